"""Several token folders as one: sources under their names, a mixture over them, and folders that do not go together."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training_parts import pretraining, write_tokens

from modelyard.errors import DataError
from modelyard.train.data import make_order
from modelyard.train.method_options import MixtureOptions
from modelyard.train.options import TrainOptions
from modelyard.train.programs import pretrain
from modelyard.train.token_folders import open_tokens
from modelyard.train.world import World


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("code"), 60, 10)


def test_folders_become_sources_of_one_data_set(tokens: Path, code: Path) -> None:
    data = open_tokens({"tokens": tokens, "code": code}, "train", verify=True)
    assert data is not None
    assert [(source.name, source.sequences) for source in data.sources] == [("tokens", 400), ("code", 60)]
    first, second = (open_tokens({"": folder}, "train", verify=False) for folder in (tokens, code))
    assert first is not None and second is not None
    whole = pickle.loads(pickle.dumps(data)).batch([399, 400, 459])
    assert np.array_equal(whole["input_ids"][0], first.batch([399])["input_ids"][0])
    assert np.array_equal(whole["input_ids"][1:], second.batch([0, 59])["input_ids"])
    mixture = MixtureOptions(weights={"tokens": 1, "code": 3})
    order = make_order(data, TrainOptions(global_batch=8, mixture=mixture))
    drawn = np.concatenate([order(step) for step in range(10)])
    assert int((drawn >= 400).sum()) == pytest.approx(60, abs=1)


def test_a_run_on_two_folders_reports_both(tokens: Path, code: Path, tmp_path: Path) -> None:
    job = pretraining(tokens, tmp_path, steps=2).model_copy(update={"more": {"code": str(code)}})
    outcome = pretrain(job, World(0, 1, torch.device("cpu")))
    assert set(outcome.by_source) == {"tokens", "code"}


def test_folders_of_different_tokenizers_or_lengths_are_refused(tokens: Path, code: Path, tmp_path: Path) -> None:
    other = shutil.copytree(code, tmp_path / "other")
    words = json.loads((other / "tokenizer" / "tokenizer.json").read_text())
    words["model"]["vocab"]["zz"] = 290
    (other / "tokenizer" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(DataError, match="other and tokens come from different tokenizers"):
        open_tokens({"tokens": tokens, "other": other}, "train", verify=False)
    index = other / "train" / "index.json"
    index.write_text(index.read_text().replace("300", "299"))
    with pytest.raises(DataError, match="other has a vocab_size of 299, tokens of 300"):
        open_tokens({"tokens": tokens, "other": other}, "train", verify=False)
