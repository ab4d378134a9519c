"""Training examples of a task, samples of an image, and how samples become a batch.

Shapes: P prompt tokens, R response tokens, B images, C closeups, S sequences, L tokens of all sequences, K scored
tokens, T sentences, E tokens of all sentences, M readings, Q parts of memory that readings join.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pix2seq.types import Target
from pix2seq.vocab import MAX_SIZE, PAD

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PADDING_LENGTH = 64  # tokens of a sequence of padding at most


@dataclass(frozen=True)
class OtherView:
    """What a sequence reads after its own image: another image beside the sample's, or a closeup of a part of one."""

    companion: int | None  # number among the task's companions of the sample; None: the sample's own image
    closeup: NDArray[np.float32] | None = None  # (4,) `yxyx` in [0, 1] of that image's input; None: all of it


@dataclass(frozen=True)
class Example:
    """One sequence of a given prompt and a response to learn."""

    prompt: NDArray[np.int64]  # (P,)
    inputs: NDArray[np.int64]  # (R,) response that the decoder reads
    targets: NDArray[np.int64]  # (R,) response that the decoder should predict
    weights: NDArray[np.float32]  # (R,) loss weight of each response token
    closeup: NDArray[np.float32] | None = None  # (4,) `yxyx` of what it reads, in [0, 1] of the input; None: all
    target: Target | None = None  # what it was made from, in pixels of what it reads; for rewards
    second: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None  # (R,) another target of each token; its weight
    # (R, 4) which ids each response token was sampled from: a range [low, high), and two more ids or -1; None: all
    choices: NDArray[np.int64] | None = None
    sentence: NDArray[np.int64] | None = None  # with its end, that is true of the image; to compare images with
    others: tuple[OtherView, ...] = ()  # what it reads too, in the order of their places

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
    companions: Mapping[str, Sequence[NDArray[Any]]] = field(default_factory=dict)  # other images, by task


@dataclass(frozen=True)
class Readings:
    """Which memories sequences read, where some read several; all on the host.

    A part is a memory at a place: the same memory read at two places is two parts.
    """

    memories: Tensor  # (Q,) int64, of each part: images, then closeups
    places: Tensor  # (Q,) int64, of each part: 0 for what is asked about, then those of references
    parts: Tensor  # (M, K) int64, of each reading in the order of places, -1 after its last

    @classmethod
    def of(cls, readings: Sequence[tuple[int, ...]]) -> Readings:
        """Collect the parts of readings, each the memories of its places in order."""
        import torch

        numbers: dict[tuple[int, int], int] = {}
        parts = np.full((len(readings), max(map(len, readings))), -1)
        for reading, row in zip(readings, parts, strict=True):
            for place, memory in enumerate(reading):
                row[place] = numbers.setdefault((memory, place), len(numbers))
        memories, places = zip(*numbers, strict=True)
        return cls(torch.tensor(memories), torch.tensor(places), torch.from_numpy(parts))


