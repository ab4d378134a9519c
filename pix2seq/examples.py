"""Training examples of a task, samples of an image, and how samples become a batch.

Shapes: P prompt tokens, R response tokens, B images, S sequences, L tokens of all sequences, K scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

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
    inputs: NDArray[np.int64]  # (R,) response that the decoder reads
    targets: NDArray[np.int64]  # (R,) response that the decoder should predict
    weights: NDArray[np.float32]  # (R,) loss weight of each response token

    def shifted(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Return tokens, targets and weights (P + R - 1,): at each position the decoder predicts the next token."""
        unscored = len(self.prompt) - 1
        tokens = np.concatenate([self.prompt, self.inputs[:-1]])
        targets = np.concatenate([self.prompt[1:], self.targets])
        weights = np.concatenate([np.zeros(unscored, np.float32), self.weights])
        return tokens, targets, weights


@dataclass(frozen=True)
class Sample:
    """One image with its examples of one task or several."""

    image: NDArray[np.uint8]  # (H, W, 3)
    examples: Mapping[str, Sequence[Example]]  # by task
    image_id: int


@dataclass(frozen=True)
class Batch:
    """Images, and the sequences of all tasks end to end, in the order of images. Nothing is padded.

    Indices and counts are made on the host, so that a device has nothing to find out.
    """

    images: Tensor  # (B, 3, H, W) uint8
    tokens: Tensor  # (L,) int64
    positions: Tensor  # (L,) int64, of each token in its sequence
    lengths: Tensor  # (S,) int64, tokens of each sequence; on the host
    memory_index: Tensor  # (S,) int64, the image that each sequence reads, ascending; on the host
    scored: Tensor  # (K,) int64, indices of tokens with a weight
    targets: Tensor  # (K,) int64
    weights: Tensor  # (K,) float32
    task_index: Tensor  # (K,) int64, index into `tasks`
    tasks: tuple[str, ...]
    counts: tuple[float, ...]  # sum of the weights of each task
    image_ids: Mapping[str, tuple[int, ...]]  # by task

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to another device, without what stays on the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True), keep=("lengths", "memory_index"))

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory; called by the data loader."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor], keep: Sequence[str] = ()) -> Batch:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: move(v) for n, v in values.items() if isinstance(v, Tensor) and n not in keep}
        return replace(self, **moved)


def collate(samples: Sequence[Sample], tasks: Sequence[str]) -> Batch:
    """Join samples to a batch for these tasks. A batch has at least one token; without any sequence it is padding."""
    parts = [
        (image, tasks.index(name), *example.shifted())
        for image, sample in enumerate(samples)
        for name, examples in sample.examples.items()
        for example in examples
    ]
    if not parts:
        parts = [(0, 0, np.full(1, PAD, np.int64), np.full(1, PAD, np.int64), np.zeros(1, np.float32))]
    memory_index, task_of, tokens, targets, weights = zip(*parts, strict=True)
    lengths = np.array([len(each) for each in tokens], np.int64)
    all_weights = np.concatenate(weights)
    scored = np.flatnonzero(all_weights)
    task_index = np.repeat(task_of, lengths)[scored]
    images = np.empty((len(samples), 3, *samples[0].image.shape[:2]), np.uint8)
    for image, sample in enumerate(samples):
        cv2.split(sample.image, list(images[image]))  # writes the planes in a quarter of the time of a transpose
    return Batch(
        images=torch.from_numpy(images),
        tokens=torch.from_numpy(np.concatenate(tokens)),
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        lengths=torch.from_numpy(lengths),
        memory_index=torch.tensor(memory_index),
        scored=torch.from_numpy(scored),
        targets=torch.from_numpy(np.concatenate(targets)[scored]),
        weights=torch.from_numpy(all_weights[scored]),
        task_index=torch.from_numpy(task_index.astype(np.int64)),
        tasks=tuple(tasks),
        counts=tuple(np.bincount(task_index, all_weights[scored], len(tasks)).tolist()),
        image_ids={name: tuple(s.image_id for s in samples if name in s.examples) for name in tasks},
    )
