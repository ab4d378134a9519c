"""What a task makes of one image for training, and how examples become a batch.

Shapes: P prompt tokens, L response tokens, B images, I sequences an image, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pix2seq.vocab import PAD


@dataclass(frozen=True)
class Example:
    """One sequence: the prompt is given, the response is learned."""

    prompt: NDArray[np.int64]  # (P,)
    inputs: NDArray[np.int64]  # (L,) response as the decoder reads it
    targets: NDArray[np.int64]  # (L,) response as the decoder should say it
    weights: NDArray[np.float32]  # (L,) loss weight of each response token

    def shifted(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Tokens, targets and weights (P + L - 1,): at each place the decoder says the next token."""
        unscored = len(self.prompt) - 1
        tokens = np.concatenate([self.prompt, self.inputs[:-1]])
        targets = np.concatenate([self.prompt[1:], self.targets])
        weights = np.concatenate([np.zeros(unscored, np.float32), self.weights])
        return tokens, targets, weights


@dataclass(frozen=True)
class Batch:
    """Images with their sequences, padded to the longest of this batch. Padding has weight 0."""

    images: Tensor  # (B, 3, H, W) uint8
    tokens: Tensor  # (B, I, T) int64
    targets: Tensor  # (B, I, T) int64
    weights: Tensor  # (B, I, T) float32
    image_ids: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        move = lambda tensor: tensor.to(device, non_blocking=True)  # noqa: E731
        return Batch(move(self.images), move(self.tokens), move(self.targets), move(self.weights), self.image_ids)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; called by the data loader."""
        return Batch(
            self.images.pin_memory(),
            self.tokens.pin_memory(),
            self.targets.pin_memory(),
            self.weights.pin_memory(),
            self.image_ids,
        )


@dataclass(frozen=True)
class Sample:
    """One image with its examples."""

    image: NDArray[np.uint8]  # (H, W, 3)
    examples: Sequence[Example]  # I of them
    image_id: int


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples. Where one has fewer examples than another, or none, rows of weight 0 fill up."""
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
        cv2.split(sample.image, list(images[b]))  # into the planes, in a quarter of a transpose's time
    return Batch(
        torch.from_numpy(images),
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(weights),
        tuple(sample.image_id for sample in samples),
    )
