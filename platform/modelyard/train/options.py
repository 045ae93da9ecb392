"""How to train: budget, batch, optimizer, schedule, precision, checkpoints. Light: read by `plan` without torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from modelyard.recipe.schema import Options, runtime
from modelyard.train.batch_plan import BatchPlan
from modelyard.train.method_options import (
    BatchWarmupOptions,
    CompressOptions,
    DenoisingOptions,
    EmaOptions,
    MixtureOptions,
    RoutingOptions,
)
from modelyard.train.run_options import ProfileRange, SampleOptions, SpikeOptions, StopOptions

OBJECTIVE = r"^(causal_lm|prefix_lm|span_corruption|completion_lm|[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*)$"
"""Names of objectives, or the import path of one."""


class ParallelOptions(Options):
    """Degrees of the device mesh; their product is the number of workers."""

    data: int = Field(1, ge=1, description="replicas of the whole layout; with shard 1 this is DDP, above it HSDP")
    shard: int | None = Field(
        None, ge=1, description="workers one copy of parameters, gradients and optimizer is split over; null = the rest"
    )
    tensor: int = Field(1, ge=1, description="workers the matrices of a layer are split over, column then row")
    sequence: bool | int | None = Field(
        None, description="sequence parallelism on the tensor axis: norms and residuals split too; null = with tensor"
    )
    pipeline: int = Field(1, ge=1, description="stages the layers are split into, one worker after the other")
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv", "dualpipev"] = Field(
        "1f1b", description="order of forward and backward in a pipeline; zbv and dualpipev place stages in a V"
    )
    virtual: int | None = Field(
        None, ge=1, description="chunks of layers a pipeline worker holds; null = 1, or 2 where the schedule needs them"
    )
    context: int = Field(1, ge=1, description="workers one sequence is split over (Ulysses: heads move, not sequences)")
    expert: int = Field(1, ge=1, description="workers the experts of a layer are spread over; each reads its own data")
    reshard: bool = Field(
        True, description="drop gathered parameters after forward (ZeRO-3); false keeps them for backward (ZeRO-2)"
    )
    offload: bool = Field(False, description="keep sharded parameters and optimizer in the host's memory")
    prefetch: int = Field(
        1, ge=0, description="blocks whose parameters are gathered ahead of use; 1 = FSDP's own overlap"
    )

    @property
    def chunks(self) -> int:
        """Chunks of layers a pipeline worker holds."""
        if self.virtual is not None:
            return self.virtual
        return 1 if self.schedule in ("gpipe", "1f1b") else 2


class TrainOptions(Options):
    """One budget (`steps`, `tokens` or `epochs`), one global batch, an optimizer, warm-up and decay."""

    steps: int | None = Field(None, ge=1, description="optimizer steps to take; one of steps, tokens, epochs")
    tokens: int | None = Field(None, ge=1, description="tokens to train on; one of steps, tokens, epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; the default budget is 1")
    global_batch: int = Field(32, ge=1, description="sequences an optimizer step, over all workers together")
    batch_warmup: BatchWarmupOptions | None = Field(None, description="a batch that rises at first; null = constant")
    mixture: MixtureOptions | None = Field(None, description="how often each source is drawn; null = as they are")
    objective: str | None = Field(
        None,
        pattern=OBJECTIVE,
        description="causal_lm, prefix_lm, span_corruption, completion_lm, or package.module:function of your own; "
        "null = the stage's usual one (pretrain: causal_lm, finetune: completion_lm)",
    )
    denoising: DenoisingOptions | None = Field(None, description="for span_corruption; null = T5's 15 % in spans of 3")
    optimizer: Literal["adamw", "adamw8bit", "lamb", "adafactor", "lion", "muon"] = Field(
        "adamw",
        description="lamb: very large batches; adafactor: little memory; lion: a tenth of the rate; muon: matrices by "
        "Muon, the rest by AdamW at the same rate; adamw8bit: torchao, extra `torchao`",
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak rate (small models: 1e-3; 1 B: 3e-4; 70 B: 1.5e-4)")
    warmup: float = Field(
        0.05, ge=0, description="linear warm-up: a share of the steps when below 1, else steps (Llama 2: 2000)"
    )
    schedule: Literal["cosine", "linear", "wsd", "one-cycle", "constant"] = Field(
        "cosine",
        description="decay after the warm-up; wsd stays flat and decays over the last fifth; one-cycle rises along a "
        "cosine from 1/25 (give it a warmup of 0.3)",
    )
    floor: float = Field(0.1, ge=0, le=1, description="last rate as a share of the peak (Chinchilla, Llama 2: 0.1)")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled decay of matrices, not of norms and embeddings (GPT-3)"
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.95), description="moment decay rates of AdamW (GPT-3, Llama), LAMB and Lion"
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="decay of Muon's momentum (Jordan 2024)")
    epsilon: float = Field(1e-8, gt=0, description="AdamW denominator offset (Kingma and Ba 2015)")
    clip: float | None = Field(1.0, gt=0, description="largest global gradient norm (GPT-3); null = no clipping")
    seed: int = Field(0, ge=0, description="decides initial weights, data order and dropout")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="type of products; weights, optimizer and reductions are fp32 in every case. auto = bf16 on CUDA, "
        "fp32 on a CPU; fp16 scales the loss; fp8 needs torchao and a GPU with fp8 units",
    )
    ema: EmaOptions | None = Field(None, description="average of the weights over steps; null = none")
    document_mask: bool = Field(
        False, description="whether attention stops at document boundaries inside a packed sequence (Llama 3: yes)"
    )
    routing: RoutingOptions | None = Field(
        None,
        description="losses and capacity of a mixture of experts, for objectives that count tokens; null = their "
        "defaults in pre-training, nothing elsewhere",
    )
    compress: CompressOptions | None = Field(
        None, description="compression of the gradients that replicas exchange; null = none"
    )
    bad_steps: int = Field(
        3, ge=0, description="updates in a row that may be skipped for a non-finite loss or gradient before giving up"
    )
    spikes: SpikeOptions | None = Field(None, description="what to do when the loss jumps; null = nothing")
    stop: StopOptions | None = Field(None, description="when to end before the budget; null = never")
    micro_batch: int | None = runtime(
        None, "sequences a forward pass on one worker; null = 16, or fewer if the worker's share is smaller", ge=1
    )
    parallel: ParallelOptions = runtime(ParallelOptions(), "degrees of the device mesh")
    recompute: Literal["none", "selective", "full"] = runtime(
        "none", "activations of a block computed again in backward; selective keeps products of matrices and attention"
    )
    compile: bool = runtime(False, "compile each block with torch.compile")
    attention: Literal["sdpa", "flex"] = runtime(
        "sdpa", "flex: FlexAttention, which skips what masks of packed documents leave empty; CUDA only"
    )
    checkpoint_every: int = runtime(100, "steps between checkpoints", ge=1)
    keep_checkpoints: int = runtime(2, "newest checkpoints kept", ge=1)
    keep_best: int = runtime(0, "checkpoints kept besides, of the lowest held-out loss (needs evaluate_every)", ge=0)
    keep_every: int | None = runtime(None, "checkpoints kept besides: those at a multiple of this step", ge=1)
    async_checkpoints: bool = runtime(True, "write checkpoints beside training, which pauses only for the copy")
    evaluate_every: int = runtime(0, "steps between held-out evaluations; 0 = only at the end", ge=0)
    evaluate_sequences: int = runtime(256, "held-out sequences of an evaluation on the way; the last uses all", ge=1)

    samples: SampleOptions | None = runtime(None, "text the model writes on the way, for the report; null = none")
    profile: ProfileRange | None = runtime(None, "steps to profile, `steps=10..12`; null = none")
    step_timeout: float = runtime(
        1800.0, "seconds without a finished step after which all stacks are dumped and the worker ends; 0 = never", ge=0
    )

    @model_validator(mode="after")
    def _one_budget(self) -> TrainOptions:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one budget, not {' and '.join(given)}")
        if self.batch_warmup is not None and self.batch_warmup.sequences > self.global_batch:
            raise ValueError("batch_warmup.sequences is above global_batch: a batch warm-up rises")
        return self

    def total_steps(self, sequences: int, sequence_length: int) -> int:
        """Optimizer steps for a data set of `sequences` of `sequence_length` tokens; at least one."""
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return self.batches.steps(round(self.tokens / sequence_length))
        return self.batches.steps((self.epochs or 1.0) * sequences)

    @property
    def batches(self) -> BatchPlan:
        """How many sequences each step reads."""
        if self.batch_warmup is None:
            return BatchPlan(self.global_batch, self.global_batch)
        return BatchPlan(self.global_batch, self.batch_warmup.sequences, self.batch_warmup.steps)

    def evaluation(self, done: int) -> tuple[bool, int]:
        """Whether the held-out loss is measured after `done` steps, and on how many sequences at most."""
        if self.stop is not None and done % self.stop.every == 0:
            return True, self.stop.sequences
        return bool(self.evaluate_every) and done % self.evaluate_every == 0, self.evaluate_sequences

    def warmup_steps(self, steps: int) -> int:
        """Warm-up in steps; at most half the run when given as a number of steps."""
        return math.ceil(self.warmup * steps) if self.warmup < 1 else min(int(self.warmup), max(1, steps // 2))
