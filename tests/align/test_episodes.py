"""Answers of several turns: a calculator inside an answer, a game with state, masks of what was told, failures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_reinforce import ALONE, job

from modelyard.align.encode import around_observation, use_template
from modelyard.align.environment import Telling
from modelyard.align.options import EnvironmentOptions, PpoOptions, RolloutEngine, RolloutOptions
from modelyard.align.pool import Ask, LocalPool
from modelyard.align.ppo import gae, last_tokens
from modelyard.align.reinforce import reinforce
from modelyard.align.samples import Drawn, Prompt, Sample, pack
from modelyard.engine import EngineCore, Sampling
from modelyard.engine.request import Grammar
from modelyard.errors import DataError, RecipeError
from modelyard.models import load_model

TOOLS = '''
import ast, operator, os, time

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

def value(node):
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))
    return node.value

def calculator(prompt, answer, row):
    """The value of the arithmetic that the turn ends with."""
    return str(value(ast.parse(answer.split(";")[-1], mode="eval").body)) + ";"

class Game:
    """Pays for each turn the number it is, and ends after the second where the row says so."""
    def reset(self, row):
        self.turn, self.row = 0, row
    def step(self, answer):
        self.turn += 1
        return f"{self.row['answer']}{self.turn}", self.turn == self.row.get("turns"), self.turn

class Riddle(Game):
    """Asks something else than the row does."""
    def reset(self, row):
        super().reset(row)
        turns = (("user", "rid"), ("assistant", "?"), ("user", "dle"))
        asked = {"text": "riddle", "messages": [{"role": r, "content": c} for r, c in turns],
                 "long": "x" * 500, "number": 7}
        if row.get("what") == "raise": raise LookupError("no riddle")
        return asked.get(row.get("what", "text"))

class Broken:
    def reset(self, row):
        self.row = row
    def step(self, answer):
        what = self.row["what"]
        if what == "raise": raise LookupError("no such word")
        if what == "hang": time.sleep(60)
        if what == "die": os._exit(1)
        if what == "number": return 7, False, 0.0
        if what == "nan": return "x", False, float("nan")
        return "x", False, 1.0
'''
VOWELS = tuple("aeiou0123456789;")
"""Strings that end the turns of a model that says nearly anything."""

SHORT = Sampling(64, 1.0, seed=1, stop=(";",), logprobs=0, grammar=Grammar("regex", "[a-m]{2};"))


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tools.py").write_text(TOOLS)
    monkeypatch.syspath_prepend(str(tmp_path))


def environment(name: str, **changes: Any) -> EnvironmentOptions:
    return EnvironmentOptions.model_validate({"function": f"my_tools:{name}", **changes})


def engine(folder: Path) -> EngineCore:
    return EngineCore(folder, RolloutEngine(max_sequences=4, max_length=96, threads=1))


def finish(pool: LocalPool) -> dict[str, list[Drawn]]:
    found: dict[str, list[Drawn]] = {}
    while pool.busy:
        found |= dict(pool.results())
    pool.close()
    return found


@pytest.mark.usefixtures("tools")
def test_a_calculator_is_used_inside_an_answer(model_folder: Path, words: Any) -> None:
    """The model is made to write sums; what the tool says stands behind them as tokens it did not write."""
    telling = Telling(environment("calculator", form="plain", stop=["="], turns=3))
    pool = LocalPool([engine(model_folder)], model_folder, telling=telling)
    prompt = Prompt((1, 20, 21, 2), "<|user|>x<|assistant|>", {}, "x")
    sampling = Sampling(40, 1.0, seed=3, stop=("=",), logprobs=0, grammar=Grammar("regex", r"[1-9][+*-][1-9]="))
    pool.submit([Ask("a", prompt, sampling, 3)])
    answers = finish(pool)["a"]
    model = load_model(model_folder).eval()
    for each in answers:
        assert re.fullmatch(r"\d[+*-]\d=-?\d+;\d[+*-]\d=-?\d+;\d[+*-]\d=", each.text)
        assert words.decode(each.tokens) == each.text
        for sum_, result in re.findall(r"(\d[+*-]\d)=(-?\d+);", each.text):
            assert eval(sum_) == int(result)
        told = "".join(words.decode([t]) for t, own in zip(each.tokens, each.learnt, strict=True) if not own)
        assert told == "".join(each.turns[1::2])
        assert len(each.turns) == 5
        # The engine's log-probabilities are those of a model that reads all tokens before, told ones too.
        ids = torch.tensor([[*prompt.ids, *each.tokens]])
        with torch.no_grad():
            logs = F.log_softmax(model(input_ids=ids).logits[0], dim=-1)
        wanted = [float(logs[3 + i, t]) if own else 0.0 for i, (t, own) in
                  enumerate(zip(each.tokens, each.learnt, strict=True))]  # fmt: skip
        assert each.logprobs == pytest.approx(wanted, abs=1e-4)


@pytest.mark.usefixtures("tools")
def test_a_conversation_goes_on_by_the_chat_template(model_folder: Path, words: Any) -> None:
    before, after = around_observation(words, "user")
    assert words.decode((*before, *after)) == "<|endoftext|><|user|><|assistant|>"
    options = environment("Game", turns=3, observation_tokens=1)
    pool = LocalPool([engine(model_folder)], model_folder, telling=Telling(options, before, after))
    prompts = [Prompt((1, 20 + i, 2), "p", {"answer": "x", "turns": i}, "x") for i in range(4)]
    pool.submit([Ask(f"{i}", prompt, SHORT, 1) for i, prompt in enumerate(prompts)])
    found = finish(pool)
    for i, turns in enumerate((3, 1, 2, 3)):
        (each,) = found[str(i)]
        assert each.earned == turns * (turns + 1) / 2
        assert len(each.turns) == (2 * turns - 1 if turns > 1 else 0)
        assert re.fullmatch("[a-m]{2}", each.text)
        assert each.ended
        told = [t for t, own in zip(each.tokens, each.learnt or [True] * len(each.tokens), strict=True) if not own]
        observations = "<|endoftext|><|user|>x<|assistant|>" * (turns - 1)
        assert words.decode(told) == observations, "observations are cut to one token"


@pytest.mark.usefixtures("tools")
def test_a_reset_may_ask_something_else(model_folder: Path, words: Any) -> None:
    riddle = [{"role": "user", "content": "riddle"}]
    several = [riddle[0] | {"content": "rid"}, {"role": "assistant", "content": "?"}, riddle[0] | {"content": "dle"}]
    options = environment("Riddle", turns=1, prompt_tokens=40, observation_tokens=4)
    pool = LocalPool([engine(model_folder)], model_folder, telling=Telling(options, *around_observation(words, "user")))
    whats = ("text", "messages", "same", "long", "number", "raise")
    pool.submit([Ask(what, Prompt((1, 20, 2), "p", {"what": what, "answer": ""}, "row 1"), SHORT, 2) for what in whats])
    found = finish(pool)
    model = load_model(model_folder).eval()
    for what, messages in (("text", riddle), ("messages", several)):
        text = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for each in found[what]:
            assert each.prompt is not None
            assert (each.prompt.text, each.prompt.place, each.failure) == (text, "row 1", "")
            assert list(each.prompt.ids) == words(text, add_special_tokens=False)["input_ids"]
            assert each.earned == 1
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([[*each.prompt.ids, *each.tokens]])).logits[0].log_softmax(-1)
            first = len(each.prompt.ids) - 1
            wanted = [float(logs[first + i, token]) for i, token in enumerate(each.tokens)]
            assert list(each.logprobs) == pytest.approx(wanted, abs=1e-4)
    assert [(each.prompt, each.failure) for each in found["same"]] == [(None, "")] * 2
    for what, sign in (("long", "above rollouts.environment.prompt_tokens"), ("number", "reset to no prompt"),
                       ("raise", "LookupError: no riddle")):  # fmt: skip
        for each in found[what]:
            assert sign in each.failure
            assert each.prompt is None
    pool.close()


def test_the_end_of_a_turn_is_not_written_twice() -> None:
    telling = Telling(EnvironmentOptions(function="a:b", observation_tokens=2), (0, 1), (2,))
    assert telling.ids([7, 8, 9], 0) == (1, 7, 8, 2)
    assert telling.ids([7], 5) == (0, 1, 7, 2)
    assert telling.longest == 3 * 5


def told_sample() -> Sample:
    prompt = Prompt((1, 20, 2), "p", {}, "x")
    return Sample(prompt, Drawn((30, 31, 7, 8, 32, 33), (-1.0, -2.0, 0.0, 0.0, -3.0, -4.0), "", True, 0,
                                learnt=(True, True, False, False, True, True)))  # fmt: skip


def test_what_was_told_is_not_learnt() -> None:
    sample = told_sample()
    plain = Sample(sample.prompt, Drawn((40, 41), (-1.0, -1.0), "", True, 0))
    arrays = pack([sample, plain], np.asarray([1.0, 2.0]), RolloutOptions(rows=16), 0)
    assert arrays["input_ids"].shape == (1, 16)
    assert arrays["loss_mask"][0].nonzero()[0].tolist() == [3, 4, 7, 8, 12, 13]
    assert arrays["engine"][0, 3:9].tolist() == [-1, -2, 0, 0, -3, -4]
    assert sample.drawn.written == (30, 31, 32, 33)


def test_advantages_pass_over_what_was_told() -> None:
    """GAE over the tokens of an answer alone, as if the observation between them were not there."""
    options = PpoOptions(gamma=0.9, gae_lambda=0.8)
    learnt = np.asarray([[False, True, True, False, False, True, True, False, True]])
    documents = np.asarray([[0, 0, 0, 0, 0, 0, 0, 1, 1]], dtype=np.int32)
    random = np.random.default_rng(0)
    rewards, values = random.normal(size=(2, 1, 9))
    assert last_tokens(learnt, documents)[0].nonzero()[0].tolist() == [6, 8]
    found = gae(rewards, values, learnt, documents, options)
    own = [1, 2, 5, 6]
    later, following = 0.0, 0.0
    for at in reversed(own):
        later = rewards[0, at] + 0.9 * following - values[0, at] + 0.9 * 0.8 * later
        following = values[0, at]
        assert found[0, at] == pytest.approx(later)
    assert found[0, 8] == pytest.approx(rewards[0, 8] - values[0, 8])
    assert not found[0, ~learnt[0]].any()


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_policy_learns_from_episodes(model_folder: Path, words: Any, tmp_path: Path, staleness: int) -> None:
    name = "Game" if staleness else "Riddle"
    told = {"function": f"my_tools:{name}", "stop": VOWELS, "turns": 3, "observation_tokens": 4, "prompt_tokens": 12}
    made = job(tmp_path / "run", model_folder, words, max_tokens=24, environment=told, staleness=staleness, rows=128,
               rewards=[{"kind": "environment"}, {"kind": "regex", "pattern": "[a-m]"}])  # fmt: skip
    made = made.model_copy(update={"around": around_observation(words, "user"),
                                   "train": made.train.model_copy(update={"steps": 4})})  # fmt: skip
    outcome = reinforce(made, ALONE)
    for row in outcome.history:
        assert row["turns"] > 1.2
        assert row["reward/environment_0"] > 0.5
        assert row["answer_tokens"] <= 24
    if not staleness:  # the trainer sees the tokens the engine saw, at the same positions
        assert max(row["engine_difference_max"] for row in outcome.history) < 1e-4


@pytest.mark.usefixtures("tools")
def test_environments_that_fail_cost_the_answer_and_not_the_run(model_folder: Path, words: Any, tmp_path: Path) -> None:
    signs = {"raise": "LookupError: no such word", "hang": "longer than", "die": "ended its process",
             "number": "text or None, not int", "nan": "the reward is nan"}  # fmt: skip
    options = environment("Broken", timeout=1.0, turns=2)
    pool = LocalPool([engine(model_folder)], model_folder, telling=Telling(options, *around_observation(words, "user")))
    for what, sign in signs.items():  # one after the other: an end of the process is the end of all it knows
        prompt = Prompt((1, 20, 2), "p", {"what": what}, "row 1")
        pool.submit([Ask(what, prompt, SHORT, 1)])
        ((_, (each,)),) = pool.results()
        assert sign in each.failure
    pool.close()
    told = {"function": "my_tools:Broken", "stop": VOWELS, "timeout": 5.0, "observation_tokens": 4}
    made = job(tmp_path / "run", model_folder, words, max_tokens=24, environment=told)
    rows = (tmp_path / "run" / "train.jsonl").read_text().replace('"answer": "x"', '"what": "raise"')
    (tmp_path / "run" / "train.jsonl").write_text(rows)
    (tmp_path / "run" / "heldout.jsonl").unlink()
    with pytest.raises(DataError, match=r"failed; the first: row \d+: my_tools:Broken raised LookupError"):
        reinforce(made, ALONE)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"environment": {"function": "no_such_module:tool", "observation_tokens": 8}}, "no_such_module"),
        ({"environment": {"function": "a:b", "form": "plain"}}, "nothing ends a turn"),
        ({"rewards": [{"kind": "environment"}]}, "no environment to earn"),
        ({"environment": {"function": "a:b"}}, "up to 393 tokens with what they are told, the model takes 128"),
    ],
)
def test_broken_environments(
    model_folder: Path, words: Any, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(RecipeError, match=complaint):
        reinforce(job(tmp_path, model_folder, words, **changes), ALONE)


def test_a_template_without_a_place_for_tools(words: Any) -> None:
    import copy

    strict = copy.deepcopy(words)
    strict.chat_template = "{% if messages[-1]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    with pytest.raises(DataError, match="no place for a turn of 'tool'"):
        around_observation(strict, "tool")
    assert around_observation(use_template(copy.deepcopy(words), "chatml"), "tool")
