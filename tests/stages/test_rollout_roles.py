"""Roles as Ray actors: the same run as colocated with some killed in the middle of their work, staleness, no room."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "align"))

from alignment_parts import write_policy, write_reward_model
from test_align import lines, options
from test_reinforce import ALONE, job
from training_stage import artifact, plan, run_stage
from transformers import AutoTokenizer

from modelyard.align.options import EngineGroup, RolloutEngine, RolloutOptions, ScorerGroup
from modelyard.align.pool import Answers, Ask
from modelyard.align.reinforce import reinforce
from modelyard.align.samples import Prompt
from modelyard.align.scoring import Wait
from modelyard.align.weights import policy_weights
from modelyard.engine import Sampling
from modelyard.errors import ResourceError, StageError
from modelyard.models import load_model
from modelyard.models.adapters import add_adapter
from modelyard.models.options import AdapterOptions, LoraOptions
from modelyard.stages.align import AlignStage
from modelyard.stages.roles import ENGINES, REFERENCE, Role, placed, reward_role
from modelyard.stages.rollout_pool import RayPool
from modelyard.stages.rollout_roles import ApartRoles
from modelyard.stages.scorers import RayScorer

SMALL = EngineGroup(count=2, cpus=0.5)
ONE, TWO = ScorerGroup(count=1, cpus=0.25), ScorerGroup(count=2, cpus=0.25, restarts=0)
JUDGED = {"rewards": [{"kind": "regex", "pattern": "[a-m]"}, {"kind": "reward_model", "model": "judge"}]}


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


class DeadlyScorer(RayScorer):
    """Kills the process of its first actor when that has been asked a second time, before it has answered."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.times, self.victim = 0, process(self._actors[0])

    def begin(self, items: Sequence[Any]) -> Wait:
        wait = super().begin(items)
        self.times += 1
        if self.times == 2:
            os.kill(self.victim, signal.SIGKILL)
        return wait


class DeadlyRoles(ApartRoles):
    """Roles apart of which each loses an actor."""

    engines: Deadly
    scorers: ClassVar[dict[str, RayScorer]] = {}

    def pool(self, model: Path, settings: Any, telling: Any, leads: bool) -> Deadly:
        self.engines = Deadly(self._actors(ENGINES), settings, telling, SMALL, self._say, when=(1,))
        return self.engines

    def _scorer(self, role: str, setup: Any) -> RayScorer:
        group = ONE if role == REFERENCE else TWO
        self.scorers[role] = DeadlyScorer(role, self._actors(role), setup, group, self._say)
        return self.scorers[role]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_actors_that_are_killed_change_nothing(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "policy")
    words = AutoTokenizer.from_pretrained(folder)
    judge = write_reward_model(folder, tmp_path / "judge", 1)
    options = {**JUDGED, "max_tokens": 24, "kl": 0.1}
    alone = job(tmp_path / "a", folder, words, **options)
    alone = alone.model_copy(update={"train": alone.train.model_copy(update={"steps": 3}),
                                     "reward_models": {"judge": str(judge)}})  # fmt: skip
    whole = reinforce(alone, ALONE)
    said: list[str] = []
    apart = job(tmp_path / "b", folder, words, **options)
    apart = apart.model_copy(update={"train": alone.train})
    roles = [Role(ENGINES, SMALL, str(folder), {"max_concurrency": 64}), Role(REFERENCE, ONE, str(folder)),
             Role(reward_role("judge"), TWO, str(judge))]  # fmt: skip
    with placed(roles, 60.0) as names:
        played = DeadlyRoles(RolloutOptions(), names, said.append)
        outcome = reinforce(apart, ALONE, roles=played)
        last = played.scorers[reward_role("judge")]
        (left,) = last._actors.values()
        os.kill(process(left), signal.SIGKILL)
        with pytest.raises(ResourceError, match="no reward_models/judge is left"):
            last.begin([((1, 20, 21), 1)])()
    for name in ("reward", "reward/reward_model_1", "kl", "loss", "answer_tokens", "grad_norm"):
        assert [r[name] for r in outcome.history] == pytest.approx([r[name] for r in whole.history], abs=1e-5)
    assert outcome.figures == pytest.approx(whole.figures, abs=1e-5)
    assert len(played.engines.at_death) == 1
    assert all(played.engines.at_death), "it died with answers to write"
    assert sorted(played.engines.answered) == sorted(played.engines.asked), "each prompt is answered once"
    assert len([line for line in said if "is started again" in line and "asked again" in line]) == 1
    assert "reference 0 died and was started again" in said
    assert "reward_models/judge 0 died more than 0 times and is left out" in said


