"""What vLLM is told of an engine's options, and which of them it does not have. Does not import vLLM."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelyard.engine.options import EngineOptions
from modelyard.engine.request import Pooling
from modelyard.errors import ResourceError

OWNER = "MODELYARD_VLLM_OWNER"
"""Variable with the id of the process that vLLM's processes belong to, and end with."""
ADAPTERS = 4
"""LoRA adapters that may share a step."""
ADAPTER_RANK = 64
"""Rank of an adapter at most; vLLM reserves memory for it."""

_REFUSED = {
    "precision": ({"int8", "float16_packed"}, "products of this kind are the native engine's", "use bfloat16"),
    "kv_precision": ({"fp8"}, "vLLM has one scale for all tokens, which must be calibrated", "use auto"),
}


def installed() -> bool:
    """Whether this process can import vLLM."""
    return find_spec("vllm") is not None


def check_installed() -> None:
    """Raises ResourceError where vLLM is not installed."""
    if not installed():
        raise ResourceError(
            "vLLM is not installed in this environment",
            place="engine.backend",
            mend="pip install 'modelyard[vllm]' in an environment without our lock files (docs/engine.md, vLLM), or "
            "use backend: native",
        )


def check_options(options: EngineOptions) -> None:
    """Raises ResourceError, by name, for an option vLLM does not have in our sense."""
    for name, (values, why, mend) in _REFUSED.items():
        if getattr(options, name) in values:
            raise ResourceError(why, place=f"engine.{name}", mend=f"{mend}, or backend: native")
    if options.speculation is not None:
        raise ResourceError("guesses of vLLM may change answers", place="engine.speculation",
                            mend="leave it out, or use backend: native")  # fmt: skip
    if options.cache_tokens is not None:
        raise ResourceError("vLLM keeps prefixes where it keeps running requests", place="engine.cache_tokens",
                            mend="use cache_bytes, or backend: native")  # fmt: skip
    if ours := sorted(set(options.vllm) & set(arguments(Path(), options.model_copy(update={"vllm": {}})))):
        raise ResourceError("an option of the engine or the safety of its host decides this argument of vLLM",
                            place=f"engine.vllm.{ours[0]}", mend="leave it out")  # fmt: skip


def arguments(
    folder: Path, options: EngineOptions, embeds: Pooling | None = None, tokenizer: bool = True
) -> dict[str, Any]:
    """vLLM's engine arguments.

    Args:
        folder: the model's.
        options: what :func:`check_options` lets pass.
        embeds: None = the model answers; else how it embeds.
        tokenizer: whether the folder has one.
    """
    o = options
    given: dict[str, Any] = {
        "model": str(folder),
        "dtype": o.precision,
        "max_num_seqs": o.max_sequences,
        "max_model_len": o.max_length,
        "max_num_batched_tokens": max(o.step_tokens or 8192, o.max_sequences),
        "enable_prefix_caching": o.prefix_cache and embeds is None,
        "kv_cache_memory_bytes": o.cache_bytes,
        "tensor_parallel_size": o.tensor_parallel,
        "enable_lora": True,
        "max_loras": ADAPTERS,
        "max_lora_rank": ADAPTER_RANK,
        "scheduling_policy": "priority",
        "worker_extension_cls": "modelyard.engine.vllm_worker.Worker",
        # As the native engine does: JSON without white space between its parts.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
        "skip_tokenizer_init": not tokenizer,
        "trust_remote_code": False,
        "load_format": "safetensors",
    }
    if o.tensor_parallel > 1:  # inside an actor vLLM would place its workers by Ray, outside what the actor was given
        given["distributed_executor_backend"] = "mp"
    if embeds is not None:
        given |= {"runner": "pooling", "convert": "embed", "pooler_config": {"pooling_type": embeds.upper()}}
    return given | o.vllm


def environment(threads: int, owner: int) -> dict[str, str]:
    """Variables for vLLM's processes.

    `threads`: of each on a CPU. vLLM itself would bind its threads to all cores of the machine, whatever else runs
    there. `owner`: the process they end with (`vllm_worker`).
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        OWNER: str(owner),
    }
