"""Training examples of a task, samples of an image, and how samples become a batch.

Shapes: P prompt tokens, L response tokens, B images, I sequences per image, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pix2seq.vocab import PAD


@dataclass(frozen=True)
class Example:
    """One sequence of a given prompt and a response to learn."""

    prompt: NDArray[np.int64]  # (P,)
    inputs: NDArray[np.int64]  # (L,) response that the decoder reads
    targets: NDArray[np.int64]  # (L,) response that the decoder should predict
    weights: NDArray[np.float32]  # (L,) loss weight of each response token

    def shifted(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Return tokens, targets and weights (P + L - 1,): at each position the decoder predicts the next token."""
        unscored = len(self.prompt) - 1
        tokens = np.concatenate([self.prompt, self.inputs[:-1]])
        targets = np.concatenate([self.prompt[1:], self.targets])
        weights = np.concatenate([np.zeros(unscored, np.float32), self.weights])
        return tokens, targets, weights


@dataclass(frozen=True)
class Batch:
    """Images with their sequences, padded to the longest in the batch. Padding has weight 0."""

    images: Tensor  # (B, 3, H, W) uint8
    tokens: Tensor  # (B, I, T) int64
    targets: Tensor  # (B, I, T) int64
    weights: Tensor  # (B, I, T) float32
    image_ids: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory; called by the data loader."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(move(self.images), move(self.tokens), move(self.targets), move(self.weights), self.image_ids)


@dataclass(frozen=True)
class Sample:
    """One image with its examples."""

    image: NDArray[np.uint8]  # (H, W, 3)
    examples: Sequence[Example]  # I
    image_id: int


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch. Samples with fewer examples than others, or none, get rows of weight 0."""
    rows = [[example.shifted() for example in sample.examples] for sample in samples]
    longest = max((len(tokens) for row in rows for tokens, _, _ in row), default=1)
    shape = (len(rows), max(1, *(len(row) for row in rows)), longest)
    tokens = np.full(shape, PAD, np.int64)
    targets = np.full(shape, PAD, np.int64)
    weights = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        for i, arrays in enumerate(row):
            length = len(arrays[0])
            tokens[b, i, :length], targets[b, i, :length], weights[b, i, :length] = arrays
    images = np.empty((len(samples), 3, *samples[0].image.shape[:2]), np.uint8)
    for b, sample in enumerate(samples):
        cv2.split(sample.image, list(images[b]))  # writes the planes in a quarter of the time of a transpose
    return Batch(
        torch.from_numpy(images),
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(weights),
        tuple(sample.image_id for sample in samples),
    )
