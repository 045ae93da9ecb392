"""Chooses the next token of every sequence in a step, each by its own parameters.

Every choice depends only on the row's logits, the request's parameters, its seed and the position: never on
the other rows. Randomness is a function of (seed, position), so a request that is computed again after
preemption, or beside other requests, continues in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modelyard.engine.kernels import largest
from modelyard.engine.request import Sampling, TokenLogprob
from modelyard.engine.scheduler import Sequence

SHORTLIST = 256
"""Candidates looked at before the whole vocabulary is sorted; enough for nearly every top-k, top-p, min-p."""

_MASK = (1 << 64) - 1


@dataclass(slots=True)
class Choice:
    """A chosen token. `token` is -1 when the logits are not finite."""

    token: int
    logprob: TokenLogprob | None = None


@torch.inference_mode()
def sample(logits: Tensor, sequences: list[Sequence], ahead: list[int] | None = None) -> list[Choice]:
    """Chooses one token a row.

    Args:
        logits: float32 [rows, vocabulary] on any device; may be changed in place.
        sequences: the sequence of each row.
        ahead: how many guessed tokens lie between the sequence's last one and the row's choice; None = none.

    Returns:
        One choice a row, in order.
    """
    reports = _Reports(logits, sequences)
    for row, sequence in enumerate(sequences):
        if sequence.penalized:
            _penalize(logits[row], sequence)
        if sequence.matcher is not None:
            sequence.matcher.restrict(logits[row])
    ahead = ahead or [0] * len(sequences)
    highest, chosen = _most_likely(logits)
    finite = [math.isfinite(value) for value in highest]
    rows = [i for i, s in enumerate(sequences) if finite[i] and not s.greedy]
    if rows:
        places = [len(sequences[i].tokens) + ahead[i] for i in rows]
        wanted = logits if len(rows) == len(logits) else logits[rows]
        drawn = _draw(wanted, [sequences[i] for i in rows], places)
        for row, token in zip(rows, drawn, strict=True):
            chosen[row] = token
    found = reports.of(chosen)
    return [Choice(token, found.get(row)) if finite[row] else Choice(-1) for row, token in enumerate(chosen)]


def _most_likely(logits: Tensor) -> tuple[list[float], list[int]]:
    """The highest logit of every row, and its token."""
    if logits.is_cpu and logits.dtype == torch.float32:
        values, places = np.empty(len(logits), np.float32), np.empty(len(logits), np.int64)
        largest(logits.contiguous().numpy(), values, places)
        return values.tolist(), places.tolist()
    best, tokens = logits.max(dim=-1)
    # One wait for the device, not two: token ids are exact in float64.
    highest, most_likely = torch.stack([best.double(), tokens.double()]).tolist()
    return highest, [int(token) for token in most_likely]


def prompt_logprobs(logits: Tensor, tokens: list[int], rivals: int) -> list[TokenLogprob]:
    """Log-probabilities of given next tokens. logits: [rows, vocabulary], tokens: one a row."""
    return _reported(logits.log_softmax(-1), tokens, [rivals] * len(tokens))


def _reported(values: Tensor, tokens: list[int], rivals: list[int]) -> list[TokenLogprob]:
    """Log-probabilities of one token a row and of the row's most likely ones. values: [rows, vocabulary]."""
    chosen = values.gather(1, torch.tensor(tokens, device=values.device)[:, None]).squeeze(1).tolist()
    most = min(max(rivals), values.shape[1])
    if not most:
        return [TokenLogprob(t, v) for t, v in zip(tokens, chosen, strict=True)]
    top = values.topk(most)
    rows = zip(tokens, chosen, top.indices.tolist(), top.values.tolist(), rivals, strict=True)
    return [TokenLogprob(t, v, tuple(zip(ids, ps, strict=True))[:n]) for t, v, ids, ps, n in rows]


class _Reports:
    """Log-probabilities of the rows that ask for them, of the model's own distribution."""

    def __init__(self, logits: Tensor, sequences: list[Sequence]) -> None:
        self._counts = {i: n for i, s in enumerate(sequences) if (n := s.request.sampling.logprobs) is not None}
        rows = list(self._counts)
        if rows:
            self._values = (logits if len(rows) == len(logits) else logits[rows]).log_softmax(-1)

    def of(self, chosen: list[int]) -> dict[int, TokenLogprob]:
        """Reports by row, for the chosen token of every row."""
        rows = list(self._counts)
        if not rows:
            return {}
        found = _reported(self._values, [chosen[i] for i in rows], list(self._counts.values()))
        return dict(zip(rows, found, strict=True))


def _penalize(row: Tensor, sequence: Sequence) -> None:
    """Bias and penalties on one row [vocabulary], in place."""
    p, device = sequence.request.sampling, row.device
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(list(set(sequence.tokens)), device=device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if sequence.output_counts and (p.presence_penalty or p.frequency_penalty):
        ids = torch.tensor(list(sequence.output_counts), device=device)
        times = torch.tensor(list(sequence.output_counts.values()), dtype=torch.float32, device=device)
        row[ids] -= p.presence_penalty + p.frequency_penalty * times
    if p.logit_bias:
        ids = torch.tensor(list(p.logit_bias), device=device)
        row[ids] += torch.tensor(list(p.logit_bias.values()), dtype=torch.float32, device=device)


def _draw(logits: Tensor, sequences: list[Sequence], places: list[int]) -> list[int]:
    """Draws from each row's tempered and filtered distribution by inverting its cumulative sum.

    `places` are the positions the chosen tokens will have.
    """
    parameters = [s.request.sampling for s in sequences]
    temperature = torch.tensor([p.temperature for p in parameters], device=logits.device)
    # Shifted by the maximum first: a tiny temperature must not overflow.
    scaled = (logits - logits.max(dim=-1, keepdim=True).values) / temperature[:, None]
    uniform = [_uniform(s.seed, place) for s, place in zip(sequences, places, strict=True)]
    filtered = [i for i, p in enumerate(parameters) if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0]
    plain = [i for i in range(len(parameters)) if i not in set(filtered)]
    drawn = [0] * len(parameters)
    for rows, draw in ((plain, _draw_plain), (filtered, _draw_filtered)):
        if rows:
            wanted = scaled if len(rows) == len(scaled) else scaled[rows]
            picks = draw(wanted, [parameters[i] for i in rows], [uniform[i] for i in rows])
            for i, pick in zip(rows, picks, strict=True):
                drawn[i] = pick
    return drawn


def _draw_plain(scaled: Tensor, parameters: list[Sampling], uniform: list[float]) -> list[int]:
    return _invert(scaled.softmax(-1), uniform)


def _draw_filtered(scaled: Tensor, parameters: list[Sampling], uniform: list[float]) -> list[int]:
    total = scaled.logsumexp(-1, keepdim=True)
    values, ids = scaled.topk(min(SHORTLIST, scaled.shape[-1]), dim=-1)
    probabilities = (values - total).exp().cpu()  # few: what follows is many small steps
    ids = ids.cpu()
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
            candidates, order = (scaled[row] - total[row]).exp().cpu().sort(descending=True)
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
    targets = torch.tensor(uniform, dtype=torch.float64, device=sums.device)[:, None] * sums[:, -1:]
    picks: list[int] = torch.searchsorted(sums, targets, right=True).squeeze(-1).clamp_(max=sums.shape[-1] - 1).tolist()
    return picks


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position): two rounds of splitmix64 (Steele et al., OOPSLA 2014)."""
    return (_mix(_mix(seed & _MASK) ^ position) >> 11) * math.ldexp(1.0, -53)


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
