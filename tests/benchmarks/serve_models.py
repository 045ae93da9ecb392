"""Random checkpoints for the serving benchmarks, written as any Hugging Face model: safetensors and a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LLAMA_32M = {
    "vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
LLAMA_135M = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
}  # fmt: skip


def save_random_llama(folder: str, shape: Mapping[str, Any], dtype: str = "float32") -> None:
    """Saves a random Llama of a shape with a byte-level tokenizer. Meant for a process of its own: it needs torch."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=True, eos_token_id=None, initializer_range=0.1)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["a short text"], trainer)
    tokenizer.add_tokens([f" w{i}" for i in range(shape["vocab_size"] - tokenizer.get_vocab_size())])
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
