"""Everything measured of one model, as one program: it runs under a debugger as well as on a worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from modelyard.errors import DataError
from modelyard.evaluate.generate import continue_prompts
from modelyard.evaluate.loss import Loss, heldout
from modelyard.evaluate.options import EvaluationOptions
from modelyard.evaluate.privacy import Emission, Extraction, Finding, Probe, Scan, emission, extraction, redact
from modelyard.models import count_parameters, load_model
from modelyard.tokens import TokenDataset
from modelyard.tokens.tokenizer import Encoder
from modelyard.train.heldout import heldout_loss
from modelyard.train.objective import completion_lm
from modelyard.train.pairs import PackedPairs, Pair, encode
from modelyard.train.parallel.strategy import Strategy
from modelyard.train.world import World

Done = Callable[[int], object]
_PROMPT_SHARE, _PROMPT_TOKENS = 4, 64
"""A sample is prompted with a quarter of a held-out sequence, at most 64 tokens."""


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        model: a Hugging Face folder with its tokenizer.
        tokens: a local copy of a tokenize artifact: `heldout/` and `tokenizer/`.
        pairs: held-out pairs, none = no completion loss.
        pair_length: tokens a pair may have, as in fine-tuning.
        probes: values to try to extract.
        known: (type, lower-case value) of all originals found, for the scan of free samples.
        options: how much.
        document_mask: whether the model was trained with documents kept apart.
        batch: sequences in a forward pass.
    """

    model: Path
    tokens: Path
    options: EvaluationOptions
    pairs: tuple[Pair, ...] = ()
    pair_length: int = 256
    probes: tuple[Probe, ...] = ()
    known: frozenset[Finding] = field(default=frozenset(), repr=False)
    document_mask: bool = False
    batch: int = 8

    @property
    def units(self) -> int:
        """Steps `done` will be told of, at most: sequences, probes, samples."""
        options = self.options
        sequences = options.max_sequences or len(TokenDataset.open(self.tokens / "heldout", verify=False))
        return sequences + len(self.probes) + options.privacy.free_samples + self.shown

    @property
    def shown(self) -> int:
        """Samples in the report: of held-out text, and as many answers to held-out pairs."""
        return self.options.samples + min(self.options.samples, len(self.pairs))


@dataclass(frozen=True)
class Sample:
    """One continuation: what the model was given, what it wrote, and what really followed. All scrubbed."""

    kind: str
    prompt: str
    answer: str
    reference: str


@dataclass(frozen=True)
class Measured:
    """All results of one model. Losses are nats a token; `completion` counts answer tokens only."""

    parameters: int
    loss: Loss
    perplexity: float
    bits_per_byte: float
    completion: float | None
    extraction: Extraction
    emission: Emission
    samples: tuple[Sample, ...]
    seconds: float


