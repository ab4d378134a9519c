"""The segmentation task: the mask, as polygons, of an object of given box and class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from pix2seq.examples import Example
from pix2seq.geometry.polygons import MIN_POINTS, clip_rings, mask_to_rings, rasterize, space_evenly
from pix2seq.metrics.mask_reward import mask_iou
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.model.decoding.grammar import PolygonGrammar
from pix2seq.settings import NonNegativeFloat, PositiveShare, Range
from pix2seq.tasks.objects import ObjectTask, ObjectTaskConfig, token_score, weighted_score
from pix2seq.tasks.outlines import outline_grammar, read_outline
from pix2seq.tasks.request import Frame
from pix2seq.tasks.task import Judge, Verdict
from pix2seq.tokenizers.instance import PROMPT_LENGTH
from pix2seq.tokenizers.segmentation import decode_polygons, encode_polygons
from pix2seq.types import Category, Instance, Target
from pix2seq.vocab import EOS

if TYPE_CHECKING:
    from pix2seq.metrics.coco_ap import ApMetric


@dataclass(frozen=True)
class SegmentationConfig(ObjectTaskConfig):
    """How segmentation is trained and asked."""

    section = "segmentation"

    # Of a mask's polygons, separators included.
    max_points: Annotated[int, Range(least=MIN_POINTS, most=10_000)] = 128
    random_start: bool = True  # each ring starts at another of its points every time
    # About so many points, at equal distances, take the place of the annotated ones; 0 keeps those.
    even_points: Annotated[int, Range(least=0, most=10_000)] = 0
    eos_weight: NonNegativeFloat = 1.0  # loss weight of the end token
    num_samples: Annotated[int, Range(least=1, most=1000)] = 8  # masks drawn for each object, which vote; 1 for speed
    threshold: PositiveShare = 0.5  # share of the votes that makes a pixel part of the mask
    top_p: PositiveShare = 0.8


class Segmentation(ObjectTask[SegmentationConfig]):
    """Polygons of objects."""

    name = "segmentation"
    hub_pipeline = "image-segmentation"
    config_type = SegmentationConfig
    learns_from = "mask"
    length_setting = "segmentation.max_points"

    @property
    def max_new_tokens(self) -> int:
        """Length of the longest response."""
        return 2 * self.config.max_points + 1

    @property
    def max_seq_len(self) -> int:
        """See `Task`."""
        return PROMPT_LENGTH + self.max_new_tokens

    @property
    def num_samples(self) -> int:
        """See `ObjectTask`."""
        return self.config.num_samples

    def usable(self, target: Target, i: int) -> bool:
        """Whether object `i` has a mask and is no crowd."""
        return bool(target.segmentations[i]) and not target.iscrowd[i]

    def example(self, target: Target, i: int, size: tuple[int, int], rng: np.random.Generator) -> Example | None:
        """See `ObjectTask`."""
        height, width = size
        rings = target.segmentations[i]
        assert isinstance(rings, list)
        clipped = clip_rings(rings, width, height)
        if self.config.even_points:
            clipped = space_evenly(clipped, self.config.even_points)
        inside = [ring[:, ::-1] / np.array([height, width], np.float32) for ring in clipped]
        start = rng if self.config.random_start else None
        ids = encode_polygons(inside, self.vocab, max_points=self.config.max_points, rng=start)
        if not len(ids):
            return None
        response = np.append(ids, EOS)
        weights = np.ones(len(response), np.float32)
        weights[-1] = self.config.eos_weight
        return Example(self.object_prompt(target, i, size), response, response, weights)

    def grammar(self) -> PolygonGrammar:
        """Return the grammar: rings of three points or more, then an end."""
        return outline_grammar(self.vocab, self.config.max_points)

    def generation(self, category: Category | None = None) -> GenerationConfig:
        """See `ObjectTask`."""
        return GenerationConfig(self.max_new_tokens, grammar=self.grammar(), eos_id=EOS, **self.sampling)

    def expected_tokens(self, instance: Instance, frame: Frame) -> int:
        """Take the longest answer for a box as large as the input, and less in proportion to the box's perimeter."""
        x0, y0, x1, y1 = instance.box_xyxy
        share = (x1 - x0 + y1 - y0) / float(frame.size.sum())
        return round(self.max_new_tokens * min(share, 1.0))

    def answer(self, instance: Instance, completion: Completion, frame: Frame, size: tuple[int, int]) -> Instance:
        """See `ObjectTask`."""
        likelihood, score = self.scores(completion, instance.score)
        rings, rle, agreement = self._vote(completion.tokens, frame, size)
        return replace(instance, score=score, polygons=rings, rle=rle, mask_score=likelihood, mask_agreement=agreement)

    def mask(
        self, samples: NDArray[np.integer], frame: Frame, size: tuple[int, int]
    ) -> tuple[list[NDArray[np.float32]], dict[str, Any] | None]:
        """Return the mask that samples (S, T) of an object agree on: rings (P, 2) x, y in pixels, and run lengths.

        `size` is width and height of the image. One sample is taken as it is, without run lengths; of several, each
        pixel goes with `threshold` of the votes.
        """
        return self._vote(samples, frame, size)[:2]

    def _vote(
        self, samples: NDArray[np.integer], frame: Frame, size: tuple[int, int]
    ) -> tuple[list[NDArray[np.float32]], dict[str, Any] | None, float | None]:
        """Return a mask as `mask` does, and the IoU of the voted mask with the share of votes of each pixel.

        The IoU is soft: 1 if all samples are the same, None for one sample, 0 if nothing was voted.
        """
        from pycocotools import mask as mask_utils  # here, because only masks need it

        width, height = size
        polygons = [read_outline(ids, frame, size, self.vocab) for ids in samples]
        if len(polygons) == 1:
            return polygons[0], None, None
        points = np.concatenate([ring for rings in polygons for ring in rings] or [np.zeros((0, 2), np.float32)])
        if not len(points):
            return [], None, 0.0
        # Nothing lies outside the points' own box, so only that part of the image is voted on.
        left, top = np.floor(points.min(axis=0)).astype(int)
        right, bottom = np.ceil(points.max(axis=0)).astype(int)
        part = (max(int(bottom - top), 1), max(int(right - left), 1))
        corner = np.array([left, top], np.float32)
        votes = np.mean([rasterize([ring - corner for ring in rings], *part) for rings in polygons], axis=0)
        voted = votes >= self.config.threshold
        full = np.zeros((height, width), np.uint8, order="F")
        full[top:bottom, left:right] = voted[: height - top, : width - left]
        common = float(votes[voted].sum())
        agreement = common / max(float(votes.sum()) + int(voted.sum()) - common, 1.0)
        return [ring + corner for ring in mask_to_rings(voted)], dict(mask_utils.encode(full)), agreement

    def scores(self, completion: Completion, box_score: float) -> tuple[float, float]:
        """Return the likelihood of the mask, and the object's score."""
        likelihood = float(token_score(completion.tokens, completion.logprobs).mean())
        return likelihood, weighted_score(box_score, likelihood, self.config.score_weight)

    def judge(self, captions: Sequence[Sequence[str]]) -> Judge:
        """Reward a mask by its IoU with the annotated one."""

        def score(example: Example, completion: Completion, size: tuple[int, int]) -> Verdict:
            assert example.target is not None
            (true_rings,) = example.target.segmentations
            assert isinstance(true_rings, list)
            scale = np.array(size, np.float32)
            answers = ([ring * scale for ring in decode_polygons(ids, self.vocab)] for ids in completion.tokens)
            return Verdict(np.array([mask_iou([r[:, ::-1] for r in rings], true_rings, size) for rings in answers]))

        return score

    def metric(self, categories: Sequence[Category]) -> ApMetric:
        """See `Task`."""
        from pix2seq.metrics.coco_ap import ApMetric  # here, because asking needs neither pandas nor pycocotools

        return ApMetric(categories, "mask")
