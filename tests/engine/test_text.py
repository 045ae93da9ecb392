"""Tokens to text: streaming equals decoding at once, stop strings across tokens, chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modelyard.engine import Tokenizer
from modelyard.engine.detokenize import Detokenizer
from modelyard.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


def stream(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    detokenizer, text = Detokenizer(tokenizer, stop), ""
    for token in tokens:
        piece, stopped = detokenizer.push(token)
        text += piece
        if stopped:
            return text, True
    return text + detokenizer.flush(), False


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocabulary - 1), max_size=40))
    assert stream(tokenizer, tokens)[0] == tokenizer.decode(tokens)


@settings(max_examples=150, deadline=None)
@given(
    st.text(alphabet="ab. 世😀\n", max_size=40),
    st.lists(st.text(alphabet="ab. 世", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_where_they_first_appear(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    tokens = tokenizer.encode(text, special=False)
    got, stopped = stream(tokenizer, tokens, tuple(stops))
    found = [at for at in (text.find(s) for s in stops) if at >= 0]
    if found and stopped:
        assert text.startswith(got)
        assert any(text[len(got) :].startswith(s) for s in stops)
        assert not any(s in got for s in stops)
    else:
        assert not found
        assert got == text


def test_nothing_of_a_stop_string_is_shown_before_it_is_complete(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ("END",))
    shown = [detokenizer.push(t)[0] for t in tokenizer.encode("xE", special=False)]
    assert "".join(shown) == "x"
    assert detokenizer.push(tokenizer.encode("N", special=False)[0])[0] == ""
    assert detokenizer.push(tokenizer.encode("o", special=False)[0])[0] == "ENo"


def test_chat_template_renders_as_in_transformers(tokenizer: Tokenizer, tiny_model: Path) -> None:
    peer = AutoTokenizer.from_pretrained(tiny_model)
    assert isinstance(peer, PreTrainedTokenizerFast)
    messages = [
        {"role": "system", "content": "Be <brief> & kind."},
        {"role": "user", "content": "Été?"},
        {"role": "assistant", "content": "Oui."},
        {"role": "user", "content": "世界"},
    ]
    expected = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render(messages) == expected
    ids = peer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(messages) == ids


def test_templates_cannot_reach_python(tiny_model: Path, tmp_path: Path) -> None:
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": attack}))
    with pytest.raises(DataError, match="rejects"):
        Tokenizer(tmp_path).render([{"role": "user", "content": "x"}])


def test_a_template_that_refuses_says_why(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        Tokenizer(tmp_path).render([{"role": "user", "content": "x"}])


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        Tokenizer(tmp_path)
