"""CORE: the continuous-batching inference engine that serving, rollouts, evaluation and batch generation share.

A request carries `computed`, the number of its tokens whose keys and values are cached; every step has a token
budget; there is no prefill phase and no decode phase. `request` holds what goes in and out, `scheduler`,
`blocks` and `slots` decide what runs and what is shared, `batch` lays a step out, `decoder` is the forward pass
over Hugging Face safetensors with `kernels` between its matrix products, `sampler`, `grammar` and `detokenize`
turn logits into text, `speculate` guesses ahead, `adapters` is LoRA, `core` is the step loop, `offline` runs it
in the caller's thread and `native` behind an asynchronous interface (`protocol.Engine`). `any_architecture` and
`vllm_engine` put other libraries behind the same interface.

May import storage, errors and planner; never Ray, MLflow or another core. Importing this package, `request`,
`options` or `tokenizer` does not import torch, so that an HTTP process stays small.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelyard.engine.core import EngineCore
    from modelyard.engine.native import NativeEngine
    from modelyard.engine.offline import Completion, generate
    from modelyard.engine.options import EngineOptions
    from modelyard.engine.protocol import Engine
    from modelyard.engine.request import EngineStats, Grammar, Request, Sampling, Scored, StepOutput, TokenLogprob
    from modelyard.engine.tokenizer import Tokenizer

_HOME = {
    "Completion": "offline",
    "Engine": "protocol",
    "EngineCore": "core",
    "EngineOptions": "options",
    "EngineStats": "request",
    "Grammar": "request",
    "NativeEngine": "native",
    "Request": "request",
    "Sampling": "request",
    "Scored": "request",
    "StepOutput": "request",
    "TokenLogprob": "request",
    "Tokenizer": "tokenizer",
    "generate": "offline",
}

__all__ = [
    "Completion",
    "Engine",
    "EngineCore",
    "EngineOptions",
    "EngineStats",
    "Grammar",
    "NativeEngine",
    "Request",
    "Sampling",
    "Scored",
    "StepOutput",
    "TokenLogprob",
    "Tokenizer",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
