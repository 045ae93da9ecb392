"""Chooses the next token of every sequence in a step, each by its own parameters.

Every choice depends only on the row's logits, the request's parameters, its seed and the position: never on
the other rows. Randomness is a function of (seed, position), so a request that is computed again after
preemption, or beside other requests, continues in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modelyard.engine.request import Sampling, TokenLogprob
from modelyard.engine.scheduler import Sequence

SHORTLIST = 256
"""Candidates looked at before the whole vocabulary is sorted; enough for nearly every top-k, top-p, min-p."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token. `token` is -1 when the logits are not finite."""

    token: int
    logprob: TokenLogprob | None = None


@torch.inference_mode()
def sample(logits: Tensor, sequences: list[Sequence], ahead: list[int] | None = None) -> list[Choice]:
    """Chooses one token a row.

    Args:
        logits: float32 [rows, vocabulary]; may be changed in place.
        sequences: the sequence of each row.
        ahead: how many guessed tokens lie between the sequence's last one and the row's choice; None = none.

    Returns:
        One choice a row, in order.
    """
    reports = _Reports(logits, sequences)
    for row, sequence in enumerate(sequences):
        if sequence.request.sampling.penalized:
            _penalize(logits[row], sequence)
        if sequence.matcher is not None:
            sequence.matcher.restrict(logits[row])
    ahead = ahead or [0] * len(sequences)
    best, tokens = logits.max(dim=-1)
    chosen: list[int] = tokens.tolist()
    rows = [i for i, s in enumerate(sequences) if not s.request.sampling.greedy]
    finite = best.isfinite().tolist()
    rows = [i for i in rows if finite[i]]
    if rows:
        places = [len(sequences[i].tokens) + ahead[i] for i in rows]
        drawn = _draw(logits[rows], [sequences[i] for i in rows], places)
        for row, token in zip(rows, drawn, strict=True):
            chosen[row] = token
    return [Choice(token, reports.of(row, token)) if finite[row] else Choice(-1) for row, token in enumerate(chosen)]


def prompt_logprobs(logits: Tensor, tokens: list[int], rivals: int) -> list[TokenLogprob]:
    """Log-probabilities of given next tokens. logits: [rows, vocabulary], tokens: one a row."""
    values = logits.log_softmax(-1)
    chosen = values.gather(1, torch.tensor(tokens)[:, None]).squeeze(1).tolist()
    if not rivals:
        return [TokenLogprob(t, v) for t, v in zip(tokens, chosen, strict=True)]
    top = values.topk(min(rivals, values.shape[1]))
    pairs = zip(tokens, chosen, top.indices.tolist(), top.values.tolist(), strict=True)
    return [TokenLogprob(t, v, tuple(zip(ids, ps, strict=True))) for t, v, ids, ps in pairs]


class _Reports:
    """Log-probabilities of the rows that ask for them, of the model's own distribution."""

    def __init__(self, logits: Tensor, sequences: list[Sequence]) -> None:
        self._counts = {i: n for i, s in enumerate(sequences) if (n := s.request.sampling.logprobs) is not None}
        self._rows = {i: logits[i].log_softmax(-1) for i in self._counts}

    def of(self, row: int, token: int) -> TokenLogprob | None:
        if row not in self._counts:
            return None
        values = self._rows[row]
        top = values.topk(min(self._counts[row], len(values))) if self._counts[row] else None
        rivals = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ()
        return TokenLogprob(token, float(values[token]), rivals)


def _penalize(row: Tensor, sequence: Sequence) -> None:
    """Bias and penalties on one row [vocabulary], in place."""
    p = sequence.request.sampling
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(list(set(sequence.tokens)))
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if sequence.output_counts and (p.presence_penalty or p.frequency_penalty):
        ids = torch.tensor(list(sequence.output_counts))
        times = torch.tensor(list(sequence.output_counts.values()), dtype=torch.float32)
        row[ids] -= p.presence_penalty + p.frequency_penalty * times
    if p.logit_bias:
        row[torch.tensor(list(p.logit_bias))] += torch.tensor(list(p.logit_bias.values()), dtype=torch.float32)


