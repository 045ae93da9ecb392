"""Small real stage kinds for testing the graph runner: they read and write files, nothing is faked."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from modelyard.errors import DataError, StageError
from modelyard.recipe.schema import StageOptions, runtime
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.storage import Files, exists, join, read_bytes, write_bytes


class CountOptions(StageOptions):
    kind: str = "count"
    scale: int = Field(1, ge=1, description="factor")
    sleep: float = runtime(0.0, "seconds to wait")


class CountStage(Stage[CountOptions]):
    """Counts the bytes of raw files or of another count."""

    kind = "count"
    Options = CountOptions
    inputs: ClassVar[Mapping[str, InputSpec]] = {
        "files": InputSpec(files=True, required=False),
        "left": InputSpec(kinds=("count",), required=False),
        "right": InputSpec(kinds=("count",), required=False),
    }

    def check(self, ctx: PlanContext[CountOptions]) -> None:
        if ctx.options.scale == 13:
            raise DataError("13 is not a scale", place="scale", mend="take 12")

    def run(self, ctx: StageContext[CountOptions]) -> StageResult:
        time.sleep(ctx.options.sleep)
        total = 0
        for value in ctx.inputs.values():
            total += value.bytes if isinstance(value, Files) else int(read_bytes(value.join("count.txt")))
        total *= ctx.options.scale
        write_bytes(join(ctx.output, "count.txt"), str(total).encode())
        ctx.run.log_metrics({"total": float(total)})
        return StageResult(f"{total} bytes", counts={"bytes": total})


class FragileOptions(StageOptions):
    kind: str = "fragile"
    how: str = Field("raise", description="raise, fail, kill or flaky")
    flag: str = runtime("", "file that stops the failing")


class FragileStage(Stage[FragileOptions]):
    """Fails until a flag file exists; keeps its progress under work."""

    kind = "fragile"
    Options = FragileOptions
    inputs: ClassVar[Mapping[str, InputSpec]] = {"before": InputSpec(kinds=("count",), required=False)}

    def run(self, ctx: StageContext[FragileOptions]) -> StageResult:
        resumed = exists(join(ctx.work, "half"))
        write_bytes(join(ctx.work, "half"), b"x")
        write_bytes(join(ctx.output, "part.txt"), b"half" if not resumed else b"whole")
        if not os.path.exists(ctx.options.flag):
            self._fail(ctx)
        return StageResult("survived", metrics={"resumed": float(resumed)})

    def _fail(self, ctx: StageContext[FragileOptions]) -> None:
        if ctx.options.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if ctx.options.how == "flaky":
            write_bytes(ctx.options.flag, b"")
            raise StageError("a passing fault")
        if ctx.options.how == "fail":
            raise StageError("it broke", place="somewhere", mend="mend it")
        raise ZeroDivisionError("unforeseen")
