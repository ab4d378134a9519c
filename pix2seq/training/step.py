"""One optimiser step.

Shapes: B images, I sequences an image, T tokens, S scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pix2seq.examples import Batch
from pix2seq.model.decoder import Decoder
from pix2seq.model.packing import pack
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.training.distributed import Ranks, accumulating, spread, whole

LOGITS_AT_ONCE = 2**24  # of the loss: 64 MiB in float32


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
    scored_hidden = hidden.flatten(0, 1)[scored]  # (S, D)
    return output_loss(model.decoder, scored_hidden, targets.flatten()[scored], weights[scored], label_smoothing)


def output_loss(decoder: Decoder, hidden: Tensor, targets: Tensor, weights: Tensor, label_smoothing: float) -> Tensor:
    """Sum of weight times cross entropy of hidden states (S, D) whose logits are never all there at once.

    Beyond `LOGITS_AT_ONCE`, logits are computed piece by piece, and again for the gradient.
    """

    def loss(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return (token_losses(decoder.logits(hidden), targets, label_smoothing) * weights).sum()

    size = max(LOGITS_AT_ONCE // len(decoder.output_weight), 1)
    if len(hidden) <= size:
        return loss(hidden, targets, weights)
    pieces = zip(hidden.split(size), targets.split(size), weights.split(size), strict=True)
    # No draw is made inside, so the random state need not be kept.
    losses = [checkpoint(loss, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.stack(losses).sum()


NOT_DECAYED = ("position_embedding", "pos_embed", "positions.table", "class_token", "cls_token")  # embeddings by name


@dataclass(frozen=True)
class TaskBatches:
    """What one task brings to a step."""

    name: str
    loss_weight: float
    micro_batches: Sequence[Batch]


@dataclass(frozen=True)
class StepResult:
    """Scalar tensors on the model's device, equal on all ranks."""

    loss: Tensor  # sum over tasks of weight times loss
    task_losses: dict[str, Tensor]  # each per scored token, without its weight
    grad_norm: Tensor  # before clipping
    finite: bool  # or else the weights were left as they were


class Learner:
    """A model with the loss that it is trained by, on one rank or spread over several.

    Build optimisers from `parameters` afterwards: FSDP puts others in their place.
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
        self._loss = spread(_SequenceLoss(model, label_smoothing), self.ranks, parallel, blocks=model.block_list())
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]

    def backward(self, batch: Batch, *, scored: Tensor, weight: float, last: bool) -> Tensor:
        """Add the gradients of `weight` times the batch's loss per `scored` token; give the loss, a scalar.

        With the `last` batch of a step gradients are summed over ranks, so every rank calls this as often.
        """
        with nullcontext() if last else accumulating(self._loss):
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self._loss(batch.to(self.model.device)) / scored
            # DDP and FSDP average over ranks, and this is to be the sum.
            (loss * (weight * self.ranks.size)).backward()
        return loss.detach()

    def statistics(self) -> list[Tensor]:
        """What a forward pass alone changes: copies of the running statistics of batch norms."""
        return [buffer.clone() for buffer in self._statistics]

    def restore(self, statistics: Sequence[Tensor]) -> None:
        """Put back what `statistics` gave."""
        for buffer, value in zip(self._statistics, statistics, strict=True):
            buffer.copy_(value)


class _SequenceLoss(nn.Module):
    """`sequence_loss` as a module, because DDP and FSDP act when a module is called."""

    def __init__(self, model: Pix2Seq, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> Tensor:
        return sequence_loss(self.model, batch, label_smoothing=self.label_smoothing)


def train_step(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    tasks: Sequence[TaskBatches],
    *,
    max_grad_norm: float,
) -> StepResult:
    """Update the weights once, by the weighted sum of all tasks' losses.

    Each task's loss is per scored token of all ranks, however its images are split into ranks and micro-batches.
    Where the loss or a gradient is not finite on any rank, every rank's model stays as it was.
    """
    model, ranks = learner.model, learner.ranks
    statistics = learner.statistics()
    scored = ranks.sum(torch.stack([_num_scored(task.micro_batches) for task in tasks])).clamp(min=1e-9)
    losses = torch.zeros(len(tasks), device=model.device)
    for i, task in enumerate(tasks):
        for batch in task.micro_batches:
            last = task is tasks[-1] and batch is task.micro_batches[-1]
            losses[i] += learner.backward(batch, scored=scored[i].float(), weight=task.loss_weight, last=last)
    losses = ranks.sum(losses)
    total = (losses * torch.tensor([task.loss_weight for task in tasks], device=losses.device)).sum()
    grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm if max_grad_norm > 0 else torch.inf))
    finite = bool((total + grad_norm).isfinite())
    if finite:
        optimizer.step()
    else:
        learner.restore(statistics)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(total, {task.name: loss for task, loss in zip(tasks, losses, strict=True)}, grad_norm, finite)


def _num_scored(batches: Sequence[Batch]) -> Tensor:
    """The weights of all scored tokens together, a scalar in host memory."""
    return torch.stack([batch.weights.sum(dtype=torch.float64) for batch in batches]).sum().cpu()


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
