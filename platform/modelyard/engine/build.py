"""From a model folder and options to the parts an engine core steps with, within the memory allowed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from modelyard.engine import kernels
from modelyard.engine.any_architecture import AnyArchitecture, Facts
from modelyard.engine.cache import BlockStore, Cache, NoStore
from modelyard.engine.calibrate import pack_int8
from modelyard.engine.checkpoint import DecoderConfig, check_folder, read_config, read_tensors
from modelyard.engine.decoder import Decoder
from modelyard.engine.options import EngineOptions, Precision
from modelyard.engine.paged import PagedDecoder
from modelyard.engine.products import has_amx
from modelyard.engine.speculate import DraftModel, Guesser, PromptLookup, draft_config
from modelyard.engine.tokenizer import Tokenizer
from modelyard.engine.weights import Weights, dense_weights
from modelyard.errors import ResourceError
from modelyard.planner.machine import free_memory


@dataclass(frozen=True)
class Parts:
    """What `EngineCore` is made of.

    `blocks`: key/value blocks in all. `step_tokens`: budget of a step where the options give none.
    """

    config: DecoderConfig | Facts
    max_length: int
    tokenizer: Tokenizer | None
    decoder: Decoder | AnyArchitecture | PagedDecoder
    cache: BlockStore
    guesser: Guesser | None
    blocks: int
    step_tokens: int = 256


def build(folder: Path, options: EngineOptions) -> Parts:
    """Checks, sizes and loads.

    Raises:
        DataError: the folder is incomplete, unsafe or of another architecture.
        ResourceError: the key/value cache does not fit, or int8 costs too much quality.
        ValueError: the options ask for vLLM, which steps by itself (`choose`).
    """
    if options.backend == "vllm":
        raise ValueError("EngineCore is no vLLM: use modelyard.engine.choose")
    check_folder(folder)
    if options.backend == "transformers":
        if options.kv_precision == "fp8":
            raise ResourceError("the transformers backend keeps keys and values its own way",
                                place="engine.kv_precision", mend="use auto")  # fmt: skip
        return _any(folder, options)
    if on_gpu(options) or options.tensor_parallel > 1:
        return _paged(folder, options)
    if options.kv_precision == "fp8":
        raise ResourceError("fp8 keys and values are a GPU's", place="engine.kv_precision", mend="use auto")
    config = read_config(folder)
    precision = _precision(folder, options.precision)
    kept = _kept(config, precision)
    length = _length(config, options, kept)
    blocks = _blocks(config, length, options, kept)
    gated = precision == "int8"
    weights = Weights(config, "float32" if gated else precision)
    # Reading and packing the weights is C++ without Python's lock: what is Python only stands beside it, not behind it.
    with ThreadPoolExecutor(1, "build") as beside:
        kernels_ready, read = beside.submit(kernels.initialize), beside.submit(_tokenizer, folder)
        weights.load(read_tensors(folder), str(folder))
        kernels_ready.result()
        tokenizer = read.result()
    stored = blocks if options.prefix_cache else 0
    cache = Cache(config, options.max_sequences, length, stored, options.block_tokens, kept)
    decoder = Decoder(weights, cache, length, torch.get_num_threads())
    if gated:
        pack_int8(weights, decoder, tokenizer, options.max_loss_increase)
    guesser = _guesser(config, length, options, None, torch.float32)
    return Parts(config, length, tokenizer, decoder, cache, guesser, blocks)


def on_gpu(options: EngineOptions) -> bool:
    """Whether these options mean a GPU: asked for, or there and able to do what is asked."""
    if options.backend == "transformers" or options.device != "auto":
        return options.device == "cuda"
    return torch.cuda.is_available() and options.precision != "int8"


def _tokenizer(folder: Path) -> Tokenizer | None:
    return Tokenizer(folder) if (folder / "tokenizer.json").exists() else None


def _any(folder: Path, options: EngineOptions) -> Parts:
    decoder = AnyArchitecture(folder)
    length = decoder.facts.length(options.max_length)
    tokenizer = _tokenizer(folder)
    blocks = (-(-length // options.block_tokens) + 1) * options.max_sequences
    return Parts(decoder.facts, length, tokenizer, decoder, NoStore(), None, blocks)


def _paged(folder: Path, options: EngineOptions) -> Parts:
    """One pool of blocks on a GPU: what memory allows after the weights, no slots. On several, a slice of each."""
    device = gpu() if on_gpu(options) else torch.device("cpu")
    config = read_config(folder)
    length = config.length(options.max_length)
    exact = options.precision == "float32" or device.type == "cpu"
    dtype = torch.float32 if exact else torch.bfloat16
    _check_gpu(options, device)
    guesser = _guesser(config, length, options, device, dtype)  # first: the pool takes what memory is left
    decoder: PagedDecoder
    if options.tensor_parallel > 1:
        decoder, blocks = _split(folder, config, length, options, device, dtype)
    else:
        weights = dense_weights(config, device, dtype)
        blocks = _paged_blocks(config, length, options, device, dtype)
        weights.load(read_tensors(folder), str(folder))
        decoder = PagedDecoder(weights, blocks, options.block_tokens, length, fp8=options.kv_precision == "fp8")
    tokenizer = _tokenizer(folder)
    return Parts(config, length, tokenizer, decoder, NoStore(), guesser, blocks, step_tokens=8192)


def _split(
    folder: Path, config: DecoderConfig, length: int, options: EngineOptions, device: torch.device, dtype: torch.dtype
) -> tuple[PagedDecoder, int]:
    """The decoder whose slices lie on several devices, and the blocks of each."""
    from modelyard.engine.tensor_parallel import Leader, local_config

    workers = options.tensor_parallel
    local = local_config(config, workers)
    if device.type == "cuda" and torch.cuda.device_count() < workers:
        raise ResourceError(
            f"{workers} slices need as many GPUs, this process sees {torch.cuda.device_count()}",
            place="engine.tensor_parallel",
            mend="lower it, or give the replica more GPUs (gpus_per_worker)",
        )
    held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))  # a slice's weights are less
    blocks = _paged_blocks(local, length, options, device, dtype, held)
    fp8 = options.kv_precision == "fp8"
    return Leader(folder, config, workers, blocks, options.block_tokens, length, device, dtype, fp8=fp8), blocks


def _check_gpu(options: EngineOptions, device: torch.device) -> None:
    """Raises ResourceError for what only the CPU's backend has, or another GPU."""
    if options.kv_precision == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ResourceError("this GPU does not compute with e4m3 (it needs compute capability 8.9)",
                            place="engine.kv_precision", mend="use auto")  # fmt: skip
    if options.precision == "int8":
        raise ResourceError("int8 products are the CPU's", place="engine.precision", mend="use bfloat16 or float32")


