"""vLLM behind the engine protocol (the `vllm` extra): the engine for clusters of GPUs.

Written against vLLM 0.32's asynchronous interface and not run in this project's tests, which have no GPU. What vLLM
does another way is refused by name: embedding with a generating model, and tensors pushed into a running engine.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.engine.checkpoint import check_folder, check_unsafe
from modelyard.engine.options import EngineOptions
from modelyard.engine.request import (
    EngineStats,
    EngineStopped,
    Finish,
    Pooling,
    Request,
    Sampling,
    Scored,
    StepOutput,
    TokenLogprob,
)
from modelyard.engine.tasks import score_all
from modelyard.errors import DataError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "abort"}


class VllmEngine:
    """Implements `protocol.Engine` by vLLM's asynchronous engine, which runs in processes of its own.

    Args:
        folder: a Hugging Face model folder.
        options: `max_sequences`, `max_length`, `step_tokens`, `prefix_cache` are passed on.
        tensor_parallel: GPUs a model is cut over.

    Raises:
        ResourceError: vLLM is not installed.
        DataError: the folder holds what could execute.
    """

    def __init__(self, folder: str | Path, options: EngineOptions | None = None, tensor_parallel: int = 1) -> None:
        o = options or EngineOptions()
        check_folder(Path(folder))
        try:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ResourceError(
                "vLLM is not installed", place="engine", mend="pip install 'modelyard[vllm]'"
            ) from error
        arguments = AsyncEngineArgs(
            model=str(folder),
            max_num_seqs=o.max_sequences,
            max_model_len=o.max_length,
            max_num_batched_tokens=max(o.step_tokens or 8192, o.max_sequences),
            enable_prefix_caching=o.prefix_cache,
            enable_lora=True,
            scheduling_policy="priority",
            tensor_parallel_size=tensor_parallel,
            trust_remote_code=False,
            load_format="safetensors",
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._engine: Any = self._wait(_start(AsyncLLM, arguments))
        self._config = self._engine.model_config
        self._adapters: dict[str, Any] = {}
        self._running: set[str] = set()
        self._prompt = self._output = self._finished = self._aborted = self._adapters_read = 0
        self._paused = False

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self._config.get_vocab_size())

    @property
    def max_length(self) -> int:
        """Tokens a prompt and its answer may have together."""
        return int(self._config.max_model_len)

    async def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """See `protocol.Engine.submit`."""
        self._check(request)
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Any]()

        async def pump() -> None:
            """Runs in vLLM's loop, hands over to the reader's."""
            try:
                async for output in self._stream(request):
                    loop.call_soon_threadsafe(arrived.put_nowait, output)
            except Exception as error:  # handed to the reader, whatever it is
                loop.call_soon_threadsafe(arrived.put_nowait, error)

        work = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        self._running.add(request.id)
        self._prompt += len(request.prompt)
        finished = False
        try:
            while not finished:
                output = await arrived.get()
                if isinstance(output, Exception):
                    raise EngineStopped(f"vLLM failed: {output}", place="engine", mend="start a new one") from output
                step = _step(request, output)
                finished = step.finish is not None
                self._output += len(step.tokens)
                yield step
        finally:
            work.cancel()
            self._running.discard(request.id)
            self._finished += finished
            self._aborted += not finished

    def _stream(self, request: Request) -> AsyncGenerator[Any, None]:
        stream: AsyncGenerator[Any, None] = self._engine.generate(
            {"prompt_token_ids": list(request.prompt)},
            _parameters(request),
            request.id,
            lora_request=self._adapters[request.adapter] if request.adapter else None,
            priority=request.priority,
        )
        return stream

    def _check(self, request: Request) -> None:
        request.sampling.check(self.vocabulary)
        if request.task == "embed":
            raise DataError("vLLM does not embed with a generating model", place="task", mend="use the native engine")
        if not request.prompt or len(request.prompt) >= self.max_length:
            raise DataError(
                f"the prompt has {len(request.prompt)} tokens, the model takes 1 to {self.max_length - 1}",
                place="prompt",
                mend="shorten the prompt",
            )
        if request.adapter is not None and request.adapter not in self._adapters:
            raise DataError(f"adapter {request.adapter!r} is not loaded", place="adapter", mend="load it first")

    def abort(self, request_id: str) -> None:
        """See `protocol.Engine.abort`."""
        asyncio.run_coroutine_threadsafe(self._engine.abort(request_id), self._loop)

    def stats(self) -> EngineStats:
        """See `protocol.Engine.stats`; vLLM tells its queue and cache to its own metrics alone."""
        n = len(self._running)
        return EngineStats(
            0, n, 0, n, 0, 0, self._prompt, self._output, 0, self._finished, self._aborted, n, 0,
            paused=self._paused, adapters=tuple(self._adapters),
        )  # fmt: skip

    async def score(
        self, prompts: Sequence[Sequence[int]], *, start: int = 1, adapter: str | None = None, priority: int = 0
    ) -> list[Scored]:
        """See `protocol.Engine.score`."""
        return await score_all(self.submit, prompts, start, adapter, priority)

    async def embed(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        pooling: Pooling = "mean",
        adapter: str | None = None,
        priority: int = 0,
    ) -> list[tuple[float, ...]]:
        """Raises DataError: vLLM does not embed with a generating model."""
        raise DataError("vLLM does not embed with a generating model", place="embed", mend="use the native engine")

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Raises DataError: vLLM takes new weights over a transport set up between its workers and the trainer."""
        raise DataError("vLLM takes no tensors from this process", place="update_weights", mend="use the native engine")

    def pause(self) -> None:
        """See `protocol.Engine.pause`."""
        self._wait(self._engine.pause_generation(mode="keep"))
        self._paused = True

    def resume(self) -> None:
        """See `protocol.Engine.resume`."""
        self._wait(self._engine.resume_generation())
        self._paused = False

    def load_adapter(self, name: str, folder: str) -> None:
        """See `protocol.Engine.load_adapter`."""
        from vllm.lora.request import LoRARequest

        if not name or name in self._adapters:
            raise DataError(f"adapter name {name!r} is empty or taken", place="adapter", mend="unload it first")
        check_unsafe(Path(folder))
        self._adapters_read += 1
        request = LoRARequest(lora_name=name, lora_int_id=self._adapters_read, lora_path=str(folder))
        try:
            self._wait(self._engine.add_lora(request))
        except (ValueError, RuntimeError, OSError) as error:
            raise DataError(f"vLLM refuses the adapter: {error}", place=str(folder), mend="see above") from error
        self._adapters[name] = request

    def unload_adapter(self, name: str) -> None:
        """See `protocol.Engine.unload_adapter`."""
        request = self._adapters.pop(name, None)
        if request is None:
            raise DataError(f"adapter {name!r} is not loaded", place="adapter", mend="load it first")
        self._wait(self._engine.remove_lora(request.lora_int_id))

    def close(self) -> None:
        """See `protocol.Engine.close`."""
        self._loop.call_soon_threadsafe(self._engine.shutdown)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _start(engine: Any, arguments: Any) -> Any:
    return engine.from_engine_args(arguments)