@dataclass(frozen=True)
class Batch:
    """Images, and the sequences of all tasks end to end, in the order of images. Only the ends may be padding.

    Indices and counts are made on the host, so that a device has nothing to find out.
    """

    images: Tensor  # (B, 3, H, W) uint8, or stored features (B, N, D); companions come last
    tokens: Tensor  # (L,) int64
    positions: Tensor  # (L,) int64, of each token in its sequence
    lengths: Tensor  # (S,) int64, tokens of each sequence; on the host
    # (S,) int64, which each sequence reads, ascending: of `readings`, or else of images and then closeups; on the host
    memory_index: Tensor
    closeups: Tensor  # (C, 4) float32, `yxyx` in [0, 1] of the input, maybe beyond it; on the host
    closeup_images: Tensor  # (C,) int64, the image of each closeup, ascending; on the host
    scored: Tensor  # (K,) int64, indices of tokens with a weight
    targets: Tensor  # (K,) int64
    weights: Tensor  # (K,) float32
    task_index: Tensor  # (K,) int64, index into `tasks`
    tasks: tuple[str, ...]
    counts: tuple[float, ...]  # sum of the weights of each task
    image_ids: Mapping[str, tuple[int, ...]]  # by task
    samples: tuple[Sample, ...] = ()  # that it was made of, without their images; only where rewards need them
    choices: Tensor | None = None  # (K, 4) int64, of the examples; None: all ids
    # Sentences that are true of an image, end to end and in the order of images; they read no memory.
    sentence_tokens: Tensor | None = None  # (E,) int64
    sentence_lengths: Tensor | None = None  # (T,) int64; on the host
    sentence_images: Tensor | None = None  # (T,) int64
    sentence_keys: Tensor | None = None  # (T,) int64, from 0; equal for equal sentences
    readings: Readings | None = None  # None: each sequence reads one memory
    layout: Any = None  # where the sequences lie, a `pix2seq.model.packing.Layout`; None: made from `lengths`

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to another device, without what stays on the host."""
        return self._map(
            lambda tensor: tensor.to(device, non_blocking=True),
            keep=("lengths", "memory_index", "closeups", "closeup_images", "sentence_lengths"),
        )

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory; called by the data loader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor], keep: Sequence[str] = ()) -> Batch:
        from torch import Tensor

        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        moved: dict[str, Any] = {n: move(v) for n, v in values.items() if isinstance(v, Tensor) and n not in keep}
        return replace(self, **moved)


@dataclass(frozen=True)
class Placed:
    """An example at its place in a batch."""

    image: int  # number of its sample
    task: str
    number: int  # among the task's examples of the image
    example: Example
    reading: tuple[int, ...]  # memories of images, then closeups: its own, then of `others`

    @property
    def memory(self) -> int:
        """The memory of what the example is about."""
        return self.reading[0]


def place(samples: Sequence[Sample]) -> tuple[list[Placed], list[tuple[int, NDArray[np.float32]]]]:
    """Return the examples of samples in the order of a batch, and the closeups (image, frame) that they read.

    Images are those of the samples, then their companions. Examples of an image share a closeup, and so its memory, if
    they hold the same array.
    """
    found: list[Placed] = []
    frames: dict[tuple[int, int], tuple[int, NDArray[np.float32]]] = {}
    numbers: dict[tuple[int, int], int] = {}
    first_companion, num_images = {}, len(samples)
    for image, sample in enumerate(samples):
        for task, companions in sample.companions.items():
            first_companion[image, task] = num_images
            num_images += len(companions)

    def memory_of(image: int, closeup: NDArray[np.float32] | None) -> int:
        if closeup is None:
            return image
        key = (image, id(closeup))
        frames[key] = (image, closeup)
        return num_images + numbers.setdefault(key, len(numbers))

    for image, sample in enumerate(samples):
        for task, examples in sample.examples.items():
            for number, example in enumerate(examples):
                others = (
                    memory_of(
                        image if view.companion is None else first_companion[image, task] + view.companion, view.closeup
                    )
                    for view in example.others
                )
                reading = (memory_of(image, example.closeup), *others)
                found.append(Placed(image, task, number, example, reading))
    return sorted(found, key=lambda each: each.reading), list(frames.values())


def collate(
    samples: Sequence[Sample],
    tasks: Sequence[str],
    *,
    bucket: int = 1,
    images: Tensor | None = None,
    keep_samples: bool = False,
) -> Batch:
    """Join samples to a batch for these tasks.

    L and K are padded to multiples of `bucket` (the padding is sequences of the last memory without a weight), and S to
    multiples of an eighth of it by empty sequences. L and K are at least 1. `images` are those of the batch, if they
    were stacked before.
    """
    import torch  # here, because tasks import this module, and `pix2seq.runtime` has no torch

    placed, frames = place(samples)
    pixels = [sample.image for sample in samples]
    pixels += [each for sample in samples for some in sample.companions.values() for each in some]
    readings = list(dict.fromkeys(each.reading for each in placed))
    if all(len(reading) == 1 for reading in readings):  # what is read are memories, maybe not all of them
        readings = [(memory,) for memory in range(len(pixels) + len(frames))]
    index = {reading: number for number, reading in enumerate(readings)}
    parts = [(index[each.reading], tasks.index(each.task), each.example) for each in placed]
    length = sum(len(example.prompt) + len(example.inputs) - 1 for _, _, example in parts)
    missing = -max(length, 1) % bucket + (length == 0)
    last = len(readings) - 1
    for start in range(0, missing, PADDING_LENGTH):
        padding = np.full(min(PADDING_LENGTH, missing - start), PAD, np.int64)
        parts.append((last, 0, Example(padding[:1], padding, padding, np.zeros(len(padding), np.float32))))
    memory_index, task_of, examples = zip(*parts, strict=True)
    tokens, targets, weights = zip(*(example.shifted() for example in examples), strict=True)
    lengths = np.array([len(each) for each in tokens], np.int64)
    terms = [_scored(targets, weights)]
    if any(example.second is not None for example in examples):
        terms.append(_scored(*zip(*(_second(example) for example in examples), strict=True)))
    unused = -sum(len(each) for each, _, _ in terms) % bucket
    terms.append((np.zeros(unused, np.int64), np.zeros(unused, np.int64), np.zeros(unused, np.float32)))
    scored, scored_targets, scored_weights = (np.concatenate(each) for each in zip(*terms, strict=True))
    task_index = np.repeat(task_of, lengths)[scored].astype(np.int64)
    empty = -len(lengths) % max(bucket // 8, 1)
    choices = None
    if any(example.choices is not None for example in examples):
        choices = torch.from_numpy(np.concatenate([_choices(example) for example in examples])[scored])
    told = [(each.image, each.example.sentence) for each in placed if each.example.sentence is not None]
    told.sort(key=lambda pair: pair[0])
    sentences = [sentence for _, sentence in told]
    return Batch(
        images=torch.from_numpy(_stack(pixels)) if images is None else images,
        tokens=torch.from_numpy(np.concatenate(tokens)),
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        lengths=torch.from_numpy(np.append(lengths, np.zeros(empty, np.int64))),
        memory_index=torch.tensor([*memory_index, *[last] * empty]),
        closeups=torch.from_numpy(np.array([frame for _, frame in frames], np.float32).reshape(-1, 4)),
        closeup_images=torch.tensor([image for image, _ in frames], dtype=torch.int64),
        scored=torch.from_numpy(scored),
        targets=torch.from_numpy(scored_targets),
        weights=torch.from_numpy(scored_weights),
        task_index=torch.from_numpy(task_index),
        tasks=tuple(tasks),
        counts=tuple(np.bincount(task_index, scored_weights, len(tasks)).tolist()),
        image_ids={name: tuple(s.image_id for s in samples if name in s.examples) for name in tasks},
        choices=choices,
        sentence_tokens=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *sentences])),
        sentence_lengths=torch.tensor([len(each) for each in sentences], dtype=torch.int64),
        sentence_images=torch.tensor([image for image, _ in told], dtype=torch.int64),
        sentence_keys=torch.tensor([_key(each) for each in sentences], dtype=torch.int64),
        readings=Readings.of(readings) if max(map(len, readings)) > 1 else None,
        samples=tuple(map(_without_images, samples)) if keep_samples else (),
    )


def _without_images(sample: Sample) -> Sample:
    companions = {task: [each[:0] for each in some] for task, some in sample.companions.items()}
    return replace(sample, image=sample.image[:0], companions=companions)


def _key(sentence: NDArray[np.int64]) -> int:
    """Return a number below 2**63 by which equal sentences are found."""
    digest = hashlib.blake2b(np.ascontiguousarray(sentence, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _scored(
    targets: Sequence[NDArray[np.int64]], weights: Sequence[NDArray[np.float32]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return the indices of tokens with a weight, their targets and their weights."""
    flat = np.concatenate(weights)
    scored = np.flatnonzero(flat)
    return scored, np.concatenate(targets)[scored], flat[scored]


def _choices(example: Example) -> NDArray[np.int64]:
    """Return the choices (P + R - 1, 4) of an example's tokens, all ids where it has none."""
    length = len(example.prompt) + len(example.inputs) - 1
    choices = np.tile(np.array([0, MAX_SIZE, -1, -1]), (length, 1))
    if example.choices is not None:
        choices[len(example.prompt) - 1 :] = example.choices
    return choices


def _second(example: Example) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the second targets and their weights (P + R - 1,) of an example, weights 0 where there are none."""
    if example.second is None:
        length = len(example.prompt) + len(example.inputs) - 1
        return np.zeros(length, np.int64), np.zeros(length, np.float32)
    targets, weights = example.second
    _, targets, weights = replace(example, targets=targets, weights=weights).shifted()
    return targets, weights


def _stack(images: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if images[0].ndim == 2:
        return np.stack(images)
    planes = np.empty((len(images), 3, *images[0].shape[:2]), np.uint8)
    for image, out in zip(images, planes, strict=True):
        cv2.split(image, list(out))  # writes the planes in a quarter of the time of a transpose
    return planes
