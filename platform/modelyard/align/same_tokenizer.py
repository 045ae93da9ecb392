"""Whether a policy and its reward model mean the same by a token id. Light: `plan` asks without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modelyard.errors import DataError, RecipeError
from modelyard.models.vocabulary import extends_vocabulary


def check_same_tokenizer(policy: bytes, reward: bytes, name: str) -> None:
    """Token ids travel from the policy to its reward models as they are: both must mean the same by them.

    Args:
        policy: the policy's tokenizer.json.
        reward: the reward model's.
        name: of the reward model.

    Raises:
        RecipeError: they differ in tokens, merges or how text is cut up.
    """
    parts = ("normalizer", "pre_tokenizer", "model")
    one, other = (json.loads(text) for text in (policy, reward))
    # A token more at the end of either (padding, say) does no harm as long as the ids that are shared agree.
    same_ids = extends_vocabulary(policy, reward) or extends_vocabulary(reward, policy)
    if same_ids and all(_how(one.get(part)) == _how(other.get(part)) for part in parts):
        return
    raise RecipeError(
        "the reward model has another tokenizer than the policy: its token ids mean something else",
        place=f"inputs.{name}",
        mend="train the reward model from the policy's own base model",
    )


def _how(part: Any) -> Any:
    """A part of a tokenizer's description without its vocabulary."""
    return {key: value for key, value in part.items() if key != "vocab"} if isinstance(part, dict) else part


def read_tokenizer(folder: Path) -> bytes:
    """The folder's tokenizer.json. Raises DataError when there is none."""
    try:
        return (folder / "tokenizer.json").read_bytes()
    except OSError as error:
        raise DataError(f"the model has no tokenizer.json: {error}", place=str(folder)) from error
