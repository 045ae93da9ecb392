"""Aliases of registered models: every move is written down beside the model, so that it can be taken back.

The history is a tag of the registered model (`modelyard.alias.<alias>`), newest last, shortened from its old end to
what MLflow's tags hold.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from modelyard.errors import DataError
from modelyard.tracking.store import translated

if TYPE_CHECKING:
    from modelyard.tracking.registry import Registry

TAG = "modelyard.alias."
_LONGEST = 4500
"""Characters of a history: MLflow's tags hold 5000."""


@dataclass(frozen=True)
class Move:
    """An alias that came to point at another version.

    Attributes:
        version: where it points since.
        before: where it pointed before; 0 = nowhere.
        time: ISO time in UTC.
        by: who moved it, as the machine knows them.
        reason: why.
        back: whether this took an earlier move back.
    """

    version: int
    before: int
    time: str
    by: str
    reason: str
    back: bool = False


class Aliases:
    """Reads and moves the aliases of a registry's models. Methods raise StorageError when MLflow cannot be reached."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._client, self._place = registry, registry.client, registry.store.uri

    def current(self, name: str) -> dict[str, int]:
        """Alias -> version of a model. Raises DataError when there is no such model."""
        from mlflow.exceptions import MlflowException

        with translated(self._place):
            try:
                found = self._client.get_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                raise DataError(
                    f"no registered model {name!r}", place=self._place,
                    mend="name one that `modelyard ui` shows, and the --root its recipe ran in",
                ) from error  # fmt: skip
        return {alias: int(version) for alias, version in found.aliases.items()}

    def history(self, name: str, alias: str) -> list[Move]:
        """Moves of an alias, oldest first; those made outside modelyard are not among them."""
        with translated(self._place):
            text = self._client.get_registered_model(name).tags.get(TAG + alias, "[]")
        return [Move(*entry) for entry in json.loads(text)]

    def move(self, name: str, alias: str, version: int, reason: str, *, back: bool = False) -> Move | None:
        """Points an alias at a version and writes it down; None when it pointed there already.

        Raises DataError when there is no such model or version.
        """
        before = self.current(name).get(alias, 0)
        self._registry.resolve(f"models:/{name}/{version}")
        if before == version:
            return None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        made = Move(version, before, now, _who(), reason[:200], back)
        moves = [*self.history(name, alias), made]
        while len(text := _dump(moves)) > _LONGEST:
            moves = moves[1:]
        with translated(self._place):
            self._client.set_registered_model_alias(name, alias, str(version))
            self._client.set_registered_model_tag(name, TAG + alias, text)
        return made

    def rollback(self, name: str, alias: str = "champion", to: int | None = None, reason: str = "rollback") -> Move:
        """Points an alias back at the version before; again, at the one before that.

        Args:
            name: registered model.
            alias: the alias to move.
            to: the version to go back to; None = the one before, or, when no move is known, the next lower number.
            reason: for the history.

        Raises:
            DataError: no such model, alias or version, or nothing to go back to.
        """
        now = self.current(name).get(alias)
        if now is None:
            raise DataError(f"{name} has no alias {alias!r}", place=name, mend="promote a version first")
        target = to if to is not None else previous(self.history(name, alias), now, self._numbers(name))
        if target is None:
            raise DataError(
                f"there is no version before {now} to go back to", place=f"{name}@{alias}",
                mend="name one with --to, or promote another version",
            )  # fmt: skip
        made = self.move(name, alias, target, reason, back=True)
        if made is None:
            raise DataError(f"{name}@{alias} is at version {target} already", place=name, mend="name another with --to")
        return made

    def _numbers(self, name: str) -> list[int]:
        return [found.version for found in self._registry.versions(name)]


def previous(moves: Sequence[Move], now: int, numbers: Sequence[int]) -> int | None:
    """The version an alias should go back to from `now`; None when there is none.

    Moves put versions on a stack and moves back take them off, so that going back twice goes two steps back.
    """
    stack: list[int] = []
    for move in moves:
        if not stack and move.before:
            stack.append(move.before)
        if move.back and move.version in stack:
            del stack[stack.index(move.version) + 1 :]
        elif not stack or stack[-1] != move.version:
            stack.append(move.version)
    while stack and stack[-1] == now:
        stack.pop()
    if stack:
        return stack[-1]
    return max((number for number in numbers if number < now), default=None) if not moves else None


def _dump(moves: Sequence[Move]) -> str:
    return json.dumps([[m.version, m.before, m.time, m.by, m.reason, m.back] for m in moves], separators=(",", ":"))


def _who() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without a user database
        return "unknown"
