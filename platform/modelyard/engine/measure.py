"""What `score` and `embed` ask of a prompt, gathered chunk by chunk as its tokens are computed."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from modelyard.engine.batch import Span, StepBatch
from modelyard.engine.sampler import prompt_logprobs


class Reads(Protocol):
    """What a decoder makes of its last results."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens, float32 [rows, vocabulary]."""
        ...

    def vectors(self, hidden: Tensor) -> Tensor:
        """What embeddings are made of, [rows, hidden]."""
        ...


def gather(decoder: Reads, batch: StepBatch, hidden: Tensor) -> None:
    """Log-probabilities of prompt tokens and sums of prompt vectors, kept with their sequences.

    hidden: [wanted, hidden], the step's results.
    """
    for span in batch.spans:
        sequence = span.piece.sequence
        if not sequence.measured:
            continue
        if sequence.request.task == "embed":
            _pool(span, decoder.vectors(hidden[span.first : span.last]))
        elif sequence.request.prompt_logprobs is not None:
            _score(decoder, span, hidden[span.first : span.last])


def _pool(span: Span, hidden: Tensor) -> None:
    sequence, end = span.piece.sequence, span.piece.start + span.piece.count
    if sequence.request.pooling == "last":
        sequence.pool = hidden[-1]
        return
    fresh = hidden[len(hidden) - (end - sequence.pooled) :]
    total = fresh.sum(0)
    sequence.pool = total if sequence.pool is None else sequence.pool + total
    sequence.pooled = end


def _score(decoder: Reads, span: Span, hidden: Tensor) -> None:
    sequence, end = span.piece.sequence, span.piece.start + span.piece.count
    rivals = sequence.request.prompt_logprobs or 0
    first = sequence.request.logprobs_from + len(sequence.scored)  # the next prompt token to score
    last = min(end + 1, sequence.prompt_length)
    if first < last:
        offset = len(hidden) - (end - (first - 1))
        logits = decoder.logits(hidden[offset : offset + last - first])
        sequence.scored += prompt_logprobs(logits, sequence.tokens[first:last], rivals)
