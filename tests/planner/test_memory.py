"""Memory: laws of sharding and pipelines, and the measured peak of a real training step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from modelyard.errors import RecipeError, ResourceError
from modelyard.planner import Layout, count, estimate_training, serving_memory, training_memory
from modelyard.planner.memory import in_flight, kv_bytes_per_token


def peak(config: dict[str, Any], layout: Layout, **options: Any) -> float:
    return training_memory(config, sequence_length=2048, layout=layout, **options).peak


def test_four_and_eight_bytes_a_parameter(llama_8b: dict[str, Any]) -> None:
    found = training_memory(llama_8b, sequence_length=16, layout=Layout(), micro_batches=2)
    assert found.parameters == pytest.approx(4 * count(llama_8b).total, rel=1e-6)
    assert found.optimizer == pytest.approx(8 * count(llama_8b).total, rel=1e-6)
    assert found.gradients >= 4 * count(llama_8b).total


@pytest.mark.parametrize(("zero", "weights", "states"), [(0, 4, 8), (1, 4, 8 / 64), (3, 4 / 64, 8 / 64)])
def test_zero_stages_shard_more(llama_8b: dict[str, Any], zero: int, weights: float, states: float) -> None:
    layout = Layout(data=64, shard=64, zero=zero)
    found = training_memory(llama_8b, sequence_length=16, layout=layout, micro_batches=2)
    assert found.parameters == pytest.approx(weights * count(llama_8b).total, rel=1e-6)
    assert found.optimizer == pytest.approx(states * count(llama_8b).total, rel=1e-6)


def test_hybrid_sharding_lies_between(llama_8b: dict[str, Any]) -> None:
    whole, hybrid = (peak(llama_8b, Layout(data=64, shard=shard)) for shard in (64, 8))
    assert whole < hybrid < peak(llama_8b, Layout(data=64, shard=1))


def test_every_saving_saves(llama_70b: dict[str, Any]) -> None:
    base = Layout(data=8, shard=8, micro_batch=2)
    start = peak(llama_70b, base)
    for saving in ({"recompute": "full"}, {"tensor": 8}, {"context": 4}, {"micro_batch": 1}, {"offload": True}):
        assert peak(llama_70b, replace(base, **saving)) < start, saving
    assert peak(llama_70b, base, optimizer="adamw8bit") < start
    assert peak(llama_70b, base, optimizer="muon") < start
    assert peak(llama_70b, base, precision_name="mixed") < start


def test_sequence_parallelism_splits_the_norms(llama_8b: dict[str, Any]) -> None:
    split = Layout(tensor=4)
    assert peak(llama_8b, split) < peak(llama_8b, replace(split, sequence_parallel=False))


def test_micro_batches_in_flight_by_schedule() -> None:
    def held(schedule: str, stage: int, virtual: int = 1, micro_batches: int = 32) -> float:
        return in_flight(Layout(pipeline=4, schedule=schedule, virtual=virtual), stage, micro_batches)  # type: ignore[arg-type]

    assert [held("gpipe", s) for s in range(4)] == [32, 32, 32, 32]
    assert [held("1f1b", s) for s in range(4)] == [4, 3, 2, 1]
    assert held("zero-bubble", 0) == 4
    assert held("interleaved", 0, virtual=2) == (6 + 4 + 1) / 2
    assert held("zbv", 3) == 4
    assert held("1f1b", 0, micro_batches=2) == 2


def test_experts_are_spread_once(mixtral: dict[str, Any]) -> None:
    plain, spread = Layout(data=8, shard=8), Layout(data=8, shard=8, expert=8)
    one, other = (training_memory(mixtral, sequence_length=16, layout=x, micro_batches=2) for x in (plain, spread))
    assert other.parameters == pytest.approx(one.parameters)
    assert other.peak < one.peak


def test_the_loops_fused_loss_is_the_one_counted(llama_8b: dict[str, Any]) -> None:
    from modelyard.planner.training import LOSS_CHUNK
    from modelyard.train.head import CHUNK_BYTES

    assert (LOSS_CHUNK["cpu"], LOSS_CHUNK["gpu"]) == (CHUNK_BYTES["cpu"], CHUNK_BYTES["cuda"])
    layout = Layout(data=8, shard=8, micro_batch=8, recompute="full")
    whole, fused = (peak(llama_8b, layout, loss_chunk=chunk) for chunk in (None, LOSS_CHUNK["gpu"]))
    assert fused < whole


@pytest.mark.parametrize("fused", [False, True])
def test_measured_peak_of_a_step(tiny: dict[str, Any], fused: bool) -> None:
    """The largest sum of tensor bytes that torch's allocator saw, within four per cent."""
    import torch
    import torch.nn.functional as F
    import transformers as hf
    from torch.profiler import ProfilerActivity, profile

    config = hf.LlamaConfig(**{k: v for k, v in tiny.items() if k != "model_type"}, use_cache=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            tokens = torch.randint(0, 8192, (2, 128))
            _step(model, tokens, F, fused).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    records = trace.profiler.kineto_results.events()
    held = highest = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in records if e.name() == "[memory]"):
        held += change
        highest = max(highest, held)
    chunk = 8.0 * 2**20 if fused else None
    predicted = training_memory(tiny, sequence_length=128, layout=Layout(micro_batch=2), loss_chunk=chunk).peak
    assert predicted == pytest.approx(highest, rel=0.04)


def _step(model: Any, tokens: Any, functional: Any, fused: bool) -> Any:
    if fused:
        from modelyard.train.head import language_loss

        return language_loss(model, {"input_ids": tokens}, tokens.roll(-1, 1))[0] / tokens.numel()
    logits = model(input_ids=tokens).logits
    return functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())


def test_serving_memory(llama_70b: dict[str, Any]) -> None:
    assert kv_bytes_per_token(llama_70b) == 80 * 2 * 8 * 128 * 2
    found = serving_memory(llama_70b, sequences=16, sequence_length=4096, tensor=8)
    assert found.weights == pytest.approx(2 * count(llama_70b).total / 8)
    assert found.kv_cache == pytest.approx(16 * 4096 * kv_bytes_per_token(llama_70b) / 8)
    assert serving_memory(llama_70b, sequences=16, sequence_length=4096, dtype="int4").weights < found.weights * 2.1


def test_unknown_names_are_refused(tiny: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="optimizer"):
        training_memory(tiny, sequence_length=8, optimizer="magic")
    with pytest.raises(RecipeError, match="precision"):
        training_memory(tiny, sequence_length=8, precision_name="fp7")


def test_a_model_too_large_says_what_weighs_most(llama_70b: dict[str, Any]) -> None:
    with pytest.raises(ResourceError) as error:
        estimate_training(llama_70b, 1e9, 2048, 8, 8, "h100", precision_name="mixed")
    assert "GiB" in error.value.what
    assert error.value.mend


def test_frozen_matrices_in_four_bits_take_an_eighth(llama_8b: dict[str, Any]) -> None:
    lora = {"sequence_length": 512, "trainable": 10**7}
    whole, four = training_memory(llama_8b, **lora), training_memory(llama_8b, **lora, frozen_bits=4.127)
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert whole.parameters - four.parameters == pytest.approx(matrices * (4 - 4.127 / 8))
    made = 6 * 4096 * 14336  # the one matrix that is made whole
    assert whole.peak - four.peak == pytest.approx(matrices * (4 - 4.127 / 8) - made)
    halves = training_memory(llama_8b, **lora, frozen_bits=4.127, layout=Layout(data=2, shard=2))
    assert halves.parameters == pytest.approx(four.parameters / 2)
