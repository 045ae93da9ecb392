"""Predicted against measured seconds of a training step on this machine, after calibration on other runs.

    python tests/benchmarks/planner_time.py [--threads N]

Every configuration trains a few steps in this process; the planner is calibrated on every other one of them
and predicts those left out. The ratio is predicted over measured of the worst configuration left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from modelyard.planner import Layout, find_hardware
from modelyard.planner.calibrate import Measurement, calibrate, predicted
from modelyard.planner.training import several_cores

LLAMA = {"model_type": "llama", "max_position_embeddings": 2048, "tie_word_embeddings": True}


def _llama(hidden: int, layers: int, heads: int, ffn: int, vocab: int) -> dict[str, Any]:
    return {**LLAMA, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": heads // 2, "intermediate_size": ffn, "vocab_size": vocab}  # fmt: skip


CASES: list[tuple[str, dict[str, Any], int, int, str]] = [
    ("4M, 256 x 4", _llama(192, 6, 6, 512, 8192), 4, 256, "none"),
    ("8M, 256 x 4", _llama(256, 8, 4, 704, 8192), 4, 256, "none"),
    ("8M, 256 x 8", _llama(256, 8, 4, 704, 8192), 8, 256, "none"),
    ("8M, 256 x 8, recompute", _llama(256, 8, 4, 704, 8192), 8, 256, "full"),
    ("8M, 1024 x 1", _llama(256, 8, 4, 704, 8192), 1, 1024, "none"),
    ("15M, 512 x 2", _llama(320, 10, 10, 896, 8192), 2, 512, "none"),
    ("30M, 256 x 4", _llama(512, 8, 8, 1408, 16384), 4, 256, "none"),
    ("30M, 256 x 4, recompute", _llama(512, 8, 8, 1408, 16384), 4, 256, "full"),
    ("60M, 128 x 4", _llama(640, 10, 10, 1728, 16384), 4, 128, "none"),
    ("60M, 256 x 4", _llama(640, 10, 10, 1728, 16384), 4, 256, "none"),
]


def measure(config: dict[str, Any], batch: int, length: int, recompute: str, steps: int) -> float:
    """Least seconds of an optimizer step, the first one left out; CPU time, so that neighbours weigh less."""
    import torch
    import torch.nn.functional as F
    import transformers as hf

    settings = hf.LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"}, use_cache=False)
    model = hf.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    if recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    seconds = []
    for _ in range(steps + 1):
        tokens = torch.randint(0, config["vocab_size"], (batch, length))
        began = time.process_time()
        logits = model(input_ids=tokens).logits
        F.cross_entropy(logits.reshape(-1, config["vocab_size"]), tokens.roll(-1, 1).reshape(-1)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append((time.process_time() - began) / torch.get_num_threads())
    # CPU time still grows when neighbours fill the caches: the least disturbed step tells most.
    return min(seconds[1:])


def main() -> None:
    """Measures, calibrates on the even cases, predicts the odd ones and prints the contract's JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads of the one worker")
    parser.add_argument("--steps", type=int, default=4, help="measured steps a configuration")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    runs: list[tuple[str, Measurement]] = []
    for name, config, batch, length, recompute in CASES:
        layout = Layout(micro_batch=batch, recompute=recompute)  # type: ignore[arg-type]
        seconds = measure(config, batch, length, recompute, arguments.steps)
        runs.append((name, Measurement(config, length, batch, seconds, layout)))
        print(f"{name:28} {seconds:7.3f} s", file=sys.stderr, flush=True)
    hw = several_cores(find_hardware(), arguments.threads)
    before = [abs(predicted(m, hw) / m.seconds - 1) for _, m in runs]
    fitted = calibrate([m for _, m in runs[::2]], hw)
    ratios = {name: predicted(m, fitted.hardware) / m.seconds for name, m in runs[1::2]}
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    error = abs(ratios[worst] - 1)
    for name, ratio in ratios.items():
        print(f"{name:28} predicted {100 * (ratio - 1):+6.1f} %", file=sys.stderr)
    print(json.dumps({
        "name": "planner_time", "unit": "predicted/measured", "ours": ratios[worst], "peer": 1.0,
        "peer_name": "measured", "ratio": ratios[worst], "target": 0.2, "pass": error <= 0.2, "max_error": error,
        "configurations": len(ratios), "calibrated_on": fitted.runs, "efficiency": fitted.efficiency,
        "bandwidth_gb_s": fitted.hardware.bandwidth / 1e9, "max_error_uncalibrated": max(before),
        "fit_max_error": fitted.max_error,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
