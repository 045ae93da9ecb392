"""Prefix LM and span corruption: nothing is lost, nothing leaks, and the loss is the plain one; objectives by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_parts import TINY, pretraining

from modelyard.errors import RecipeError
from modelyard.models import build_config, build_on_meta, initialise
from modelyard.models.build import materialise
from modelyard.train.choose_objective import load_objective
from modelyard.train.denoise import (
    _decoder_loss,
    check_sentinels,
    corrupt,
    noise_mask,
    prefix_lm,
    prefix_mask,
    room_for,
    span_corruption,
)  # fmt: skip
from modelyard.train.head import IGNORE
from modelyard.train.method_options import DenoisingOptions
from modelyard.train.options import TrainOptions
from modelyard.train.programs import pretrain
from modelyard.train.world import World

TOP, UL2 = 399, DenoisingOptions(extreme=0.25, prefix=0.5)


def rows(count: int, length: int) -> torch.Tensor:
    return torch.randint(0, 300, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Any:
    built = build_on_meta(build_config(TINY.model_copy(update={"vocab_size": 400}), 300))
    materialise(built, torch.device("cpu"))
    initialise(built, 0)
    return built


def restored(source: list[int], target: list[int]) -> list[int]:
    spans: dict[int, list[int]] = {}
    for token in target:
        if token > 300:
            last = spans.setdefault(token, [])
        else:
            last.append(token)
    return [t for token in source for t in (spans[token] if token > 300 else [token])]


@pytest.mark.parametrize("options", [DenoisingOptions(), UL2], ids=["t5", "ul2"])
def test_text_and_targets_together_are_the_sequence(options: DenoisingOptions) -> None:
    ids = rows(40, 64)
    source, target = corrupt(ids, torch.ones_like(ids, dtype=torch.bool), options, TOP, 64)
    for i in range(40):
        s, t = (part[i][part[i] != IGNORE].tolist() for part in (source, target))
        assert restored(s, t) == ids[i].tolist()
        assert [token for token in t if token > 300] == [TOP - k for k in range(len([x for x in t if x > 300]))]
    one = corrupt(ids[7:8], torch.ones(1, 64, dtype=torch.bool), options, TOP, 64)
    assert torch.equal(one[0][0], source[7]), "a row is cut alike in any batch"
    sizes = {int((t != IGNORE).sum()) for t in target}
    assert sizes == ({14, 34} if options is UL2 else {14}), "ordinary, and both others with half of the tokens"


def test_spans_are_as_many_and_as_long_as_asked() -> None:
    noise = noise_mask(rows(200, 100), 15, 5)
    assert (noise.sum(1) == 15).all()
    starts = noise[:, 1:] & ~noise[:, :-1]
    assert (starts.sum(1) == 5).all()
    assert not noise[:, 0].any()
    assert len({tuple(row.tolist()) for row in noise}) > 190
    share = noise.double().mean(0)[10:].mean()
    assert 0.12 < float(share) < 0.2


def test_a_prefix_sees_itself_and_nothing_sees_ahead(model: Any) -> None:
    ids, prefix = rows(1, 20), torch.tensor([[8]])
    mask = prefix_mask(prefix, 20)
    assert mask.shape == (1, 1, 20, 20)

    def logits(changed: int | None = None) -> torch.Tensor:
        tokens = ids.clone()
        if changed is not None:
            tokens[0, changed] = (tokens[0, changed] + 1) % 300
        result: torch.Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[0]
        return result

    plain = logits()
    assert not torch.allclose(logits(7)[0], plain[0]), "the start of the prefix sees its end"
    torch.testing.assert_close(logits(8)[:8], plain[:8])
    torch.testing.assert_close(logits(15)[:15], plain[:15])
    documents = torch.zeros_like(ids)
    loss, metrics = prefix_lm(model, {"input_ids": ids, "document_ids": documents})
    assert 1 <= int(metrics["weight"]) <= 19
    assert float(loss.detach()) > 0


def test_a_decoder_reads_the_corrupted_text_and_learns_the_spans(model: Any) -> None:
    ids = rows(6, 40)
    loss, metrics = span_corruption(UL2)(model, {"input_ids": ids, "document_ids": torch.zeros_like(ids)})
    source, target = corrupt(ids, torch.ones_like(ids, dtype=torch.bool), UL2, TOP, room_for(40, UL2))
    expected, count = 0.0, 0
    for s, t in zip(source, target, strict=True):
        s, t = s[s != IGNORE], t[t != IGNORE]
        whole = torch.cat([s, t])[None]
        out = model(input_ids=whole, attention_mask=prefix_mask(torch.tensor([[len(s)]]), whole.shape[1])).logits[0]
        expected += float(F.cross_entropy(out[len(s) - 1 : -1], t, reduction="sum").detach())
        count += len(t)
    assert int(metrics["weight"]) == count
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    empty, weight = _decoder_loss(model, source, torch.full_like(target, IGNORE), 40)
    assert (float(empty.detach()), int(weight["weight"])) == (0.0, 0)


def test_an_encoder_decoder_gets_its_own_loss() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model, ids = T5ForConditionalGeneration(config), rows(5, 40)
    options = DenoisingOptions()
    loss, metrics = span_corruption(options)(model, {"input_ids": ids, "document_ids": torch.zeros_like(ids)})
    source, target = corrupt(ids, torch.ones_like(ids, dtype=torch.bool), options, TOP, 40)
    theirs = model(input_ids=source, labels=target, use_cache=False).loss
    assert float(loss.detach()) / int(metrics["weight"]) == pytest.approx(float(theirs.detach()), rel=1e-5)


def test_a_model_without_room_for_sentinels_is_refused(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="sentinels"):
        check_sentinels(303, 300, DenoisingOptions(), 64)
    with pytest.raises(RecipeError, match="sentinels"):
        pretrain(pretraining(tokens, tmp_path, objective="span_corruption"), World(0, 1, torch.device("cpu")))


def test_an_objective_by_import_path_is_the_function(tokens: Path, tmp_path: Path) -> None:
    alone = World(0, 1, torch.device("cpu"))
    ours = pretrain(pretraining(tokens, tmp_path / "a", steps=2), alone)
    path = "modelyard.train.objective:causal_lm"
    theirs = pretrain(pretraining(tokens, tmp_path / "b", steps=2, objective=path), alone)
    assert [row["loss"] for row in theirs.history] == [row["loss"] for row in ours.history]
    for wrong in ("no_such_module:loss", "modelyard.train.objective:no_such_loss"):
        with pytest.raises(RecipeError, match="there is no objective"):
            load_objective(wrong)
    with pytest.raises(RecipeError, match="not a function"):
        load_objective("modelyard.train.head:IGNORE")
    for text in ("causal", "/tmp/evil.py:loss", "a b:c", "os:system('x')"):
        with pytest.raises(ValueError, match="objective"):
            TrainOptions(objective=text)
