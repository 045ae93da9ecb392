from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.tracking.redact import HIDDEN, PARAM_LIMIT, flatten, is_secret, redact, redact_text


@pytest.mark.parametrize("name", ["api_key", "HF_TOKEN", "hfToken", "awsSecretAccessKey", "db.password", "auth-key"])
def test_secret_names(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["tokenizer", "max_tokens", "tokens_per_second", "keyword", "monkey", "hidden_size"])
def test_names_that_only_contain_a_secret_word(name: str) -> None:
    assert not is_secret(name)


def test_secrets_are_blanked_at_any_depth_and_numbers_stay() -> None:
    options = {"steps": [{"upload": {"access_key": "AKIA123"}}], "token": 17, "tokenizer": {"vocab_size": 8192}}
    assert redact(options) == {
        "steps": [{"upload": {"access_key": HIDDEN}}],
        "token": 17,
        "tokenizer": {"vocab_size": 8192},
    }


def test_values_of_secret_environment_variables_are_blanked_inside_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", "t0psecret-value")
    assert redact_text("url=https://t0psecret-value@host") == f"url=https://{HIDDEN}@host"
    assert flatten({"url": "https://t0psecret-value@host"}) == {"url": f"https://{HIDDEN}@host"}


def test_passwords_in_urls_are_blanked() -> None:
    assert flatten({"redis_url": "rediss://:p%40ss@host:6379/0"}) == {"redis_url": f"rediss://:{HIDDEN}@host:6379/0"}
    assert redact_text("at http://me:secret@host/a:b@c") == f"at http://me:{HIDDEN}@host/a:b@c"
    for harmless in ("s3://bucket/a:b@c", "models:/name@champion", "http://host:8000/x", "redis://host:6379/0"):
        assert redact_text(harmless) == harmless


def test_flatten_numbers_lists_of_mappings_and_keeps_plain_lists() -> None:
    flat = flatten({"steps": [{"dedup": {"jaccard": 0.8}}], "rules": ["c4", "gopher"], "none": None, "empty": {}})
    assert flat == {"steps.0.dedup.jaccard": "0.8", "rules": '["c4", "gopher"]', "none": "null", "empty": "{}"}


def test_long_values_are_cut_to_what_mlflow_accepts() -> None:
    value = flatten({"text": "x" * 10_000})["text"]
    assert len(value) == PARAM_LIMIT
    assert value.endswith("...")


_nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=4) | st.lists(inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(min_size=1, max_size=8), _nested, max_size=5))
def test_flattened_parameters_are_always_acceptable_to_mlflow(options: dict[str, object]) -> None:
    for key, value in flatten(options).items():
        assert len(key) <= 250
        assert isinstance(value, str)
        assert len(value) <= PARAM_LIMIT
