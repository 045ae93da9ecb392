"""FlexAttention: refused by name on a CPU; on CUDA the losses and gradients of SDPA under document masks."""

from __future__ import annotations

import pytest
import torch
from training_parts import TINY, VOCABULARY

from modelyard.errors import RecipeError, ResourceError
from modelyard.models import ModelOptions, build_config, build_on_meta
from modelyard.train.objective import causal_lm_by_document
from modelyard.train.options import ParallelOptions, TrainOptions
from modelyard.train.parallel.layout import check_layout
from modelyard.train.parallel.parallelize import parallelize
from modelyard.train.world import World


def test_a_cpu_refuses_it() -> None:
    model = build_on_meta(build_config(TINY, VOCABULARY))
    with pytest.raises(ResourceError, match="flex attention trains on CUDA only"):
        parallelize(model, TrainOptions(steps=1, attention="flex"), World(0, 1, torch.device("cpu")))


def test_context_parallelism_has_an_attention_of_its_own() -> None:
    options = TrainOptions(steps=1, attention="flex", parallel=ParallelOptions(context=2))
    with pytest.raises(RecipeError, match="context"):
        check_layout(options, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_losses_and_gradients_are_those_of_sdpa() -> None:
    world = World(0, 1, torch.device("cuda"))
    shape = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    ids = torch.randint(8, VOCABULARY, (2, 512), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(512) // 150).repeat(2, 1).int()
    batch = {"input_ids": ids.cuda(), "document_ids": documents.cuda()}
    found = []
    for attention in ("sdpa", "flex"):
        model = build_on_meta(build_config(ModelOptions(config=shape), VOCABULARY))
        strategy = parallelize(model, TrainOptions(steps=1, attention=attention, precision="fp32"), world)
        strategy.materialise(0)
        sums = strategy.forward_backward(causal_lm_by_document, [batch])
        gradient = strategy.model.get_parameter("model.layers.0.self_attn.q_proj.weight").grad
        assert gradient is not None
        found.append((float(sums["loss"] / sums["weight"]), gradient))
    (one, ours), (other, theirs) = found
    assert other == pytest.approx(one, abs=1e-3)
    assert (ours - theirs).norm() < 0.02 * ours.norm()
