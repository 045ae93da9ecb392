"""Options of tokenization, and what every tokenizer trained here holds. Light: plans and schemas load it."""

from __future__ import annotations

from typing import Any

import xxhash
from pydantic import Field, model_validator

from modelyard.errors import StorageError
from modelyard.recipe.schema import Bytes, Options
from modelyard.storage import exists, join, read_bytes

END, USER, ASSISTANT, SYSTEM, PAD = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"
SPECIAL_TOKENS = (END, USER, ASSISTANT, SYSTEM, PAD)
MIN_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""Every byte and every special token has an id, so any text can be encoded."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class TrainTokenizerOptions(Options):
    """Training a byte-level BPE on the corpus, held-out documents apart."""

    vocab_size: int = Field(
        32_000,
        ge=MIN_VOCABULARY,
        le=1 << 24,
        description="entries of the vocabulary, special tokens included; default: Llama 2's size",
    )
    sample_bytes: Bytes = Field(
        100_000_000, ge=1, description="about how many bytes of text to train on, whole documents; own choice"
    )


class TokenizerOptions(Options):
    """Where the tokenizer comes from: `train` it, or take the files at `path`."""

    train: TrainTokenizerOptions | None = Field(None, description="train a byte-level BPE; null = use `path`")
    path: str | None = Field(
        None, description="a Hugging Face folder or a tokenizer.json, local or s3://; null = use `train`"
    )
    add: tuple[str, ...] = Field(
        (), description="words to add to the vocabulary: each becomes one token wherever a text holds it"
    )
    add_special: tuple[str, ...] = Field(
        (), description="special tokens to add, such as roles: a text that spells one stays text"
    )
    checksum: str | None = Field(
        None, description="xxh3-128 of the files at `path`; filled in, so that changed files are tokenized again"
    )

    @model_validator(mode="after")
    def _new(self) -> TokenizerOptions:
        added = (*self.add, *self.add_special)
        if len(set(added)) != len(added) or not all(token.strip() for token in added):
            raise ValueError("tokens to add must be distinct and hold more than blanks")
        return self

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        path, given = value.get("path"), value.get("checksum")
        if (value.get("train") is None) == (path is None):
            raise ValueError("give either train or path")
        if path is None:
            return value
        found = tokenizer_checksum(str(path))
        if given not in (None, found):
            raise ValueError(f"the files at {path} have checksum {found}, the recipe says {given}")
        return {**value, "checksum": found}


def tokenizer_uris(path: str) -> dict[str, str]:
    """File name -> URI of the tokenizer files at a folder, or of one `tokenizer.json`."""
    if path.endswith(".json"):
        return {"tokenizer.json": path}
    return {name: join(path, name) for name in TOKENIZER_FILES if exists(join(path, name))}


def tokenizer_checksum(path: str) -> str:
    """xxh3-128 over names and contents of the tokenizer files at `path`.

    Raises:
        ValueError: there is no `tokenizer.json`, or a file cannot be read.
    """
    files = tokenizer_uris(path)
    if "tokenizer.json" not in files:
        raise ValueError(f"there is no tokenizer.json in {path}: give a folder saved from a fast tokenizer")
    digest = xxhash.xxh3_128()
    for name, uri in files.items():
        try:
            content = read_bytes(uri)
        except StorageError as error:
            raise ValueError(f"the tokenizer {uri} cannot be read") from error
        digest.update(f"{name}:{len(content)}:".encode() + content)
    return digest.hexdigest()
