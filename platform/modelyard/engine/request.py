"""What goes into an engine and what comes out: requests, sampling parameters, step outputs, statistics."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from modelyard.errors import DataError, ModelyardError

Finish = Literal["stop", "length", "abort", "error"]
Task = Literal["generate", "score", "embed"]
Pooling = Literal["mean", "last"]
GrammarKind = Literal["json_schema", "json_object", "regex", "lark"]

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_GRAMMAR_CHARACTERS = 200_000


UNSATISFIED = "the answer cannot go on as the grammar asks"
"""Begins `StepOutput.error` when a grammar turned out to have no matching answer, or to cost too much to follow."""


class EngineStopped(ModelyardError):
    """The engine was closed or has failed; another one may answer."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must match, whatever the model would rather say.

    `text` is a JSON schema as JSON, a regular expression, or a Lark grammar; unused for `json_object`,
    which asks for any JSON object. Needs the `grammar` extra.
    """

    kind: GrammarKind
    text: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen and when to stop.

    Attributes:
        max_tokens: tokens to generate at most.
        temperature: divides the logits; 0 = greedy.
        top_k: keep the k most probable tokens; 0 = all.
        top_p: keep the smallest set of tokens with this probability mass (nucleus, arXiv:1904.09751).
        min_p: drop tokens below this share of the most probable one's probability (arXiv:2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or
            answer (arXiv:1909.05858); 1 = off.
        presence_penalty: subtracted from logits of tokens already in the answer.
        frequency_penalty: subtracted once for every time a token is already in the answer.
        logit_bias: added to the logits of these token ids.
        seed: makes the answer repeatable whatever else is in the batch; None = a fresh one.
        stop: strings that end the answer; they are not part of it.
        stop_tokens: token ids that end the answer besides the model's own end tokens.
        ignore_eos: go on past the model's end tokens.
        logprobs: None = off, else how many alternatives to report beside the chosen token.
        grammar: None = off, else what the answer must match.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """Whether logits depend on tokens seen so far or on a bias."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or bool(self.logit_bias)
        )

    def check(self, vocabulary: int) -> None:
        """Raises DataError naming the first parameter out of range."""
        for name, good, rule in self._rules(vocabulary):
            if not good:
                value = repr(getattr(self, name))
                shown = value if len(value) <= 100 else value[:100] + "..."
                raise DataError(f"{name} is {shown}", place=name, mend=f"{name} must be {rule}")

    def _rules(self, vocabulary: int) -> Iterable[tuple[str, bool, str]]:
        yield "max_tokens", self.max_tokens >= 1, "at least 1"
        yield "temperature", _within(self.temperature, 0.0, 100.0), "a number from 0 (greedy) to 100"
        yield "top_k", self.top_k >= 0, "0 (off) or more"
        yield "top_p", _within(self.top_p, 0.0, 1.0) and self.top_p > 0, "above 0 and at most 1"
        yield "min_p", _within(self.min_p, 0.0, 1.0), "from 0 to 1"
        yield "repetition_penalty", _within(self.repetition_penalty, 0.01, 100.0), "from 0.01 to 100"
        yield "presence_penalty", _within(self.presence_penalty, -100.0, 100.0), "from -100 to 100"
        yield "frequency_penalty", _within(self.frequency_penalty, -100.0, 100.0), "from -100 to 100"
        bias = all(0 <= t < vocabulary and _within(b, -1e4, 1e4) for t, b in self.logit_bias.items())
        yield "logit_bias", bias, f"token ids below {vocabulary} with biases from -10000 to 10000"
        stops = len(self.stop) <= MAX_STOPS and all(0 < len(s) <= MAX_STOP_CHARACTERS for s in self.stop)
        yield "stop", stops, f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
        yield "logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"
        size = 0 if self.grammar is None else len(self.grammar.text)
        yield "grammar", size <= MAX_GRAMMAR_CHARACTERS, f"at most {MAX_GRAMMAR_CHARACTERS} characters"


