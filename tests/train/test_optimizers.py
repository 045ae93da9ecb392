"""Every optimizer against a slow twin written from its paper, and sharded over two processes against one."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelyard.errors import ResourceError
from modelyard.train.ema import Ema
from modelyard.train.loss_scale import LossScale
from modelyard.train.optimizer import make_optimizer
from modelyard.train.optimizers.adafactor import Adafactor
from modelyard.train.optimizers.lamb import Lamb
from modelyard.train.optimizers.lion import Lion
from modelyard.train.optimizers.muon import Muon, orthogonal
from modelyard.train.options import TrainOptions

NAMES = ("adamw", "lamb", "adafactor", "lion", "muon")
STEPS = 4


class Net(nn.Module):
    """An embedding, matrices of odd shapes that do not divide over two workers, norms and biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(13, 7)
        self.layers = nn.ModuleList([nn.Linear(7, 9), nn.Linear(9, 5, bias=False)])
        self.norm = nn.LayerNorm(9)
        self.out = nn.Linear(5, 13)

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.norm(self.layers[0](self.embed(ids))))
        result: torch.Tensor = self.out(self.layers[1](hidden))
        return result


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for step in range(steps):
        ids = torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(name: str, shard: Any = None) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import DTensor

    model = Net()
    if shard is not None:
        for layer in model.layers:
            shard(layer)
        shard(model)
    descend(model, make_optimizer(model, TrainOptions(optimizer=name, learning_rate=0.02, weight_decay=0.05)))  # type: ignore[arg-type]
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {n: p.detach().clone() for n, p in whole.items()}


def _worker(rank: int, port: int, out: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {name: trained(name, fully_shard) for name in NAMES}
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


def test_sharded_over_two_processes_they_do_what_one_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [context.Process(target=_worker, args=(rank, port, str(tmp_path / "out.pt"))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)
    assert [worker.exitcode for worker in workers] == [0, 0]
    sharded = torch.load(tmp_path / "out.pt", weights_only=True)
    start = dict(Net().named_parameters())
    for name in NAMES:
        for parameter, whole in trained(name).items():
            torch.testing.assert_close(sharded[name][parameter], whole, rtol=1e-5, atol=2e-6, msg=f"{name} {parameter}")
            assert not torch.equal(whole, start[parameter]), f"{name} moves {parameter}"


def twin_lion(w: Any, g: Any, s: dict[str, Any], n: int) -> Any:
    m = s.get("m", 0 * w)
    s["m"] = 0.99 * m + 0.01 * g
    return w - 0.02 * (torch.sign(0.9 * m + 0.1 * g) + 0.05 * w)


def twin_lamb(w: Any, g: Any, s: dict[str, Any], n: int) -> Any:
    s["m"] = 0.9 * s.get("m", 0 * w) + 0.1 * g
    s["v"] = 0.999 * s.get("v", 0 * w) + 0.001 * g * g
    update = (s["m"] / (1 - 0.9**n)) / ((s["v"] / (1 - 0.999**n)).sqrt() + 1e-6) + 0.05 * w
    return w - 0.02 * w.norm() / update.norm() * update


def twin_muon(w: Any, g: Any, s: dict[str, Any], n: int) -> Any:
    s["m"] = 0.95 * s.get("m", 0 * w) + 0.05 * g
    ahead = 0.05 * g + 0.95 * s["m"]
    x = ahead / ahead.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return w - 0.02 * 0.05 * w - 0.02 * 0.2 * max(w.shape) ** 0.5 * x


@pytest.mark.parametrize(
    ("make", "twin"),
    [
        (lambda p: Lion(p, 0.02, weight_decay=0.05), twin_lion),
        (lambda p: Lamb(p, 0.02, weight_decay=0.05), twin_lamb),
        (lambda p: Muon(p, 0.02, weight_decay=0.05), twin_muon),
    ],
    ids=["lion", "lamb", "muon"],
)
def test_an_optimizer_is_its_papers_formula(make: Any, twin: Any) -> None:
    random = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(6, 9, generator=random))
    expected, state, optimizer = weight.detach().double(), {}, make([weight])
    for n in range(1, 8):
        weight.grad = torch.randn(6, 9, generator=random)
        expected = twin(expected, weight.grad.double(), state, n)
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_adafactor_is_torchs() -> None:
    ours, theirs = Net(), Net()
    descend(ours, Adafactor(ours.parameters(), 0.05, weight_decay=0.01), 8)
    descend(theirs, torch.optim.Adafactor(theirs.parameters(), 0.05, weight_decay=0.01), 8)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_newton_schulz_makes_singular_values_about_one() -> None:
    for shape in ((12, 30), (30, 12), (3, 8, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert float(values.min()) > 0.3
        assert float(values.max()) < 1.3


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    model = Net()
    optimizer = make_optimizer(model, TrainOptions(optimizer="muon"))
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert groups[0] == {"layers.0.weight", "layers.1.weight"}
    assert groups[1] == {"out.weight"}
    descend(model, optimizer, 1)
    assert all(optimizer.state[p] for p in model.parameters())


def test_8_bit_adam_says_what_to_install() -> None:
    try:
        import torchao  # noqa: F401
    except ImportError:
        with pytest.raises(ResourceError, match="not installed"):
            make_optimizer(Net(), TrainOptions(optimizer="adamw8bit"))
        return
    model = Net()
    descend(model, make_optimizer(model, TrainOptions(optimizer="adamw8bit")))


def test_averages_follow_the_weights_and_change_places_with_them() -> None:
    model = Net()
    ema, twin = Ema(model, 0.9), {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = make_optimizer(model, TrainOptions(learning_rate=0.05))
    for n in range(30):
        descend(model, optimizer, 1)
        ema.update()
        keep = min(0.9, (1 + n) / (10 + n))
        twin = {name: keep * twin[name] + (1 - keep) * p.detach() for name, p in model.named_parameters()}
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    with ema.applied():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), twin[name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(own[n], p) for n, p in model.named_parameters())


def test_loss_scale_halves_at_overflow_and_doubles_after_good_steps() -> None:
    scale = LossScale()
    scale.update(False)
    assert scale.value == 0.5
    for _ in range(1000):
        scale.update(True)
    assert scale.value == 1.0
    for _ in range(40):
        scale.update(False)
    assert scale.exhausted