def _parameters(request: Request) -> Any:
    """vLLM's sampling parameters for a request; outputs come as differences."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    p: Sampling = request.sampling
    return SamplingParams(
        max_tokens=1 if request.task == "score" else p.max_tokens,
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


def _step(request: Request, output: Any) -> StepOutput:
    answer = output.outputs[0]
    scored: tuple[TokenLogprob, ...] = ()
    if request.prompt_logprobs is not None and output.prompt_logprobs:
        rows = list(zip(request.prompt, output.prompt_logprobs, strict=False))[request.logprobs_from :]
        scored = tuple(_logprob(token, row, request.prompt_logprobs) for token, row in rows)
    finish = _FINISH.get(answer.finish_reason, "error") if answer.finish_reason else None
    if request.task == "score":
        return StepOutput((), finish="stop" if finish else None, prompt_logprobs=scored)
    tokens = tuple(answer.token_ids)
    rivals = request.sampling.logprobs or 0
    chosen = tuple(_logprob(t, row, rivals) for t, row in zip(tokens, answer.logprobs or (), strict=False))
    cached = int(getattr(output, "num_cached_tokens", None) or 0)
    return StepOutput(tokens, answer.text, chosen, finish, prompt_logprobs=scored, cached=cached)


def _logprob(token: int, row: Any, rivals: int) -> TokenLogprob:
    ranked = sorted(((t, float(v.logprob)) for t, v in row.items()), key=lambda pair: -pair[1])
    return TokenLogprob(token, float(row[token].logprob), tuple(ranked[:rivals]))