def check_adapter_alone(pool: RayPool, folder: Path) -> None:
    """An engine elsewhere that gets a LoRA policy's adapter gives its tokens the probabilities the trainer does."""
    policy = add_adapter(load_model(folder), AdapterOptions(lora=LoraOptions(r=4)), 0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter += 0.05 * torch.randn(parameter.shape) * ("lora_" in name)
    weights = list(policy_weights(policy, changed_only=True))
    assert sum(value.nbytes for _, value in weights) == sum(
        4 * p.numel() for p in policy.parameters() if p.requires_grad
    )
    pool.update_weights(weights, 0)
    pool.submit(
        [Ask("a", Prompt((1, 20, 21), "p", {}, "x"), Sampling(20, 1.0, seed=1, logprobs=0, ignore_eos=True), 2)]
    )
    ((_, answers),) = pool.results()
    for each in answers:
        with torch.no_grad():
            logs = policy.eval()(input_ids=torch.tensor([[1, 20, 21, *each.tokens]])).logits[0].log_softmax(-1)
        wanted = [float(logs[2 + i, token]) for i, token in enumerate(each.tokens)]
        assert list(each.logprobs) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_engines_that_hang_or_never_come_back_end_the_run(tmp_path: Path) -> None:
    import ray

    folder = write_policy(tmp_path / "policy")
    settings = RolloutEngine(max_sequences=2, max_length=128, threads=1)
    with placed([Role(ENGINES, SMALL, str(folder), {"max_concurrency": 16})], 60.0) as names:
        actors = [ray.get_actor(name) for name in names[ENGINES]]
        pool = RayPool(actors, settings, None, SMALL, print)
        check_adapter_alone(pool, folder)
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
def test_the_stage_trains_while_actors_answer_and_score(tmp_path: Path) -> None:
    """Two trainers, of which one talks to an engine for both, and both to a reference and a reward model; one trainer
    is killed, and both begin again."""
    folder = write_policy(tmp_path / "policy")
    policy = artifact(folder.parent, "finetune")
    judge = artifact(write_reward_model(folder, tmp_path / "reward" / "model", 1).parent, "reward")
    data = lines(tmp_path / "prompts.jsonl", [{"prompt": chr(97 + i % 26), "answer": "x"} for i in range(30)])
    rollouts = {"group": 4, "max_tokens": 12, "rows": 64, **JUDGED, "staleness": 1, "kl": 0.05,
                "engines": {"count": 1, "cpus": 0.5}, "reference": ONE, "reward_models": ONE}  # fmt: skip
    chosen = options(method="grpo", rollouts=rollouts, engine={"max_sequences": 8}, global_batch=2, steps=12,
                     checkpoint_every=2, adapter={"lora": None}, learning_rate=1e-3,
                     resources={"workers": 2, "cpus_per_worker": 0.5})  # fmt: skip
    assert AlignStage().demand(chosen) == {"CPU": 2.0}
    assert any("1 x reference (0.25 CPU each)" in n for n in AlignStage().estimate(plan(chosen, {})).notes)
    killer = threading.Thread(target=kill_a_trainer, args=[tmp_path / "work" / "checkpoints" / "step-00000004"])
    killer.start()
    result = run_stage(chosen, {"model": policy, "data": data, "judge": judge}, tmp_path)
    killer.join()
    assert {"reward", "heldout_reward", "heldout_before_reward"} <= set(result.metrics)
    assert result.counts["steps"] == 12
    assert "Staleness mean" in (tmp_path / "out" / "report.md").read_text()
    assert "workers were lost" in (tmp_path / "screen.txt").read_text()


@pytest.mark.usefixtures("ray_session")
def test_roles_without_room(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match=r"no room for 3 x engines \(8 CPU each\), 1 x reference"),
        placed([Role(ENGINES, EngineGroup(count=3, cpus=8.0)), Role(REFERENCE, ONE)], 0.5),
    ):
        pass
