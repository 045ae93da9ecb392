"""What this project adds to vLLM's workers: new weights by files. Runs in vLLM's processes; imports little."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from safetensors import safe_open


class Worker:
    """Mixed into vLLM's worker class (its `worker_extension_cls`)."""

    reload_weights: Callable[..., None]

    def take_weights(self, files: list[str]) -> str:
        """Replaces all of the model's tensors by those of safetensors files, by Hugging Face names.

        Says what failed; raised here it would end vLLM. vLLM's own way of loading again knows the forms its layers
        have been packed into, and LoRA's wrappers around them.
        """
        try:
            self.reload_weights(weights_iterator=_tensors(files))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def _tensors(files: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                yield name, handle.get_tensor(name)
