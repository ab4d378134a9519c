"""What a task asks the model, and which part of an image a question shows it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pix2seq.geometry.affine import fit_affine
from pix2seq.geometry.boxes import box_xyxy_to_yxyx
from pix2seq.model.decoding.completion import Completion, GenerationConfig

MIN_CLOSEUP = 1 / 64  # of the input's side: a closer look would show single features

Region = tuple[int, int, int, int]
"""A part of an image: x0, y0, x1, y1 in whole pixels, the last ones excluded."""


@dataclass(frozen=True)
class Frame:
    """The rectangle of an image that the model's whole input covers, padding included, in pixels of the image."""

    origin: NDArray[np.float64]  # (2,) x, y of the top left corner
    size: NDArray[np.float64]  # (2,) width, height

    @classmethod
    def of_input(cls, size: tuple[int, int], part: NDArray[np.floating] | None = None) -> Frame:
        """Return the frame of an input of `size` (height, width), or of a `part` (4,) of it, in the input's pixels."""
        whole = cls(np.zeros(2), np.array(size[::-1], np.float64))
        return whole if part is None else whole.part(part)

    def to_input_yxyx(self, boxes_xyxy: NDArray[np.floating]) -> NDArray[np.floating]:
        """Convert boxes (N, 4) in pixels of the image to `yxyx` in [0, 1] of the model's input."""
        return box_xyxy_to_yxyx((boxes_xyxy - np.tile(self.origin, 2)) / np.tile(self.size, 2))

    def to_input_yx(self, points_xy: NDArray[np.floating]) -> NDArray[np.float64]:
        """Convert points (N, 2), x, y in pixels of the image, to `yx` in [0, 1] of the model's input."""
        return ((points_xy - self.origin) / self.size)[..., ::-1]

    def to_image_xy(self, points_yx: NDArray[np.floating]) -> NDArray[np.float64]:
        """Convert points (N, 2), `yx` in [0, 1] of the model's input, to x, y in pixels of the image."""
        return points_yx[..., ::-1] * self.size + self.origin

    def around(self, box_xyxy: NDArray[np.floating], padding: float) -> Frame:
        """Return the frame of the same aspect ratio in whose middle a box lies, with `padding` of its size around."""
        corners = np.asarray(box_xyxy, np.float64).reshape(2, 2)
        share = max(float(((corners[1] - corners[0]) / self.size).max()), MIN_CLOSEUP) * (1 + 2 * padding)
        return Frame(corners.mean(axis=0) - share * self.size / 2, share * self.size)

    def part(self, yxyx: NDArray[np.floating]) -> Frame:
        """Return the frame of a part (4,) of this one, given in [0, 1] of it, maybe beyond it."""
        y0, x0, y1, x1 = yxyx.tolist()
        return Frame(self.origin + np.array([x0, y0]) * self.size, np.array([x1 - x0, y1 - y0]) * self.size)

    @property
    def xyxy(self) -> NDArray[np.float64]:
        """The corners (4,) in pixels of the image."""
        return np.concatenate([self.origin, self.origin + self.size])


@dataclass(frozen=True)
class EncodedImage:
    """An image that was encoded once, to be asked about many times. The caller holds it."""

    memory: Any  # (N, D), a tensor, or an array of NumPy in `pix2seq.runtime`; so are the maps
    pixels: NDArray[np.uint8]  # (H, W, 3)
    input_size: tuple[int, int]  # height, width of the model's input
    maps: tuple[Any, ...] = ()  # (C, h, w) each, for closeups
    embedding: Any = None  # (E,) unit vector, where the model compares images with sentences

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @cached_property
    def checksum(self) -> int:
        """A number that differs between images."""
        return zlib.crc32(np.ascontiguousarray(self.pixels).data)

    def frame(self, region: Region | None = None) -> Frame:
        """Return what the model's input covers when it shows the image, or a region of it."""
        x0, y0, x1, y1 = region or (0, 0, *self.size)
        affine = fit_affine((y1 - y0, x1 - x0), self.input_size)
        height, width = self.input_size
        return Frame(np.array([x0, y0], np.float64), np.array([width / affine.scale_x, height / affine.scale_y]))


@dataclass(frozen=True)
class Reference:
    """What a question reads beside the image it is about: another image, or the same one, or a part of it."""

    image: EncodedImage
    closeup: Frame | None = None  # a memory made from the image's maps; None: that of the whole image

    @property
    def own_key(self) -> tuple[float, ...]:
        """Which memory of its image it is: equal for equal ones."""
        return _key(None, self.closeup)


@dataclass(frozen=True)
class Request:
    """One question about one image. Its answer depends on nothing else that is asked."""

    prompt: NDArray[np.int64]  # (P,) of any length
    generation: GenerationConfig  # grammar, sampling and length of the answer
    subject: Any = None  # what the question is about, for `Task.answers`
    region: Region | None = None  # cropped and encoded for this question; None: the whole image
    closeup: Frame | None = None  # what the question reads a memory of, made from the image's maps
    references: tuple[Reference, ...] = ()  # what it reads too; their memories are joined to the image's, in order
    num_samples: int = 1  # answers to draw
    expected_tokens: int | None = None  # likely length of the answer; None: `generation.max_new_tokens`
    embeds: bool = False  # the answer is the embedding of the prompt, which is a sentence and reads no image

    def frame(self, image: EncodedImage) -> Frame:
        """Return what the answer's coordinates are relative to."""
        return image.frame(self.region) if self.closeup is None else self.closeup

    @property
    def own_key(self) -> tuple[float, ...]:
        """Which memory of the image the question reads, apart from references: equal for equal ones."""
        return _key(self.region, self.closeup)

    @property
    def memory_key(self) -> tuple[Any, ...]:
        """Which memory the question reads, among those of an image: equal for equal ones while images are held."""
        return (*self.own_key, *((id(each.image), *each.own_key) for each in self.references))

    def random_seed(self, seed: int) -> int:
        """Return the seed, below 2**63, of what sampling draws: a function of the question and of a call's `seed`."""
        entropy = [seed, *self.prompt.tolist(), *(self.region or ()), *_bits(self.closeup)]
        for reference in self.references:
            entropy += [reference.image.checksum, *_bits(reference.closeup)]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))

    @property
    def length(self) -> int:
        """Tokens to expect, by which requests are batched."""
        return self.generation.max_new_tokens if self.expected_tokens is None else self.expected_tokens


def _key(region: Region | None, closeup: Frame | None) -> tuple[float, ...]:
    return (*(region or ()), *(() if closeup is None else closeup.xyxy.tolist()))


def _bits(frame: Frame | None) -> list[int]:
    """Return the corners of a frame as whole numbers."""
    return [] if frame is None else [int(bits) for bits in frame.xyxy.view(np.uint64)]


@dataclass(frozen=True)
class Exchange:
    """What a task asked about one image, what the model said to each request, and what that means."""

    requests: list[Request]
    completions: list[Completion]
    answers: list[Any]
