"""The learning rate as a function of the step. Reference: google-research/pix2seq, `WarmUpAndDecay`."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up to the peak, a stretch at the peak if wanted, then decay."""

    name: str = "linear"  # linear, cosine or none
    warmup_steps: int = 500
    hold: float = 0.0  # share of the steps after warm-up that stay at the peak; as published, none
    end_factor: float = 0.01  # learning rate at the last step, as a share of the peak

    def __post_init__(self) -> None:
        if self.name not in ("linear", "cosine", "none"):
            raise ValueError(f"schedule.name is {self.name!r}; expected linear, cosine or none")
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps must be at least 0, got {self.warmup_steps}")
        if not 0 <= self.hold < 1:
            raise ValueError(f"schedule.hold must lie in [0, 1), got {self.hold}")


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate for the update that follows `step` finished ones; step 0 of a warm-up has rate 0."""
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.name == "none":
        return peak
    share = min((step - schedule.warmup_steps) / max(total_steps - schedule.warmup_steps, 1), 1.0)
    progress = max(share - schedule.hold, 0.0) / (1 - schedule.hold)
    remaining = 1 - progress if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.end_factor + (1 - schedule.end_factor) * remaining)
