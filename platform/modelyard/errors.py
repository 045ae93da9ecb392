"""The named errors of modelyard.

Every error a person can mend carries three things: what is wrong, the place (file, row, field or
stage) and the mend. The command line prints them on one screen and exits with `exit_code`: 2 for
a mistake the user mends, 1 for work that failed.
"""

from __future__ import annotations


class ModelyardError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: one sentence, what is wrong.
        place: where: a file with line, a row, a field, a stage.
        mend: how to mend it.
    """

    exit_code = 1

    def __init__(self, what: str, *, place: str = "", mend: str = "") -> None:
        super().__init__(what)
        self.what, self.place, self.mend = what, place, mend

    def __str__(self) -> str:
        parts = [self.what]
        if self.place:
            parts.append(f"at: {self.place}")
        if self.mend:
            parts.append(f"mend: {self.mend}")
        return "\n  ".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders inside Ray: keyword arguments must survive pickling.
        return _rebuild, (type(self), self.what, self.place, self.mend)


def _rebuild(kind: type[ModelyardError], what: str, place: str, mend: str) -> ModelyardError:
    return kind(what, place=place, mend=mend)


class RecipeError(ModelyardError):
    """The recipe, an override or a command-line argument is wrong."""

    exit_code = 2


class DataError(ModelyardError):
    """Input data is missing, unreadable, empty or not of the stated form."""

    exit_code = 2


class ResourceError(ModelyardError):
    """The machine or cluster cannot do what is asked: memory, disk, port, workers."""

    exit_code = 2


class StorageError(ModelyardError):
    """A root, artifact or manifest cannot be read or written."""

    exit_code = 2


class StageError(ModelyardError):
    """A stage failed while it worked."""
