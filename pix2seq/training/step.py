"""One optimiser step.

Shapes: B images, I sequences an image, T tokens, S scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2seq.model.packing import pack
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.tasks.example import Batch


def token_losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy (S,) of logits (S, V), in float32; see `F.cross_entropy` for the smoothing."""
    return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)


def sequence_loss(model: Pix2Seq, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Sum over tokens of weight times cross entropy, a scalar in float32.

    Only scored places meet the output layer: padding, prompts and the coordinates of noise objects
    would cost a row of V logits each and count for nothing.
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
    logits = model.decoder.logits(hidden.flatten(0, 1)[scored])  # (S, V)
    losses = token_losses(logits, targets.flatten()[scored], label_smoothing)
    return (losses * weights[scored]).sum()


NOT_DECAYED = ("position_embedding", "pos_embed", "positions.table", "class_token", "cls_token")  # embeddings by name


@dataclass(frozen=True)
class TaskBatches:
    """What one task brings to a step."""

    name: str
    loss_weight: float
    micro_batches: Sequence[Batch]


@dataclass(frozen=True)
class StepResult:
    """Scalar tensors on the model's device."""

    loss: Tensor  # sum over tasks of weight times loss
    task_losses: dict[str, Tensor]  # each per scored token, without its weight
    grad_norm: Tensor  # before clipping


def train_step(
    model: Pix2Seq,
    optimizer: torch.optim.Optimizer,
    tasks: Sequence[TaskBatches],
    *,
    max_grad_norm: float,
    bf16: bool,
    label_smoothing: float = 0.0,
) -> StepResult:
    """Update the weights once, by the weighted sum of all tasks' losses.

    Each task's loss is per scored token, however its images are split into micro-batches.
    """
    device = model.device
    losses: dict[str, Tensor] = {}
    for task in tasks:
        batches = [batch.to(device) for batch in task.micro_batches]
        num_scored = torch.stack([batch.weights.sum() for batch in batches]).sum().clamp(min=1e-9)
        losses[task.name] = torch.zeros((), device=device)
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = sequence_loss(model, batch, label_smoothing=label_smoothing) / num_scored
            (loss * task.loss_weight).backward()
            losses[task.name] += loss.detach()
    total = torch.stack([task.loss_weight * losses[task.name] for task in tasks]).sum()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm if max_grad_norm > 0 else torch.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(total, losses, grad_norm)


def build_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW. Matrices and kernels decay; norms, biases and embeddings do not.

    The official code decays every variable; pulling norm gains and rarely seen embedding rows
    towards zero helps nobody.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        is_embedding = id(parameter) in embeddings or name.endswith(NOT_DECAYED)
        (kept if parameter.ndim < 2 or is_embedding else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
