"""What training minimises: an objective maps a model and a batch to sums and counts by name.

Shapes: B images, L tokens, K scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pix2seq.examples import Batch
from pix2seq.model.decoder import Decoder
from pix2seq.model.decoding.grammar import Allowed
from pix2seq.model.packing import Layout
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.training.contrast import NAME, ContrastiveLoss

LOGITS_AT_ONCE = 2**24  # in one chunk of the loss: 64 MiB in float32


class Objective(Protocol):
    """A loss that a step can split over micro-batches and ranks: a sum for each name, to be divided by a count."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The tensors that it changes when called, by name; they are part of a checkpoint."""
        ...

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return what the sums of a batch are divided by, told in host memory before the model runs."""
        ...

    def __call__(self, model: Pix2Seq, batch: Batch) -> dict[str, tuple[Tensor, float]]:
        """Return the sum, a scalar in float32, and the count of each name; the names are those of `counts`."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """The cross entropy of scored tokens, for each task apart, and maybe a contrastive loss. The default objective."""

    label_smoothing: float = 0.0
    contrast: ContrastiveLoss | None = None

    @property
    def state(self) -> Mapping[str, Tensor]:
        """See `Objective`."""
        return {} if self.contrast is None else self.contrast.queue.state

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return the sum of the tokens' weights by task, and the number of sentences that are compared with images."""
        counts = dict(zip(batch.tasks, batch.counts, strict=True))
        if self.contrast is not None:
            assert batch.sentence_lengths is not None
            counts[NAME] = float(len(batch.sentence_lengths))
        return counts

    def __call__(self, model: Pix2Seq, batch: Batch) -> dict[str, tuple[Tensor, float]]:
        """Return the sum over tokens of weight times cross entropy by task, and over sentences the contrastive loss.

        The output layer runs at scored positions only: prompts and the coordinates of noise objects have weight 0,
        and would cost a row of V logits each.
        """
        images = batch.images.to(model.device)
        held = memories(model, images, batch)
        memory = parts_of(model, held, batch)
        layout = batch.layout or layout_of(batch, len(memory), memory.device)
        hidden = model.decoder.forward_packed(batch.tokens, batch.positions, layout, memory)  # (L, D)
        scored = hidden.index_select(0, batch.scored)  # (K, D)
        losses = token_losses(model.decoder, scored, batch.targets, self.label_smoothing, batch.choices)
        losses = losses * batch.weights
        # A table of tasks, because adding by index is not the same from run to run on a GPU.
        is_task = batch.task_index == torch.arange(len(batch.tasks), device=losses.device)[:, None]  # (tasks, K)
        sums = [*torch.where(is_task, losses, 0.0).sum(1)]
        if self.contrast is not None:
            sums.append(self.contrast(model, held[: len(images)], batch))
        return {name: (total, count) for (name, count), total in zip(self.counts(batch).items(), sums, strict=True)}


def layout_of(batch: Batch, num_memories: int, device: torch.device) -> Layout:
    """Return where the sequences of a batch lie, and which of so many memories they read."""
    if batch.readings is None:
        return Layout(batch.lengths, batch.memory_index, num_memories, device)
    parts = batch.readings.parts
    return Layout(batch.lengths, batch.memory_index, len(parts), device, parts=parts)


def memories(model: Pix2Seq, images: Tensor, batch: Batch) -> Tensor:
    """Return the memories (B + C, N, D) of a batch: of its images, given on the model's device, then of closeups."""
    if images.ndim == 3:
        return model.project(images.float())
    memory, maps = model.encode_with_maps(images.float() / 255)
    if not maps:
        return memory
    frames, image_index = batch.closeups, batch.closeup_images.tolist()
    if not image_index:  # every step uses all weights, which ranks with other batches rely on
        frames, image_index = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), [0]
    frames = frames.to(memory.device, non_blocking=True)
    return torch.cat([memory, model.look_closer(maps, frames, image_index)])


def parts_of(model: Pix2Seq, memory: Tensor, batch: Batch) -> Tensor:
    """Return what sequences read of the memories (M, N, D) of a batch: the parts (Q, N, D) that some of them join.

    Where each sequence reads one memory, these are the parts.
    """
    if model.reference_embedding is None:
        return memory
    if batch.readings is None:  # every step uses all weights, which ranks with other batches rely on
        return memory + 0 * model.reference_embedding.sum().to(memory.dtype)
    rows, places = (x.to(memory.device, non_blocking=True) for x in (batch.readings.memories, batch.readings.places))
    return model.at_places(memory.index_select(0, rows), places)


def token_losses(
    decoder: Decoder,
    hidden: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    choices: Tensor | None = None,
) -> Tensor:
    """Return the cross entropy (K,) of hidden states (K, D) in float32, without all logits in memory.

    Beyond `LOGITS_AT_ONCE`, compute the logits in chunks, and once more in the backward pass. `F.cross_entropy`
    explains the smoothing. `choices` (K, 4) are those of `Example`, among which ids are drawn, and over which smoothing
    spreads.
    """

    def loss(hidden: Tensor, targets: Tensor, choices: Tensor | None = None) -> Tensor:
        logits = decoder.logits(hidden)
        if choices is not None:
            ids = torch.arange(logits.shape[1], device=logits.device)
            allowed = Allowed(choices[:, 0], choices[:, 1], choices[:, 2:])
            logits = logits.masked_fill(allowed.forbids(ids), -torch.inf)
        return cast("Tensor", _CrossEntropy.apply(logits, targets, label_smoothing))

    size = max(LOGITS_AT_ONCE // len(decoder.output_weight), 1)
    if len(hidden) <= size:
        return loss(hidden, targets, choices)
    parts = [hidden, targets] if choices is None else [hidden, targets, choices]
    chunks = zip(*(part.split(size) for part in parts), strict=True)
    # The chunks draw no random numbers, so the random state does not have to be saved.
    return torch.cat([checkpoint(loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy (K,) in float32 of logits (K, V) of any type.

    PyTorch's own takes five passes over float32 logits; here one tensor is kept, in the type of the logits, and
    becomes the gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        log_probs = logits.float().log_softmax(-1)
        losses = -log_probs.gather(1, targets[:, None])[:, 0]
        possible = None
        if label_smoothing:
            possible = log_probs > -torch.inf
            spread = log_probs.masked_fill(~possible, 0.0).sum(1) / possible.sum(1)
            losses = (1 - label_smoothing) * losses - label_smoothing * spread
        ctx.save_for_backward(log_probs.exp_().to(logits.dtype), targets, possible)
        ctx.label_smoothing = label_smoothing
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        probs, targets, possible = ctx.saved_tensors
        grad = probs * grads[0][:, None].to(probs.dtype)
        smoothing = ctx.label_smoothing
        if smoothing:
            grad -= possible * (grads[0] * smoothing / possible.sum(1))[:, None].to(probs.dtype)
        return grad.scatter_add_(1, targets[:, None], (grads[0] * (smoothing - 1))[:, None].to(probs.dtype)), None, None
