"""Rewards beyond rules: reward models read token ids in packed passes, judges answer over HTTP."""

from __future__ import annotations

import copy
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from alignment_parts import write_reward_model
from transformers import AutoModelForSequenceClassification

from modelyard.align.answered import Answered
from modelyard.align.code_sandbox import can_confine
from modelyard.align.encode import after_answer, use_template
from modelyard.align.options import RolloutOptions
from modelyard.align.rewards import RewardMix
from modelyard.align.same_tokenizer import check_same_tokenizer
from modelyard.align.samples import Drawn, Prompt, Sample
from modelyard.align.scoring import RewardScorer
from modelyard.errors import DataError, RecipeError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classifiers(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two reward models with different score layers."""
    folder = tmp_path_factory.mktemp("rewards")
    return [write_reward_model(model_folder, folder / str(seed), seed) for seed in (1, 2)]


def mix(*rewards: dict[str, Any], scorers: Any = None, **options: Any) -> RewardMix:
    return RewardMix(RolloutOptions.model_validate({"rewards": rewards, **options}), scorers)


def answered(ids: tuple[int, ...] = (), text: str = "t", row: Any = None, place: str = "x:1") -> Answered:
    return Answered(row or {"prompt": "p"}, place, "<|user|>p", text, ids)


def test_packed_scores_are_those_of_transformers_one_by_one(classifiers: list[Path]) -> None:
    talks = [[1, 20, 21, 2, 30], [1, 22, 2], list(range(20, 60)), [1, 2, 3, 5]]
    plain = AutoModelForSequenceClassification.from_pretrained(classifiers[0], dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = [plain(input_ids=torch.tensor([ids])).logits.item() for ids in talks]
    scorer = RewardScorer(classifiers[0], CPU, 64)
    found = scorer([(tuple(ids), 0) for ids in talks])
    assert [score for (score,) in found] == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(RecipeError, match="longer than the model"):
        RewardScorer(classifiers[0], CPU, 10_000)


def test_an_ensemble_is_a_mean_or_the_least_and_mixes_with_a_rule(classifiers: list[Path]) -> None:
    scorers = {name: RewardScorer(folder, CPU, 64) for name, folder in zip("ab", classifiers, strict=True)}
    answers = [answered((1, 20, 21), "yes"), answered((1, 30, 31, 32), "no")]
    one, two = (np.ravel(scorers[name]([(a.ids, 1) for a in answers])) for name in "ab")
    rule = {"kind": "regex", "pattern": "yes", "weight": 2.0}
    for how, wanted in (("mean", (one + two) / 2), ("min", [min(pair) for pair in zip(one, two, strict=True)])):
        source = {"kind": "reward_model", "model": ["a", "b"], "ensemble": how, "weight": 0.5}
        found = mix(source, rule, scorers=scorers)(answers)
        assert found.total.tolist() == pytest.approx([0.5 * w + 2 * (i == 0) for i, w in enumerate(wanted)])
        assert found.means == {"reward_model_0": pytest.approx(sum(wanted) / 2), "regex_1": 0.5}
    with pytest.raises(RecipeError, match="no reward model 'c'"):
        mix({"kind": "reward_model", "model": "c"}, scorers=scorers)


def test_reward_models_read_what_the_template_puts_behind_an_answer(words: Any) -> None:
    chat = use_template(copy.deepcopy(words), "chatml")
    after = after_answer(chat)
    assert words.decode(after) in ("\n", "<|im_end|>\n", "")
    prompt = Prompt((1, 2), "p", {}, "x")
    assert Sample(prompt, Drawn((5, 0), (0.0, 0.0), "", True, 0)).answered((9,)).ids == (1, 2, 5, 0, 9)
    assert Sample(prompt, Drawn((5, 6), (0.0, 0.0), "", False, 0)).answered((9,)).ids == (1, 2, 5, 6)


def test_another_tokenizer_is_named_before_work(model_folder: Path) -> None:
    text = (model_folder / "tokenizer.json").read_bytes()
    check_same_tokenizer(text, text, "judge")
    described = json.loads(text)
    vocabulary = described["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    with pytest.raises(RecipeError, match="another tokenizer") as caught:
        check_same_tokenizer(text, json.dumps(described).encode(), "helpful")
    assert caught.value.place == "inputs.helpful"


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint with moods, chosen by the answer it is shown."""

    seen: ClassVar[list[tuple[str, str]]] = []
    tries: ClassVar[dict[str, int]] = {}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        mood = body["messages"][0]["content"].split("|")[1]
        self.seen.append((self.headers.get("authorization", ""), body["messages"][0]["content"]))
        self.tries[mood] = self.tries.get(mood, 0) + 1
        status = 500 if mood == "again" and self.tries[mood] == 1 else 401 if mood == "refused" else 200
        text = json.dumps({"choices": [{"message": {"content": mood if mood[0].isdigit() else "8"}}]}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        for byte in text:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if mood == "slow":
                time.sleep(0.2)

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the judge gave up on it
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing on the screen."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.daemon_threads = True
    Endpoint.seen, Endpoint.tries = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_judge_scores_retries_and_gives_up_in_time(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "opaque")
    source = {"kind": "judge", "url": endpoint, "model": "m", "key": "JUDGE_KEY", "timeout": 2.0, "retries": 1,
              "instruction": "{prompt}|{answer}|{reference}"}  # fmt: skip
    judge = mix(source, failed_reward=-1.0, bad_rewards=0.9)
    moods = ["10", "1", "again", "refused", "slow", "99"]
    began = time.monotonic()
    row = {"prompt": "{answer} {braces}", "answer": "ref"}
    found = judge([answered(text=mood, row=row, place=f"row {i}") for i, mood in enumerate(moods)])
    assert time.monotonic() - began < 20
    assert found.total.tolist() == pytest.approx([1.0, 0.0, 7 / 9, -1.0, -1.0, -1.0])
    assert [f.split(":")[0] for f in found.failures] == ["row 3", "row 4", "row 5"]
    for failure, sign in zip(found.failures, ("401", "longer than 2 s", "outside 1 to 10"), strict=True):
        assert sign in failure
    assert Endpoint.tries == {"10": 1, "1": 1, "again": 2, "refused": 1, "slow": 2, "99": 1}
    assert {seen[0] for seen in Endpoint.seen} == {"Bearer opaque"}
    assert "{answer} {braces}|10|ref" in {seen[1] for seen in Endpoint.seen}, "braces of a prompt stay as they are"


def test_a_judge_that_fails_too_often_or_has_no_key_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"kind": "judge", "url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0, "timeout": 5.0}
    with pytest.raises(DataError, match="1 rewards of 1 answers failed; the first: x:1: the judge cannot be reached"):
        mix(source)([answered()])
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(RecipeError, match="NO_SUCH_KEY is not set"):
        mix({**source, "key": "NO_SUCH_KEY"})


@pytest.mark.skipif(not can_confine(), reason="no Landlock here")
@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("Here:\n```python\nimport math\ndef add(a, b):\n    return math.fsum([a, b])\n```\nDone.", 1.0),
        ("def add(a, b):\n    return a - b", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("while True: pass", 0.0),
        ("add = lambda a, b: a + b\nx = bytearray(2**30)", 0.0),
        ("add = lambda a, b: a + b\nopen(PLACE + '/new', 'w')", 0.0),
        ("import os\nadd = lambda a, b: a + b\nos.remove(PLACE + '/kept')", 0.0),
        ("add = lambda a, b: a + b\nopen(PLACE + '/kept').read()", 0.0),
        ("import socket\nadd = lambda a, b: a + b\nsocket.create_connection(('127.0.0.1', PORT), 1)", 0.0),
    ],
)
def test_code_is_run_against_tests_and_can_do_no_harm(text: str, worth: float, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        known = f"PLACE, PORT = {str(tmp_path)!r}, {server.getsockname()[1]}\n"
        text = text if text.startswith("Here") else known + text
        code = mix({"kind": "code", "timeout": 1})
        assert code([answered(text=text, row={"tests": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]})]).total == [
            worth
        ]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
