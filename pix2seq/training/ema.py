"""An exponential moving average of the weights. Evaluation and checkpoints for inference use it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pix2seq.training.distributed import local_tensor


class Ema:
    """Averaged float32 copies of a model's weights and buffers.

    The average follows the weights quickly at first: at step t the decay is min(decay, (1 + t) / (10 + t)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.weights = {name: t.detach().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, finite: Tensor | None = None) -> None:
        """Move the average towards the weights after optimiser step `step`, counted from 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = []
        current: list[Tensor] = []
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                averages.append(local_tensor(self.weights[name]))
                current.append(local_tensor(tensor.detach()))
            else:
                self.weights[name].copy_(tensor)
        torch._foreach_lerp_(averages, current, share)
