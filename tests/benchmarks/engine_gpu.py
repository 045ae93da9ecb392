"""Tokens a second of the engine on a GPU against transformers' continuous batching, and its share of the floor.

    python tests/benchmarks/engine_gpu.py [--preset llama-1b] [--tokens 128]

A random Llama in bfloat16, prompts of 32 to 256 tokens, greedy, the same answers' length from both sides, wall time.
The floor of a decode step is reading every weight and the keys and values of the batch once, at the rate of a
device-to-device copy measured in the same run. Time to first token is that of one prompt of 512 tokens.
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


def make_prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Random token ids, the same in every run."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(32, 257, (count,), generator=generator).tolist()
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


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Rates of both sides, steps against the floor, and first tokens."""
    rate = copy_rate()
    say(f"{torch.cuda.get_device_name()}: copies {rate / 1e12:.2f} TB/s")
    options = EngineOptions(
        device="cuda", max_sequences=CONCURRENT[-1], max_length=1024, prefix_cache=False, precision="bfloat16"
    )
    core = EngineCore(folder, options)
    vocabulary = core.config.vocabulary
    rates: dict[str, float] = {}
    shares: dict[str, float] = {}
    answers: dict[str, list[list[int]]] = {}
    for count in CONCURRENT:
        prompts = make_prompts(count, vocabulary)
        seconds, answers[f"ours {count}"] = timed(lambda p=prompts: ours(core, p, args.tokens), args.repeats)
        short, _ = timed(lambda p=prompts: ours(core, p, 1), args.repeats)
        step = (seconds - short) / (args.tokens - 1)
        rates[f"ours {count}"] = count * args.tokens / seconds
        shares[str(count)] = decode_floor(core, prompts, args.tokens, rate) / step
        say(f"ours {count}: {rates[f'ours {count}']:,.0f} tokens/s, {step * 1e3:.2f} ms a step, "
            f"{shares[str(count)]:.0%} of the floor's rate, prompts {short * 1e3:.1f} ms")  # fmt: skip
    first = {"ours": timed(lambda: ours(core, make_first(vocabulary), 1), 10)[0]}
    if not args.no_peer:
        del core
        gc.collect()
        torch.cuda.empty_cache()
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").cuda().eval()
        with continuous(model, args.tokens) as peer:
            for count in CONCURRENT:
                prompts = make_prompts(count, vocabulary)
                seconds, answers[f"continuous {count}"] = timed(lambda p=prompts: peer(p, args.tokens), args.repeats)
                rates[f"continuous {count}"] = count * args.tokens / seconds
                say(f"continuous {count}: {rates[f'continuous {count}']:,.0f} tokens/s")
            first["continuous"] = timed(lambda: peer(make_first(vocabulary), 1), 10)[0]
    same = {
        str(n): statistics.fmean(
            a == b
            for x, y in zip(answers[f"ours {n}"], answers[f"continuous {n}"], strict=True)
            for a, b in zip(x, y, strict=True)
        )
        for n in CONCURRENT
        if f"continuous {n}" in answers
    }
    return {"tokens_per_second": rates, "share_of_floor": shares, "first_token_s": first, "copy_tb_s": rate / 1e12,
            "same_tokens": same}  # fmt: skip


def make_first(vocabulary: int) -> list[list[int]]:
    """One prompt of FIRST tokens."""
    return [torch.randint(5, vocabulary, (FIRST,)).tolist()]


if __name__ == "__main__":
    main()
