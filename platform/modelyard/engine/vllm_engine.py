"""vLLM behind the engine protocol (the `vllm` extra): the engine for clusters of GPUs.

Written against vLLM 0.32's asynchronous interface. What vLLM does another way is refused by name: a model either
answers or embeds, with one pooling. New weights travel as files in memory to vLLM's workers, on one machine.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from modelyard.engine.checkpoint import check_adapter, check_folder, read_tensors
from modelyard.engine.options import EngineOptions
from modelyard.engine.protocol import Put
from modelyard.engine.request import EngineStats, EngineStopped, Pooling, Request, StepOutput, Task, check
from modelyard.engine.tasks import Streams
from modelyard.engine.tokenizer import Tokenizer
from modelyard.engine.vllm_options import arguments, check_installed, check_options, environment
from modelyard.engine.vllm_requests import Watch, embedded, parameters, pooling, step
from modelyard.errors import DataError, ModelyardError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

FILE_BYTES = 1 << 30
"""New weights travel to vLLM's workers in files of about this size."""


@dataclass
class _Reader:
    """Who waits for a request's outputs, and the task that fetches them. `started`: its prompt has been computed."""

    loop: asyncio.AbstractEventLoop
    put: Put
    prompt: int
    work: asyncio.Task[None] | None = None
    started: bool = False

    def tell(self, output: StepOutput) -> None:
        with suppress(RuntimeError):  # its loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.put, output)


