"""The training loop. It knows no objective, model or data set by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from modelyard.train.checkpoint import Checkpoints, Row, State
from modelyard.train.clock import Timings, time_collectives
from modelyard.train.data import Batches, Feed, Sequences, make_order
from modelyard.train.ema import Ema
from modelyard.train.guard import DivergedError, Guard, Verdict, skipped_in_a_row
from modelyard.train.hooks import Hooks, Pulse
from modelyard.train.loss_scale import LossScale
from modelyard.train.memory import peak_memory
from modelyard.train.metrics import Meter, Say, Sink, StepMetrics, no_say, no_sink
from modelyard.train.objective import Objective, checked
from modelyard.train.optimizer import set_learning_rate
from modelyard.train.options import TrainOptions
from modelyard.train.parallel.parallelize import compute_dtype
from modelyard.train.parallel.strategy import Strategy, Sums
from modelyard.train.schedule import make_schedule
from modelyard.train.stopping import stop_reason
from modelyard.train.world import World

TIMED_EVERY = 10
"""Steps between reports of where time goes: rare enough to cost nothing in MLflow."""


@dataclass(frozen=True)
class Additions:
    """What a program adds to the loop where its data come about while it trains (rollouts of a policy, a stream).

    Attributes:
        batches: makes what hands out the batches from the given step on; None = the job's data by their order.
        figures: further figures of the step just taken, reported with it. All workers call it together.
        state: tensors by name that checkpoints hold too and give back in place; the same on every worker.
        ends: another reason to end before the budget, from the table of all steps; empty = go on. A function of the
            table alone, so that all workers and a resumed run agree.
    """

    batches: Callable[[int], Batches] | None = None
    figures: Callable[[], dict[str, float]] = dict
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    ends: Callable[[Sequence[Row]], str] = lambda _: ""


@dataclass
class Job:
    """Everything one run needs, put together by a program.

    Attributes:
        model: sharded where there is more than one worker.
        optimizer: over its trainable parameters.
        objective: what is minimised.
        data: training sequences.
        sequence_length: tokens in one.
        options: budget, batch, schedule and so on.
        checkpoints: where to save and resume; None = neither.
        evaluate: held-out loss, `evaluate(limit)`; None = never. All workers call it together.
        sink: takes the metrics of every step on rank 0.
        say: takes messages for people on rank 0.
        strategy: how gradients come about on the mesh; None = data parallelism, as the model is sharded.
        hooks: what the outside adds to every step, on all workers.
        sample: writes text with the model as it is at a step. All workers call it together.
        additions: of a program whose data come about while it trains.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    data: Sequences
    sequence_length: int
    options: TrainOptions
    checkpoints: Checkpoints | None = None
    evaluate: Callable[[int | None], float] | None = None
    sink: Sink = no_sink
    say: Say = no_say
    strategy: Strategy | None = None
    hooks: Hooks = field(default_factory=Hooks)
    sample: Callable[[int], None] | None = None
    additions: Additions = field(default_factory=Additions)


