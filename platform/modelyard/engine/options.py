"""What one engine replica may be told: sizes, budget and precision."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from modelyard.errors import RecipeError
from modelyard.recipe.schema import Bytes, Options, runtime

Precision = Literal["float32", "float16_packed", "bfloat16", "int8"]
Backend = Literal["native", "transformers", "vllm"]


class Speculation(Options):
    """Guessing tokens ahead and checking them in one step; answers stay what they would be without it."""

    method: Literal["prompt_lookup", "draft_model"] = Field(
        "prompt_lookup",
        description="where guesses come from: what followed the last words earlier in the text, or a small model",
    )
    tokens: int = Field(4, ge=1, le=11, description="tokens guessed a step at most")
    ngram: int = Field(3, ge=1, le=8, description="last tokens that must have occurred before (prompt_lookup)")
    model: str | None = Field(None, description="folder of the small model, of the same vocabulary (draft_model)")
    max_running: int = Field(
        4, ge=1, description="requests in a step up to which guessing pays; above, the batch itself fills the step"
    )


class EngineOptions(Options):
    """Which engine computes, its sizes, token budget and precision."""

    max_sequences: int = Field(
        32, ge=1, le=1024, description="requests computed in one step; each owns a contiguous key/value slot"
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="tokens of prompt and answer together; null = the model's max_position_embeddings, on a CPU less "
        "where memory does not hold them for all sequences at once",
    )
    step_tokens: int | None = Field(
        None,
        ge=1,
        description="token budget of one step; long prompts are cut into chunks that fit (chunked prefill); "
        "null = 256 on a CPU, 8192 on a GPU",
    )
    max_waiting: int = Field(1024, ge=0, description="requests that may wait for a slot; more are refused")
    backend: Backend | Literal["auto"] = Field(
        "auto",
        description="auto: vllm where it is installed and a replica has several GPUs, else native; native; vllm (the "
        "extra of this name); transformers for an architecture the native decoder does not know (slower)",
    )
    vllm: dict[str, bool | int | float | str] = Field(
        {}, description="for vllm: further arguments of its engine by their names, such as gpu_memory_utilization"
    )
    device: Literal["auto", "cpu", "cuda"] = runtime(
        "auto",
        "where the native backend computes; auto = on a GPU where this process has one, with paged keys and values",
    )
    tensor_parallel: int = runtime(
        1, "devices of one machine that a model is cut over; on CPUs it is for tests only", ge=1
    )
    precision: Precision | Literal["auto"] = Field(
        "auto",
        description="auto: bfloat16 on a GPU, and on a CPU with AMX for a checkpoint that is stored in it, else "
        "float16_packed; float16_packed: weights in half precision, sums in float32 (half the memory, relative error "
        "2e-4); float32: answers identical to transformers'; bfloat16: weights in it, sums in float32 (relative error "
        "2e-3); int8: a quarter of the memory, checked at load against max_loss_increase",
    )
    kv_precision: Literal["auto", "fp8"] = Field(
        "auto",
        description="keys and values on a GPU. auto: as the products; fp8: e4m3 with a scale a token and head (half "
        "of bfloat16's memory, so twice the tokens; GPUs from compute capability 8.9)",
    )
    max_loss_increase: float = Field(
        0.02, ge=0, description="int8 is refused when it raises the loss on a built-in text by more nats a token"
    )
    prefix_cache: bool = runtime(True, "whether requests with the same beginning share its computation")
    block_tokens: int = runtime(16, "tokens in a block of the prefix cache", ge=1, le=1024)
    cache_tokens: int | None = runtime(
        None, "tokens the prefix cache holds; null = as many as all slots, if memory allows", ge=1
    )
    speculation: Speculation | None = runtime(None, "guess tokens ahead; null = off; answers stay the same")
    threads: int | None = Field(None, ge=1, description="torch threads; null = the cores this process may use")
    cache_bytes: Bytes | None = Field(
        None, description="bound on the key/value cache in bytes; null = 60 % of the memory available at start"
    )

    def placed(self, gpus: float) -> Self:
        """The same for a process that has been given so many GPUs: `device: auto` means them, or a CPU where there are
        none, and `backend: auto` is native unless they are several.

        Raises RecipeError where the model is to be cut over more of them.
        """
        if self.device != "cpu" and self.tensor_parallel > 1 and 0 < gpus < self.tensor_parallel:
            raise RecipeError(
                f"the model is to be cut over {self.tensor_parallel} GPUs, the replica has {gpus:g}",
                place="engine.tensor_parallel",
                mend=f"give resources.gpus_per_worker: {self.tensor_parallel}",
            )
        device = ("cuda" if gpus else "cpu") if self.device == "auto" else self.device
        one = device == "cpu" or gpus <= 1
        return self.model_copy(update={"device": device, "backend": "native" if self.backend == "auto" and one
                                       else self.backend})  # fmt: skip
