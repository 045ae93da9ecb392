"""Losses and capacity of routers: the papers' formulas, the same however a batch is cut, and how experts are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_cases import MODELS
from training_parts import pretraining

from modelyard.errors import RecipeError
from modelyard.models import ModelOptions
from modelyard.models.build import build_config, build_on_meta, initialise, materialise
from modelyard.stages.training_report import curves
from modelyard.train.loop import Outcome
from modelyard.train.method_options import RoutingOptions
from modelyard.train.objective import causal_lm
from modelyard.train.options import TrainOptions
from modelyard.train.parallel.parallelize import parallelize
from modelyard.train.parallel.routing import find_routing, routers
from modelyard.train.programs import pretrain
from modelyard.train.world import World

ALONE = World(0, 1, torch.device("cpu"))
MODEL = {**MODELS["mixtral"], "num_hidden_layers": 2}


def built(**routing: Any) -> Any:
    """A mixture of 2 layers of 4 experts with routers far from even, under a strategy."""
    config = build_config(ModelOptions(config=MODEL), 300)
    model = build_on_meta(config)
    strategy = parallelize(model, TrainOptions(routing=RoutingOptions(**routing)), ALONE)
    materialise(model, ALONE.device)
    initialise(model, 0)
    for router in routers(model).values():
        torch.nn.init.normal_(router.weight, std=1.0, generator=torch.Generator().manual_seed(3))
    return strategy


def batch() -> dict[str, torch.Tensor]:
    documents = torch.zeros(3, 32, dtype=torch.int32)
    documents[1, 20:], documents[2, 9:] = -1, -1
    return {"input_ids": torch.randint(0, 300, (3, 32), generator=torch.Generator().manual_seed(1)),
            "document_ids": documents}  # fmt: skip


def routed(strategy: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and choices of every router on the batch, by a plain forward pass."""
    found: list[Any] = []
    handles = [r.register_forward_hook(lambda m, a, out: found.append(out)) for r in routers(strategy.model).values()]
    strategy.model(input_ids=batch()["input_ids"])
    for handle in handles:
        handle.remove()
    return [(logits, index) for logits, _, index in found]


def test_the_losses_are_those_of_the_papers_sequence_by_sequence() -> None:
    strategy = built(balance=0.5, z=0.25)
    balance = z = torch.zeros(())
    for logits, index in routed(strategy):
        for row, documents in enumerate(batch()["document_ids"]):
            real = documents >= 0
            scores, chosen = logits.view(3, 32, 4)[row][real], index.view(3, 32, 2)[row][real]
            shares = torch.stack([(chosen == e).sum() / chosen.numel() for e in range(4)])
            balance = balance + real.sum() * 4 * (shares * scores.softmax(-1).mean(0)).sum()
            z = z + scores.exp().sum(-1).log().square().sum()
    (0.5 * balance + 0.25 * z).backward()
    expected = {name: router.weight.grad.clone() for name, router in routers(strategy.model).items()}
    strategy.model.zero_grad(set_to_none=True)
    plain = built(balance=0.0, z=0.0)
    base, sums = (s.forward_backward(causal_lm, [batch()]) for s in (plain, strategy))
    assert float(sums["loss"]) == float(base["loss"]), "the loss that is shown is the objective's"
    assert float(sums["balance_loss"]) == pytest.approx(balance.item() / 2, rel=1e-5)
    assert float(sums["router_z_loss"]) == pytest.approx(z.item() / 2, rel=1e-5)
    for (name, router), without in zip(routers(strategy.model).items(), routers(plain.model).values(), strict=True):
        assert torch.allclose(router.weight.grad - without.weight.grad, expected[name], rtol=1e-4, atol=1e-4), name


def test_an_expert_takes_what_its_capacity_allows_in_the_order_of_tokens() -> None:
    strategy = built(capacity=0.75)
    room = RoutingOptions(capacity=0.75).room(32, 2, 4)
    assert room == 12
    seen: list[Any] = []
    for router in routers(strategy.model).values():
        router.register_forward_hook(lambda m, a, out: seen.append(out))
    strategy.model.train()
    strategy.model(input_ids=batch()["input_ids"])
    for _, scores, index in seen:
        for row in range(3):
            taken = [0] * 4
            for token in range(row * 32, (row + 1) * 32):
                for place in range(2):
                    expert = int(index[token, place])
                    assert bool(scores[token, place] > 0) == (taken[expert] < room)
                    taken[expert] += 1
    strategy.model.eval()
    seen.clear()
    strategy.model(input_ids=batch()["input_ids"])
    assert all(bool((scores > 0).all()) for _, scores, _ in seen), "dropless when it is used"


def run(tokens: Path, folder: Path, **train: Any) -> Outcome:
    job = pretraining(tokens, folder, **{"steps": 8, "checkpoint_every": 100, **train})
    return pretrain(job.model_copy(update={"model": ModelOptions(config=MODEL)}), ALONE)


def test_a_batch_cut_otherwise_trains_the_same(tokens: Path, tmp_path: Path) -> None:
    routing = {"balance": 0.05, "capacity": 1.0}
    whole = run(tokens, tmp_path / "a", micro_batch=8, routing=routing)
    cut = run(tokens, tmp_path / "b", micro_batch=2, routing=routing, recompute="full")
    names = ("loss", "grad_norm", "balance_loss", "router_z_loss", "expert_peak", "expert_use", "dead_experts")
    for name in names:
        assert [row[name] for row in cut.history] == pytest.approx([row[name] for row in whole.history], rel=1e-4), name
    assert 1 <= whole.history[0]["balance_loss"] < 2
    assert 0.5 < whole.history[0]["expert_use"] <= 1


def test_pretraining_balances_by_itself_and_dead_experts_are_counted(tokens: Path, tmp_path: Path) -> None:
    usual = run(tokens, tmp_path / "a")
    titles = [title for title, _ in curves(usual.history)]
    assert titles[-1] == "Dead experts of all layers, by step"
    routing = find_routing(build_on_meta(build_config(ModelOptions(config=MODEL), 300)), RoutingOptions())
    assert routing is not None
    seen = routing.series([8.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0])
    assert seen == {"expert_peak": 4.0, "expert_use": pytest.approx((0.25 + 1) / 2), "dead_experts": 3.0}
    dense = build_on_meta(build_config(ModelOptions(config=MODELS["llama"]), 300))
    assert find_routing(dense, RoutingOptions()) is None


def test_routers_that_are_not_known_are_named() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    model[0].gate_up_proj, model[0].num_experts = torch.nn.Parameter(torch.zeros(2, 2, 2)), 2
    with pytest.raises(RecipeError, match="routers of a ModuleList are not known"):
        find_routing(model, RoutingOptions())
