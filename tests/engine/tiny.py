"""Small random checkpoints in Hugging Face form, with a real byte-level BPE trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

TEXT = [
    "The scheduler decides what runs in a step, and a step has a token budget.",
    "A request carries the number of its tokens whose keys and values are cached.",
    "Été, naïve, 世界 and emoji such as 😀 make characters of several bytes.",
    "def generate(prompt: str) -> str: return engine.submit(prompt)",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def save_tokenizer(folder: Path, vocabulary: int = 384) -> int:
    """Trains and saves a tokenizer with a chat template; returns its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<|user|>", "<|system|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def save_model(folder: Path, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Saves a random checkpoint of `family` with its tokenizer and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    size = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**(BASE | {"vocab_size": size} | overrides))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(folder)
    return folder