@dataclass
class Outcome:
    """What a run came to. `history` holds one row a step, those before a restart included.

    `phases` are mean seconds a step by phase since the last start, `stopped` why it ended before its budget, and
    `peak_bytes` the most memory a worker of this machine held, `by_source` the held-out loss of
    each source where there are several, `figures` what the program measured besides.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    loss: float
    heldout_loss: float | None = None
    parameters: int = 0
    trainable: int = 0
    skipped: int = 0
    history: list[Row] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    stopped: str = ""
    peak_bytes: int = 0
    by_source: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


def fit(job: Job, world: World) -> Outcome:
    """Trains to the end of the budget, from the newest checkpoint where there is one.

    Raises:
        DivergedError: losses or gradients stopped being numbers.
        RecipeError: the objective does not return what an objective returns.
        DataError: a checkpoint belongs to another run.
    """
    began = time.perf_counter()
    options = job.options
    steps = options.total_steps(len(job.data), job.sequence_length)
    ema = Ema(job.model, options.ema.decay) if options.ema is not None else None
    scaler = LossScale() if options.precision == "fp16" else None
    extra = (ema.state if ema else {}) | (scaler.state if scaler else {}) | job.additions.state
    state = State(job.model, job.optimizer, 0, [], extra)
    if job.checkpoints is not None:
        job.checkpoints.restore(state)
    meter = Meter(options.global_batch * job.sequence_length)
    job.model.train()
    strategy = job.strategy or Strategy(job.model, world)
    run = _Run(job, world, strategy, state, steps, meter, ema, scaler)
    try:
        with _feed(job, world, strategy, state.step) as feed:
            while state.step < steps and not run.stopped:
                run.step(state.step, feed)
    finally:
        job.hooks.close()
        if job.checkpoints is not None:
            job.checkpoints.finish()
    if ema is not None and options.ema is not None and options.ema.export:
        ema.adopt()
    heldout = job.evaluate(None) if job.evaluate is not None else None
    outcome = _outcome(state, meter, options.batches.before(state.step) * job.sequence_length, heldout, began)
    parameters, trainable = strategy.count()
    return replace(
        outcome,
        parameters=parameters,
        trainable=trainable,
        phases=run.timings.mean(),
        stopped=run.stopped,
        peak_bytes=peak_memory(world.device),
    )


def _feed(job: Job, world: World, strategy: Strategy, step: int) -> Batches:
    if job.additions.batches is not None:
        return job.additions.batches(step)
    share, micro = (strategy.reader, strategy.readers), strategy.micro_batch or job.options.micro_batch
    return Feed(job.data, make_order(job.data, job.options), micro, *share, world.device)


def _outcome(state: State, meter: Meter, tokens: int, heldout: float | None, began: float) -> Outcome:
    return Outcome(
        steps=state.step,
        tokens=tokens,
        seconds=time.perf_counter() - began,
        tokens_per_second=meter.mean_tokens_per_second,
        loss=state.history[-1]["loss"] if state.history else float("nan"),
        heldout_loss=heldout,
        skipped=sum(int(row.get("skipped", 0)) for row in state.history),
        history=state.history,
    )


class _Run:
    """One pass through the budget: what `fit` would keep in local variables."""

    def __init__(
        self,
        job: Job,
        world: World,
        strategy: Strategy,
        state: State,
        steps: int,
        meter: Meter,
        ema: Ema | None,
        scaler: LossScale | None,
    ) -> None:
        self.job, self.world, self.strategy, self.state, self.steps, self.meter = (
            job, world, strategy, state, steps, meter)  # fmt: skip
        self.ema, self.scaler = ema, scaler
        self.schedule = make_schedule(job.options, steps)
        self.guard = Guard(job.options.bad_steps, job.options.spikes)
        self.clock, self.pulse = strategy.clock, Pulse(world, job.hooks)
        time_collectives(job.model, self.clock, world.device)
        self.timings = Timings()
        self.stopped = self._reason_to_end()
        self.objective = checked(job.objective)

    def step(self, step: int, feed: Batches) -> None:
        """One optimizer step: forward and backward, one reduction of everything measured, update, report."""
        options, began = self.job.options, time.perf_counter()
        self.job.hooks.begin(step, self.steps)
        rate = options.learning_rate * self.schedule(step) * self.guard.rate(self.state.history)
        set_learning_rate(self.job.optimizer, rate)
        seed_everything(options.seed, step, self.strategy.reader)
        with self.clock("data"):
            batches, wait = feed.take(step, more=step + 1 < self.steps)
        with _precision(self.job, self.strategy):
            loss_scale = self.scaler.value if self.scaler is not None else 1.0
            sums = self.strategy.forward_backward(self.objective, batches, loss_scale)
        means, norm = self._reduce(sums, loss_scale)
        verdict = self._judge(means["loss"], norm)
        with self.clock("optimizer"):
            if verdict is Verdict.ACCEPT:
                self.job.optimizer.step()
                if self.ema is not None:
                    self.ema.update()
            self.job.optimizer.zero_grad(set_to_none=True)
        if verdict is Verdict.REWIND:
            self._rewind(step, means["loss"])
            return
        if verdict is Verdict.SKIP and self.scaler is None and self.world.leads:
            self.job.say(f"step {step + 1}: update left out, loss {means['loss']:g}, gradient norm {norm:g}")
        self.state.step = step + 1
        seconds = time.perf_counter() - began
        self.meter.tokens_per_step = options.batches.size(step) * self.job.sequence_length
        self.meter.update(seconds, wait)
        self._report(rate, means, norm, verdict is Verdict.ACCEPT, seconds)
        self._save()
        self.timings.add(self.clock.finish())
        self.job.hooks.end(step)

    def _judge(self, loss: float, norm: float) -> Verdict:
        """The guard's verdict; an overflow of scaled fp16 gradients is the scale's business and only skipped."""
        if self.scaler is None:
            return self.guard.judge(self.state.history, loss, norm)
        overflow = math.isfinite(loss) and not math.isfinite(norm) and not self.scaler.exhausted
        self.scaler.update(math.isfinite(norm))
        return Verdict.SKIP if overflow else self.guard.judge(self.state.history, loss, norm)

    def _reduce(self, sums: Sums, loss_scale: float) -> tuple[dict[str, float], float]:
        """Global means and the global gradient norm, by one all-reduce; scales and clips the gradients.

        Gradients hold the sum over this step: dividing by the global weight here, after the backward passes,
        needs no knowledge of it before them.
        """
        pulse = torch.tensor(self.pulse.pack(self.clock.own), dtype=torch.float64, device=self.world.device)
        tally = self.strategy.tally()
        measured = torch.cat([torch.stack([*sums.values(), self.strategy.squared_norm()]), tally, pulse])
        with self.clock("communication"):
            totals = self.world.add(measured).tolist()
        square, after = totals[len(sums)], len(sums) + 1 + len(tally)
        self.pulse.read(totals[after:])
        values = dict(zip(sums, totals, strict=False))
        weight = values.pop("weight")
        scale = self.strategy.gradient_scale / max(weight, 1.0) / loss_scale
        norm = (square**0.5) * scale
        clip = self.job.options.clip
        self.strategy.scale_gradients(scale * (min(1.0, clip / (norm + 1e-6)) if clip is not None else 1.0))
        means = {name: value / max(weight, 1.0) for name, value in values.items()}
        return means | self.strategy.series(totals[len(sums) + 1 : after]), norm

    def _report(self, rate: float, means: dict[str, float], norm: float, accepted: bool, seconds: float) -> None:
        done, options = self.state.step, self.job.options
        extra = {name: value for name, value in means.items() if name != "loss"} | self.job.additions.figures()
        due, limit = options.evaluation(done)
        if self.job.evaluate is not None and due:
            with self.clock("evaluation"):
                extra["heldout_loss"] = self.job.evaluate(limit)
            self.job.hooks.beat()
        metrics = StepMetrics(
            step=done,
            loss=means["loss"],
            learning_rate=rate,
            grad_norm=norm,
            seconds=seconds,
            tokens=options.batches.before(done) * self.job.sequence_length,
            tokens_per_second=self.meter.tokens_per_second,
            data_wait=self.meter.data_wait,
            eta=self.meter.eta(self.steps - done),
            skipped=not accepted,
            extra=extra,
            timings=self._timings(),
        )
        self.state.history.append({"step": done, **metrics.series(), **self._marks(accepted)})
        self.stopped = self._reason_to_end()
        if self.world.leads:
            self.job.sink(metrics)

    def _reason_to_end(self) -> str:
        history = self.state.history
        return stop_reason(self.job.options.stop, history) or self.job.additions.ends(history)

    def _marks(self, accepted: bool) -> Row:
        rewinds = self.guard.rewinds(self.state.history)
        marks: Row = {"skipped": int(not accepted)}
        return marks | {"rewinds": rewinds} if rewinds else marks

    def _timings(self) -> dict[str, float]:
        """Mean seconds by phase since the last time, and who straggles; empty except every tenth step."""
        return self.timings.recent() | self.pulse.series() if self.state.step % TIMED_EVERY == 0 else {}

    def _save(self) -> None:
        """A checkpoint when one is due, at the end, and when one is asked for (a machine is about to be taken)."""
        done, asked = self.state.step, self.pulse.asked and self.job.hooks.answer()
        due = done == self.steps or done % self.job.options.checkpoint_every == 0 or bool(self.stopped)
        if self.job.checkpoints is not None and (due or asked):
            with self.clock("checkpoint"):
                self.job.checkpoints.save(self.state)
                if asked:
                    self.job.checkpoints.finish()
            self.job.hooks.beat()
        sampling = self.job.options.samples
        if self.job.sample is not None and sampling and (done == self.steps or done % sampling.every == 0):
            self.job.sample(done)
            self.job.hooks.beat()

    def _rewind(self, step: int, loss: float) -> None:
        """Goes back to the newest checkpoint from before the trouble, which is then trained on at a lower rate."""
        history, bad = self.state.history, skipped_in_a_row(self.state.history)
        self.guard.lower(history)
        if self.job.checkpoints is None or not self.job.checkpoints.rewind(self.state, step - bad):
            raise DivergedError(
                f"loss {loss:g} at step {step + 1} and no checkpoint to go back to",
                place=f"step {step + 1}",
                mend="lower learning_rate, or write checkpoints more often (checkpoint_every)",
            )
        rate = self.guard.rate(self.state.history)
        if self.world.leads:
            self.job.say(f"loss {loss:g} at step {step + 1}: back to step {self.state.step}, rate x {rate:g}")
        self.job.hooks.beat()


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Seeds the generator of dropout from (seed, step, rank): nothing to save, and a resumed step draws the same."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)


@contextmanager
def _precision(job: Job, strategy: Strategy) -> Iterator[None]:
    """bf16 autocast where the model is not sharded; a sharded one has its own mixed-precision policy."""
    device = strategy.world.device
    dtype = compute_dtype(job.options, device)
    alone = dtype != torch.float32 and not strategy.casts
    context: AbstractContextManager[object] = torch.autocast(device.type, dtype) if alone else nullcontext()
    with context:
        yield
