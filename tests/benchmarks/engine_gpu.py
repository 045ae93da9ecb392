"""Tokens a second of the engine on a GPU against transformers' continuous batching, and its share of the floor.

    python tests/benchmarks/engine_gpu.py [--preset llama-1b] [--tokens 128]

A random Llama in bfloat16, prompts of 32 to 256 tokens, greedy, the same answers' length from both sides, wall time.
The floor of a decode step is reading every weight and the keys and values of the batch once, at the rate of a
device-to-device copy measured in the same run. Time to first token is that of one prompt of 512 tokens. `fp8` is the
same engine with keys and values in e4m3, on prompts of 512 to 768 tokens beside bfloat16 on the same ones.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from contract import report, say
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.continuous_batching.utils import WorkloadHints

from modelyard.engine import EngineCore, EngineOptions, Request, Sampling, generate
from modelyard.models.presets import PRESETS

CONCURRENT = (1, 8, 32, 128)
FIRST = 512


def save_model(folder: Path, preset: str) -> None:
    """A random checkpoint in bfloat16."""
    torch.manual_seed(0)
    shape = {name: value for name, value in PRESETS[preset].config().items() if name != "model_type"}
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None)).to(torch.bfloat16)
    model.save_pretrained(folder)


def make_prompts(count: int, vocabulary: int, shortest: int = 32, longest: int = 256) -> list[list[int]]:
    """Random token ids, the same in every run."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(5, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def ours(core: EngineCore, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """All prompts at once."""
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    requests = [Request(str(i), tuple(p), sampling, detokenize=False) for i, p in enumerate(prompts)]
    return [list(c.output.tokens) for c in generate(core, requests)]


@contextmanager
def continuous(model: LlamaForCausalLM, tokens: int) -> Iterator[Callable[[list[list[int]], int], list[list[int]]]]:
    """transformers' continuous batching: one manager that keeps running, as a server would hold it.

    `generate_batch` starts and stops a thread in every call, which takes a second.
    """
    hints = WorkloadHints(max_prompt_length=FIRST, max_generated_length=tokens, num_requests=CONCURRENT[-1])
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.3, allow_block_sharing=False),
        workload_hints=hints,
    ) as manager:

        def answer(prompts: list[list[int]], length: int) -> list[list[int]]:
            ids = manager.add_requests(inputs=prompts, max_new_tokens=length)
            found: dict[str, list[int]] = {}
            while len(found) < len(ids):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    found[result.request_id] = list(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("the peer ended")
            if any(len(a) != length for a in found.values()):
                raise RuntimeError(f"the peer did not answer in full: {[len(a) for a in found.values()]}")
            return [found[i] for i in ids]

        yield answer


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median wall seconds after one turn that is not counted, and the last result."""
    seconds, result = [], None
    for turn in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        if turn:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), result


def copy_rate(size: int = 4 << 30) -> float:
    """Bytes a second of a copy on the device, read and written ones."""
    a = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    seconds, _ = timed(lambda: b.copy_(a), 10)
    return 2 * size / seconds


def decode_floor(core: EngineCore, prompts: list[list[int]], tokens: int, rate: float) -> float:
    """Seconds a decode step needs at least to read weights, keys and values."""
    c = core.config
    weights = sum(t.numel() * t.element_size() for t in core.decoder.weights.tensors())
    if not c.tied:
        weights -= c.vocabulary * c.hidden * 2  # a step reads a few rows of the embedding
    else:
        weights -= core.decoder.weights.embed.numel() * 2  # the head is that matrix
    context = sum(len(p) + tokens / 2 for p in prompts)
    return float(weights + context * c.cache_bytes_per_token / 2) / rate