def _paged_blocks(
    config: DecoderConfig,
    length: int,
    options: EngineOptions,
    device: torch.device,
    dtype: torch.dtype,
    held: int = 0,
) -> int:
    """Blocks of the pool: as many as wanted, else as all sequences may need, else as the GPU's free memory holds.

    `held`: bytes that are about to be taken by weights.
    """
    size = options.block_tokens
    one = -(-length // size) + 1
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    bound = options.cache_bytes or max(0, int(0.85 * (free - held)))
    head = config.head_dim + 4 if options.kv_precision == "fp8" else config.head_dim * dtype.itemsize
    fitting = bound // (size * config.kept_bytes(head))
    if fitting < one:
        raise ResourceError(
            f"the key/value cache needs {one} blocks of {size} tokens for one request, {fitting} fit",
            place="engine.max_length",
            mend="lower max_length, or raise cache_bytes",
        )
    wanted = one * options.max_sequences if options.cache_tokens is None else -(-options.cache_tokens // size)
    return min(max(one, wanted), fitting)


def gpu() -> torch.device:
    """The CUDA device of this process. Raises ResourceError when there is none."""
    if not torch.cuda.is_available():
        raise ResourceError("there is no CUDA device", place="engine.device", mend="use device: cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _precision(folder: Path, wanted: Precision | Literal["auto"]) -> Precision:
    """What `auto` means on this CPU: bfloat16 where AMX multiplies it and the checkpoint's own weights are of it."""
    if wanted != "auto":
        return wanted
    file = folder / "config.json"
    raw = json.loads(file.read_text()) if file.is_file() else {}
    stored = raw.get("dtype") or raw.get("torch_dtype")
    return "bfloat16" if stored == "bfloat16" and has_amx() else "float16_packed"


def _kept(config: DecoderConfig, precision: Precision) -> torch.dtype:
    """What keys and values are kept in: rounded to bfloat16 where the products round what they come from."""
    return torch.bfloat16 if precision == "bfloat16" and config.head_dim % 2 == 0 else torch.float32


def _guesser(
    config: DecoderConfig, length: int, options: EngineOptions, device: torch.device | None, dtype: torch.dtype
) -> Guesser | None:
    """Who guesses ahead; a draft model beside the large one, paged on `device`, or over slots where that is None."""
    s = options.speculation
    if s is None:
        return None
    if s.method == "prompt_lookup":
        return PromptLookup(s)
    folder, draft = draft_config(s, config.vocabulary)
    slots, reach, size = min(s.max_running, options.max_sequences), draft.length(length), options.block_tokens
    decoder: Decoder | PagedDecoder
    if device is None:
        # No gate stands before a draft: it changes no answer, it would only guess worse, and nobody would be told.
        wanted = "auto" if options.precision == "int8" else options.precision
        precision = _precision(folder, wanted)
        weights = Weights(draft, precision)
        cache = Cache(draft, slots, reach, kept=_kept(draft, precision))
        decoder = Decoder(weights, cache, reach, torch.get_num_threads())
    else:
        weights = dense_weights(draft, device, dtype)
        decoder = PagedDecoder(weights, slots * -(-reach // size), size, reach)
    weights.load(read_tensors(folder), str(folder))
    return DraftModel(s, decoder, slots, reach, size)


SHORTEST = 1024
"""Tokens below which `max_length` is not shortened to fit memory: an error says more than that would help."""


def _length(config: DecoderConfig, options: EngineOptions, kept: torch.dtype) -> int:
    """Tokens of prompt and answer: as asked; else the model's, or as many as memory holds for all sequences at once."""
    length = config.length(options.max_length)
    if options.max_length is not None:
        return length
    bound = options.cache_bytes if options.cache_bytes is not None else int(0.6 * free_memory())
    size, one = options.block_tokens, int(options.prefix_cache)
    held = bound // config.kept_bytes(config.head_dim * kept.itemsize) - (options.cache_tokens or 0) * one
    slots = options.max_sequences + (
        one if options.cache_tokens is None else 0
    )  # the store holds one sequence at least
    return min(length, max(held // slots // size * size - 2 * size, SHORTEST))


def _blocks(config: DecoderConfig, length: int, options: EngineOptions, kept: torch.dtype) -> int:
    """Blocks of the prefix cache: as many as wanted, else as fill all slots, else as memory allows."""
    bound = options.cache_bytes if options.cache_bytes is not None else int(0.6 * free_memory())
    size, token = options.block_tokens, config.kept_bytes(config.head_dim * kept.itemsize)
    slot = -(-length // size)
    slots = slot * options.max_sequences * size * token
    # One sequence of the greatest length must always fit, or it could never run.
    least, whole = slot + 1, (slot + 1) * options.max_sequences
    if not options.prefix_cache:
        stored, blocks = 0, whole
    else:
        wanted = whole if options.cache_tokens is None else -(-options.cache_tokens // size)
        fitting = max(0, bound - slots) // (size * token)
        blocks = max(least, wanted if options.cache_tokens is not None else min(wanted, fitting))
        stored = blocks * size * token
    if slots + stored > bound:
        raise ResourceError(
            f"the key/value cache needs {(slots + stored) / 2**20:,.0f} MiB, {bound / 2**20:,.0f} MiB are allowed",
            place="engine.max_sequences, engine.max_length, engine.cache_tokens",
            mend="lower max_sequences or max_length, or raise cache_bytes",
        )
    return blocks