def _within(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue, to score or to embed.

    Attributes:
        id: unique among the requests an engine holds.
        prompt: token ids, at least one.
        sampling: how to continue it.
        priority: smaller runs first; equal priorities run in order of arrival.
        detokenize: whether step outputs carry text; stop strings need it.
        adapter: name of a loaded LoRA adapter; None = the base model.
        task: `generate` an answer; `score` the prompt, or `embed` it, and end without an answer.
        prompt_logprobs: None = off, else how many alternatives to report for every prompt token.
        logprobs_from: first prompt position whose log-probability is reported. Position 0 has none. What
            lies before may come from the prefix cache.
        pooling: how `embed` makes one vector of the last layer's: `mean` of all tokens, or the `last`.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    priority: int = 0
    detokenize: bool = True
    adapter: str | None = None
    task: Task = "generate"
    prompt_logprobs: int | None = None
    logprobs_from: int = 1
    pooling: Pooling = "mean"

    def samples(self, count: int) -> list[Request]:
        """`count` requests for as many answers to this prompt: ids `id-0 ..`, seeds one apart.

        Queued together they compute the prompt once: the later ones wait for the first one's blocks.
        """
        seed = self.sampling.seed
        return [
            replace(
                self,
                id=f"{self.id}-{i}",
                sampling=self.sampling if seed is None else replace(self.sampling, seed=seed + i),
            )
            for i in range(count)
        ]


def check(request: Request, vocabulary: int, max_length: int, adapters: Collection[str], tokenizer: bool) -> None:
    """Raises DataError for a request that can never run.

    Args:
        request: what is asked.
        vocabulary: token ids of the model.
        max_length: tokens a prompt and its answer may have together.
        adapters: names that are loaded.
        tokenizer: whether the engine can make text of tokens.
    """
    request.sampling.check(vocabulary)
    length, answer = len(request.prompt), request.task == "generate"
    if not request.prompt:
        raise DataError("the prompt is empty", place="prompt", mend="send at least one token")
    if length + int(answer) > max_length:
        raise DataError(
            f"the prompt has {length} tokens, the model takes {max_length} with the answer",
            place="prompt",
            mend="shorten the prompt, or raise engine.max_length where the model takes more",
        )
    if not all(0 <= t < vocabulary for t in request.prompt):
        raise DataError("a token id is outside the vocabulary", place="prompt", mend="use the model's tokenizer")
    needs_text = answer and (request.detokenize or request.sampling.stop or request.sampling.grammar)
    if not tokenizer and needs_text:
        raise DataError("the model folder has no tokenizer", place="detokenize", mend="ask for tokens only")
    if request.adapter is not None and request.adapter not in adapters:
        raise DataError(
            f"adapter {request.adapter!r} is not loaded",
            place="adapter",
            mend="load it first; loaded: " + (", ".join(sorted(adapters)) or "none"),
        )
    if request.task == "score" and request.prompt_logprobs is None:
        raise DataError("a score needs prompt_logprobs", place="prompt_logprobs", mend="set it to 0 or more")
    if request.logprobs_from < 1:
        raise DataError("the first token has no probability", place="logprobs_from", mend="begin at 1 or later")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token under the model, before temperature, and its rivals."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)  # not frozen: one a request a step is made, and frozen ones take three times as long
class StepOutput:
    """What one request gained since the last output: tokens, text, and perhaps its end.

    Attributes:
        tokens: new tokens of the answer.
        text: text that became certain; it lags behind `tokens` while a character or a possible stop
            string is incomplete.
        logprobs: one entry a token, when asked for.
        finish: why the answer ended, None while it goes on.
        weights: version of the weights that chose the last of these tokens.
        waited: seconds from arrival to the request's first step.
        error: what went wrong when `finish` is `error`.
        weights_first: version of the weights that chose the first of these tokens.
        prompt_logprobs: prompt tokens from `logprobs_from` on, when asked for; they come whole, before or
            with the first token.
        embedding: the prompt's vector, of length one, for `embed`.
        cached: prompt tokens that came from the prefix cache.
    """

    tokens: tuple[int, ...]
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    weights: int = 0
    waited: float = 0.0
    error: str = ""
    weights_first: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] = ()
    cached: int = 0

    def __add__(self, later: StepOutput) -> StepOutput:
        """This output and the next of the same request as one."""
        return StepOutput(
            self.tokens + later.tokens,
            self.text + later.text,
            self.logprobs + later.logprobs,
            later.finish,
            later.weights,
            later.waited or self.waited,
            later.error,
            self.weights_first if self.tokens else later.weights_first,
            self.prompt_logprobs + later.prompt_logprobs,
            self.embedding or later.embedding,
            max(self.cached, later.cached),
        )


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of given tokens: `logprobs[i]` is that of token `start + i` after all before it."""

    logprobs: tuple[float, ...]
    weights: int

    @property
    def total(self) -> float:
        """Natural-log probability of all scored tokens together."""
        return math.fsum(self.logprobs)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of an engine. Totals count since the engine started.

    `blocks` hold `block_tokens` tokens each; `blocks_used` belong to running requests, `blocks_cached` to
    no one but can be reused. `prefix_hit_tokens_total` of `prefix_asked_tokens_total` prompt tokens came
    from the prefix cache. `drafted_total` tokens were guessed by speculation, `accepted_total` kept.
    """

    waiting: int
    running: int
    waiting_tokens: int
    slots: int
    cached_tokens: int
    cache_capacity: int
    prompt_tokens_total: int
    output_tokens_total: int
    steps_total: int
    finished_total: int
    aborted_total: int
    last_batch: int
    weights: int
    blocks: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    block_tokens: int = 0
    prefix_hit_tokens_total: int = 0
    prefix_asked_tokens_total: int = 0
    preempted_total: int = 0
    drafted_total: int = 0
    accepted_total: int = 0
    paused: bool = False
    adapters: tuple[str, ...] = ()
