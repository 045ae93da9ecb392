"""What a person sees while a model trains: a live line, curves in MLflow, and what it has cost so far."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelyard.errors import ModelyardError
from modelyard.planner import formatting as fmt
from modelyard.stages.mailbox import DRAIN_SECONDS, unseal

if TYPE_CHECKING:
    from modelyard.planner.estimate import Estimate
    from modelyard.recipe.schema import Resources
    from modelyard.stages.base import StageContext
    from modelyard.train.loop import Outcome
    from modelyard.train.metrics import StepMetrics


@dataclass(frozen=True)
class Rates:
    """What turns tokens a second into a share of the peak, and seconds into money.

    Attributes:
        flops_per_token: of the model, forward and backward; None = not known.
        peak: FLOP/s of all workers by the data sheet; None = no data sheet, the measured peak is used.
        usd_per_second: of all workers; None = no price.
    """

    flops_per_token: float | None = None
    peak: float | None = None
    usd_per_second: float | None = None


def make_rates(estimate: Estimate | None, resources: Resources) -> Rates:
    """The rates of a run, from what the planner says of it and of the hardware."""
    from modelyard.planner.cost import price
    from modelyard.planner.hardware import find_hardware

    hardware = find_hardware(resources.hardware)
    gpu = hardware.kind != "cpu"
    flops = estimate.flops / estimate.tokens if estimate and estimate.flops and estimate.tokens else None
    devices = resources.workers * (resources.gpus_per_worker if gpu and resources.gpus_per_worker else 1)
    hourly = price(hardware)
    cores = 1.0 if gpu else resources.cpus_per_worker / max(hardware.cores, 1)
    return Rates(
        flops_per_token=flops,
        peak=hardware.flops("bf16") * devices if gpu else None,
        usd_per_second=None if hourly is None else hourly * devices * cores / 3600,
    )


@dataclass
class Post:
    """What came through the mailbox and matters after the run."""

    outcome: Outcome | None = None
    error: ModelyardError | None = None
    said: str = ""
    groups: int = 0
    start: dict[str, float] = field(default_factory=dict)


@dataclass
class Live:
    """The driver's end of the mailbox: hands every message to the screen and to the stage's run.

    One run, however often workers are restarted: a step that comes again is logged again only if it came out otherwise,
    after a rewind.
    """

    ctx: StageContext[Any]
    bar: Any
    rates: Rates
    post: Post = field(default_factory=Post)
    began: float = field(default_factory=time.time)
    peak: float | None = None
    marks: dict[str, float] = field(default_factory=dict)
    _done: int = 0
    _logged: dict[int, float] = field(default_factory=dict)
    _system: dict[int, Mapping[str, float]] = field(default_factory=dict)

    def handle(self, kind: str, value: Any) -> None:
        """Takes one message."""
        getattr(self, f"_on_{kind}")(value)

    def _on_marks(self, marks: Mapping[str, float]) -> None:
        self.marks = self.marks or dict(marks)

    def _log_start(self) -> None:
        """How long it took until the worker group ran, had imported the program, and had done its first step."""
        moments = {**self.marks, "first_step": time.time()}
        for name, at in moments.items():
            self.post.start[name] = at - self.began
        self.ctx.run.log_metrics({f"start_{name}_seconds": value for name, value in self.post.start.items()})

    def _on_metrics(self, metrics: StepMetrics) -> None:
        if not self.post.start:
            self._log_start()
        before = self._logged.get(metrics.step)
        if before is None or abs(before - metrics.loss) > 1e-3:
            self.ctx.run.log_metrics(metrics.series() | metrics.timings | self._extra(metrics), step=metrics.step)
            self._logged[metrics.step] = metrics.loss
        self.bar.advance(max(0, metrics.step - self._done), loss=metrics.loss, **self.shown(metrics))
        self._done = max(self._done, metrics.step)

    def _on_say(self, text: str) -> None:
        self.post.said = text
        self.ctx.progress.say(text)

    def _on_group(self, group: tuple[int, float]) -> None:
        self.post.groups, wait = group
        if self.post.groups > 1:
            after = f" in {wait:g} s" if wait else ""
            self.ctx.progress.say(f"[yellow]workers were lost or their number changed[/]: starting again{after}")
            self.ctx.run.set_tags({"restarts": self.post.groups - 1})

    def _on_peak(self, flops: float) -> None:
        self.peak = flops

    def _on_system(self, message: tuple[int, Mapping[str, float]]) -> None:
        rank, used = message
        self._system[rank] = used
        if rank == 0:
            names = dict.fromkeys(name for values in self._system.values() for name in values)
            most = {n: max(values.get(n, 0.0) for values in self._system.values()) for n in names}
            self.ctx.run.log_metrics(most, step=self._done)

    def _on_error(self, error: ModelyardError) -> None:
        self.post.error = error

    def _on_outcome(self, outcome: Outcome) -> None:
        self.post.outcome = outcome
        self._log_lost(outcome.history)

    def _log_lost(self, history: Sequence[Mapping[str, float]]) -> None:
        """Logs steps whose metrics died with a worker: a killed worker may take half a second of them along."""
        first = min(self._logged, default=0)
        for row in history:
            step = int(row["step"])
            if step > first and step not in self._logged:
                self.ctx.run.log_metrics({name: value for name, value in row.items() if name != "step"}, step=step)

    def _share(self, metrics: StepMetrics) -> tuple[str, float] | None:
        """Model FLOPs as a share of the data sheet's peak, or of the matrix products measured at the start."""
        peak = self.rates.peak or self.peak
        if not peak or not self.rates.flops_per_token:
            return None
        name = "mfu" if self.rates.peak else "share_of_measured_peak"
        return name, metrics.tokens_per_second * self.rates.flops_per_token / peak

    def _cost(self) -> float | None:
        rate = self.rates.usd_per_second
        return None if rate is None else rate * (time.time() - self.began)

    def _extra(self, metrics: StepMetrics) -> dict[str, float]:
        share, cost = self._share(metrics), self._cost()
        return dict([share] if share else []) | ({} if cost is None else {"cost_usd": cost})

    def shown(self, metrics: StepMetrics) -> dict[str, str | float]:
        """What stands beside the bar."""
        found: dict[str, str | float] = {"tokens/s": f"{metrics.tokens_per_second:,.0f}"}
        share, cost = self._share(metrics), self._cost()
        if share:
            found["MFU" if share[0] == "mfu" else "of peak"] = f"{share[1]:.0%}"
        found["data"] = f"{metrics.data_wait:.1%}"
        found["left"] = fmt.duration(round(metrics.eta))
        if cost is not None:
            found["cost"] = fmt.money(cost)
        if metrics.extra.get("dead_experts"):
            found["dead experts"] = f"{metrics.extra['dead_experts']:.0f}"
        if "heldout_loss" in metrics.extra:
            found["heldout"] = metrics.extra["heldout_loss"]
        return found


@contextmanager
def drained(ctx: StageContext[Any], mailbox: Any, steps: int, rates: Rates, began: float) -> Iterator[Post]:
    """Empties the mailbox in a thread while the body runs, and at its end; it all `began` at a Unix time."""
    import ray

    stop = threading.Event()
    with ctx.progress.task("train", steps, "steps") as bar:
        live = Live(ctx, bar, rates, began=began)

        def drain() -> None:
            for letter in ray.get(mailbox.drain.remote()):
                live.handle(*unseal(letter))

        thread = threading.Thread(target=_keep, args=(drain, stop), name=f"metrics-{ctx.name}", daemon=True)
        thread.start()
        try:
            yield live.post
        finally:
            stop.set()
            thread.join()
            drain()
            ray.kill(mailbox)


def _keep(drain: Callable[[], None], stop: threading.Event) -> None:
    while not stop.wait(DRAIN_SECONDS):
        drain()
