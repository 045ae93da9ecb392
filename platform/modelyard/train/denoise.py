"""Prefix language modelling and span corruption, for decoders and for encoder-decoders.

Where a sequence is cut, and what is hidden in it, is drawn from a hash of its tokens: any worker, any batch and any
resumed run cut it alike, and so does every epoch. The work is a few tensor operations on the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modelyard.errors import RecipeError
from modelyard.train.head import IGNORE, language_loss
from modelyard.train.method_options import DenoisingOptions
from modelyard.train.objective import Batch, Objective, next_tokens

_EXTREME = (0.5, 32.0)
"""Share hidden and mean span of UL2's X denoisers."""
_MASK = {30: (1 << 34) - 1, 27: (1 << 37) - 1, 31: (1 << 33) - 1}


def prefix_lm(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prefix language model (Raffel et al. 2019, figure 4): a prefix sees all of itself, what follows is predicted.

    `batch` as in `causal_lm`; the prefix is 1 to L-1 tokens long. Attention needs a mask of B x L x L booleans.
    """
    ids = batch["input_ids"]
    length = ids.shape[1]
    prefix = 1 + _draw(ids, 1, 0)[:, :1] % (length - 1)
    learnt = (batch["document_ids"] >= 0) & (torch.arange(length, device=ids.device) >= prefix)
    inputs = {"input_ids": ids, "attention_mask": prefix_mask(prefix, length), "use_cache": False}
    return language_loss(model, inputs, next_tokens(ids, learnt), sparse=True)


def prefix_mask(prefix: torch.Tensor, length: int) -> torch.Tensor:
    """Who sees whom: bool [B, 1, L, L], true where row i may look at column j; `prefix` int [B, 1]."""
    place = torch.arange(length, device=prefix.device)
    causal = place[None, :] <= place[:, None]
    return (causal[None] | (place < prefix)[:, None, :])[:, None]


def span_corruption(options: DenoisingOptions) -> Objective:
    """Spans are replaced by sentinels, and predicted: sentinel, span, sentinel, span ..., sentinel.

    An encoder-decoder reads the corrupted text in its encoder. A decoder reads it as a prefix that sees all of itself,
    with the targets after it; so that both fit, the last tokens of a sequence stay out. Sentinels are the last ids of
    the model's vocabulary, counted down: build the model with about 100 rows more than the tokenizer has
    (`model.vocab_size`).
    """

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config: Any = model.config
        ids, real = batch["input_ids"], batch["document_ids"] >= 0
        top = int(config.vocab_size) - 1
        if getattr(config, "is_encoder_decoder", False):
            source, target = corrupt(ids, real, options, top, ids.shape[1])
            return _encoder_decoder_loss(model, source, target)
        source, target = corrupt(ids, real, options, top, room_for(ids.shape[1], options))
        return _decoder_loss(model, source, target, ids.shape[1])

    objective.__name__ = f"span_corruption {options.model_dump()}"
    return objective


def _encoder_decoder_loss(
    model: nn.Module, source: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config: Any = model.config
    begin = getattr(config, "decoder_start_token_id", None) or 0
    shifted = torch.cat([torch.full_like(target[:, :1], begin), target[:, :-1]], dim=1).clamp_min(0)
    inputs = {
        "input_ids": source.clamp_min(0),
        "attention_mask": (source >= 0).long(),
        "decoder_input_ids": shifted,
        "use_cache": False,
    }
    return language_loss(model, inputs, target, sparse=True)


def _decoder_loss(
    model: nn.Module, source: torch.Tensor, target: torch.Tensor, length: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Source and target of every row in a row, both without their padding in between; [B, length]."""
    lengths, widths = (source >= 0).sum(1, keepdim=True), (target >= 0).sum(1, keepdim=True)
    place = torch.arange(length, device=source.device)[None].expand(len(source), -1)
    after = place - lengths
    ids = torch.where(
        after < 0,
        source.gather(1, place.clamp(max=source.shape[1] - 1)),
        target.gather(1, after.clamp(0, target.shape[1] - 1)),
    )
    learnt = (after >= 0) & (after < widths)
    ids = ids.masked_fill(after >= widths, 0).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": prefix_mask(lengths, length), "use_cache": False}
    return language_loss(model, inputs, next_tokens(ids, learnt), sparse=True)


def kinds(options: DenoisingOptions, length: int) -> list[tuple[float, int, int]]:
    """The denoisers in use: share of sequences, hidden tokens, spans, for sequences of `length` tokens."""
    found = []
    rest = 1 - options.extreme - options.prefix
    for share, rate, span in ((rest, options.rate, options.span), (options.extreme, *_EXTREME)):
        hidden = min(max(round(length * rate), 1), length - 1)
        spans = min(max(round(hidden / span), 1), length - hidden)
        found.append((share, hidden, spans))
    found.append((options.prefix, max(1, length // 2), 1))
    return [kind for kind in found if kind[0] > 0]


def room_for(length: int, options: DenoisingOptions) -> int:
    """The most tokens whose corrupted form and targets together take at most `length`.

    Raises:
        RecipeError: not even four do.
    """
    for tokens in range(length, 3, -1):
        if all(tokens + 2 * spans + 1 <= length for _, _, spans in kinds(options, tokens)):
            return tokens
    raise RecipeError("sequences are too short for span corruption", place="denoising", mend="use longer sequences")


def check_sentinels(rows: int, vocab_size: int, options: DenoisingOptions, length: int) -> None:
    """Raises RecipeError where the model's vocabulary has no room for sentinels above the tokens' ids.

    Args:
        rows: of the model's vocabulary.
        vocab_size: ids of the tokens.
        options: the mixture of denoisers.
        length: tokens of a sequence.
    """
    need = 1 + max(spans for _, _, spans in kinds(options, length))
    if rows - vocab_size < need:
        raise RecipeError(
            f"span corruption needs {need} sentinels, the model has {rows - vocab_size} ids above the tokens'",
            place="model.vocab_size",
            mend=f"set model.vocab_size to at least {vocab_size + need}",
        )


def corrupt(
    ids: torch.Tensor, real: torch.Tensor, options: DenoisingOptions, top: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrupted text and targets of the first `length` tokens of every row, padded with `IGNORE` at their ends.

    Args:
        ids: int64 [B, L].
        real: bool [B, L], false at padding, which is neither read nor predicted.
        options: the mixture of denoisers.
        top: the first sentinel's id; the next is one less.
        length: tokens of a row that take part.

    Returns:
        int64 [B, S] and [B, T]; S and T depend on `options` and `length` alone.
    """
    ids, real = ids[:, :length], real[:, :length]
    ways = kinds(options, length)
    chance = (_draw(ids, 1, 1)[:, 0] % 1_000_003).double() / 1_000_003
    wide = max(length - hidden + spans for _, hidden, spans in ways), max(h + s + 1 for _, h, s in ways)
    source, target = (ids.new_full((len(ids), width), IGNORE) for width in wide)
    bounds = torch.tensor([share for share, _, _ in ways], dtype=torch.float64, device=ids.device).cumsum(0)
    way_of = torch.bucketize(chance, bounds[:-1], right=True)
    for way, (_, hidden, spans) in enumerate(ways):
        rows = (way_of == way).nonzero().squeeze(1)
        if not len(rows):
            continue
        chosen, at_end = ids[rows], options.prefix > 0 and way == len(ways) - 1
        noise = _tail(chosen, hidden) if at_end else noise_mask(chosen, hidden, spans)
        left, right = _split(chosen, real[rows], noise, top)
        source[rows, : left.shape[1]], target[rows, : right.shape[1]] = left, right
    return source, target


def noise_mask(ids: torch.Tensor, hidden: int, spans: int) -> torch.Tensor:
    """True at hidden tokens, [B, L]: `spans` spans of at least one, `hidden` in all, each after at least one visible.

    As in T5: hidden and visible tokens are both cut into `spans` parts at random, and the parts alternate.
    """
    count, length = ids.shape
    sizes = torch.stack(
        [_parts(ids, length - hidden, spans, 2), _parts(ids, hidden, spans, 3)], dim=2
    )  # [B, spans, visible and hidden]
    ends = sizes.reshape(count, -1).cumsum(1)
    segment = torch.searchsorted(
        ends, torch.arange(length, device=ids.device).expand(count, -1).contiguous(), right=True
    )
    return segment % 2 == 1


def _parts(ids: torch.Tensor, total: int, parts: int, salt: int) -> torch.Tensor:
    """Sizes of `parts` parts of at least one that sum to `total`, int64 [B, parts]."""
    inner = _draw(ids, max(total - 1, 1), salt)[:, : total - 1].argsort(1)[:, : parts - 1].sort(1).values + 1
    edge = inner.new_zeros((len(ids), 1))
    return torch.diff(torch.cat([edge, inner, edge + total], dim=1), dim=1)


def _tail(ids: torch.Tensor, hidden: int) -> torch.Tensor:
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, -hidden:] = True
    return mask


def _split(ids: torch.Tensor, real: torch.Tensor, noise: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrupted text and targets. All rows have as many hidden tokens and spans, so each is one block."""
    first = noise.clone()
    first[:, 1:] &= ~noise[:, :-1]
    sentinels = top + 1 - first.cumsum(1)
    known = ids.masked_fill(~real, IGNORE)
    source = torch.where(first, sentinels, known)[~noise | first].reshape(len(ids), -1)
    pairs = torch.stack([sentinels, known], dim=2).reshape(len(ids), -1)
    chosen = torch.stack([first, noise], dim=2).reshape(len(ids), -1)
    target = pairs[chosen].reshape(len(ids), -1)
    last = top - first.sum(1, keepdim=True)
    # A sequence that is all padding teaches nothing, sentinels included.
    target = torch.cat([target, last], dim=1).masked_fill(~real.any(1, keepdim=True), IGNORE)
    return source, target


def _draw(ids: torch.Tensor, count: int, salt: int) -> torch.Tensor:
    """Pseudo-random non-negative int64 [B, count], a function of each row's tokens and `salt`."""
    places = torch.arange(ids.shape[1], device=ids.device)
    row = (ids * (_mix(places + 1) | 1)).sum(1, keepdim=True)
    return _mix(_mix(row + salt) + _mix(torch.arange(count, device=ids.device) + 7)) & ((1 << 62) - 1)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """The finalizer of SplitMix64 on int64, which wraps; shifts are made logical by a mask."""
    words = (words ^ ((words >> 30) & _MASK[30])) * -0x40A7B892E31B1A47
    words = (words ^ ((words >> 27) & _MASK[27])) * -0x6B2FB644ECCEEE15
    return words ^ ((words >> 31) & _MASK[31])