class VllmEngine(Streams):
    """Implements `protocol.Engine` by vLLM's asynchronous engine, which runs in processes of its own.

    Args:
        folder: a Hugging Face model folder.
        options: sizes, `precision`, `prefix_cache`, `tensor_parallel`, `cache_bytes`, `vllm` are passed on.
        embeds: None = the model answers and scores; else it embeds with this pooling, and does nothing else.

    Raises:
        ResourceError: vLLM is not installed, cannot start, or is asked for what only the native engine does.
        DataError: the folder holds what could execute.
    """

    def __init__(
        self, folder: str | Path, options: EngineOptions | None = None, *, embeds: Pooling | None = None
    ) -> None:
        self._options, self._folder, self._embeds = options or EngineOptions(), Path(folder), embeds
        check_installed()
        check_options(self._options)
        check_folder(self._folder)
        self._tokenizer = Tokenizer(self._folder) if (self._folder / "tokenizer.json").exists() else None
        given = arguments(self._folder, self._options, embeds, self._tokenizer is not None)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._watch = Watch()
        threads = self._options.threads or len(os.sched_getaffinity(0))
        try:
            with _variables(environment(threads, os.getpid())):
                self._engine: Any = self._wait(_start(given, self._watch, self._options.device))
        except ModelyardError:
            self._end_loop()
            raise
        except Exception as error:
            self._end_loop()
            raise ResourceError(f"vLLM did not start: {error}", place="engine", mend="see its log") from error
        self._config = self._engine.model_config
        self._adapters: dict[str, Any] = {}
        self._readers: dict[str, _Reader] = {}
        """In vLLM's loop alone."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._replaced: set[str] = set()
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

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None when its folder has none."""
        return self._tokenizer

    @property
    def tasks(self) -> frozenset[Task]:
        """What requests may ask for."""
        return frozenset({"generate", "score"} if self._embeds is None else {"embed"})

    @property
    def alive(self) -> bool:
        """Whether vLLM's processes run."""
        return not self._closed and not self._engine.errored

    async def start(self, request: Request, put: Put) -> None:
        """See `protocol.Engine.start`."""
        if self._closed:
            raise EngineStopped("the engine is closed", place="engine", mend="start a new one")
        reader = _Reader(asyncio.get_running_loop(), put, len(request.prompt))
        added = asyncio.run_coroutine_threadsafe(self._add(request, reader), self._loop)
        try:
            await asyncio.shield(asyncio.wrap_future(added))
        except asyncio.CancelledError:
            self.abort(request.id)  # it may have been taken in already
            raise

    async def _add(self, request: Request, reader: _Reader) -> None:
        """Runs in vLLM's loop, as all that follows with a name of `_` and works on readers."""
        from vllm.exceptions import VLLMClientError

        self._check(request)
        self._readers[request.id] = reader
        try:
            collector = await self._engine.add_request(
                request.id,
                {"prompt_token_ids": list(request.prompt)},
                pooling() if request.task == "embed" else parameters(request),
                lora_request=self._adapters.get(request.adapter or ""),
                priority=request.priority,
            )
        except (VLLMClientError, ValueError, TypeError) as error:
            self._readers.pop(request.id, None)
            raise DataError(f"vLLM refuses the request: {error}", place="request", mend="see the message") from error
        except Exception as error:
            self._readers.pop(request.id, None)
            raise EngineStopped(f"vLLM failed: {error}", place="engine", mend="start a new one") from error
        reader.work = self._loop.create_task(self._pump(request, reader, collector))
        if self._readers.get(request.id) is not reader:  # aborted meanwhile
            reader.work.cancel()

    async def _pump(self, request: Request, reader: _Reader, collector: Any) -> None:
        """From vLLM to the reader."""
        finished = False
        try:
            while not finished:
                output = collector.get_nowait() or await collector.get()
                finished = output.finished
                if request.task == "embed":
                    if finished:
                        self._deliver(request.id, reader, embedded(output, self._version))
                else:
                    self._deliver(request.id, reader, step(request, output, self._version))
        except asyncio.CancelledError:
            await self._engine.abort(collector.request_id, internal=True)
            raise
        except Exception as error:  # handed to the reader, whatever it is
            self._deliver(request.id, reader, StepOutput((), finish="error", error=f"vLLM failed: {error}"))
        finally:
            collector.close()

    def _deliver(self, name: str, reader: _Reader, output: StepOutput) -> None:
        if self._readers.get(name) is not reader:
            return  # aborted, and told so
        self._prompt += 0 if reader.started else reader.prompt
        self._output += len(output.tokens)
        reader.started = True
        if output.finish is not None:
            del self._readers[name]
            self._finished += output.finish in ("stop", "length")
            self._aborted += output.finish == "abort"
        reader.tell(output)

    def _check(self, request: Request) -> None:
        check(request, self.vocabulary, self.max_length, self._adapters, self._tokenizer is not None)
        if request.task not in self.tasks:
            raise DataError("vLLM runs a model either to answer or to embed", place="task",
                            mend="use backend: native, or VllmEngine with embeds or without it")  # fmt: skip
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
        with suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(self._abort, request_id)

    def _abort(self, request_id: str) -> None:
        reader = self._readers.pop(request_id, None)
        if reader is None:
            return
        self._aborted += 1
        reader.tell(StepOutput((), finish="abort", weights=self._version, weights_first=self._version))
        if reader.work is not None:
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

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `protocol.Engine.update_weights`. vLLM's workers must be on this machine.

        vLLM packs matrices together and cannot replace a part of one: what is not given is read from the model's
        folder. Raises DataError, before anything is replaced, for a tensor that is none of the model's, and where one
        is left out that was replaced before.
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
        held, files, given = dict[str, Any](), list[str](), set[str]()

        def hold(name: str, tensor: Tensor) -> None:
            held[name] = tensor.detach().cpu().contiguous()
            if sum(t.nbytes for t in held.values()) >= FILE_BYTES:
                flush()

        def flush() -> None:
            files.append(str(folder / f"{len(files)}.safetensors"))
            save_file(held, files[-1])
            held.clear()

        for name, tensor in weights:
            if self._shapes.get(name) != tuple(tensor.shape):
                raise DataError(f"tensor {name} of shape {tuple(tensor.shape)} has no place in this model",
                                place="update_weights", mend="use the checkpoint's names")  # fmt: skip
            given.add(name)
            hold(name, tensor)
        if missing := self._replaced - given:
            raise DataError(f"{len(missing)} tensors were replaced before and are missing, first {min(missing)}",
                            place="update_weights", mend="send the same ones every time, or all")  # fmt: skip
        for name, tensor in read_tensors(self._folder):
            if name not in given:
                hold(name, tensor)
        if held:
            flush()
        self._replaced = given
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

    def invariants(self) -> list[str]:
        """What is wrong with the bookkeeping; vLLM's own is its own."""
        ended = [name for name, reader in list(self._readers.items()) if reader.work is not None and reader.work.done()]
        return [f"request {name} has ended and is kept" for name in ended]

    def close(self) -> None:
        """See `protocol.Engine.close`."""
        if self._closed:
            return
        self._closed = True
        self._wait(self._shut())
        self._end_loop()

    async def _shut(self) -> None:
        for name in list(self._readers):
            self._abort(name)
        for _ in range(3):  # the cancelled tasks end, and tell vLLM
            await asyncio.sleep(0)
        self._engine.shutdown()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _start(arguments: dict[str, Any], watch: Watch, device: str) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    if device not in ("auto", current_platform.device_type):
        raise ResourceError(
            f"this vLLM computes on {current_platform.device_type!r}, the engine is to compute on {device!r}",
            place="engine.backend", mend="give the replica the GPUs it needs, or install vLLM's other build",
        )  # fmt: skip
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[watch.logger()])


@contextmanager
def _variables(given: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for processes that start meanwhile; those that a person has set for vLLM stay."""
    before = {name: os.environ.get(name) for name in given}
    os.environ |= {name: v for name, v in given.items() if not (name.startswith("VLLM_") and name in os.environ)}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