def main() -> None:
    """Prints the result as one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="llama-1b")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("engine_gpu needs a CUDA GPU")
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name), args.preset)
        figures = measure(Path(name), args)
    rates = figures["tokens_per_second"]
    peer = rates.get("continuous 32", 0.0)
    report(
        "engine_gpu",
        unit="tokens/s",
        ours=rates["ours 32"],
        peer=peer,
        peer_name=f"transformers {transformers.__version__} continuous batching",
        target=1.0,
        **{
            f"ratio_cb_{n}": rates[f"ours {n}"] / rates[f"continuous {n}"]
            for n in CONCURRENT
            if f"continuous {n}" in rates
        },
        **figures,
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
    )


@dataclass
class Found:
    """What both sides did."""

    rates: dict[str, float] = field(default_factory=dict)
    """Tokens a second, by side and number of requests."""
    shares: dict[str, float] = field(default_factory=dict)
    """Of the floor's rate, by number of requests."""
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    """Seconds to the first token."""


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Rates of both sides, steps against the floor, and first tokens."""
    rate = copy_rate()
    say(f"{torch.cuda.get_device_name()}: copies {rate / 1e12:.2f} TB/s")
    options = EngineOptions(
        device="cuda", max_sequences=CONCURRENT[-1], max_length=1024, prefix_cache=False, precision="bfloat16"
    )
    found = Found()
    measure_ours(folder, options, args, rate, found)
    fp8 = {kv: kept(folder, options.model_copy(update={"kv_precision": kv}), args) for kv in ("auto", "fp8")}
    if not args.no_peer:
        measure_peer(folder, args, found)
    same = {
        str(n): statistics.fmean(
            a == b
            for x, y in zip(found.answers[f"ours {n}"], found.answers[f"continuous {n}"], strict=True)
            for a, b in zip(x, y, strict=True)
        )
        for n in CONCURRENT
        if f"continuous {n}" in found.answers
    }
    return {"tokens_per_second": found.rates, "share_of_floor": found.shares, "first_token_s": found.first,
            "copy_tb_s": rate / 1e12, "same_tokens": same, "kv_precision": fp8}  # fmt: skip


def measure_ours(folder: Path, options: EngineOptions, args: argparse.Namespace, copies: float, found: Found) -> None:
    """Our side; `copies` in bytes a second."""
    core = EngineCore(folder, options)
    vocabulary = core.config.vocabulary
    for count in CONCURRENT:
        prompts = make_prompts(count, vocabulary)
        seconds, found.answers[f"ours {count}"] = timed(lambda p=prompts: ours(core, p, args.tokens), args.repeats)
        short, _ = timed(lambda p=prompts: ours(core, p, 1), args.repeats)
        step = (seconds - short) / (args.tokens - 1)
        rate = found.rates[f"ours {count}"] = count * args.tokens / seconds
        share = found.shares[str(count)] = decode_floor(core, prompts, args.tokens, copies) / step
        say(f"ours {count}: {rate:,.0f} tokens/s, {step * 1e3:.2f} ms a step, "
            f"{share:.0%} of the floor's rate, prompts {short * 1e3:.1f} ms")  # fmt: skip
    found.first["ours"] = timed(lambda: ours(core, make_first(vocabulary), 1), 10)[0]


def measure_peer(folder: Path, args: argparse.Namespace, found: Found) -> None:
    """The peer's side."""
    gc.collect()
    torch.cuda.empty_cache()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").cuda().eval()
    vocabulary = model.config.vocab_size
    with continuous(model, args.tokens) as peer:
        for count in CONCURRENT:
            prompts = make_prompts(count, vocabulary)
            seconds, answers = timed(lambda p=prompts: peer(p, args.tokens), args.repeats)
            found.answers[f"continuous {count}"] = answers
            found.rates[f"continuous {count}"] = count * args.tokens / seconds
            say(f"continuous {count}: {found.rates[f'continuous {count}']:,.0f} tokens/s")
        found.first["continuous"] = timed(lambda: peer(make_first(vocabulary), 1), 10)[0]


def kept(folder: Path, options: EngineOptions, args: argparse.Namespace) -> dict[str, float]:
    """Long prompts with keys and values of one precision: rate, milliseconds a decode step, bytes a token."""
    gc.collect()
    torch.cuda.empty_cache()
    core = EngineCore(folder, options)
    prompts = make_prompts(CONCURRENT[-1], core.config.vocabulary, 512, 768)
    seconds, _ = timed(lambda: ours(core, prompts, args.tokens), args.repeats)
    short, _ = timed(lambda: ours(core, prompts, 1), args.repeats)
    head = core.config.head_dim + 4 if options.kv_precision == "fp8" else core.config.head_dim * 2
    found = {
        "tokens_per_second": len(prompts) * args.tokens / seconds,
        "step_ms": (seconds - short) / (args.tokens - 1) * 1e3,
        "prompt_ms": short * 1e3,
        "bytes_per_token": core.config.kept_bytes(head),
    }
    say(f"keys and values {options.kv_precision}: {found}")
    return found


def make_first(vocabulary: int) -> list[list[int]]:
    """One prompt of FIRST tokens."""
    return [torch.randint(5, vocabulary, (FIRST,)).tolist()]


if __name__ == "__main__":
    main()
