"""One training step: gradients of an objective, and the update."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pix2seq.errors import InputError
from pix2seq.examples import Batch
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.training.distributed import Ranks, full_tensor, no_sync, parallelize
from pix2seq.training.objective import Objective
from pix2seq.training.optimizer import optimizer_step


@dataclass(frozen=True)
class StepResult:
    """What a training step computed. Tensors are scalars on the model's device, equal on all ranks."""

    loss: Tensor  # weighted sum of the objective's losses
    losses: dict[str, Tensor]  # each sum divided by its count, before weighting
    grad_norm: Tensor  # before clipping
    finite: Tensor  # bool; if false, nothing was updated


class Step(Protocol):
    """A form of `train_step`."""

    def __call__(
        self,
        training_model: TrainingModel,
        optimizer: torch.optim.Optimizer,
        micro_batches: Sequence[Batch],
        loss_weights: Mapping[str, float],
        max_grad_norm: float,
    ) -> StepResult: ...


class TrainingModel:
    """Wrap a model and its objective for training on one or several ranks.

    Build the optimiser from the model's `parameters` afterwards, because FSDP replaces them.
    """

    def __init__(
        self,
        model: Pix2Seq,
        objective: Objective,
        *,
        bf16: bool = False,
        ranks: Ranks | None = None,
        parallel: str = "ddp",
    ) -> None:
        self.model = model
        self.objective = objective
        self.bf16 = bf16
        self.ranks = ranks or Ranks(model.device)
        self._sums = parallelize(_Sums(model, objective), self.ranks, parallel, blocks=model.block_list())
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()] + [*objective.state.values()]

    def backward(self, batch: Batch, factors: Tensor, *, last: bool) -> Tensor:
        """Add the gradients of the objective's sums, each times its factor; return the sums, (names,).

        Gradients are summed over ranks with the `last` batch of a step, so all ranks must call this equally often.
        """
        with nullcontext() if last else no_sync(self._sums):
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                sums: Tensor = self._sums(batch.to(self.model.device))
            # DDP and FSDP average over ranks, but the step needs the sum.
            (sums * (factors * self.ranks.size)).sum().backward()
        return sums.detach()

    def running_statistics(self) -> list[Tensor]:
        """Return copies of all that a forward pass changes: statistics of batch norms, and the objective's state."""
        return [buffer.clone() for buffer in self._statistics]

    def restore_statistics(self, statistics: Sequence[Tensor], keep: Tensor) -> None:
        """Set the running statistics to what `running_statistics` returned, unless `keep`, a bool on the device."""
        for buffer, value in zip(self._statistics, statistics, strict=True):
            buffer.copy_(torch.where(keep, buffer, value))


class _Sums(nn.Module):
    """The sums of an objective as a module, because DDP and FSDP hook into module calls."""

    def __init__(self, model: Pix2Seq, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> Tensor:
        return torch.stack([total for total, _ in self.objective(self.model, batch).values()])


def train_step(
    training_model: TrainingModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    loss_weights: Mapping[str, float],
    max_grad_norm: float,
) -> StepResult:
    """Update the weights once, with the gradient of the weighted sum of the objective's losses.

    Each loss is its sum over all ranks and micro-batches, divided by its count over all of them. If a loss or a
    gradient is not finite on any rank, the model stays unchanged on all ranks. Nothing waits for the device.
    """
    names, factors = loss_factors(training_model, micro_batches, loss_weights)
    if training_model.model.device.type == "cuda":
        factors = factors.pin_memory().to(training_model.model.device, non_blocking=True)
    return update(training_model, optimizer, micro_batches, names, factors, max_grad_norm=max_grad_norm)


def loss_factors(
    training_model: TrainingModel, micro_batches: Sequence[Batch], loss_weights: Mapping[str, float]
) -> tuple[list[str], Tensor]:
    """Return the names of the sums, and the factors of `update` for them, in host memory."""
    each = [training_model.objective.counts(batch) for batch in micro_batches]
    names = list(each[0])
    counted = torch.tensor([sum(counts[name] for counts in each) for name in names], dtype=torch.float64)
    counts = training_model.ranks.sum(counted).clamp(min=1e-9)
    weights = torch.tensor([loss_weights.get(name, 1.0) for name in names])
    return names, torch.stack([1 / counts, weights / counts]).float()


def update(
    training_model: TrainingModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    names: Sequence[str],
    factors: Tensor,
    *,
    max_grad_norm: float,
) -> StepResult:
    """Do the part of `train_step` that the device computes.

    `factors` (2, names), on the device, turn the sums over all micro-batches into losses, and into weighted losses.
    """
    model, ranks = training_model.model, training_model.ranks
    statistics = training_model.running_statistics()
    sums = torch.zeros(len(names), device=model.device)
    for batch in micro_batches:
        sums += training_model.backward(batch, factors[1], last=batch is micro_batches[-1])
    losses, weighted = ranks.sum(sums) * factors
    total = weighted.sum()
    max_norm = max_grad_norm if max_grad_norm > 0 else torch.inf
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    finite = (total + grad_norm).isfinite()
    optimizer_step(optimizer, (~finite).float())
    training_model.restore_statistics(statistics, keep=finite)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(total, dict(zip(names, losses, strict=True)), grad_norm, finite)


def compile_model(model: Pix2Seq) -> None:
    """Compile the blocks of encoder and decoder in place; the compiler runs at the first step.

    Weights keep their names. Generation and evaluation stay uncompiled, because they call other methods.
    Raises `InputError` if the model is on the CPU and there is no C++ compiler.
    """
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    if model.device.type == "cpu" and not any(name and shutil.which(name) for name in compilers):
        raise InputError("compile=true found no C++ compiler, which the CPU needs; install g++, or leave compile out")
    import torch._dynamo  # takes seconds

    blocks = model.block_list()
    # Blocks that differ in a number, such as timm's drop rates, are variants of one function. Beyond this limit
    # torch.compile silently leaves the rest uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile()
