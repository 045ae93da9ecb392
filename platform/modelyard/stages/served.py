"""A served model while it runs: it follows its aliases in MLflow, and its figures over time are an MLflow run."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from modelyard.errors import ModelyardError
from modelyard.serving.traffic import Variant
from modelyard.stages import series
from modelyard.tracking import Tracker

if TYPE_CHECKING:
    from modelyard.serving import ServeOptions, ServerHandle

log = logging.getLogger(__name__)

Role = Literal["stable", "canary", "shadow"]
_LIVE: list[Served] = []


@dataclass(frozen=True)
class Reference:
    """A model as a person names it, and its part of the traffic."""

    role: Role
    text: str
    share: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether it can come to mean another version: an alias of a registered model."""
        return self.text.startswith("models:/") and "@" in self.text


def references(model: str, options: ServeOptions) -> list[Reference]:
    """The models a server serves: the stable one first, then canary and shadow."""
    traffic, found = options.traffic, [Reference("stable", model)]
    if traffic.canary is not None:
        found.append(Reference("canary", traffic.canary.model, traffic.canary.percent / 100))
    if traffic.shadow is not None:
        found.append(Reference("shadow", traffic.shadow.model, traffic.shadow.percent / 100))
    return found


def variants(
    wanted: Sequence[Reference], root: str, known: Sequence[Variant] = (), say: Callable[[str], None] = log.warning
) -> list[Variant]:
    """The versions that the references mean now, behind `known` ones.

    One that equals an earlier one is left out, and `say` is told.

    Raises DataError or StorageError as :func:`modelyard.stages.serve.find_model`.
    """
    from modelyard.stages.serve import find_model

    found = list(known)
    for reference in wanted:
        uri, _, version = find_model(reference.text, root)
        if version in {v.version for v in found}:
            say(f"{reference.role} is version {version}, which another already stands for: left out")
            continue
        found.append(Variant(version, uri, reference.share, shadow=reference.role == "shadow"))
    return found


class Served:
    """Watches a running server until :meth:`close`.

    Every `traffic.watch_s` it looks at the aliases and at `/metrics`: an alias that moved makes the server roll to
    its version, and what happened since the last look goes to the run.

    Args:
        handle: the server.
        wanted: what it serves.
        root: root whose MLflow store knows `models:/`, and where the run goes.
        options: what it was launched with.
        say: where one-line notices for people go.
        tags: of the run.
    """

    def __init__(
        self, handle: ServerHandle, wanted: list[Reference], root: str, options: ServeOptions,
        say: Callable[[str], None] = log.info, tags: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._handle, self._wanted, self._root, self._say = handle, wanted, root, say
        self._options, self._tags = options, dict(tags or {})
        self._events: list[dict[str, object]] = []
        self._began, self._last, self._stop = time.monotonic(), time.monotonic(), threading.Event()
        self._before: series.Look | None = None
        self._refused: tuple[Variant, ...] | None = None
        self._thread = threading.Thread(target=self._watch, name="served", daemon=True)
        self._thread.start()
        _LIVE.append(self)

    def close(self) -> None:
        """Takes a last look, and ends the run."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(timeout=120)
        _LIVE.remove(self)

    def follow(self) -> None:
        """Rolls to the versions that the aliases mean now, if they are others. Failures are said, never raised.

        Called by the watching thread alone.
        """
        rollout = self._handle.rollout
        if not any(reference.moves for reference in self._wanted):
            return
        try:
            now = tuple(variants(self._wanted, self._root, say=log.debug))  # or it would be said at every look
            if now == rollout.variants or now == self._refused:
                return
            self._refused = now  # what did not start is not tried again until an alias moves
            self._say(f"rolling from {_names(rollout.variants)} to {_names(now)}")
            started = time.monotonic()
            rollout.move(now, self._say)
            self._refused = None
            self._say(f"version {_names(now)} answers after {time.monotonic() - started:.1f} s")
            self._note("rolled", time.monotonic() - started)
        except ModelyardError as error:
            self._say(f"stays at {_names(rollout.variants)}: {error.what}")
            self._events.append({"event": "failed to roll", "error": error.what[:500]})
        except Exception as error:  # whatever Serve or MLflow raise: the server goes on, the next look tries again
            log.exception("following the aliases failed")
            self._say(f"stays at {_names(rollout.variants)}: {error}")

    def _watch(self) -> None:
        # Here and not before: MLflow takes seconds to import, and the server answers already.
        settings = self._options.model_dump(mode="json", exclude={"api_keys"})
        with Tracker(self._root, f"{self._handle.name}-serving", say=self._say) as tracker:
            self.run = tracker.start_recipe({"url": self._handle.url, **settings}, self._tags, uuid.uuid4().hex)
            self.run.log_metrics({"start_seconds": self._handle.seconds})
            self._note("launched")
            self._log_series()
            while not self._stop.wait(self._options.traffic.watch_s):
                self.follow()
                self._log_series()
            self._log_series()
            self.run.end()

    def _log_series(self) -> None:
        look, now = self._look(), time.monotonic()
        if look is None:
            return
        if self._before is not None:
            figures = series.between(self._before, look, max(now - self._last, 1e-6))
            self.run.log_metrics(figures, step=int(now - self._began))
        self._before, self._last = look, now

    def _look(self) -> series.Look | None:
        import httpx

        try:
            handle = self._handle
            answer = httpx.get(handle.url + "/metrics", headers=handle.headers, timeout=10, verify=handle.verify)
        except httpx.HTTPError:
            return None
        return series.read(answer.text) if answer.status_code == 200 else None

    def _note(self, event: str, seconds: float | None = None) -> None:
        """Writes down which versions serve now."""
        found = self._handle.rollout.variants
        self.run.set_tags({"version": _names(found), **{f"model.{v.version}": v.model for v in found}})
        self._events.append({
            "event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": seconds,
            "versions": [{"version": v.version, "share": v.share, "shadow": v.shadow} for v in found],
        })  # fmt: skip
        self.run.log_text("deployments.json", json.dumps(self._events, indent=1) + "\n")


def stop_watching() -> None:
    """Closes every served model of this process."""
    for served in list(_LIVE):
        served.close()


def _names(found: tuple[Variant, ...]) -> str:
    """The versions in a few words, such as `3 (with 10% to 4)`."""
    parts = ["a shadow of " + v.version if v.shadow else f"{v.share:.0%} to {v.version}" for v in found[1:]]
    return (found[0].version or "unnamed") + (f" (with {' and '.join(parts)})" if parts else "")
