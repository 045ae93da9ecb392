"""Tokenizers: deterministic, lossless on any text, and opened offline by transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.errors import DataError
from modelyard.tokens.options import MIN_VOCABULARY, PAD, SPECIAL_TOKENS, TokenizerOptions
from modelyard.tokens.tokenizer import Encoder, copy_tokenizer, extend_tokenizer, save_tokenizer, train_tokenizer

TEXTS = [f"The {word} is {i * 37} metres long.\n    def {word}(): return {i}\n" for i, word in enumerate(dir(str) * 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXTS, 600), target)
    return target


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.open(folder)


@given(text=st.text())
@settings(deadline=None)
def test_any_text_comes_back(encoder: Encoder, text: str) -> None:
    ids, lengths = encoder.encode([text])
    assert ids[-1] == encoder.end_id and lengths.tolist() == [len(ids)]
    assert encoder.tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


def test_documents_are_encoded_each_on_its_own(encoder: Encoder) -> None:
    ids, lengths = encoder.encode([*TEXTS, ""])
    assert ids.dtype == np.uint16
    assert lengths[-1] == 1
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    for text, part in zip([*TEXTS, ""], parts, strict=True):
        assert part.tolist() == [*encoder.tokenizer.encode(text).ids, encoder.end_id]


def test_a_very_long_document_is_cut_at_line_ends(encoder: Encoder) -> None:
    text = "".join(TEXTS) * 300
    assert len(text) > 2 << 20
    ids, _ = encoder.encode([text, "x"])
    assert encoder.tokenizer.decode(ids[:-2].tolist()[: -len(encoder.tokenizer.encode("x").ids)]) == text


def test_text_that_spells_a_special_token_stays_text(encoder: Encoder) -> None:
    ids, _ = encoder.encode(["a<|endoftext|>b<|user|>"])
    special = {encoder.tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    assert not special & set(ids[:-1].tolist())


def test_training_gives_the_same_file_in_every_process(folder: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys; from modelyard.tokens.tokenizer import *;"
        "texts = json.load(open(sys.argv[1])); save_tokenizer(train_tokenizer(reversed(texts), 600), sys.argv[2])"
    )
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    for seed, threads in (("1", "1"), ("2", "2")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        arguments = [sys.executable, "-c", code, str(tmp_path / "texts.json"), str(tmp_path / seed)]
        subprocess.run(arguments, check=True, env=environment)
        assert (tmp_path / seed / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_transformers_opens_it_offline_with_a_chat_template(folder: Path, encoder: Encoder) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert len(tokenizer) == encoder.vocab_size == 600
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (encoder.end_id, encoder.pad_id)
    assert tokenizer(TEXTS[0])["input_ids"] == encoder.tokenizer.encode(TEXTS[0]).ids
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>s<|user|>u<|assistant|>"
    messages.append({"role": "assistant", "content": "a"})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{prompt}a<|endoftext|>"


def test_a_given_tokenizer_is_copied(folder: Path, encoder: Encoder, tmp_path: Path) -> None:
    copy_tokenizer(str(folder), tmp_path / "whole")
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    copy_tokenizer(str(folder / "tokenizer.json"), tmp_path / "single")
    single = Encoder.open(tmp_path / "single")
    assert (single.end_id, single.vocab_size) == (encoder.end_id, encoder.vocab_size)
    assert json.loads((tmp_path / "single" / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


def test_bad_input_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot hold all bytes"):
        train_tokenizer(TEXTS, MIN_VOCABULARY - 1)
    for nothing in ([], ["", ""]):
        with pytest.raises(DataError, match="no text"):
            train_tokenizer(nothing, 600)
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        copy_tokenizer(str(tmp_path), tmp_path / "copy")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        Encoder.open(tmp_path)
    text = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<|what|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="no end-of-text token"):
        Encoder.open(tmp_path)


def test_options_take_one_source_and_see_changed_files(folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(str(folder), tmp_path / "t")
    given = TokenizerOptions(path=str(tmp_path / "t"))
    assert given == TokenizerOptions(path=str(tmp_path / "t"), checksum=given.checksum)
    with (tmp_path / "t" / "tokenizer.json").open("a") as handle:
        handle.write("\n")
    assert TokenizerOptions(path=str(tmp_path / "t")).checksum != given.checksum
    with pytest.raises(ValueError, match="have checksum"):
        TokenizerOptions(path=str(tmp_path / "t"), checksum=given.checksum)
    for wrong in ({}, {"path": str(folder), "train": {}}):
        with pytest.raises(ValueError, match="either train or path"):
            TokenizerOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        TokenizerOptions(path=str(tmp_path))


def test_added_words_are_one_token_and_special_ones_stay_text(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["some words to merge some words"] * 5, 300), tmp_path)
    before = Encoder.open(tmp_path)
    assert extend_tokenizer(tmp_path, ["acetylsalicylic", " words"], ["<|tool|>", PAD]) == 3
    after = Encoder.open(tmp_path)
    assert after.vocab_size == before.vocab_size + 3 and after.end_id == before.end_id
    text = "some acetylsalicylic words <|tool|>"
    assert len(after.encode([text])[0]) < len(before.encode([text])[0])
    assert after.tokenizer.token_to_id("acetylsalicylic") in after.encode([text])[0]
    assert after.tokenizer.token_to_id("<|tool|>") not in after.encode([text])[0]
    assert after.tokenizer.decode(after.encode([text])[0].tolist(), skip_special_tokens=True) == text
    assert np.array_equal(after.encode(["to merge"])[0], before.encode(["to merge"])[0])
