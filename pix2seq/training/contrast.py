"""The contrastive loss: each sentence finds its image among all images of a step, and each image its sentences.

Reference: arXiv 2103.00020; a queue of earlier embeddings as in arXiv 1911.05722, but without a second encoder.

Shapes: B images, T sentences, E width of embeddings, Q pairs in the queue; of all ranks after a gather.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from pix2seq.examples import Batch
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.settings import NonNegativeFloat, Range, Settings
from pix2seq.training.distributed import Ranks

NAME = "contrast"  # of the loss
NO_KEY = -1  # of an empty place in the queue


@dataclass(frozen=True)
class ContrastTraining(Settings):
    """How embeddings are trained, where `model.contrast` makes some."""

    section = "contrast"

    loss_weight: NonNegativeFloat = 1.0  # in the sum of all losses
    queue: Annotated[int, Range(least=0, most=2**20)] = 0  # pairs of earlier steps that each step compares with too


@dataclass(frozen=True)
class Queue:
    """Pairs of an image and a sentence that is true of it, of earlier steps, oldest first."""

    images: Tensor  # (Q, E)
    sentences: Tensor  # (Q, E)
    keys: Tensor  # (Q,) of the sentences, `NO_KEY` where there is no pair yet

    @classmethod
    def empty(cls, size: int, dim: int, device: torch.device) -> Queue:
        """Return a queue of `size` places without pairs."""
        rows = torch.zeros((size, dim), device=device)
        return cls(rows, rows.clone(), torch.full((size,), NO_KEY, device=device))

    def add(self, images: Tensor, sentences: Tensor, keys: Tensor) -> None:
        """Let new pairs take the places of the oldest ones."""
        for held, new in ((self.images, images), (self.sentences, sentences), (self.keys, keys)):
            held.copy_(torch.cat([held, new])[len(new) :])

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The tensors by name; none without places."""
        return vars(self) if len(self.keys) else {}


class ContrastiveLoss:
    """The symmetric cross entropy of similarities, over the batches of all ranks."""

    def __init__(self, ranks: Ranks, queue: Queue) -> None:
        self.ranks, self.queue = ranks, queue

    def __call__(self, model: Pix2Seq, memory: Tensor, batch: Batch) -> Tensor:
        """Return the sum over this rank's sentences, and put the pairs of all ranks into the queue.

        `memory` (B, N, D) is that of the batch's images. All ranks must call this equally often.
        """
        tokens, lengths = batch.sentence_tokens, batch.sentence_lengths
        owners, keys = batch.sentence_images, batch.sentence_keys
        assert tokens is not None
        assert lengths is not None
        assert owners is not None
        assert keys is not None
        count = len(lengths)
        if not count:  # every step uses all weights, which ranks with other batches rely on
            tokens, lengths = tokens.new_zeros(1), lengths.new_ones(1)
        images, sentences = model.embed_images(memory), model.embed_sentences(tokens, lengths)[:count]
        numbers = self.ranks.row_counts([len(images), count])  # (ranks, 2)
        first_image, first = numbers[: self.ranks.rank].sum(0).tolist()
        num_images, num_sentences = numbers.T.tolist()
        images = self.ranks.gather_rows(images, num_images)
        sentences, owners, keys = (
            self.ranks.gather_rows(each, num_sentences) for each in (sentences, owners + first_image, keys)
        )
        own = slice(first, first + count)
        with torch.autocast(memory.device.type, enabled=False):
            loss = contrastive_loss(images, sentences, owners, keys, model.contrast_scale(), own=own, queue=self.queue)
        self.queue.add(images.detach()[owners], sentences.detach(), keys)
        return loss


def contrastive_loss(
    images: Tensor, sentences: Tensor, owners: Tensor, keys: Tensor, scale: Tensor, *, own: slice, queue: Queue
) -> Tensor:
    """Return the sum over the sentences `own` of the mean of two cross entropies.

    One is of a sentence's image among `images` (B, E), the other of the sentence among `sentences` (T, E) for its
    image, `owners` (T,). The queue's pairs are wrong answers too. An image and a sentence are not held against each
    other if a sentence of that image has the same key.
    """
    owned = F.one_hot(owners, len(images)).float()  # (T, B)
    same, same_queued = ((keys[:, None] == each).float() for each in (keys, queue.keys))  # (T, T), (T, Q)
    is_true = same @ owned > 0  # (T, B)
    is_true_queued = same_queued.T @ owned > 0  # (Q, B)
    empty = queue.keys == NO_KEY
    own_images = owners[own]
    to_images = scale * sentences[own] @ torch.cat([images, queue.images]).T
    to_sentences = scale * images[own_images] @ torch.cat([sentences, queue.sentences]).T
    excused = torch.cat([is_true[own], same_queued[own].bool() | empty], 1)
    excused_sentences = torch.cat([is_true.T[own_images], is_true_queued.T[own_images] | empty], 1)
    numbers = torch.arange(len(keys), device=keys.device)[own]
    by_sentences = _cross_entropy(to_images, own_images, excused)
    by_images = _cross_entropy(to_sentences, numbers, excused_sentences)
    return (by_sentences + by_images) / 2


def _cross_entropy(logits: Tensor, targets: Tensor, excused: Tensor) -> Tensor:
    """Return the sum over rows of logits (T, C), without the `excused` ones, except for the targets (T,)."""
    excused = excused.scatter(1, targets[:, None], False)
    return F.cross_entropy(logits.masked_fill(excused, -torch.inf), targets, reduction="sum")
