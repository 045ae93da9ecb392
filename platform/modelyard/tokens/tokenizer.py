"""Tokenizers: training a byte-level BPE, opening a given one, and turning documents into token ids.

Files are the ecosystem's: `tokenizer.json` and `tokenizer_config.json`, which transformers opens
offline. No transformers here: the `tokenizers` library alone starts in a tenth of the time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from modelyard.errors import DataError
from modelyard.storage import read_bytes
from modelyard.tokens.options import ASSISTANT, END, MIN_VOCABULARY, PAD, SPECIAL_TOKENS, SYSTEM, USER, tokenizer_uris
from modelyard.tokens.shards import token_dtype

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_WORDS = Regex(
    r"(?i:'(?:[sdmt]|ll|ve|re))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""Pieces that no merge crosses: words with the character before them, up to three digits, punctuation,
line ends, indentation. On 30 MB of documentation and code 5 % fewer tokens than GPT-2's pattern at 8,192."""

_END_NAMES = (END, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>")
_PIECE = 1 << 20
_BATCH = 1 << 22


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE.

    The result depends on the texts, not on their order or the number of threads: words are counted
    first, and equal pair counts are merged in the order of their ids.

    Args:
        texts: the sample.
        vocab_size: entries wanted, at least `MIN_VOCABULARY`; a small sample may yield fewer.

    Raises:
        DataError: there is no text, or the vocabulary cannot hold all bytes and special tokens.
    """
    if vocab_size < MIN_VOCABULARY:
        raise DataError(f"a vocabulary of {vocab_size} cannot hold all bytes", mend=f"ask for {MIN_VOCABULARY} or more")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(_WORDS, behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        # ByteLevel.alphabet() comes from a hash set: its order differs from process to process.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = _Counted(texts)
    tokenizer.train_from_iterator(seen, trainer)
    if not seen.any:
        raise DataError("there is no text to train a tokenizer on", mend="give more documents or a larger sample_bytes")
    return tokenizer


class _Counted:
    """Passes texts on and remembers whether any was not empty."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self.any = texts, False

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.any |= bool(text)
            yield text


def save_tokenizer(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Writes a tokenizer trained here as the files transformers opens, with the chat template."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1_000_000,
        "clean_up_tokenization_spaces": False,
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT, SYSTEM],
        "chat_template": CHAT_TEMPLATE,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def copy_tokenizer(source: str, folder: Path | str) -> None:
    """Copies a given tokenizer into a local folder.

    Args:
        source: an HF folder or one `tokenizer.json`, local or `s3://`.
        folder: where to; a `tokenizer_config.json` is written where the source has none.

    Raises:
        DataError: the source is not a fast tokenizer, or no end-of-text token can be told.
        StorageError: it cannot be read.
    """
    target = Path(folder)
    files = tokenizer_uris(source)
    if "tokenizer.json" not in files:
        mend = "give a folder with tokenizer.json (save_pretrained of a fast tokenizer) or that file"
        raise DataError("there is no tokenizer.json", place=source, mend=mend)
    target.mkdir(parents=True, exist_ok=True)
    for name, uri in files.items():
        (target / name).write_bytes(read_bytes(uri))
    encoder = Encoder.open(target)
    if not (target / "tokenizer_config.json").exists():
        end = encoder.tokenizer.id_to_token(encoder.end_id)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "pad_token": end}
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def extend_tokenizer(folder: Path | str, words: Sequence[str], special: Sequence[str]) -> int:
    """Adds tokens to the tokenizer in a local folder, after those it has; returns how many were new.

    A model that was trained with the tokenizer needs more embedding rows then: `models.embeddings`.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    tokenizer = Encoder.open(folder).tokenizer
    added: int = tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    added += tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    return added


@dataclass(frozen=True)
class Encoder:
    """A tokenizer ready for documents.

    Attributes:
        tokenizer: the loaded tokenizer.
        end_id: id of the token after every document.
        pad_id: id that fills the last sequence.
        vocab_size: largest id + 1.
    """

    tokenizer: Tokenizer
    end_id: int
    pad_id: int
    vocab_size: int

    @classmethod
    def open(cls, folder: Path | str) -> Encoder:
        """Opens a tokenizer folder.

        Raises:
            DataError: the files are damaged or name no end-of-text token.
        """
        place = Path(folder) / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(place))
        except Exception as error:  # the Rust side raises plain Exception for every kind of damage
            raise DataError(f"the tokenizer cannot be read: {error}", place=str(place)) from error
        config = _config(place.with_name("tokenizer_config.json"))
        end = _first_id(tokenizer, (_token(config, "eos_token"), *_END_NAMES))
        if end is None:
            mend = "name one as eos_token in tokenizer_config.json"
            raise DataError("the tokenizer names no end-of-text token", place=str(place), mend=mend)
        pad = _first_id(tokenizer, (_token(config, "pad_token"), PAD))
        # Text that spells a special token is text: a document must not end itself or speak as a user.
        tokenizer.encode_special_tokens = True
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        return cls(tokenizer, end, end if pad is None else pad, max(vocabulary.values()) + 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy type ids are kept in."""
        return np.dtype(token_dtype(self.vocab_size))

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Encodes documents, each followed by the end token.

        Documents go to the library in batches of about 4 MB and pieces of at most a million
        characters, cut at line ends, so memory does not grow with the input.

        Args:
            texts: n documents.

        Returns:
            all ids in one array, and the number of ids of each document, int64 [n].
        """
        parts: list[npt.NDArray[Any]] = []
        lengths = np.ones(len(texts), dtype=np.int64)
        end = np.array([self.end_id], dtype=self.dtype)
        for first, batch in _batches(texts):
            pieces = [_pieces(text) for text in batch]
            encodings = iter(self.tokenizer.encode_batch_fast(list(chain(*pieces)), add_special_tokens=False))
            for document, own in enumerate(pieces, first):
                for _ in own:
                    ids = np.array(next(encodings).ids, dtype=self.dtype)
                    lengths[document] += len(ids)
                    parts.append(ids)
                parts.append(end)
        return (np.concatenate(parts) if parts else end[:0]), lengths


def limit_threads(cpus: float) -> None:
    """Holds the library to a worker's cores. Effective before the process first encodes or trains."""
    threads = max(1, int(cpus))
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Index of the first, and documents of about `_BATCH` characters together."""
    batch: list[str] = []
    size = 0
    for i, text in enumerate(texts):
        batch.append(text)
        size += len(text)
        if size >= _BATCH or i == len(texts) - 1:
            yield i + 1 - len(batch), batch
            batch, size = [], 0


def _pieces(text: str) -> list[str]:
    """A text in pieces of at most `_PIECE` characters, cut after the last line end where there is one."""
    pieces = []
    while len(text) > _PIECE:
        cut = text.rfind("\n", _PIECE // 2, _PIECE) + 1 or _PIECE
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError("the tokenizer's configuration is not valid JSON", place=str(path)) from error
    return config if isinstance(config, dict) else {}


def _token(config: dict[str, Any], name: str) -> str | None:
    """A special token of a configuration, written as text or as a record with `content`."""
    value = config.get(name)
    return value.get("content") if isinstance(value, dict) else value


def _first_id(tokenizer: Tokenizer, names: Iterable[str | None]) -> int | None:
    return next((i for name in names if name and (i := tokenizer.token_to_id(name)) is not None), None)
