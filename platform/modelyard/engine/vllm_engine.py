"""vLLM behind the engine protocol (the `vllm` extra): the engine for clusters of GPUs.

Written against vLLM 0.32's asynchronous interface. What vLLM does another way is refused by name: a model either
answers or embeds, with one pooling. New weights travel as files in memory to vLLM's workers, on one machine.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from modelyard.engine.checkpoint import check_adapter, check_folder, read_tensors
from modelyard.engine.mailbox import Mailbox
from modelyard.engine.options import EngineOptions
from modelyard.engine.request import EngineStats, EngineStopped, Pooling, Request, Scored, StepOutput, check
from modelyard.engine.tasks import embed_all, score_all
from modelyard.engine.vllm_requests import Watch, parameters, step
from modelyard.errors import DataError, ModelyardError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

ADAPTERS = 4
"""LoRA adapters that may share a step."""
ADAPTER_RANK = 64
"""Rank of an adapter at most; vLLM reserves memory for it."""
FILE_BYTES = 1 << 30
"""New weights travel to vLLM's workers in files of about this size."""


@dataclass
class _Reader:
    """Who waits for a request's outputs, and the task that fetches them. `started`: its prompt has been computed."""

    loop: asyncio.AbstractEventLoop
    box: Mailbox
    prompt: int
    work: Future[None] | None = None
    started: bool = False

    def tell(self, action: Any, *arguments: Any) -> None:
        with suppress(RuntimeError):  # its loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(action, *arguments)


