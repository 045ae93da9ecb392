"""Parameters counted from configs against those of the models transformers builds on the meta device.

    python tests/benchmarks/planner_parameters.py

Published shapes of real size; the peer is `sum(p.numel())`. Also prints how much faster counting is.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from modelyard.planner import count


def cases() -> list[tuple[str, Any, str]]:
    """(name, config, task) of models at their published size, from the classes' own defaults where those are one."""
    import transformers as hf

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = {**ids, "vocab_size": 128256, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
             "num_key_value_heads": 8, "intermediate_size": 28672}  # fmt: skip
    qwen = {**ids, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "head_dim": 128,
            "num_key_value_heads": 8, "intermediate_size": 12288}  # fmt: skip
    moe = {**ids, "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
           "head_dim": 128, "moe_intermediate_size": 1536, "num_experts": 128}  # fmt: skip
    return [
        ("Llama-3.3-70B", hf.LlamaConfig(**llama), "causal"),
        ("Mistral-7B", hf.MistralConfig(), "causal"),
        ("Mixtral-8x7B", hf.MixtralConfig(), "causal"),
        ("Qwen2-MoE", hf.Qwen2MoeConfig(), "causal"),
        ("Qwen3-8B", hf.Qwen3Config(**qwen), "causal"),
        ("Qwen3-235B-A22B", hf.Qwen3MoeConfig(**moe), "causal"),
        ("DeepSeek-V3", hf.DeepseekV3Config(), "causal"),
        ("gpt-oss-120b", hf.GptOssConfig(), "causal"),
        ("Gemma-2", hf.Gemma2Config(), "causal"),
        ("Gemma-3 text", hf.Gemma3TextConfig(), "causal"),
        ("Phi-3", hf.Phi3Config(), "causal"),
        ("OLMo-2", hf.Olmo2Config(**ids), "causal"),
        ("GPT-2", hf.GPT2Config(), "causal"),
        ("GPT-NeoX-20B", hf.GPTNeoXConfig(), "causal"),
        ("OPT", hf.OPTConfig(), "causal"),
        ("Falcon", hf.FalconConfig(), "causal"),
        ("BLOOM", hf.BloomConfig(), "causal"),
        ("BERT", hf.BertConfig(), "masked"),
        ("T5", hf.T5Config(), "seq2seq"),
        ("BART-large", hf.BartConfig(), "seq2seq"),
        ("ViT-base", hf.ViTConfig(), "image"),
    ]


def main() -> None:
    """Counts both ways and prints the contract's JSON line."""
    import torch
    import transformers as hf

    builders = {"causal": hf.AutoModelForCausalLM, "masked": hf.AutoModelForMaskedLM,
                "seq2seq": hf.AutoModelForSeq2SeqLM, "image": hf.AutoModelForImageClassification}  # fmt: skip
    worst, slow, fast, number = 0, 0.0, 0.0, 0
    for name, config, task in cases():
        began = time.perf_counter()
        with torch.device("meta"):
            built = sum(p.numel() for p in builders[task].from_config(config).parameters())
        middle = time.perf_counter()
        ours = count(config.to_dict()).total
        slow, fast, number = slow + middle - began, fast + time.perf_counter() - middle, number + 1
        worst = max(worst, abs(ours - built))
        print(f"{name:20} {built:>18,} difference {ours - built}", file=sys.stderr, flush=True)
    print(json.dumps({
        "name": "planner_parameters", "unit": "seconds", "ours": fast, "peer": slow,
        "peer_name": "transformers on the meta device", "ratio": slow / fast, "target": 0, "pass": worst == 0,
        "max_difference": worst, "configurations": number,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
