"""From options to a model on the meta device, and from there to weights that depend on the seed alone.

Every module draws its initial weights from a generator seeded by (seed, module name) over the full, unsharded
tensors, and each worker keeps its shard: one worker or a hundred start from the same model.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import xxhash
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from modelyard.errors import DataError, RecipeError
from modelyard.models.options import ModelOptions
from modelyard.models.packing import keep_documents_apart


def build_config(options: ModelOptions, vocab_size: int, sequence_length: int | None = None) -> PretrainedConfig:
    """The transformers configuration of a model for tokens below `vocab_size`.

    Raises:
        RecipeError: the configuration is not one transformers knows, heads do not divide the width, or
            `sequence_length` is longer than the model's.
        DataError: an explicit `vocab_size` is smaller than the tokenizer's.
    """
    settings = options.settings()
    asked = settings.setdefault("vocab_size", vocab_size)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # An architecture's default ids belong to its own tokenizer; export sets those of ours.
        settings.setdefault(name, None)
    if asked < vocab_size:
        raise DataError(
            f"the tokens have a vocabulary of {vocab_size:,}, the model's embedding has {asked:,} rows",
            place="model.vocab_size",
            mend="leave vocab_size out (it is taken from the tokens) or make it at least as large",
        )
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise RecipeError(f"transformers refuses the configuration: {error}", place="model") from error
    check_shape(config, sequence_length)
    config.use_cache = False
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0  # what the span-corruption objective begins targets with
    return config


def check_shape(config: PretrainedConfig, sequence_length: int | None) -> None:
    """Raises RecipeError where widths do not divide or the sequence is longer than the model's."""
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if hidden and heads and getattr(config, "head_dim", None) in (None, hidden // heads) and hidden % heads:
        raise RecipeError(
            f"{heads} attention heads do not divide hidden_size {hidden}",
            place="model.num_attention_heads",
            mend=f"choose a divisor of {hidden}",
        )
    shared = getattr(config, "num_key_value_heads", None)
    if heads and shared and heads % shared:
        raise RecipeError(
            f"{shared} key-value heads do not divide {heads} attention heads",
            place="model.num_key_value_heads",
            mend=f"choose a divisor of {heads}",
        )
    longest = getattr(config, "max_position_embeddings", None)
    if sequence_length and longest and sequence_length > longest:
        raise RecipeError(
            f"sequences of {sequence_length:,} tokens are longer than the model's {longest:,}",
            place="model.max_position_embeddings",
            mend="tokenize with a shorter sequence_length or raise max_position_embeddings",
        )


def attention(config: PretrainedConfig) -> str:
    """SDPA; eager where the architecture has no other: the ALiBi of Bloom and MPT is a bias added there."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' factory of decoders, or of encoder-decoders such as T5."""
    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A language model without storage: parameters are on the meta device."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype, attn_implementation=attention(config))
    model.tie_weights()
    return keep_documents_apart(cast(PreTrainedModel, model))


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, a shared (tied) one counted once; sharded ones count in full."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def materialise(model: nn.Module, device: torch.device) -> None:
    """Gives every meta parameter and buffer of `model` (sharded or not) uninitialised storage on `device`.

    Unlike `Module.to_empty`, a tensor that two modules share stays shared.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                empty = torch.empty_like(parameter, device=device)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=persistent)


@torch.no_grad()
def initialise(model: PreTrainedModel, seed: int) -> None:
    """Initialises a materialised model in place by its architecture's own rule, independent of sharding."""
    done: set[int] = set()
    for name, module in model.named_modules():
        owned = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if not owned or all(id(tensor) in done for tensor in owned.values()):
            continue
        full = _draw(model, module, _module_seed(seed, name))
        for key, tensor in owned.items():
            store(tensor, getattr(full, key))
        done.update(id(tensor) for tensor in owned.values())
    for name, module in reversed(list(model.named_modules())):  # inner ones first: an outer rule has the last word
        if any(True for _ in module.children()):
            _initialise_below(model, module, _module_seed(seed, f"{name}/"))


def _initialise_below(model: PreTrainedModel, module: nn.Module, seed: int) -> None:
    """Applies what an architecture's rule for `module` does to the parameters of modules below it.

    GPT-2 scales the last matrices of a block so, T5 all of its matrices. A first pass without storage finds which
    parameters these are; only they are then drawn in full.
    """
    shadow = _without_storage(module)
    model._init_weights(shadow)
    touched = [name for name, parameter in shadow.named_parameters() if "." in name and parameter._version]
    if not touched:
        return
    targets = dict(module.named_parameters(remove_duplicate=False))
    for name in touched:
        owner, _, key = name.rpartition(".")
        shadow.get_submodule(owner)._parameters[key] = _blank(targets[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model._init_weights(shadow)
    for name in touched:
        store(targets[name], shadow.get_parameter(name))


def _without_storage(module: nn.Module) -> nn.Module:
    """A copy of a tree of modules whose parameters and buffers lie on the meta device."""
    copy = _shallow(module)
    for kind in (copy._parameters, copy._buffers):
        for key, tensor in kind.items():
            kind[key] = None if tensor is None else _meta(tensor)  # type: ignore[assignment]
    copy._modules = {key: None if child is None else _without_storage(child) for key, child in module._modules.items()}
    return copy


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _shallow(module: nn.Module) -> nn.Module:
    # Not `copy.copy`: the class FSDP gives a module builds a new one instead of copying.
    copy: nn.Module = object.__new__(type(module))
    copy.__dict__ = module.__dict__.copy()
    copy._parameters, copy._buffers = dict(module._parameters), dict(module._buffers)
    return copy


def _module_seed(seed: int, name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode(), seed=seed) & 0x7FFF_FFFF_FFFF_FFFF


def _draw(model: PreTrainedModel, module: nn.Module, seed: int) -> nn.Module:
    """A shallow copy of `module` with full tensors on the CPU, initialised by the architecture."""
    full = _shallow(module)
    full._parameters = {k: _blank(v) for k, v in module._parameters.items()}
    full._buffers = {k: None if v is None else torch.empty_like(v, device="cpu") for k, v in module._buffers.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model._init_weights(full)
    return full


def _blank(parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    # Zeros, not garbage: whatever an architecture's rule leaves out (a bias) is then at least defined.
    return nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype), requires_grad=False)


def store(target: torch.Tensor, full: torch.Tensor) -> None:
    """Copies `full` into `target` in place; a DTensor keeps its shard of it."""
    if isinstance(target, DTensor):
        # Every rank has drawn the same tensor and keeps its part: nothing is sent.
        shape, offset = compute_local_shape_and_global_offset(full.shape, target.device_mesh, target.placements)
        part = full.detach()[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        target.to_local().copy_(part)
    else:
        target.copy_(full)