class VllmEngine:
    """Implements `protocol.Engine` by vLLM's asynchronous engine, which runs in processes of its own.

    Args:
        folder: a Hugging Face model folder.
        options: sizes, `precision`, `prefix_cache`, `tensor_parallel`, `cache_bytes` are passed on.
        embeds: None = the model answers and scores; else it embeds with this pooling, and does nothing else.
        **arguments: more of vLLM's engine arguments; they win over what the options say.

    Raises:
        ResourceError: vLLM is not installed, cannot start, or is asked for what only the native engine does.
        DataError: the folder holds what could execute.
    """

    def __init__(
        self, folder: str | Path, options: EngineOptions | None = None, *, embeds: Pooling | None = None,
        **arguments: Any,
    ) -> None:  # fmt: skip
        self._options, self._folder, self._embeds = options or EngineOptions(), Path(folder), embeds
        check_folder(self._folder)
        self._tokenizer = (self._folder / "tokenizer.json").exists()
        given = _arguments(self._folder, self._options, embeds, self._tokenizer) | arguments
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._watch = Watch()
        try:
            self._engine: Any = self._wait(_start(given, self._watch))
        except ModelyardError:
            self._end_loop()
            raise
        except Exception as error:
            self._end_loop()
            raise ResourceError(f"vLLM did not start: {error}", place="engine", mend="see its log") from error
        self._config = self._engine.model_config
        self._adapters: dict[str, Any] = {}
        self._readers: dict[str, _Reader] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._prompt = self._output = self._finished = self._aborted = self._adapters_read = self._version = 0
        self._paused = self._closed = False

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
        reader = _Reader(asyncio.get_running_loop(), Mailbox(), len(request.prompt))
        self._readers[request.id] = reader
        finished: str | None = None
        try:
            fetch = self._embed if request.task == "embed" else self._answer
            reader.work = asyncio.run_coroutine_threadsafe(self._pump(request, reader, fetch), self._loop)
            while finished is None:
                output = await reader.box.get()
                finished = output.finish
                yield output
        finally:
            if finished is None and reader.work is not None:
                reader.work.cancel()
            self._readers.pop(request.id, None)
            self._finished += finished in ("stop", "length")
            self._aborted += finished in (None, "abort")

    async def _pump(self, request: Request, reader: _Reader, fetch: Any) -> None:
        """Runs in vLLM's loop, hands over to the reader's."""
        from vllm.exceptions import VLLMClientError

        try:
            async for output in fetch(request):
                self._prompt += 0 if reader.started else reader.prompt
                self._output += len(output.tokens)
                reader.started = True
                reader.tell(reader.box.put, output)
        except asyncio.CancelledError:
            reader.tell(reader.box.put, StepOutput((), finish="abort", weights=self._version))
            raise
        except (VLLMClientError, ValueError, TypeError) as error:
            what = DataError(f"vLLM refuses the request: {error}", place="request", mend="see the message")
            reader.tell(reader.box.fail, what)
        except Exception as error:  # handed to the reader, whatever it is
            reader.tell(reader.box.fail, EngineStopped(f"vLLM failed: {error}", place="engine", mend="start a new one"))

    async def _answer(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        outputs = self._engine.generate(
            {"prompt_token_ids": list(request.prompt)},
            parameters(request),
            request.id,
            lora_request=self._adapters.get(request.adapter or ""),
            priority=request.priority,
        )
        async for output in outputs:
            yield step(request, output, self._version)

    async def _embed(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        from vllm import PoolingParams

        outputs = self._engine.encode(
            {"prompt_token_ids": list(request.prompt)},
            PoolingParams(task="embed", use_activation=True),  # its activation is scaling to length one
            request.id,
            lora_request=self._adapters.get(request.adapter or ""),
            priority=request.priority,
        )
        async for output in outputs:
            if output.finished:
                vector, v = tuple(output.outputs.data.float().tolist()), self._version
                yield StepOutput((), finish="stop", weights=v, weights_first=v, embedding=vector)

    def _check(self, request: Request) -> None:
        if self._closed:
            raise EngineStopped("the engine is closed", place="engine", mend="start a new one")
        check(request, self.vocabulary, self.max_length, self._adapters, self._tokenizer)
        if (request.task == "embed") != (self._embeds is not None):
            raise DataError("vLLM runs a model either to answer or to embed", place="task",
                            mend="start VllmEngine with embeds, or without it, or use the native engine")  # fmt: skip
        if request.task == "embed" and request.pooling != self._embeds:
            raise DataError(f"this engine was started to embed with {self._embeds!r}", place="pooling",
                            mend="use that pooling, or start another engine")  # fmt: skip
        if request.task == "score" and len(request.prompt) >= self.max_length:
            raise DataError(f"vLLM scores at most {self.max_length - 1} tokens", place="prompt",
                            mend="shorten the prompt")  # fmt: skip
        if request.id in self._readers:
            raise DataError(f"request {request.id} is already running", place="id", mend="use another id")
        if len(self._readers) >= self._options.max_sequences + self._options.max_waiting:
            raise ResourceError("too many requests are waiting", place="engine", mend="try again later")

    def abort(self, request_id: str) -> None:
        """See `protocol.Engine.abort`."""
        reader = self._readers.get(request_id)
        if reader is not None and reader.work is not None:
            reader.work.cancel()

    def stats(self) -> EngineStats:
        """See `protocol.Engine.stats`; `steps_total` counts what vLLM's process reported."""
        w, cache, readers = self._watch, self._engine.vllm_config.cache_config, list(self._readers.values())
        blocks = int(cache.num_gpu_blocks or 0)
        used = round(w.usage * blocks)
        return EngineStats(
            waiting=w.waiting,
            running=w.running,
            waiting_tokens=sum(r.prompt for r in readers if not r.started),
            slots=self._options.max_sequences,
            cached_tokens=used * cache.block_size,
            cache_capacity=blocks * cache.block_size,
            prompt_tokens_total=self._prompt,
            output_tokens_total=self._output,
            steps_total=w.steps,
            finished_total=self._finished,
            aborted_total=self._aborted,
            last_batch=w.running,
            weights=self._version,
            blocks=blocks,
            blocks_used=used,
            block_tokens=cache.block_size,
            prefix_hit_tokens_total=w.hits,
            prefix_asked_tokens_total=w.asked,
            preempted_total=w.preempted,
            paused=self._paused,
            adapters=tuple(self._adapters),
        )

    async def score(
        self, prompts: Sequence[Sequence[int]], *, start: int = 1, adapter: str | None = None, priority: int = 0
    ) -> list[Scored]:
        """See `protocol.Engine.score`. vLLM computes the whole prompt, whatever lies before `start`."""
        return await score_all(self.submit, prompts, start, adapter, priority)

    async def embed(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        pooling: Pooling = "mean",
        adapter: str | None = None,
        priority: int = 0,
    ) -> list[tuple[float, ...]]:
        """See `protocol.Engine.embed`. Raises DataError unless the engine was started to embed so."""
        return await embed_all(self.submit, prompts, pooling, adapter, priority)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `protocol.Engine.update_weights`. vLLM's workers must be on this machine.

        Raises DataError, before anything is replaced, for weights that are not all of the model's: vLLM packs matrices
        together and cannot replace a part of one.
        """
        memory = Path("/dev/shm")  # noqa: S108 - a folder of a name of its own is made there
        with TemporaryDirectory(prefix="modelyard-", dir=memory if memory.is_dir() else None) as folder:
            files = self._write(weights, Path(folder))
            paused = self._paused
            if not paused:
                self._wait(self._engine.pause_generation(mode="keep", clear_cache=False))
            try:
                faults = [f for f in self._wait(self._engine.collective_rpc("take_weights", args=(files,))) if f]
                if faults:
                    raise DataError(f"vLLM refuses the weights: {faults[0]}", place="update_weights", mend="see above")
                self._version = version
            finally:  # whatever was replaced before an error makes cached keys and values wrong
                self._wait(self._engine.reset_prefix_cache(reset_running_requests=True))
                if not paused:
                    self._wait(self._engine.resume_generation())

    def _write(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> list[str]:
        """Files of all tensors. Raises DataError for one that is not the model's, and for missing ones."""
        from safetensors.torch import save_file

        self._shapes = self._shapes or {name: tuple(t.shape) for name, t in read_tensors(self._folder)}
        missing, held, files = set(self._shapes), dict[str, Any](), list[str]()

        def flush() -> None:
            files.append(str(folder / f"{len(files)}.safetensors"))
            save_file(held, files[-1])
            held.clear()

        for name, tensor in weights:
            if self._shapes.get(name) != tuple(tensor.shape):
                raise DataError(f"tensor {name} of shape {tuple(tensor.shape)} has no place in this model",
                                place="update_weights", mend="use the checkpoint's names")  # fmt: skip
            missing.discard(name)
            held[name] = tensor.detach().cpu().contiguous()
            if sum(t.nbytes for t in held.values()) >= FILE_BYTES:
                flush()
        if missing:
            raise DataError(f"{len(missing)} tensors are missing, first {min(missing)}", place="update_weights",
                            mend="send all of the model's")  # fmt: skip
        if held:
            flush()
        return files

    def pause(self) -> None:
        """See `protocol.Engine.pause`."""
        self._wait(self._engine.pause_generation(mode="keep", clear_cache=False))
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
        check_adapter(Path(folder))
        self._adapters_read += 1
        request = LoRARequest(lora_name=name, lora_int_id=self._adapters_read, lora_path=str(folder))
        try:
            self._wait(self._engine.add_lora(request))
        except Exception as error:  # vLLM's processes tell of theirs as bare exceptions
            raise DataError(f"vLLM refuses the adapter: {error}", place=str(folder), mend="see above") from error
        self._adapters[name] = request

    def unload_adapter(self, name: str) -> None:
        """See `protocol.Engine.unload_adapter`. vLLM drops it from its slots when it needs them."""
        if self._adapters.pop(name, None) is None:
            raise DataError(f"adapter {name!r} is not loaded", place="adapter", mend="load it first")

    def close(self) -> None:
        """See `protocol.Engine.close`."""
        if self._closed:
            return
        self._closed = True
        self._wait(self._shut())
        self._end_loop()

    async def _shut(self) -> None:
        for reader in list(self._readers.values()):
            if reader.work is not None:
                reader.work.cancel()
        for _ in range(3):  # the cancelled tasks end, and tell vLLM
            await asyncio.sleep(0)
        self._engine.shutdown()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _start(arguments: dict[str, Any], watch: Watch) -> Any:
    try:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise ResourceError("vLLM is not installed", place="engine", mend="pip install 'modelyard[vllm]'") from error
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[watch.logger()])


def _arguments(folder: Path, o: EngineOptions, embeds: Pooling | None, tokenizer: bool) -> dict[str, Any]:
    """vLLM's engine arguments. Raises ResourceError for options vLLM does not have in our sense."""
    if o.precision == "int8":
        raise ResourceError("int8 products are the native engine's", place="engine.precision", mend="use bfloat16")
    if o.speculation is not None:
        raise ResourceError("guesses of vLLM may change answers", place="engine.speculation", mend="leave it out")
    given: dict[str, Any] = {
        "model": str(folder),
        "dtype": o.precision if o.precision in ("float32", "bfloat16") else "auto",
        "max_num_seqs": o.max_sequences,
        "max_model_len": o.max_length,
        "max_num_batched_tokens": max(o.step_tokens or 8192, o.max_sequences),
        "enable_prefix_caching": o.prefix_cache,
        "kv_cache_memory_bytes": o.cache_bytes,
        "tensor_parallel_size": o.tensor_parallel,
        "enable_lora": True,
        "max_loras": ADAPTERS,
        "max_lora_rank": ADAPTER_RANK,
        "scheduling_policy": "priority",
        "worker_extension_cls": "modelyard.engine.vllm_worker.Worker",
        # As the native engine does: JSON without white space between its parts.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
        "skip_tokenizer_init": not tokenizer,
        "trust_remote_code": False,
        "load_format": "safetensors",
    }
    if embeds is not None:
        given |= {"runner": "pooling", "convert": "embed", "pooler_config": {"pooling_type": embeds.upper()}}
        given["enable_prefix_caching"] = False
    return given
