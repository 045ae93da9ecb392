"""Peer of engine_throughput, run by an interpreter with xllamacpp and gguf: llama.cpp's tokens a CPU-second, greedy.

    python llama_generate.py FOLDER TOKENS REPEATS      (stdin: JSON list of batches, lists of prompts of token ids)

Writes the Hugging Face folder (a Llama) as GGUF in q8_0 first. All prompts of a batch are asked for at once, from as
many threads, of llama.cpp's server inside this process (continuous batching, one compute thread, no prompt cache).
Prints {"rates": .., "answers": .., "version": ..} as its last line. It is no benchmark of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp

MOST = 32
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 values of every tensor of the folder's safetensors files."""
    for file in sorted(folder.glob("*.safetensors")):
        data = np.memmap(file, np.uint8, mode="r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        for name, entry in json.loads(data[8 : 8 + size].tobytes()).items():
            if name == "__metadata__":
                continue
            first, last = (8 + size + offset for offset in entry["data_offsets"])
            raw = data[first:last]
            if entry["dtype"] == "BF16":
                values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = raw.view({"F32": np.float32, "F16": np.float16}[entry["dtype"]]).astype(np.float32)
            yield name, values.reshape(entry["shape"])


def translate(name: str) -> str:
    """A Hugging Face tensor name as llama.cpp's."""
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return OUTER[stem] + ".weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix in the order of llama.cpp's rotation: pairs side by side, not half a head apart."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def convert(folder: Path, target: Path) -> None:
    """Writes the model as GGUF, matrices in q8_0, with placeholder texts for its tokens: prompts come as ids."""
    c = json.loads((folder / "config.json").read_text())
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    w = gguf.GGUFWriter(str(target), "llama")
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_dimension_count(c["hidden_size"] // heads)
    rope = c.get("rope_parameters") or {}
    w.add_rope_freq_base(float(rope.get("rope_theta") or c.get("rope_theta") or 10_000.0))
    w.add_vocab_size(c["vocab_size"])
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    w.add_token_list([f"t{i}" for i in range(c["vocab_size"])])
    w.add_token_types([gguf.TokenType.NORMAL] * c["vocab_size"])
    w.add_token_merges(["t 0"])
    w.add_add_bos_token(False)
    for name, value in tensors(folder):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = interleave(value, heads if "q_proj" in name else kv_heads)
        kind = gguf.GGMLQuantizationType.Q8_0 if value.ndim > 1 else gguf.GGMLQuantizationType.F32
        w.add_tensor(translate(name), gguf.quants.quantize(value, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def start(model: Path, tokens: int) -> Any:
    """llama.cpp's server, in this process."""
    p = xllamacpp.CommonParams()
    p.model.path = str(model)
    p.n_parallel, p.n_ctx = MOST, MOST * 256
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
    p.cont_batching, p.cache_prompt, p.cache_ram_mib, p.warmup, p.verbosity = True, False, 0, False, -1
    p.n_predict = tokens
    return xllamacpp.Server(p)


def answer(server: Any, prompt: list[int], tokens: int) -> list[int]:
    """Continues one prompt."""
    body = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False,
            "samplers": ["temperature"]}  # fmt: skip
    result = server.handle_completions(body)
    found = [int(token) for token in result["choices"][0]["text"].split("t")[1:]]  # the placeholder texts
    if len(found) != tokens:
        raise RuntimeError(f"llama.cpp did not answer in full: {str(result)[:300]}")
    return found


def main() -> None:
    """Measures and prints."""
    folder, tokens, repeats = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    batches = json.load(sys.stdin)
    rates, answers = {}, {}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(MOST) as pool:
        model = Path(scratch) / "model.gguf"
        convert(folder, model)
        server = start(model, tokens)
        for prompts in batches:
            spent = []
            for _ in range(repeats + 1):
                begin = time.process_time()
                found = list(pool.map(lambda p: answer(server, p, tokens), prompts))
                spent.append(time.process_time() - begin)
            rates[len(prompts)] = len(prompts) * tokens / statistics.median(spent[1:])
            answers[len(prompts)] = found
    print(json.dumps({"rates": rates, "answers": answers, "version": str(xllamacpp.__version__)}))


if __name__ == "__main__":
    main()
