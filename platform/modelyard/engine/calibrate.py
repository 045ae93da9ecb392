"""The gate before 8-bit weights: how much worse does the model predict a text it should know how to read?"""

from __future__ import annotations

import torch

from modelyard.engine.batch import lay_out
from modelyard.engine.decoder import Decoder
from modelyard.engine.request import Request
from modelyard.engine.scheduler import Piece, Sequence
from modelyard.engine.tokenizer import Tokenizer
from modelyard.engine.weights import Weights
from modelyard.errors import ResourceError

TEXT = """The library opens at nine in the morning and closes at six, except on Sundays. Anyone who lives in the town
may borrow up to ten books for three weeks. Last year more than forty thousand people came through its doors, and most
of them were looking for a quiet place to read. "We never expected this," said the director, "when we moved from the old
school in 1987."

def average(numbers):
    # An empty list has no average.
    if not numbers:
        return None
    return sum(numbers) / len(numbers)

Water boils at 100 degrees Celsius at sea level, but on a high mountain it boils sooner, because the air is thinner.
How long should an egg be cooked there? Longer than at home: the water is not as hot. To make the dough, mix 500 g of
flour with a little salt, add 300 ml of warm water and the yeast, and wait for an hour until it has doubled.
"""
LONGEST = 256


def pack_int8(weights: Weights, decoder: Decoder, tokenizer: Tokenizer | None, max_increase: float) -> float:
    """Turns a float32 model's matrices to 8 bits and returns by how much its loss on `TEXT` rose, in nats a token.

    Without a tokenizer the text's bytes stand for tokens. Raises ResourceError when the loss rises by more than
    `max_increase`.
    """
    vocabulary = weights.config.vocabulary
    tokens = tokenizer.encode(TEXT) if tokenizer else [b % vocabulary for b in TEXT.encode()]
    tokens = tokens[: min(LONGEST, decoder.cache.data.shape[-2])]
    before = _loss(decoder, tokens)
    weights.pack("int8")
    rise = _loss(decoder, tokens) - before
    if not rise <= max_increase:
        raise ResourceError(
            f"int8 raises the loss from {before:.3f} by {rise:.3f} nats a token, {max_increase} are allowed",
            place="engine.precision",
            mend="use float16_packed, or raise engine.max_loss_increase",
        )
    return rise


def _loss(decoder: Decoder, tokens: list[int]) -> float:
    request = Request("calibrate", tuple(tokens), prompt_logprobs=0, task="score")
    sequence = Sequence(request, 0, 0.0, tokens, 0, 0, slot=0)
    hidden = decoder.forward(lay_out([Piece(sequence, 0, len(tokens))]))
    logits = decoder.logits(hidden)
    return float(torch.nn.functional.cross_entropy(logits[: len(tokens) - 1], torch.tensor(tokens[1:])))
