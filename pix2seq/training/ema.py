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
        """Move the average towards the weights after optimiser step `step`, counted from 1.

        `finite` is one number on the device of the weights. If it is 0, the average stays. The host does not read it.
        """
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = []
        current: list[Tensor] = []
        for name, tensor in model.state_dict(keep_vars=True).items():
            average, new = local_tensor(self.weights[name]), local_tensor(tensor.detach())
            if finite is not None and not isinstance(tensor, nn.Parameter):
                # Batch norms have seen the batch that is not finite; the optimiser has left the parameters finite.
                new = torch.where(finite.reshape(()).bool(), new, average)
            if tensor.is_floating_point():
                averages.append(average)
                current.append(new)
            else:
                average.copy_(new)
        if finite is None:
            torch._foreach_lerp_(averages, current, share)
        else:
            moves = torch._foreach_sub(current, averages)
            torch._foreach_mul_(moves, finite.reshape(()).float() * share)
            torch._foreach_add_(averages, moves)
