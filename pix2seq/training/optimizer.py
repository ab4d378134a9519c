"""AdamW, and its learning rate as a function of the step.

Reference: google-research/pix2seq, `WarmUpAndDecay`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

NOT_DECAYED = ("position_embedding", "pos_embed", "positions.table", "class_token", "cls_token")  # embeddings by name


def build_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Build AdamW with weight decay on matrices and kernels, but not on norms, biases and embeddings.

    Parameters without a gradient, which are frozen, are left out.
    The official code decays every variable. That also pulls norm gains and rarely seen embedding rows
    towards zero, which brings no benefit.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in ((n, p) for n, p in model.named_parameters() if p.requires_grad):
        is_embedding = id(parameter) in embeddings or name.endswith(NOT_DECAYED)
        (not_decayed if parameter.ndim < 2 or is_embedding else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up to the peak, then an optional hold at the peak, then decay."""

    name: str = "linear"  # linear, cosine or none
    warmup_steps: int = 500
    hold: float = 0.0  # share of the steps after warm-up that stay at the peak; 0 as published
    end_factor: float = 0.01  # learning rate at the last step, as a share of the peak

    def __post_init__(self) -> None:
        if self.name not in ("linear", "cosine", "none"):
            raise ValueError(f"schedule.name is {self.name!r}; expected linear, cosine or none")
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps must be at least 0, got {self.warmup_steps}")
        if not 0 <= self.hold < 1:
            raise ValueError(f"schedule.hold must lie in [0, 1), got {self.hold}")


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of the update after `step` finished ones; with warm-up it is 0 at step 0."""
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.name == "none":
        return peak
    share = min((step - schedule.warmup_steps) / max(total_steps - schedule.warmup_steps, 1), 1.0)
    progress = max(share - schedule.hold, 0.0) / (1 - schedule.hold)
    remaining = 1 - progress if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.end_factor + (1 - schedule.end_factor) * remaining)