def measure(job: Job, scan: Scan, done: Done = lambda n: None) -> Measured:
    """Measures one model. The same job gives the same result on the same machine.

    Raises:
        DataError: a folder is damaged, the token shards were made by another tokenizer, or there are no
            held-out tokens.
    """
    began = time.monotonic()
    data = TokenDataset.open(job.tokens / "heldout")
    tokenizer = _tokenizer(job)
    model = load_model(job.model)
    _check_fits(model, tokenizer, data, job)
    if torch.cuda.is_available():
        cast(torch.nn.Module, model).cuda()
    loss = heldout(model, data, job.options.max_sequences, document_mask=job.document_mask, batch=job.batch, done=done)
    writer = Writer(model, tokenizer, done)
    return Measured(
        parameters=count_parameters(model),
        loss=loss,
        perplexity=loss.perplexity,
        bits_per_byte=loss.bits_per_byte(data.tokens, data.text_bytes),
        completion=_completion(model, tokenizer, job),
        extraction=_extract(writer, job),
        emission=_emit(writer, job, scan),
        samples=tuple(_samples(writer, data, job, scan)),
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True)
class Writer:
    """A model with its tokenizer: token prompts in, text out."""

    model: PreTrainedModel
    tokenizer: Any
    done: Done

    @property
    def end_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, none added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, ids: Iterable[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def write(self, prompts: Sequence[Sequence[int]], new_tokens: int, **how: Any) -> list[str]:
        """Continuations as text; greedy unless `how` says otherwise."""
        pad = self.tokenizer.pad_token_id
        pad = self.end_id if pad is None else int(pad)
        answers = continue_prompts(
            self.model, prompts, new_tokens, pad_id=pad, end_id=self.end_id, done=self.done, **how
        )
        return [self.text(answer) for answer in answers]


def _tokenizer(job: Job) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(job.model), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        mend = "copy the tokenizer files into it"
        raise DataError(f"the model folder has no tokenizer: {error}", place=str(job.model), mend=mend) from error
    if tokenizer.eos_token_id is None:
        raise DataError("the model's tokenizer names no eos_token", place=str(job.model))
    return tokenizer


def _check_fits(model: PreTrainedModel, tokenizer: Any, data: TokenDataset, job: Job) -> None:
    ours = Encoder.open(job.tokens / "tokenizer").tokenizer.get_vocab(with_added_tokens=True)
    if tokenizer.get_vocab() != ours:
        raise DataError(
            "the held-out tokens were made by another tokenizer than the model's",
            place=str(job.model),
            mend="tokenize with `tokenizer: {path: <the model's folder>}`",
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and longest < data.sequence_length:
        raise DataError(
            f"sequences of {data.sequence_length:,} tokens are longer than the model's {longest:,}",
            place=str(job.model),
            mend="tokenize for evaluation with a shorter sequence_length",
        )


def _completion(model: PreTrainedModel, tokenizer: Any, job: Job) -> float | None:
    """Loss of the answers' tokens in held-out pairs, nats a token; None without pairs or template."""
    if not job.pairs or not getattr(tokenizer, "chat_template", None):
        return None
    encoded, _ = encode(job.pairs, tokenizer, job.pair_length)
    packed = PackedPairs.pack(encoded, job.pair_length, job.options.seed, tokenizer.pad_token_id or 0)
    alone = Strategy(model, World(0, 1, model.device))
    return heldout_loss(alone, completion_lm, packed, batch=job.batch)


def _extract(writer: Writer, job: Job) -> Extraction:
    if not job.probes:
        return Extraction({}, {})
    privacy = job.options.privacy
    prompts = [writer.ids(probe.context)[-privacy.context_tokens :] or [writer.end_id] for probe in job.probes]
    return extraction(job.probes, writer.write(prompts, privacy.new_tokens))


def _emit(writer: Writer, job: Job, scan: Scan) -> Emission:
    privacy = job.options.privacy
    if not privacy.free_samples:
        return Emission(0, {}, 0)
    prompts = [[writer.end_id]] * privacy.free_samples
    texts = writer.write(prompts, privacy.free_tokens, temperature=1.0, seed=job.options.seed)
    return emission(texts, scan, job.known)


def _samples(writer: Writer, data: TokenDataset, job: Job, scan: Scan) -> Iterable[Sample]:
    new = job.options.sample_tokens
    rows = _heldout_starts(data, job.options.samples)
    if rows:
        size = max(1, min(data.sequence_length // _PROMPT_SHARE, _PROMPT_TOKENS))
        prompts = [row[:size] for row in rows]
        references = [writer.text(row[size : size + new]) for row in rows]
        answers = writer.write(prompts, new)
        for prompt, answer, reference in zip(prompts, answers, references, strict=True):
            yield _shown("continuation", writer.text(prompt), answer, reference, scan)
    chosen = list(islice(job.pairs, job.options.samples))
    if chosen and getattr(writer.tokenizer, "chat_template", None):
        rendered = [
            writer.tokenizer.apply_chat_template(list(p.messages), tokenize=False, add_generation_prompt=True)
            for p in chosen
        ]
        answers = writer.write([writer.ids(text) for text in rendered], new)
        for pair, answer in zip(chosen, answers, strict=True):
            yield _shown("answer", pair.messages[-1]["content"], answer, pair.completion, scan)


def _heldout_starts(data: TokenDataset, count: int) -> list[list[int]]:
    """The first sequences of held-out text that are full."""
    batch = data.batch(np.arange(min(count, len(data))))
    full = (batch["document_ids"] >= 0).all(axis=1)
    return [row.tolist() for row in batch["input_ids"][full]]


def _shown(kind: str, prompt: str, answer: str, reference: str, scan: Scan) -> Sample:
    return Sample(kind, redact(prompt, scan), redact(answer, scan), redact(reference, scan))
