"""One training step: loss, gradients and update.

Shapes: B images, I sequences per image, T tokens, L packed tokens, S scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pix2seq.errors import InputError
from pix2seq.examples import Batch
from pix2seq.model.decoder import Decoder
from pix2seq.model.packing import pack
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.training.distributed import Ranks, full_tensor, no_sync, parallelize

LOGITS_AT_ONCE = 2**24  # in one chunk of the loss: 64 MiB in float32


def token_losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross entropy (S,) of logits (S, V) in float32; `F.cross_entropy` explains the smoothing."""
    return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)


def sequence_loss(model: Pix2Seq, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the sum over tokens of weight times cross entropy, a scalar in float32.

    The output layer runs at scored positions only. Padding, prompts and the coordinates of noise objects
    have weight 0, and would cost a row of V logits each.
    """
    images = batch.images.to(model.device).float() / 255
    memory = model.encode(images)
    targets, weights = batch.targets, batch.weights
    if batch.tokens.shape[1] == 1:
        hidden = model.decoder(batch.tokens[:, 0], memory)  # (B, T, D)
    else:
        packed = pack(batch.tokens)
        hidden = model.decoder.forward_packed(packed, memory)  # (B, L, D)
        targets, weights = packed.pick(targets), packed.pick(weights)
    weights = weights.flatten()
    scored = weights.nonzero()[:, 0]
    scored_hidden = hidden.flatten(0, 1)[scored]  # (S, D)
    return output_loss(model.decoder, scored_hidden, targets.flatten()[scored], weights[scored], label_smoothing)


def output_loss(decoder: Decoder, hidden: Tensor, targets: Tensor, weights: Tensor, label_smoothing: float) -> Tensor:
    """Return the sum of weight times cross entropy of hidden states (S, D), without all logits in memory.

    Beyond `LOGITS_AT_ONCE`, compute the logits in chunks, and once more in the backward pass.
    """

    def loss(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return (token_losses(decoder.logits(hidden), targets, label_smoothing) * weights).sum()

    size = max(LOGITS_AT_ONCE // len(decoder.output_weight), 1)
    if len(hidden) <= size:
        return loss(hidden, targets, weights)
    chunks = zip(hidden.split(size), targets.split(size), weights.split(size), strict=True)
    # The chunks draw no random numbers, so the random state does not have to be saved.
    losses = [checkpoint(loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(losses).sum()


@dataclass(frozen=True)
class TaskBatches:
    """The micro-batches of one task in a training step."""

    name: str
    loss_weight: float
    micro_batches: Sequence[Batch]


@dataclass(frozen=True)
class StepResult:
    """What a training step computed. Tensors are scalars on the model's device, equal on all ranks."""

    loss: Tensor  # weighted sum of the tasks' losses
    task_losses: dict[str, Tensor]  # per scored token, before weighting
    grad_norm: Tensor  # before clipping
    finite: bool  # if false, the weights were not updated


class TrainingModel:
    """Wrap a model for training on one or several ranks.

    Build the optimiser from the model's `parameters` afterwards, because FSDP replaces them.
    """

    def __init__(
        self,
        model: Pix2Seq,
        *,
        bf16: bool = False,
        label_smoothing: float = 0.0,
        ranks: Ranks | None = None,
        parallel: str = "ddp",
    ) -> None:
        self.model = model
        self.bf16 = bf16
        self.ranks = ranks or Ranks(model.device)
        self._loss = parallelize(_SequenceLoss(model, label_smoothing), self.ranks, parallel, blocks=model.block_list())
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]

    def backward(self, batch: Batch, *, scored: Tensor, weight: float, last: bool) -> Tensor:
        """Add the gradients of `weight` times the batch's loss per `scored` token; return the loss without `weight`.

        Gradients are summed over ranks with the `last` batch of a step, so all ranks must call this equally often.
        """
        with nullcontext() if last else no_sync(self._loss):
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self._loss(batch.to(self.model.device)) / scored
            # DDP and FSDP average over ranks, but the step needs the sum.
            (loss * (weight * self.ranks.size)).backward()
        return loss.detach()

    def running_statistics(self) -> list[Tensor]:
        """Return copies of the running statistics of batch norms, the only state that a forward pass changes."""
        return [buffer.clone() for buffer in self._statistics]

    def restore_statistics(self, statistics: Sequence[Tensor]) -> None:
        """Set the running statistics to what `running_statistics` returned."""
        for buffer, value in zip(self._statistics, statistics, strict=True):
            buffer.copy_(value)


class _SequenceLoss(nn.Module):
    """`sequence_loss` as a module, because DDP and FSDP hook into module calls."""

    def __init__(self, model: Pix2Seq, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> Tensor:
        return sequence_loss(self.model, batch, label_smoothing=self.label_smoothing)


def train_step(
    training_model: TrainingModel,
    optimizer: torch.optim.Optimizer,
    tasks: Sequence[TaskBatches],
    *,
    max_grad_norm: float,
) -> StepResult:
    """Update the weights once, with the gradient of the weighted sum of the tasks' losses.

    Each task's loss is per scored token over all ranks, however its images are split into ranks and micro-batches.
    If the loss or a gradient is not finite on any rank, the model stays unchanged on all ranks.
    """
    model, ranks = training_model.model, training_model.ranks
    statistics = training_model.running_statistics()
    scored = ranks.sum(torch.stack([_num_scored(task.micro_batches) for task in tasks])).clamp(min=1e-9)
    losses = torch.zeros(len(tasks), device=model.device)
    for i, task in enumerate(tasks):
        for batch in task.micro_batches:
            last = task is tasks[-1] and batch is task.micro_batches[-1]
            losses[i] += training_model.backward(batch, scored=scored[i].float(), weight=task.loss_weight, last=last)
    losses = ranks.sum(losses)
    total = (losses * torch.tensor([task.loss_weight for task in tasks], device=losses.device)).sum()
    max_norm = max_grad_norm if max_grad_norm > 0 else torch.inf
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    finite = bool((total + grad_norm).isfinite())
    if finite:
        optimizer.step()
    else:
        training_model.restore_statistics(statistics)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(total, {task.name: loss for task, loss in zip(tasks, losses, strict=True)}, grad_norm, finite)


def _num_scored(batches: Sequence[Batch]) -> Tensor:
    """Return the sum of all token weights, a scalar in host memory."""
    return torch.stack([batch.weights.sum(dtype=torch.float64) for batch in batches]).sum().cpu()


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
