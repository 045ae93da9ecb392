"""Answers that must match a JSON schema, a regular expression or a grammar (llguidance, the `grammar` extra).

Before each choice the tokens that could not continue a match are ruled out, so the answer matches whatever the
sampling parameters; the model's end token is allowed only where the match may end.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from modelyard.engine.request import Grammar
from modelyard.engine.tokenizer import Tokenizer
from modelyard.errors import DataError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Grammars:
    """Compiles grammars for one tokenizer. `ends` are the model's end tokens."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, list(ends)
        self._backend: Any = None
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of an answer. May take a second for a hostile grammar; any thread may call it.

        Raises DataError for a grammar that is malformed or that no answer can satisfy, ResourceError when
        llguidance is not installed.
        """
        library = _library()
        source = _source(library, grammar)
        backend = self._tokens(library)
        limits = library.LLParserLimits(verbose_errors=False)
        matcher = Matcher(library.LLMatcher(backend, source, log_level=0, limits=limits), self._vocabulary)
        if not matcher.error and matcher.allowed().any() and not matcher.error:
            return matcher
        raise DataError(
            f"the {grammar.kind} cannot be satisfied: {matcher.error or 'no token may begin it'}",
            place="grammar",
            mend="correct the schema or expression",
        )

    def _tokens(self, library: Any) -> Any:
        with self._lock:
            if self._backend is None:
                ends = self._ends or [self._vocabulary - 1]
                self._backend = library.LLTokenizer(
                    self._tokenizer.backend.to_str(), n_vocab=self._vocabulary, eos_token=ends
                )
            return self._backend


class Matcher:
    """The state of one answer: which tokens may come next."""

    def __init__(self, state: Any, vocabulary: int) -> None:
        self._state, self._vocabulary = state, vocabulary
        self._bits = np.zeros((1, (vocabulary + 31) // 32), dtype=np.int32)

    @property
    def error(self) -> str:
        """Why nothing can match any more, empty while something can.

        Some grammars show only on the way that no answer of finite length matches, or that a step costs too much.
        """
        if not self._state.is_error():
            return ""
        reason = str(self._state.get_error()).removesuffix("<non-verbose/>").strip()
        return "no token may come next" if reason.startswith("NoExtension") else reason[:300]

    def allowed(self) -> np.ndarray:
        """bool [vocabulary]."""
        self._state.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        return bits[: self._vocabulary].astype(bool)

    def restrict(self, row: Tensor) -> None:
        """Sets the logits [vocabulary] of all other tokens to minus infinity, in place."""
        row.masked_fill_(torch.from_numpy(~self.allowed()).to(row.device), -torch.inf)

    def accept(self, token: int) -> bool:
        """Goes on after a chosen token; whether the answer is complete and nothing can follow."""
        self._state.consume_token(token)
        return bool(self._state.is_stopped())


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ResourceError(
            "answers by a grammar need llguidance", place="grammar", mend="pip install 'modelyard[grammar]'"
        ) from error
    return llguidance


def _source(library: Any, grammar: Grammar) -> str:
    m = library.LLMatcher
    if grammar.kind == "regex":
        return str(m.grammar_from_regex(grammar.text))
    if grammar.kind == "lark":
        return str(m.grammar_from_lark(grammar.text))
    try:
        schema = {"type": "object"} if grammar.kind == "json_object" else json.loads(grammar.text)
        # A model may fill its whole budget with white space where the schema allows any.
        return str(m.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False}))
    except ValueError as error:
        raise DataError(f"the JSON schema is malformed: {error}", place="grammar", mend="send valid JSON") from error
