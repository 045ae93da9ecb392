"""Text to token ids and back: `tokenizer.json`, and the chat template that goes with it.

Uses the `tokenizers` library directly: importing transformers for this costs an HTTP process 8 s and 140 MB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from modelyard.engine.checkpoint import read_json
from modelyard.errors import DataError


class Tokenizer:
    """A tokenizer folder opened for inference.

    Raises DataError when `tokenizer.json` is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise DataError(
                "the folder has no tokenizer.json", place=str(folder), mend="save the tokenizer in its fast form"
            )
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises bare Exception
            raise DataError(f"tokenizer.json is damaged: {error}", place=str(file), mend="restore the file") from error
        self.backend.no_padding()
        self.backend.no_truncation()
        # Counted once: the library takes a third of a millisecond for it.
        self.vocabulary = int(self.backend.get_vocab_size(with_added_tokens=True))
        config = read_json(folder / "tokenizer_config.json", missing={})
        self.template = _chat_template(folder, config)
        self._variables = {k: _content(config[k]) for k in ("bos_token", "eos_token", "unk_token") if config.get(k)}
        self._compiled: jinja2.Template | None = None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the tokenizer puts around a text (a begin token).

        Raises DataError for lone surrogates, which JSON can express and UTF-8 cannot.
        """
        try:
            return list(self.backend.encode(text, add_special_tokens=special).ids)
        except TypeError:
            raise DataError("the text is not valid Unicode (a lone surrogate)", mend="send valid text") from None

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; incomplete characters become U+FFFD."""
        return str(self.backend.decode(list(tokens), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """The text of one token alone, special tokens included."""
        return str(self.backend.decode([token], skip_special_tokens=False))

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation with the assistant's turn opened, by the model's chat template.

        Raises DataError when there is no template or it rejects the messages.
        """
        return self.encode(self.render(messages, tools), special=False)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The conversation as the template writes it, before tokenization."""
        if self.template is None:
            raise DataError("the model has no chat template", place="messages", mend="use text completions instead")
        try:
            self._compiled = self._compiled or _environment().from_string(self.template)
            return self._compiled.render(
                messages=messages, tools=tools, add_generation_prompt=True, documents=None, **self._variables
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise DataError(
                f"the chat template rejects these messages: {error}",
                place="messages",
                mend="send roles and contents the model was trained on",
            ) from error


def _content(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; at inference it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Templates come with models, so they run sandboxed and cannot change what they are given."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    # jinja2's own filter escapes <, > and &, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
