"""The mailbox between workers and driver: in order, without waiting, remembering what no restart mends."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from modelyard.errors import DataError, ResourceError
from modelyard.planner.estimate import Estimate
from modelyard.recipe.schema import Resources
from modelyard.stages.live import Live, Rates, make_rates
from modelyard.stages.mailbox import Mailbox, Outbox, seal, unseal
from modelyard.stages.train_worker import SpotWatch, load_program
from modelyard.stages.workers import _named, scaling
from modelyard.train.metrics import StepMetrics


class Local:
    """Stands for the actor's handle: `push.remote(items)`."""

    def __init__(self) -> None:
        self.box, self.pushes = Mailbox(), 0

    @property
    def push(self) -> Local:
        return self

    def remote(self, items: list[Any]) -> None:
        self.pushes += 1
        self.box.push(items)


def test_messages_keep_their_order_and_are_drained_once() -> None:
    box = Mailbox()
    box.push([seal("say", 1), seal("say", 2)])
    box.push([seal("say", 3)])
    assert [unseal(letter)[1] for letter in box.drain()] == [1, 2, 3]
    assert box.drain() == []
    assert box.enter("a", 1.0) == 0.0
    box.push([seal("error", DataError("x"))])
    box.drain()
    assert box.enter("b", 1.0) is None, "remembered after it was read"


def test_groups_that_make_no_step_wait_longer_each_time() -> None:
    box = Mailbox()
    waits = [box.enter(name, 2.0) for name in ("a", "a", "b", "c", "c", "d")]
    assert waits == [0.0, 0.0, 2.0, 4.0, 4.0, 8.0]
    box.push([seal("metrics", None)])
    assert [box.enter(name, 2.0) for name in ("e", "f", "g", "h", "i", "j", "k")] == [0, 2, 4, 8, 16, 32, 60]
    assert [value for kind, value in map(unseal, box.drain()) if kind == "group"][:3] == [(1, 0.0), (2, 2.0), (3, 4.0)]


def test_the_outbox_gathers_what_comes_quickly() -> None:
    local = Local()
    outbox = Outbox(local)
    for i in range(100):
        outbox.send("say", i)
    assert local.pushes == 1
    outbox._last -= 10
    outbox.send("say", 100)
    outbox.say("at once")
    assert [unseal(letter)[1] for letter in local.box.drain()] == [*range(101), "at once"]


def test_errors_cross_processes_whole() -> None:
    error = pickle.loads(pickle.dumps(DataError("what", place="where", mend="how")))
    assert (error.what, error.place, error.mend) == ("what", "where", "how")


def test_programs_are_found_by_path() -> None:
    from modelyard.train.programs import pretrain

    assert load_program("modelyard.train.programs:pretrain") is pretrain
    with pytest.raises(AttributeError):
        load_program("modelyard.train.programs:nothing")


class Recorded:
    """Stands for a stage's context, its bar and its run at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.shown: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.tags: dict[str, Any] = {}
        self.run = self.progress = self

    def say(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, n: int, **fields: Any) -> None:
        self.shown = {"n": n, **fields}

    def log_metrics(self, values: dict[str, float], step: int | None = None) -> None:
        if step is not None:
            self.logged.append((step, dict(values)))

    def set_tags(self, tags: dict[str, Any]) -> None:
        self.tags |= tags


def step(number: int, loss: float = 2.0) -> StepMetrics:
    return StepMetrics(number, loss, 1e-3, 1.0, 0.5, number * 100, 200.0, 0.001, 90.0, timings={"forward_seconds": 0.2})


def test_the_live_line_shows_speed_share_wait_time_and_cost() -> None:
    seen = Recorded()
    live = Live(seen, seen, Rates(flops_per_token=1e6, usd_per_second=3600.0))  # type: ignore[arg-type]
    live.handle("peak", 1e9)
    live.handle("metrics", step(1))
    live.handle("system", (1, {"system_rss_mib": 300.0}))
    live.handle("system", (0, {"system_rss_mib": 200.0}))
    shown = seen.shown
    assert (shown["tokens/s"], shown["of peak"], shown["data"], shown["left"]) == ("200", "20%", "0.1%", "1 min 30 s")
    assert shown["cost"].startswith("$")
    _, logged = seen.logged[0]
    assert logged["share_of_measured_peak"] == pytest.approx(0.2)
    assert logged["forward_seconds"] == 0.2
    assert seen.logged[-1] == (1, {"system_rss_mib": 300.0})


def test_steps_that_come_again_are_logged_once_unless_they_differ() -> None:
    seen = Recorded()
    live = Live(seen, seen, Rates())  # type: ignore[arg-type]
    for message in (step(1), step(2), step(1), step(2, loss=1.5)):
        live.handle("metrics", message)
    live.handle("group", (1, 0.0))
    live.handle("group", (2, 4.0))
    assert [number for number, _ in seen.logged] == [1, 2, 2]
    assert seen.tags == {"restarts": 1}
    assert "starting again in 4 s" in seen.lines[-1]
    assert "of peak" not in seen.shown


def test_rates_of_a_data_sheet_and_of_this_machine() -> None:
    estimate = Estimate(tokens=10, flops=1e7)
    gpus = make_rates(estimate, Resources(workers=8, gpus_per_worker=1, hardware="h100"))
    assert gpus.peak is not None
    assert gpus.peak > 7e15
    assert gpus.flops_per_token == 1e6
    assert gpus.usd_per_second is not None
    assert 0.002 < gpus.usd_per_second < 0.05
    assert make_rates(estimate, Resources()).peak is None


def test_a_range_of_workers_is_read_and_checked() -> None:
    resources = Resources.model_validate({"workers": [1, 4]})
    assert (resources.min_workers, resources.workers, resources.fewest) == (1, 4, 1)
    assert scaling(resources).num_workers == (1, 4)
    assert scaling(Resources(workers=3)).num_workers == 3
    mistakes = ({"workers": [4, 1]}, {"workers": [1]}, {"workers": [1, 2], "min_workers": 1}, {"min_workers": 3})
    for wrong in mistakes:
        with pytest.raises(ValueError, match="workers"):
            Resources.model_validate(wrong)


def test_a_worker_ended_for_memory_is_named_with_prediction_and_knob() -> None:
    killed = RuntimeError("... 1 Workers (tasks / actors) killed due to memory pressure (OOM)")
    error = _named(killed, "base", Estimate(memory_bytes=3 * 2**30), "")
    assert isinstance(error, ResourceError)
    assert "3 GiB were predicted" in error.what
    assert "available" in error.what
    assert "micro_batch" in error.mend
    other = _named(RuntimeError("x\nit broke"), "base", None, "step 7 took longer than 5 s")
    assert "it broke (before that: step 7 took longer than 5 s)" in other.what


def test_a_machine_about_to_be_taken_is_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2.api.preemption import PreemptionInfo

    taken: dict[str, list[int]] = {}
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: PreemptionInfo(None, taken) if taken else None)
    said: list[str] = []
    watch, follower = SpotWatch(said.append, leads=True), SpotWatch(said.append, leads=False)
    assert watch.asks() and not watch.asks(), "one question in five seconds"
    assert not follower.asks()
    assert not watch.answer(), "no machine is taken"
    taken["node"] = [2, 3]
    assert watch.answer() and follower.answer()
    assert not watch.answer(), "answered once a machine"
    assert said == ["the machine of workers 2, 3 is about to be taken away: writing a checkpoint now"]
