"""Rollout engines as Ray actors: the same run as colocated, one killed in the middle of its answers, staleness."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "align"))

from alignment_parts import write_policy
from test_align import lines, options
from test_reinforce import ALONE, job
from training_stage import artifact, run_stage
from transformers import AutoTokenizer

from modelyard.align.options import EngineGroup, RolloutEngine
from modelyard.align.pool import Answers, Ask
from modelyard.align.reinforce import reinforce
from modelyard.align.samples import Prompt
from modelyard.engine import Sampling
from modelyard.errors import ResourceError, StageError
from modelyard.stages.rollout_engines import placed
from modelyard.stages.rollout_pool import RayPool

SMALL = EngineGroup(count=2, cpus=0.5)


def process(actor: Any) -> int:
    """The id of an actor's process."""
    import ray

    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


class Deadly(RayPool):
    """Kills the process of an engine just after it has been given prompts, and notes what is asked and answered."""

    def __init__(self, *arguments: Any, when: Sequence[int]) -> None:
        self.when, self.asked, self.answered, self.at_death = when, list[str](), list[str](), list[int]()
        super().__init__(*arguments)

    def submit(self, asks: Sequence[Ask]) -> None:
        self.asked += [ask.name for ask in asks]
        super().submit(asks)
        if self.asked[-1].startswith("heldout") or int(self.asked[-1].split("-")[0]) not in self.when:
            return
        victim = next(engine for engine in self._engines if engine.ready)
        self.at_death.append(len(victim.asked))
        os.kill(process(victim.actor), signal.SIGKILL)

    def results(self) -> list[Answers]:
        found = super().results()
        self.answered += [name for name, _ in found]
        return found


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_engine_that_is_killed_changes_nothing(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "policy")
    words = AutoTokenizer.from_pretrained(folder)
    alone = job(tmp_path / "a", folder, words, max_tokens=24)
    train = alone.train.model_copy(update={"steps": 4})
    whole = reinforce(alone.model_copy(update={"train": train}), ALONE)
    said: list[str] = []
    made: list[Deadly] = []
    apart = job(tmp_path / "b", folder, words, max_tokens=24, engines=SMALL.model_dump())

    with placed(str(folder), SMALL, 64, 60.0) as names:
        import ray

        def pool(settings: Any, telling: Any) -> Deadly:
            actors = [ray.get_actor(name) for name in names]
            made.append(Deadly(actors, settings, telling, SMALL, said.append, when=(1, 2)))
            return made[0]

        outcome = reinforce(apart.model_copy(update={"train": train}), ALONE, pools=pool)
    for name in ("reward", "loss", "answer_tokens", "grad_norm"):
        assert [r[name] for r in outcome.history] == pytest.approx([r[name] for r in whole.history], abs=1e-5)
    assert outcome.figures == pytest.approx(whole.figures, abs=1e-5)
    assert len(made[0].at_death) == 2
    assert all(made[0].at_death), "it died with answers to write"
    assert sorted(made[0].answered) == sorted(made[0].asked), "each prompt is answered once"
    assert len([line for line in said if "is started again" in line and "asked again" in line]) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_engines_that_hang_or_never_come_back_end_the_run(tmp_path: Path) -> None:
    import ray

    folder = write_policy(tmp_path / "policy")
    settings = RolloutEngine(max_sequences=2, max_length=128, threads=1)
    with placed(str(folder), SMALL, 16, 60.0) as names:
        actors = [ray.get_actor(name) for name in names]
        pool = RayPool(actors, settings, None, SMALL, print)
        pool.update_weights([], 0)
        hung = process(actors[1])
        os.kill(hung, signal.SIGSTOP)
        impatient = RayPool(actors, settings, None, SMALL.model_copy(update={"sync_timeout": 2.0}), print)
        with pytest.raises(StageError, match="rollout engines 1 have not taken the weights in 2 s"):
            impatient.update_weights([], 1)
        os.kill(hung, signal.SIGCONT)
        said: list[str] = []
        once = RayPool(actors, settings, None, SMALL.model_copy(update={"restarts": 0}), said.append)
        once.update_weights([], 1)
        processes = [process(actor) for actor in actors]
        sampling = Sampling(120, 1.0, logprobs=0, ignore_eos=True)
        once.submit([Ask("a", Prompt((1, 20), "p", {}, "x"), sampling, 16, least=1)])
        for each in processes:
            os.kill(each, signal.SIGKILL)
        with pytest.raises(ResourceError, match="no rollout engine is left; the last one died 1 times"):
            once.results()
        assert "is left out" in said[0]


def kill_a_trainer(checkpoint: Path) -> None:
    """Kills the process of a training worker of this session once there is a checkpoint."""
    while not checkpoint.exists():
        time.sleep(0.05)
    workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    workers[0].kill()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_stage_trains_while_its_engines_answer(tmp_path: Path) -> None:
    """Two trainers, of which one talks to two engines for both; one trainer is killed, and both begin again."""
    policy = artifact(write_policy(tmp_path / "policy").parent, "finetune")
    data = lines(tmp_path / "prompts.jsonl", [{"prompt": chr(97 + i % 26), "answer": "x"} for i in range(30)])
    rollouts = {"group": 4, "max_tokens": 12, "rows": 64, "rewards": [{"kind": "regex", "pattern": "[a-m]"}],
                "engines": SMALL.model_dump(), "staleness": 1}  # fmt: skip
    chosen = options(method="grpo", rollouts=rollouts, engine={"max_sequences": 8}, global_batch=2, steps=12,
                     checkpoint_every=2, resources={"workers": 2, "cpus_per_worker": 0.5})  # fmt: skip
    killer = threading.Thread(target=kill_a_trainer, args=[tmp_path / "work" / "checkpoints" / "step-00000004"])
    killer.start()
    result = run_stage(chosen, {"model": policy, "data": data}, tmp_path)
    killer.join()
    assert {"reward", "heldout_reward", "heldout_before_reward"} <= set(result.metrics)
    assert result.counts["steps"] == 12
    assert "Staleness mean" in (tmp_path / "out" / "report.md").read_text()
    assert "workers were lost" in (tmp_path / "screen.txt").read_text()


@pytest.mark.usefixtures("ray_session")
def test_engines_without_room(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match="no room for 3 rollout engines"),
        placed(str(tmp_path), EngineGroup(count=3, cpus=8.0), 16, 0.5),
    ):
        pass
