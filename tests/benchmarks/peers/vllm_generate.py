"""Peer of engine_throughput, run by the interpreter of an environment with vLLM (CPU): tokens a CPU-second, greedy.

    python vllm_generate.py FOLDER TOKENS REPEATS      (stdin: JSON list of batches, lists of prompts of token ids)

Prints {"rates": .., "answers": .., "version": ..} as its last line. The engine runs in this process, so that its CPU
time is this process's. It is no benchmark of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    """Measures and prints."""
    import vllm

    folder, tokens, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    batches = json.load(sys.stdin)
    model = vllm.LLM(
        folder, dtype=os.environ.get("PEER_DTYPE") or "auto", max_model_len=512, max_num_seqs=32,
        skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    rates, answers = {}, {}
    for prompts in batches:
        spent = []
        for _ in range(repeats + 1):
            begin = time.process_time()
            out = model.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
            spent.append(time.process_time() - begin)
        rates[len(prompts)] = len(prompts) * tokens / statistics.median(spent[1:])
        answers[len(prompts)] = [list(o.outputs[0].token_ids) for o in out]
    print(json.dumps({"rates": rates, "answers": answers, "version": vllm.__version__}))


if __name__ == "__main__":
    main()