def _draw(logits: Tensor, sequences: list[Sequence], places: list[int]) -> list[int]:
    """Draws from each row's tempered and filtered distribution by inverting its cumulative sum.

    `places` are the positions the chosen tokens will have.
    """
    parameters = [s.request.sampling for s in sequences]
    temperature = torch.tensor([p.temperature for p in parameters])
    # Shifted by the maximum first: a tiny temperature must not overflow.
    scaled = (logits - logits.max(dim=-1, keepdim=True).values) / temperature[:, None]
    uniform = [_uniform(s.seed, place) for s, place in zip(sequences, places, strict=True)]
    filtered = [i for i, p in enumerate(parameters) if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0]
    plain = [i for i in range(len(parameters)) if i not in set(filtered)]
    drawn = [0] * len(parameters)
    if plain:
        picks = _invert(scaled[plain].softmax(-1), [uniform[i] for i in plain])
        for i, pick in zip(plain, picks, strict=True):
            drawn[i] = pick
    if filtered:
        rows = _draw_filtered(scaled[filtered], [parameters[i] for i in filtered], [uniform[i] for i in filtered])
        for i, pick in zip(filtered, rows, strict=True):
            drawn[i] = pick
    return drawn


def _draw_filtered(scaled: Tensor, parameters: list[Sampling], uniform: list[float]) -> list[int]:
    total = scaled.logsumexp(-1, keepdim=True)
    values, ids = scaled.topk(min(SHORTLIST, scaled.shape[-1]), dim=-1)
    probabilities = (values - total).exp()
    mass = probabilities.double().sum(-1).tolist()
    smallest = probabilities[:, -1].tolist()
    largest = probabilities[:, 0].tolist()
    drawn = []
    for row, p in enumerate(parameters):
        enough = (
            values.shape[-1] == scaled.shape[-1]
            or 0 < p.top_k <= SHORTLIST
            or (p.top_k == 0 and mass[row] >= p.top_p + 1e-6)
            or smallest[row] < p.min_p * largest[row]
        )
        if enough:
            candidates, order = probabilities[row], ids[row]
        else:
            candidates, order = (scaled[row] - total[row]).exp().sort(descending=True)
        pick = _invert(_filter(candidates, p)[None], [uniform[row]])[0]
        drawn.append(int(order[pick]))
    return drawn


def _filter(probabilities: Tensor, p: Sampling) -> Tensor:
    """Zeroes what top-k, then top-p, then min-p leave out. probabilities: descending [candidates]."""
    kept = probabilities.double()
    if p.top_k > 0:
        kept = kept[: p.top_k]
    if p.top_p < 1.0:
        whole = kept.sum() if p.top_k > 0 else 1.0  # nucleus of what top-k left
        before = kept.cumsum(0) - kept
        kept = kept[: max(1, int((before < p.top_p * whole).sum()))]
    if p.min_p > 0.0:
        kept = kept[: max(1, int((kept >= p.min_p * kept[0]).sum()))]
    return kept


def _invert(probabilities: Tensor, uniform: list[float]) -> list[int]:
    """Index where the cumulative sum first exceeds u times the total; never an index of probability zero."""
    sums = probabilities.double().cumsum(-1)
    targets = torch.tensor(uniform, dtype=torch.float64)[:, None] * sums[:, -1:]
    picks = torch.searchsorted(sums, targets, right=True).squeeze(-1)
    return [int(i) for i in picks.clamp_(max=sums.shape[-1] - 1)]


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position): two rounds of splitmix64 (Steele et al., OOPSLA 2014)."""
    return (_mix(_mix(seed & _MASK) ^ position) >> 11) * math.ldexp(1.0, -53)


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
