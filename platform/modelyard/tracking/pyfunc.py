"""Lets MLflow load a registered model: `mlflow.pyfunc.load_model("models:/name@champion").predict([...])`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from modelyard.storage import download, is_remote

NEW_TOKENS = 64
"""Default length of a continuation, in tokens."""


class Generator:
    """Greedy continuations of prompts by a Hugging Face causal language model in a local folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
        self._model.train(False)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """One text a prompt.

        Args:
            model_input: a table whose first column holds prompts, or a list of them.
            params: `max_new_tokens` (tokens, default 64).
        """
        prompts = model_input.iloc[:, 0].tolist() if hasattr(model_input, "iloc") else list(model_input)
        new_tokens = int((params or {}).get("max_new_tokens", NEW_TOKENS))
        return [self._continue(str(prompt), new_tokens) for prompt in prompts]

    def _continue(self, prompt: str, new_tokens: int) -> str:
        import torch

        encoded = self._tokenizer(prompt, return_tensors="pt")
        ids = encoded["input_ids"]
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids, attention_mask=encoded["attention_mask"], max_new_tokens=new_tokens, do_sample=False
            )
        return str(self._tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def _load_pyfunc(path: str) -> Generator:
    """MLflow's entry point: `path` is the small file that names the model folder."""
    uri = str(json.loads(Path(path).read_text())["uri"])
    return Generator(download(uri, tempfile.mkdtemp()) if is_remote(uri) else Path(uri))
