"""Training examples of a task, samples of an image, and how samples become a batch.

Shapes: P prompt tokens, R response tokens, B images, C closeups, S sequences, L tokens of all sequences, K scored
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pix2seq.vocab import PAD

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PADDING_LENGTH = 64  # tokens of a sequence of padding at most


@dataclass(frozen=True)
class Example:
    """One sequence of a given prompt and a response to learn."""

    prompt: NDArray[np.int64]  # (P,)
    inputs: NDArray[np.int64]  # (R,) response that the decoder reads
    targets: NDArray[np.int64]  # (R,) response that the decoder should predict
    weights: NDArray[np.float32]  # (R,) loss weight of each response token
    closeup: NDArray[np.float32] | None = None  # (4,) `yxyx` of what it reads, in [0, 1] of the input; None: all

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

    image: NDArray[Any]  # (H, W, 3) uint8, or stored features (N, D)
    examples: Mapping[str, Sequence[Example]]  # by task
    image_id: int


@dataclass(frozen=True)
class Batch:
    """Images, and the sequences of all tasks end to end, in the order of images. Only the ends may be padding.

    Indices and counts are made on the host, so that a device has nothing to find out.
    """

    images: Tensor  # (B, 3, H, W) uint8, or stored features (B, N, D)
    tokens: Tensor  # (L,) int64
    positions: Tensor  # (L,) int64, of each token in its sequence
    lengths: Tensor  # (S,) int64, tokens of each sequence; on the host
    memory_index: Tensor  # (S,) int64, which each sequence reads, ascending: images, then closeups; on the host
    closeups: Tensor  # (C, 4) float32, `yxyx` in [0, 1] of the input, maybe beyond it; on the host
    closeup_images: Tensor  # (C,) int64, the image of each closeup, ascending; on the host
    scored: Tensor  # (K,) int64, indices of tokens with a weight
    targets: Tensor  # (K,) int64
    weights: Tensor  # (K,) float32
    task_index: Tensor  # (K,) int64, index into `tasks`
    tasks: tuple[str, ...]
    counts: tuple[float, ...]  # sum of the weights of each task
    image_ids: Mapping[str, tuple[int, ...]]  # by task
    layout: Any = None  # where the sequences lie, a `pix2seq.model.packing.Layout`; None: made from `lengths`

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to another device, without what stays on the host."""
        return self._map(
            lambda tensor: tensor.to(device, non_blocking=True),
            keep=("lengths", "memory_index", "closeups", "closeup_images"),
        )

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory; called by the data loader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor], keep: Sequence[str] = ()) -> Batch:
        from torch import Tensor

        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: move(v) for n, v in values.items() if isinstance(v, Tensor) and n not in keep}
        return replace(self, **moved)


def collate(samples: Sequence[Sample], tasks: Sequence[str], *, bucket: int = 1) -> Batch:
    """Join samples to a batch for these tasks.

    L and K are padded to multiples of `bucket` (the padding is sequences of the last memory without a weight), and S to
    multiples of an eighth of it by empty sequences. L and K are at least 1.
    """
    import torch  # here, because tasks import this module, and `pix2seq.runtime` has no torch

    found = [
        (image, tasks.index(name), example)
        for image, sample in enumerate(samples)
        for name, examples in sample.examples.items()
        for example in examples
    ]
    near = [entry for entry in found if entry[2].closeup is not None]
    parts = [(image, task, *example.shifted()) for image, task, example in found if example.closeup is None]
    parts += [(len(samples) + i, task, *example.shifted()) for i, (_, task, example) in enumerate(near)]
    length = sum(len(part[2]) for part in parts)
    missing = -max(length, 1) % bucket + (length == 0)
    last = len(samples) + len(near) - 1
    for start in range(0, missing, PADDING_LENGTH):
        padding = np.full(min(PADDING_LENGTH, missing - start), PAD, np.int64)
        parts.append((last, 0, padding, padding, np.zeros(len(padding), np.float32)))
    memory_index, task_of, tokens, targets, weights = zip(*parts, strict=True)
    lengths = np.array([len(each) for each in tokens], np.int64)
    flat_weights = np.concatenate(weights)
    scored = np.flatnonzero(flat_weights)
    num_scored = len(scored)
    scored = np.append(scored, np.zeros(-num_scored % bucket, np.int64))
    scored_weights = flat_weights[scored]
    scored_weights[num_scored:] = 0
    task_index = np.repeat(task_of, lengths)[scored].astype(np.int64)
    empty = -len(lengths) % max(bucket // 8, 1)
    return Batch(
        images=torch.from_numpy(_stack([sample.image for sample in samples])),
        tokens=torch.from_numpy(np.concatenate(tokens)),
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        lengths=torch.from_numpy(np.append(lengths, np.zeros(empty, np.int64))),
        memory_index=torch.tensor([*memory_index, *[last] * empty]),
        closeups=torch.from_numpy(np.array([each.closeup for _, _, each in near], np.float32).reshape(-1, 4)),
        closeup_images=torch.tensor([image for image, _, _ in near], dtype=torch.int64),
        scored=torch.from_numpy(scored),
        targets=torch.from_numpy(np.concatenate(targets)[scored]),
        weights=torch.from_numpy(scored_weights),
        task_index=torch.from_numpy(task_index),
        tasks=tuple(tasks),
        counts=tuple(np.bincount(task_index, scored_weights, len(tasks)).tolist()),
        image_ids={name: tuple(s.image_id for s in samples if name in s.examples) for name in tasks},
    )


def _stack(images: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if images[0].ndim == 2:
        return np.stack(images)
    planes = np.empty((len(images), 3, *images[0].shape[:2]), np.uint8)
    for image, out in zip(images, planes, strict=True):
        cv2.split(image, list(out))  # writes the planes in a quarter of the time of a transpose
    return planes
