"""Request bodies of the OpenAI API that this server understands.

Unknown fields are ignored, as OpenAI's server does; known fields whose effect is not offered are refused by
name, so that nobody believes a constraint was kept that was not.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, field_validator, model_validator

from modelyard.engine.request import MAX_LOGPROBS, MAX_STOP_CHARACTERS, MAX_STOPS, Grammar, Sampling
from modelyard.serving.options import MAX_PRIORITY

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1)]

Priority = Annotated[
    StrictInt,
    Field(
        ge=-MAX_PRIORITY, le=MAX_PRIORITY,
        description="smaller runs first, 0 is usual; how small it may be is the API key's affair (extension)",
    ),
]  # fmt: skip


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class JsonSchema(BaseModel):
    """A schema an answer has to match."""

    name: str | None = Field(None, max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What an answer has to be: text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema goes with type json_schema, and with no other")
        return self

    def grammar(self) -> Grammar | None:
        """The same for the engine; None for text."""
        if self.json_schema is not None:
            return Grammar("json_schema", json.dumps(self.json_schema.schema_))
        return Grammar("json_object") if self.type == "json_object" else None


_NULLABLE = ("temperature", "top_p", "n", "presence_penalty", "frequency_penalty", "stream")
"""Fields whose null means their default, as OpenAI's server takes it."""


def _say_nullable(schema: dict[str, Any]) -> None:
    """The same for the OpenAPI document."""
    for name in _NULLABLE:
        bounds = schema["properties"][name]
        about = {key: bounds.pop(key) for key in ("title", "description", "default") if key in bounds}
        schema["properties"][name] = {"anyOf": [bounds, {"type": "null"}], **about}


class _Common(BaseModel):
    """Fields completions and chat share."""

    model_config = ConfigDict(
        extra="ignore", protected_namespaces=(), allow_inf_nan=False, json_schema_extra=_say_nullable
    )

    model: str = Field(description="served model name")
    temperature: float = Field(1.0, ge=0, le=2, description="0 = greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 = off (extension)")
    min_p: float = Field(0.0, ge=0, le=1, description="(extension)")
    repetition_penalty: float = Field(1.0, ge=0.01, le=10, description="(extension)")
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(None, max_length=1024, description="token id -> bias")
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Stops | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=1024)
    priority: Priority = 0
    response_format: ResponseFormat | None = None
    regex: str | None = Field(None, min_length=1, max_length=4096, description="the answer matches it (extension)")

    @model_validator(mode="after")
    def _one_constraint(self) -> _Common:
        if self.regex is not None and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("give regex or response_format, not both")
        return self

    @field_validator(*_NULLABLE, mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _Common:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    def _sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        format_ = self.response_format
        grammar = format_.grammar() if format_ is not None else None
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(k): v for k, v in (self.logit_bias or {}).items()},
            seed=self.seed,
            stop=stop,
            logprobs=logprobs,
            grammar=Grammar("regex", self.regex) if self.regex else grammar,
        )


class CompletionRequest(_Common):
    """POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] | None = Field(None, description="not offered")
    suffix: None = Field(None, description="not offered")
    best_of: Literal[1] | None = Field(None, description="not offered")

    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as text or as token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def sampling(self, room: int) -> Sampling:
        """Parameters for a prompt that leaves `room` tokens for its answer."""
        return self._sampling(min(self.max_tokens or room, room), self.logprobs)


class Message(BaseModel):
    """One turn. Tool-call fields pass through to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        """The turn with text parts joined, for the chat template. Raises ValueError for images or audio."""
        value = self.model_dump()
        if isinstance(self.content, list):
            if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in self.content):
                raise ValueError("only text content is supported")
            value["content"] = "".join(part["text"] for part in self.content)
        return value


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str = Field(description="served model name")
    input: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = Field(None, description="not offered")
    pooling: Literal["mean", "last"] = Field("mean", description="one vector from the tokens' (extension)")
    user: str | None = Field(None, max_length=1024)
    priority: Priority = 0

    def inputs(self) -> list[str | list[int]]:
        """Every input, as text or as token ids."""
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


class FeedbackRequest(BaseModel):
    """POST /v1/feedback: what a person says about one answer. Conversation and answer only if the client sends them."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    id: str = Field(min_length=1, max_length=128, description="id of the response")
    rating: Literal["up", "down"]
    model: str | None = Field(None, max_length=256)
    version: str | None = Field(None, max_length=128, description="version that answered")
    messages: list[Message] | None = Field(None, max_length=4096, description="conversation before the answer")
    answer: str | None = Field(None, description="the answer as it was shown")
    correction: str | None = Field(None, min_length=1, description="what the answer should have been")
    comment: str | None = Field(None, max_length=4096)

    @model_validator(mode="after")
    def _correction_needs_answer(self) -> FeedbackRequest:
        if self.correction is not None and self.answer is None:
            raise ValueError("correction needs the answer it corrects")
        return self


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = Field(None, max_length=256, description="passed to the chat template")
    tool_choice: Literal["auto", "none"] | None = Field(None, description="a call cannot be forced; none: no tools")

    def offered(self) -> list[dict[str, Any]] | None:
        """The tools for the chat template."""
        return None if self.tool_choice == "none" else self.tools

    def turns(self) -> list[dict[str, Any]]:
        """The messages for the chat template."""
        return [m.plain() for m in self.messages]

    def sampling(self, room: int) -> Sampling:
        """Parameters for a prompt that leaves `room` tokens for its answer."""
        wanted = self.max_completion_tokens or self.max_tokens or room
        return self._sampling(min(wanted, room), (self.top_logprobs or 0) if self.logprobs else None)
