"""Tokens a CPU-second of the native engine against transformers: `generate` one by one, static batches, continuous.

    python tests/benchmarks/engine_throughput.py [--model FOLDER] [--tokens 64] [--repeats 3]

One random Llama of 32 M parameters stored in bfloat16, or the given model; one thread, 64-token prompts, greedy, the
same number of tokens from every side. Ours keeps no prefixes, since the rounds repeat their prompts. Headline: 32
concurrent requests in float32 against transformers' continuous batching. vLLM's CPU build joins when .venv-vllm exists
(requirements-vllm.txt) or MODELYARD_VLLM_PYTHON names an interpreter that has it, in the precision it chooses itself,
against what ours chooses, and in float32; llama.cpp in q8_0 likewise (.venv-llama, requirements-llama.txt,
MODELYARD_LLAMA_PYTHON).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from contract import CHECKOUT, in_turns, report, say
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from modelyard.engine import EngineCore, EngineOptions, Request, Sampling, generate
from modelyard.engine.options import Precision

SHAPE = {
    "vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT = 64
CONCURRENT = (1, 8, 32)
SIDES: tuple[tuple[str, Precision | Literal["auto"]], ...] = (
    ("native", "float32"), ("native default", "auto"), ("native fp16", "float16_packed"), ("native int8", "int8"),
)  # fmt: skip

Answers = list[list[int]]


def save_model(folder: Path) -> None:
    """A random checkpoint; wide initial weights keep greedy choices clear of ties."""
    torch.manual_seed(1)  # with 0, two tokens of a prompt come within rounding of each other
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.1, eos_token_id=None)).eval()
    model.bfloat16().save_pretrained(folder)


def load(folder: Path) -> LlamaForCausalLM:
    """The peer's model: a fresh one a side, because the continuous batching manager lives in it."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def make_prompts(count: int) -> list[list[int]]:
    """Random token ids [count, PROMPT], the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, SHAPE["vocab_size"], (PROMPT,), generator=generator).tolist() for _ in range(count)]


def ours(core: EngineCore, prompts: list[list[int]], tokens: int) -> Answers:
    """All prompts at once."""
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    requests = [Request(str(i), tuple(p), sampling, detokenize=False) for i, p in enumerate(prompts)]
    return [list(c.output.tokens) for c in generate(core, requests)]


def static(model: LlamaForCausalLM, prompts: list[list[int]], tokens: int) -> Answers:
    """One batch of equal lengths, which is the best case for it."""
    ids = torch.tensor(prompts)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [row[PROMPT:].tolist() for row in out]


def continuous(model: LlamaForCausalLM, prompts: list[list[int]], tokens: int) -> Answers:
    """transformers' continuous batching, its manager and cache kept from round to round.

    Must not run under inference_mode: its thread then fails and still takes CPU time.
    """
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results: dict[str, Any] = model.generate_batch(
        inputs=prompts,
        generation_config=config,
        # By default it takes nearly all free memory for its cache.
        continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.1),
        progress_bar=False,
        persistent_manager=True,
    )
    by_prompt = {tuple(r.prompt_ids): list(r.generated_tokens) for r in results.values()}
    answers = [by_prompt.get(tuple(p), []) for p in prompts]
    if any(len(a) != tokens for a in answers):
        raise RuntimeError(f"the peer did not answer in full: {[len(a) for a in answers]}")
    return answers


def foreign_rates(
    name: str, batches: Sequence[int], folder: Path, tokens: int, repeats: int, precision: str = ""
) -> dict[str, Any]:
    """{"rates", "answers", "version"} of a peer with an interpreter of its own; empty when it is absent.

    name: `vllm` (its CPU build, in `precision`) or `llama` (llama.cpp, in q8_0).
    """
    named = os.environ.get(f"MODELYARD_{name.upper()}_PYTHON")
    python = Path(named or CHECKOUT / f".venv-{name}" / "bin" / "python")
    if not python.exists():
        say(f"{name} is absent: see tests/benchmarks/requirements-{name}.txt")
        return {}
    script = Path(__file__).parent / "peers" / f"{name}_generate.py"
    done = subprocess.run(
        [str(python), str(script), str(folder), str(tokens), str(repeats)],
        input=json.dumps([make_prompts(n) for n in batches]),
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"OMP_NUM_THREADS": "1", "PEER_DTYPE": precision},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    say(f"{name} {precision} {found['version']}: {found['rates']}")
    return found


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a Hugging Face folder in place of the random 32 M Llama")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as random:
        folder = args.model or Path(random)
        if args.model is None:
            save_model(folder)
        results = measure(folder, args.tokens, args.repeats)
        vllm, exact = (
            foreign_rates("vllm", CONCURRENT[1:], folder, args.tokens, args.repeats, p) for p in ("auto", "float32")
        )
        llama = foreign_rates("llama", CONCURRENT, folder, args.tokens, args.repeats)
    finish(results, vllm, exact, llama)


def measure(folder: Path, tokens: int, repeats: int) -> dict[str, tuple[float, Answers]]:
    """Side -> (tokens a CPU-second, answers)."""
    options = EngineOptions(max_sequences=32, threads=1, max_length=512, prefix_cache=False, max_loss_increase=9.0)
    cores = {name: EngineCore(folder, options.model_copy(update={"precision": precision})) for name, precision in SIDES}
    peer, peer_cb = load(folder), load(folder)
    found: dict[str, tuple[float, Answers]] = {}
    for count in CONCURRENT:
        prompts = make_prompts(count)
        sides: dict[str, Callable[[], Answers]] = {
            f"{name} {count}": functools.partial(ours, core, prompts, tokens) for name, core in cores.items()
        }
        sides[f"static {count}"] = functools.partial(static, peer, prompts, tokens)
        if count > 1:
            sides[f"continuous {count}"] = functools.partial(continuous, peer_cb, prompts, tokens)
        for name, runs in in_turns(sides, repeats=repeats).items():
            found[name] = count * tokens / runs.cpu_median, runs.last
            say(f"{name}: {found[name][0]:.0f} tokens a CPU-second")
    return found


def finish(
    found: dict[str, tuple[float, Answers]], vllm: dict[str, Any], exact: dict[str, Any], llama: dict[str, Any]
) -> None:
    """Prints the result line; ratios to an absent peer are null."""
    rate = {name: value[0] for name, value in found.items()}
    against_vllm = {
        f"ratio_vllm_{n}": rate[f"native default {n}"] / vllm["rates"][str(n)] if vllm else None for n in CONCURRENT[1:]
    } | {
        f"ratio_vllm_float32_{n}": rate[f"native {n}"] / exact["rates"][str(n)] if exact else None
        for n in CONCURRENT[1:]
    }
    report(
        "engine_throughput",
        unit="tokens/CPU s",
        ours=rate["native 32"],
        peer=rate["continuous 32"],
        peer_name=f"transformers {transformers.__version__} continuous batching",
        target=2.0,
        identical=all(found[f"native {n}"][1] == found[f"static {n}"][1] for n in CONCURRENT),
        identical_cb=all(found[f"native {n}"][1] == found[f"continuous {n}"][1] for n in CONCURRENT[1:]),
        identical_vllm=all(found[f"native {n}"][1] == exact["answers"][str(n)] for n in CONCURRENT[1:])
        if exact
        else None,
        ratio_cb_8=rate["native 8"] / rate["continuous 8"],
        ratio_cb_32=rate["native 32"] / rate["continuous 32"],
        ratio_generate=rate["native 32"] / rate["static 1"],
        ratio_static_8=rate["native 8"] / rate["static 8"],
        ratio_static_32=rate["native 32"] / rate["static 32"],
        **against_vllm,
        vllm_version=vllm.get("version"),
        ratio_llama_1=rate["native int8 1"] / llama["rates"]["1"] if llama else None,
        ratio_llama_32=rate["native int8 32"] / llama["rates"]["32"] if llama else None,
        llama_version=llama.get("version"),
        rates=rate
        | {f"vllm {n}": r for n, r in vllm.get("rates", {}).items()}
        | {f"vllm float32 {n}": r for n, r in exact.get("rates", {}).items()}
        | {f"llama.cpp q8_0 {n}": r for n, r in llama.get("rates", {}).items()},
    )


if __name__ == "__main__":
    main()
