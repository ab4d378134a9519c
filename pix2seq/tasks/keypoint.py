"""The keypoint task: the points of an object whose box and class are given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pix2seq.examples import Example
from pix2seq.model.decoding.generate import Generated, GenerationConfig
from pix2seq.model.decoding.grammar import KeypointGrammar
from pix2seq.tasks.scores import token_score, weighted_score
from pix2seq.tasks.task import Task, TaskConfig, object_prompt
from pix2seq.tokenizers.instance import PROMPT_LENGTH
from pix2seq.tokenizers.keypoint import decode_keypoints, encode_keypoints
from pix2seq.types import Category, Target
from pix2seq.vocab import INVISIBLE

SEEN, GUESSED = 2.0, 1.0  # COCO's flags for visible points and for labelled ones that are hidden


@dataclass(frozen=True)
class KeypointConfig(TaskConfig):
    """How keypoints are trained and asked."""

    crop: bool = True  # every object is an image of its own, cut out around its box
    crop_padding: float = 0.5  # share of the box's size kept on each side of it
    max_objects: int = 10  # objects of one image in a training step, where nothing is cropped
    invisible_weight: float = 0.1  # loss weight of the invisible token
    mask_inputs: bool = True  # hide a random share of the points that the decoder reads
    suppress_invisible: bool = True  # give the likeliest place of points that the model calls invisible
    min_box_score: float = 0.05  # predicted boxes below it are not asked about
    score_weight: float = 1.0  # of the points' likelihood in the score; the rest is the box's
    top_p: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_padding < 0:
            raise ValueError(f"keypoint.crop_padding must not be negative, got {self.crop_padding}")
        if self.max_objects < 1:
            raise ValueError(f"keypoint.max_objects must be at least 1, got {self.max_objects}")


class Keypoint(Task[KeypointConfig]):
    """Points of a skeleton, of any class that has one."""

    name = "keypoint"
    config_type = KeypointConfig
    scale_range = (0.3, 1.0)
    learns_from = "labelled keypoint"
    length_setting = "the number of keypoints"

    @property
    def max_points(self) -> int:
        """Points of the largest skeleton."""
        return max(len(category.keypoints) for category in self.categories.values())

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence, prompt included; there is no end token."""
        return PROMPT_LENGTH + 2 * self.max_points

    @property
    def crop_padding(self) -> float | None:
        """See `Task`."""
        return self.config.crop_padding if self.config.crop else None

    def samples(self, target: Target) -> list[int | None]:
        """Objects with a labelled point, or the whole image if it has such an object."""
        found = [i for i in range(len(target.labels)) if self._usable(target, i)]
        return [*found] if self.config.crop else [None] if found else []

    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """A sequence for each of up to `max_objects` objects, drawn at random."""
        scale = np.array(size, np.float32)
        usable = rng.permutation([i for i in range(len(target.labels)) if self._usable(target, i)])
        found = []
        for i in usable[: self.config.max_objects]:
            points = target.keypoints[i, : len(self.categories[int(target.labels[i])].keypoints)]
            response = encode_keypoints(
                points[:, 1::-1] / scale,
                points[:, 2] > 0,
                self.vocab,
                rng if self.config.mask_inputs else None,
                invisible_weight=self.config.invisible_weight,
            )
            prompt = object_prompt(self.name, target, int(i), size, self.vocab)
            found.append(Example(prompt, response.inputs, response.targets, response.weights))
        return found

    def _usable(self, target: Target, i: int) -> bool:
        category = self.categories.get(int(target.labels[i]))
        has_points = category is not None and len(category.keypoints) > 0
        return has_points and not target.iscrowd[i] and bool((target.keypoints[i, :, 2] > 0).any())

    @property
    def max_new_tokens(self) -> int:
        """Length of the longest response."""
        return 2 * self.max_points

    @property
    def score_range(self) -> tuple[int, int]:
        """Ids of the coordinates, as [first, past the last)."""
        return self.vocab.coord_base, self.vocab.coord_end

    @property
    def score_without(self) -> int | None:
        """The id that likelihoods leave out: where invisible points are suppressed, the model is asked for places."""
        return INVISIBLE if self.config.suppress_invisible else None

    def grammar(self) -> KeypointGrammar:
        """Pairs of coordinates, or of invisible tokens."""
        return KeypointGrammar(self.vocab.coord_base, self.vocab.num_bins, INVISIBLE)

    def generation(self, category: Category | None = None) -> GenerationConfig:
        """See `Task`; with the points of `category`, or of the largest skeleton."""
        return GenerationConfig(
            self.max_new_tokens if category is None else 2 * len(category.keypoints),
            grammar=self.grammar(),
            eos_id=None,
            score_range=self.score_range,
            score_without=self.score_without,
            **self.sampling,
        )

    def points(
        self, out: Generated, row: int, category: Category, to_pixels: NDArray[np.floating]
    ) -> NDArray[np.float32]:
        """Points (K, 3) of a row as x, y in pixels of the (cropped) image and COCO's visibility.

        Points that the model calls invisible get their likeliest place and visibility 1, or, where
        they are not suppressed, 0, 0, 0.
        """
        num_points = len(category.keypoints)
        ids = out.tokens[row].cpu().numpy()
        _, seen = decode_keypoints(ids, num_points, self.vocab)
        if self.config.suppress_invisible and out.best_tokens is not None:
            ids = np.where(ids == INVISIBLE, out.best_tokens[row].cpu().numpy(), ids)
        places, given = decode_keypoints(ids, num_points, self.vocab)
        flags = np.where(seen, SEEN, np.where(given, GUESSED, 0.0))
        return np.column_stack([places[:, ::-1] * to_pixels * given[:, None], flags]).astype(np.float32)

    def scores(self, out: Generated, row: int, box_score: float) -> tuple[float, float]:
        """Likelihood of the points, and the object's score."""
        tokens, logprobs = out.tokens[row : row + 1], out.logprobs[row : row + 1]
        if self.config.suppress_invisible and out.best_logprobs is not None:
            logprobs = torch.where(tokens == INVISIBLE, out.best_logprobs[row : row + 1], logprobs)
        likelihood = float(token_score(tokens, logprobs)[0])
        return likelihood, weighted_score(box_score, likelihood, self.config.score_weight)
