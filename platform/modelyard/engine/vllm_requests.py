"""Requests and answers of an engine in vLLM's words (0.32), and its statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelyard.engine.request import Finish, Request, Sampling, StepOutput, TokenLogprob

_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "abort"}


def parameters(request: Request) -> Any:
    """vLLM's sampling parameters for a request; outputs come as differences."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    p: Sampling = request.sampling
    if request.task == "score":
        return SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=request.prompt_logprobs, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
    return SamplingParams(
        max_tokens=p.max_tokens,
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        repetition_penalty=p.repetition_penalty,
        presence_penalty=p.presence_penalty,
        frequency_penalty=p.frequency_penalty,
        logit_bias=dict(p.logit_bias) or None,
        seed=p.seed,
        stop=list(p.stop),
        stop_token_ids=list(p.stop_tokens),
        ignore_eos=p.ignore_eos,
        logprobs=p.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        detokenize=request.detokenize or bool(p.stop),
        structured_outputs=_structured(p),
        output_kind=RequestOutputKind.DELTA,
    )


def _structured(p: Sampling) -> Any:
    if p.grammar is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams

    kind, text = p.grammar.kind, p.grammar.text
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(**{{"json_schema": "json", "lark": "grammar"}.get(kind, kind): text})


def step(request: Request, output: Any, version: int) -> StepOutput:
    """What an output of vLLM means. `version`: of the weights now."""
    answer = output.outputs[0]
    scored: tuple[TokenLogprob, ...] = ()
    if request.prompt_logprobs is not None and output.prompt_logprobs:
        rows = list(zip(request.prompt, output.prompt_logprobs, strict=False))[request.logprobs_from :]
        scored = tuple(_logprob(token, row, request.prompt_logprobs) for token, row in rows)
    finish = _FINISH.get(answer.finish_reason, "error") if answer.finish_reason else None
    error = f"vLLM ended the request: {answer.finish_reason}" if finish == "error" else ""
    waited, cached = _waited(output.metrics), int(output.num_cached_tokens or 0)
    if request.task == "score":
        ended: Finish | None = "stop" if finish == "length" else finish
        return StepOutput((), "", (), ended, version, waited, error, version, scored, (), cached)
    tokens, rivals = tuple(answer.token_ids), request.sampling.logprobs or 0
    chosen = tuple(_logprob(t, row, rivals) for t, row in zip(tokens, answer.logprobs or (), strict=False))
    text = answer.text if request.detokenize or request.sampling.stop else ""
    return StepOutput(tokens, text, chosen, finish, version, waited, error, version, scored, (), cached)


def pooling() -> Any:
    """vLLM's parameters of a request to embed."""
    from vllm import PoolingParams

    return PoolingParams(task="embed", use_activation=True)  # its activation is scaling to length one


def embedded(output: Any, version: int) -> StepOutput:
    """What a finished request to embed gave. `version`: of the weights now."""
    vector = tuple(output.outputs.data.float().tolist())
    return StepOutput((), finish="stop", weights=version, weights_first=version, embedding=vector)


def _waited(metrics: Any) -> float:
    """Seconds from the queue to the first step."""
    queued, begun = getattr(metrics, "queued_ts", 0.0), getattr(metrics, "scheduled_ts", 0.0)
    return max(0.0, begun - queued) if queued and begun else 0.0


def _logprob(token: int, row: Any, rivals: int) -> TokenLogprob:
    ranked = sorted(((t, float(v.logprob)) for t, v in row.items()), key=lambda pair: -pair[1])
    return TokenLogprob(token, float(row[token].logprob), tuple(ranked[:rivals]))


@dataclass
class Watch:
    """What vLLM's scheduler last said of itself, and sums over its steps."""

    waiting: int = 0
    running: int = 0
    usage: float = 0.0
    steps: int = 0
    preempted: int = 0
    hits: int = 0
    asked: int = 0

    def logger(self) -> Any:
        """A class for vLLM's `stat_loggers` whose instances report to this object."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        watch = self

        class Logger(StatLoggerBase):  # type: ignore[misc]
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **more: Any) -> None:
                watch.record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        return Logger

    def record(self, scheduler: Any, iteration: Any) -> None:
        """Takes vLLM's statistics of a step."""
        if scheduler is not None:
            self.waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            self.running, self.usage = scheduler.num_running_reqs, scheduler.kv_cache_usage
            self.hits += scheduler.prefix_cache_stats.hits
            self.asked += scheduler.prefix_cache_stats.queries
        if iteration is not None:
            self.steps += 1
            self.preempted += iteration.num_preempted_reqs
