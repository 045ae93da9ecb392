from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelyard.errors import DataError
from modelyard.tracking import Aliases, Move, Registry, register, resolve
from modelyard.tracking.aliases import previous
from modelyard.tracking.store import Unreachable

FIRST, SECOND = "1" * 64, "2" * 64


def test_a_version_points_at_the_folder_and_carries_its_lineage(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    tags = {"recipe": "demo", "metric": {"heldout_loss": 3.5}, "api_key": "s3cret"}
    made = register("demo", str(model), root=str(root), fingerprint=FIRST, tags=tags)
    assert (made.name, made.version, made.alias, made.uri) == ("demo", 1, "champion", str(model))
    assert resolve("models:/demo@champion", root=str(root)) == (str(model), 1)
    assert resolve("models:/demo/1", root=str(root)) == (str(model), 1)
    (kept,) = Registry(str(root)).versions("demo")
    assert kept.tags["metric.heldout_loss"] == "3.5"
    assert kept.tags["api_key"] == "[redacted]"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "root"], "MLflow wrote into the working directory"


def test_the_same_fingerprint_is_the_same_version_and_aliases_move(root: Path, tmp_path: Path) -> None:
    registry = Registry(str(root))
    assert registry.register("demo", str(tmp_path / "a"), fingerprint=FIRST).version == 1
    assert registry.register("demo", str(tmp_path / "b"), fingerprint=SECOND, alias="candidate").version == 2
    assert registry.register("demo", str(tmp_path / "a"), fingerprint=FIRST).version == 1
    assert registry.resolve("models:/demo@champion").version == 1
    assert registry.register("demo", str(tmp_path / "b"), fingerprint=SECOND, alias="champion").version == 2
    assert registry.resolve("models:/demo@champion").version == 2
    assert [v.version for v in registry.versions("demo")] == [2, 1]


@pytest.mark.parametrize("reference", ["demo@champion", "models:/demo", "models:/demo/latest", "models:/@x", ""])
def test_a_malformed_reference_is_explained(root: Path, reference: str) -> None:
    with pytest.raises(DataError, match="does not name a registered model"):
        resolve(reference, root=str(root))


@pytest.mark.parametrize("reference", ["models:/nobody@champion", "models:/nobody/7"])
def test_an_unknown_model_is_explained(root: Path, reference: str) -> None:
    with pytest.raises(DataError, match="no such registered model"):
        resolve(reference, root=str(root))


def test_an_absent_server_is_an_error_of_one_screen(root: Path) -> None:
    with pytest.raises(Unreachable, match="does not answer"):
        register("demo", "/model", root=str(root), uri="http://127.0.0.1:9", fingerprint=FIRST)


_LOAD = """
import json, sys
import mlflow
model = mlflow.pyfunc.load_model("models:/demo@champion")
print(json.dumps([model.predict(["ab"]), model.predict(["ab"], params={"max_new_tokens": 3})]))
"""


def tiny_model(folder: Path) -> None:
    """A Hugging Face folder of a Llama with random weights and a character tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {chr(c): c - 97 for c in range(97, 123)} | {"<eos>": 26}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=27, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=26, bos_token_id=26,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def test_mlflow_itself_loads_a_registered_model_and_generates(root: Path, tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    made = register("demo", str(tmp_path / "model"), root=str(root), fingerprint=FIRST)
    assert made.version == 1
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2] / "platform"),
        "MLFLOW_TRACKING_URI": Registry(str(root)).store.uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    done = subprocess.run(
        [sys.executable, "-c", _LOAD], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    long, short = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(long) == len(short) == 1
    assert long[0].startswith(short[0])
    assert len(short[0].replace(" ", "")) <= 3


def moves(*steps: tuple[int, int, bool]) -> list[Move]:
    return [Move(version, before, "", "", "", back) for version, before, back in steps]


@pytest.mark.parametrize(
    ("history", "now", "numbers", "expected"),
    [
        (moves((1, 0, False), (2, 1, False), (3, 2, False)), 3, [1, 2, 3], 2),
        (moves((1, 0, False), (2, 1, False), (3, 2, False), (2, 3, True)), 2, [1, 2, 3], 1),
        (moves((1, 0, False), (2, 1, False), (1, 2, True), (3, 1, False)), 3, [1, 2, 3], 1),
        (moves((1, 0, False), (2, 1, False)), 5, [1, 2, 5], 2),  # moved elsewhere since
        (moves((4, 2, False)), 4, [1, 2, 3, 4], 2),  # the first move that was written down
        (moves((1, 0, False)), 1, [1], None),
        ([], 3, [1, 2, 3], 2),
        ([], 1, [1], None),
    ],
)
def test_where_an_alias_goes_back_to(history: list[Move], now: int, numbers: list[int], expected: int | None) -> None:
    assert previous(history, now, numbers) == expected


def test_an_alias_goes_back_step_by_step_and_every_move_is_kept(root: Path, tmp_path: Path) -> None:
    registry = Registry(str(root))
    for digit in "123":
        registry.register("demo", str(tmp_path / digit), fingerprint=digit * 64)
    aliases = Aliases(registry)
    assert [aliases.rollback("demo", reason=why).version for why in ("slow", "slower")] == [2, 1]
    assert registry.resolve("models:/demo@champion").version == 1
    with pytest.raises(DataError, match="no version before 1"):
        aliases.rollback("demo")
    assert aliases.move("demo", "champion", 1, "again") is None
    assert aliases.rollback("demo", to=3).version == 3
    kept = [(m.before, m.version, m.reason, m.back) for m in aliases.history("demo", "champion")]
    assert kept[2:] == [(2, 3, "registered", False), (3, 2, "slow", True), (2, 1, "slower", True),
                        (1, 3, "rollback", True)]  # fmt: skip
    for mistake in (lambda: aliases.rollback("nobody"), lambda: aliases.rollback("demo", "candidate"),
                    lambda: aliases.move("demo", "champion", 9, "")):  # fmt: skip
        with pytest.raises(DataError):
            mistake()
    for _ in range(30):  # MLflow's tags hold 5000 characters
        aliases.move("demo", "champion", 1, "x" * 200)
        aliases.move("demo", "champion", 2, "y" * 200)
    assert 5 < len(aliases.history("demo", "champion")) < 60
