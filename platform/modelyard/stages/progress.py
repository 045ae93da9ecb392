"""Progress of stages that run side by side: one live bar a stage on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Task:
    """One bar. `advance` may be called from any thread."""

    def __init__(self, owner: Display, title: str, total: int | None, unit: str) -> None:
        self._owner, self._title, self._unit, self._total = owner, title, unit, total
        self._done, self._last = 0, 0.0
        self._bar = owner.rich.add_task(title, total=total, detail="") if owner.rich else None

    def advance(self, n: int = 1, **fields: object) -> None:
        """Moves on by `n` units and shows `fields` (loss=3.21, ...) beside the bar."""
        self._done += n
        detail = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())
        if self._owner.rich and self._bar is not None:
            self._owner.rich.update(self._bar, completed=self._done, detail=detail)
        elif time.monotonic() - self._last > self._owner.interval:
            self._last = time.monotonic()
            total = f"/{self._total:,}" if self._total else ""
            self._owner.console.print(
                f"  {self._title}: {self._done:,}{total} {self._unit}  {detail}", highlight=False, soft_wrap=True
            )

    def close(self) -> None:
        if self._owner.rich and self._bar is not None:
            self._owner.rich.remove_task(self._bar)


class Display:
    """The screen all stages of one run share. Non-terminals get a line every `interval` seconds."""

    def __init__(self, console: Console | None = None, interval: float = 15.0) -> None:
        self.console = console or Console(stderr=True)
        self.interval = interval
        self.rich: RichProgress | None = None
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.rich = RichProgress(
                *columns, TimeRemainingColumn(), TextColumn("{task.fields[detail]}"), console=self.console
            )
        self._lock = threading.Lock()

    def __enter__(self) -> Display:
        if self.rich:
            self.rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.rich:
            self.rich.stop()

    def say(self, text: str) -> None:
        """One line for people, above the bars."""
        with self._lock:
            self.console.print(text, highlight=False)


class Progress:
    """A stage's view of the display: its lines and bars carry the stage's name."""

    def __init__(self, display: Display, stage: str) -> None:
        self._display, self._stage = display, stage

    def say(self, text: str) -> None:
        """One line for people."""
        self._display.say(f"[bold]{self._stage}[/]: {text}")

    @contextmanager
    def task(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
        """A bar (`with ctx.progress.task("train", steps, "steps") as bar: bar.advance(1, loss=...)`)."""
        task = Task(self._display, f"{self._stage} {title}", total, unit)
        try:
            yield task
        finally:
            task.close()
