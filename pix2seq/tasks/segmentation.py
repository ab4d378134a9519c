"""The segmentation task: the outline of an object whose box and class are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from pix2seq.examples import Example
from pix2seq.geometry.polygons import MIN_POINTS, clip_rings, mask_to_rings, rasterize
from pix2seq.model.decoding.generate import Generated, GenerationConfig
from pix2seq.model.decoding.grammar import PolygonGrammar
from pix2seq.tasks.scores import token_score, weighted_score
from pix2seq.tasks.task import Task, TaskConfig, object_prompt
from pix2seq.tokenizers.instance import PROMPT_LENGTH
from pix2seq.tokenizers.segmentation import decode_polygons, encode_polygons
from pix2seq.types import Target
from pix2seq.vocab import EOS, SEPARATOR


@dataclass(frozen=True)
class SegmentationConfig(TaskConfig):
    """How segmentation is trained and asked."""

    max_objects: int = 10  # objects of one image in a training step
    max_points: int = 128  # of an outline, separators included
    random_start: bool = True  # each ring starts at another of its points every time
    eos_weight: float = 1.0  # loss weight of the end token
    num_samples: int = 8  # outlines drawn for each object, whose masks vote; 1 for speed
    threshold: float = 0.5  # share of the votes that makes a pixel part of the mask
    min_box_score: float = 0.05  # predicted boxes below it are not asked about
    score_weight: float = 0.0  # of the outline's likelihood in the score; the rest is the box's
    top_p: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_points < MIN_POINTS:
            raise ValueError(f"segmentation.max_points must be at least {MIN_POINTS}, got {self.max_points}")
        if self.num_samples < 1 or self.max_objects < 1:
            raise ValueError("segmentation.num_samples and segmentation.max_objects must be at least 1")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"segmentation.threshold must lie in (0, 1], got {self.threshold}")


class Segmentation(Task[SegmentationConfig]):
    """Polygons of objects."""

    name = "segmentation"
    config_type = SegmentationConfig
    scale_range = (0.3, 1.0)
    learns_from = "mask"
    length_setting = "segmentation.max_points"

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence, prompt and end included."""
        return PROMPT_LENGTH + self.max_new_tokens

    @property
    def max_new_tokens(self) -> int:
        """Length of the longest response."""
        return 2 * self.config.max_points + 1

    def samples(self, target: Target) -> list[int | None]:
        """Whole images with a mask that is no crowd's."""
        return [None] if any(self._usable(target, i) for i in range(len(target.labels))) else []

    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """A sequence for each of up to `max_objects` objects, drawn at random."""
        height, width = size
        scale = np.array([height, width], np.float32)
        found: list[Example] = []
        for i in rng.permutation([i for i in range(len(target.labels)) if self._usable(target, i)]):
            if len(found) == self.config.max_objects:
                break
            rings = target.segmentations[i]
            assert isinstance(rings, list)
            inside = [ring[:, ::-1] / scale for ring in clip_rings(rings, width, height)]
            ids = encode_polygons(
                inside, self.vocab, max_points=self.config.max_points, rng=rng if self.config.random_start else None
            )
            if not len(ids):
                continue
            prompt = object_prompt(self.name, target, int(i), size, self.vocab)
            response = np.append(ids, EOS)
            weights = np.ones(len(response), np.float32)
            weights[-1] = self.config.eos_weight
            found.append(Example(prompt, response, response, weights))
        return found

    @staticmethod
    def _usable(target: Target, i: int) -> bool:
        return bool(target.segmentations[i]) and not target.iscrowd[i]

    def grammar(self) -> PolygonGrammar:
        """Rings of three points or more, and an end."""
        return PolygonGrammar(
            coord_base=self.vocab.coord_base,
            num_bins=self.vocab.num_bins,
            separator_id=SEPARATOR,
            eos_id=EOS,
            max_points=self.config.max_points,
        )

    def generation(self) -> GenerationConfig:
        """See `Task`."""
        return GenerationConfig(self.max_new_tokens, grammar=self.grammar(), eos_id=EOS, **self.sampling)

    def mask(
        self, out: Generated, rows: slice, to_pixels: NDArray[np.floating], limits: tuple[int, int]
    ) -> tuple[list[NDArray[np.float32]], dict[str, Any] | None]:
        """The outline, rings (P, 2) x, y in pixels, that the samples in `rows` agree on, and its run lengths if voted.

        `to_pixels` (2,) is width and height of the model's input in pixels of the image, `limits`
        the image's own (width, height). One sample is taken as it is; of several, each pixel goes
        with `threshold` of the votes.
        """
        width, height = limits
        samples = []
        for ids in out.tokens[rows].cpu().numpy():
            rings = [ring[:, ::-1] * to_pixels for ring in decode_polygons(ids, self.vocab)]
            samples.append([ring.astype(np.float32) for ring in clip_rings(rings, width, height)])
        if len(samples) == 1:
            return samples[0], None
        points = np.concatenate([ring for rings in samples for ring in rings] or [np.zeros((0, 2), np.float32)])
        if not len(points):
            return [], None
        # Nothing lies outside the points' own box, so only that part of the image is voted on.
        left, top = np.floor(points.min(axis=0)).astype(int)
        right, bottom = np.ceil(points.max(axis=0)).astype(int)
        size = (max(int(bottom - top), 1), max(int(right - left), 1))
        corner = np.array([left, top], np.float32)
        votes = np.mean([rasterize([ring - corner for ring in rings], *size) for rings in samples], axis=0)
        voted = votes >= self.config.threshold
        whole = np.zeros((height, width), np.uint8, order="F")
        whole[top:bottom, left:right] = voted[: height - top, : width - left]
        return [ring + corner for ring in mask_to_rings(voted)], dict(mask_utils.encode(whole))

    def scores(self, out: Generated, rows: slice, box_score: float) -> tuple[float, float]:
        """Likelihood of the outline, and the object's score."""
        likelihood = float(token_score(out.tokens[rows], out.logprobs[rows]).mean())
        return likelihood, weighted_score(box_score, likelihood, self.config.score_weight)
