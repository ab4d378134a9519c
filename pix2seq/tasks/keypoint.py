"""The keypoint task: the points of an object of given box and class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray

from pix2seq.errors import unknown_name
from pix2seq.examples import Example
from pix2seq.geometry.keypoints import point_key
from pix2seq.metrics.keypoint_reward import keypoint_similarity
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.model.decoding.grammar import KeypointGrammar
from pix2seq.settings import NonNegativeFloat, PositiveShare, Range, Share
from pix2seq.tasks.objects import ObjectTask, ObjectTaskConfig, Padding, token_score, weighted_score
from pix2seq.tasks.request import Frame
from pix2seq.tasks.task import Judge, Verdict
from pix2seq.tokenizers.instance import PROMPT_LENGTH
from pix2seq.tokenizers.keypoint import decode_keypoints, encode_keypoints
from pix2seq.tokenizers.text import TextTokenizer
from pix2seq.types import Category, Instance, Target
from pix2seq.vocab import INVISIBLE, Vocab

if TYPE_CHECKING:
    from pix2seq.metrics.coco_ap import ApMetric

Sigma = Annotated[float, Range(above=0, most=10)]
VISIBLE, HIDDEN = 2.0, 1.0  # COCO's flags for visible points and for labelled ones that are hidden


@dataclass(frozen=True)
class KeypointConfig(ObjectTaskConfig):
    """How keypoints are trained and asked."""

    section = "keypoint"

    crop: bool = True
    crop_padding: Padding = 0.5
    invisible_weight: NonNegativeFloat = 0.1  # loss weight of the invisible token
    mask_inputs: bool = True  # hide a random share of the points that the decoder reads
    suppress_invisible: bool = True  # give the likeliest position of points that the model calls invisible
    score_weight: Share = 1.0  # of the points' likelihood in the score; the rest is the box's
    sigmas: dict[str, Sigma] = field(default_factory=dict)  # of OKS, by names of points; see `keypoint_sigmas`
    top_p: PositiveShare = 0.1


class Keypoint(ObjectTask[KeypointConfig]):
    """Points of a skeleton, of any class that has one."""

    name = "keypoint"
    hub_pipeline = "keypoint-detection"
    config_type = KeypointConfig
    learns_from = "labelled keypoint"
    length_setting = "the number of keypoints"

    def __init__(
        self,
        config: KeypointConfig,
        vocab: Vocab,
        categories: Sequence[Category],
        text: TextTokenizer | None = None,
    ) -> None:
        """Raises `InputError` for a name in `keypoint.sigmas` that is no point of any class."""
        super().__init__(config, vocab, categories, text)
        known = dict.fromkeys(name for category in self.categories.values() for name in category.keypoints)
        keys = {key for side, rest in map(point_key, known) for key in ((side, rest), ("", rest))}
        for name in self.config.sigmas:
            if point_key(name) not in keys:
                raise unknown_name("keypoint in keypoint.sigmas:", name, known)

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence, prompt included; there is no end token."""
        return PROMPT_LENGTH + 2 * max(len(category.keypoints) for category in self.categories.values())

    def accepts(self, category: Category) -> bool:
        """Whether the class has a skeleton."""
        return len(category.keypoints) > 0

    def usable(self, target: Target, i: int) -> bool:
        """Whether object `i` has a labelled point and is no crowd."""
        category = self.categories.get(int(target.labels[i]))
        has_points = category is not None and self.accepts(category)
        return has_points and not target.iscrowd[i] and bool((target.keypoints[i, :, 2] > 0).any())

    def example(self, target: Target, i: int, size: tuple[int, int], rng: np.random.Generator) -> Example:
        """See `ObjectTask`."""
        points = target.keypoints[i, : len(self.categories[int(target.labels[i])].keypoints)]
        scale: NDArray[np.float32] = np.array(size, np.float32)
        response = encode_keypoints(
            points[:, 1::-1] / scale,
            points[:, 2] > 0,
            self.vocab,
            rng if self.config.mask_inputs else None,
            invisible_weight=self.config.invisible_weight,
        )
        return Example(self.object_prompt(target, i, size), response.inputs, response.targets, response.weights)

    def grammar(self) -> KeypointGrammar:
        """Return the grammar: pairs of coordinates, or of invisible tokens."""
        return KeypointGrammar(self.vocab.coord_base, self.vocab.num_bins, INVISIBLE)

    def generation(self, category: Category) -> GenerationConfig:
        """Return how the points of `category` are generated, with the likeliest coordinate at every step.

        If invisible points are suppressed, likelihoods are as if the model could not say that a point is invisible.
        """
        return GenerationConfig(
            2 * len(category.keypoints),
            grammar=self.grammar(),
            eos_id=None,
            score_range=(self.vocab.coord_base, self.vocab.coord_end),
            score_without=INVISIBLE if self.config.suppress_invisible else None,
            **self.sampling,
        )

    def answer(self, instance: Instance, completion: Completion, frame: Frame, size: tuple[int, int]) -> Instance:
        """See `ObjectTask`."""
        points = self.points(completion, instance.category, frame)
        points[:, :2] = np.clip(points[:, :2], 0, size) * (points[:, 2:] > 0)
        likelihood, score = self.scores(completion, instance.score)
        return replace(instance, score=score, keypoints=points, keypoint_score=likelihood)

    def points(self, completion: Completion, category: Category, frame: Frame) -> NDArray[np.float32]:
        """Return points (K, 3) as x, y in pixels of the image and COCO's visibility.

        A point that the model calls invisible gets its likeliest position and visibility 1 or, if they are not
        suppressed, 0, 0, 0.
        """
        num_points = len(category.keypoints)
        ids = completion.tokens[0]
        _, visible = decode_keypoints(ids, num_points, self.vocab)
        if self.config.suppress_invisible and completion.best_tokens is not None:
            ids = np.where(ids == INVISIBLE, completion.best_tokens[0], ids)
        points_yx, given = decode_keypoints(ids, num_points, self.vocab)
        flags = np.where(visible, VISIBLE, np.where(given, HIDDEN, 0.0))
        return np.column_stack([frame.to_image_xy(points_yx) * given[:, None], flags]).astype(np.float32)

    def scores(self, completion: Completion, box_score: float) -> tuple[float, float]:
        """Return the likelihood of the points, and the object's score."""
        logprobs = completion.logprobs
        if self.config.suppress_invisible and completion.best_logprobs is not None:
            logprobs = np.where(completion.tokens == INVISIBLE, completion.best_logprobs, logprobs)
        likelihood = float(token_score(completion.tokens, logprobs)[0])
        return likelihood, weighted_score(box_score, likelihood, self.config.score_weight)

    def judge(self, captions: Sequence[Sequence[str]]) -> Judge:
        """Reward points by their OKS.

        A point that the model calls invisible has no position here: the likeliest one would be worth more than a
        sampled one, and all points would become invisible.
        """

        from pix2seq.metrics.coco_ap import keypoint_sigmas  # it needs pandas

        def score(example: Example, completion: Completion, size: tuple[int, int]) -> Verdict:
            target = example.target
            assert target is not None
            category = self.categories[int(target.labels[0])]
            sigmas = keypoint_sigmas(category.keypoints, self.config.sigmas)
            rewards = []
            for ids in completion.tokens:
                points_yx, given = decode_keypoints(ids, len(sigmas), self.vocab)
                points = np.column_stack([(points_yx * np.array(size))[:, ::-1], given])
                true_points = target.keypoints[0, : len(sigmas)]
                rewards.append(keypoint_similarity(points, true_points, float(target.areas[0]), sigmas))
            return Verdict(np.array(rewards))

        return score

    def metric(self, categories: Sequence[Category]) -> ApMetric:
        """See `Task`."""
        from pix2seq.metrics.coco_ap import ApMetric  # here, because asking needs neither pandas nor pycocotools

        return ApMetric(categories, "keypoint", self.config.sigmas)
