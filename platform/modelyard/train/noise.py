"""Noise on embeddings while fine-tuning."""

from __future__ import annotations

from typing import Any

import torch


def add_noise(model: Any, alpha: float) -> None:
    """NEFTune (Jain et al. 2023, arXiv 2310.05914): uniform noise of size alpha / sqrt(L d) on embedded tokens.

    Only in training mode. The noise comes from torch's generator, which the loop seeds by step.
    """

    def noisy(module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        size = alpha / (output.shape[1] * output.shape[2]) ** 0.5
        return output + torch.empty_like(output).uniform_(-size, size)

    model.get_input_embeddings().register_forward_hook(noisy)
