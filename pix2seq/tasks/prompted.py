"""The prompted task: clicks on any object, of no class, are answered by its outline.

The model is asked up to three times about a set of clicks. `find` reads the whole image and answers which box is
meant; several samples give the candidates where clicks can mean several objects. `outline` reads a closeup of a box and
answers with polygons, `rate` how well they fit. Without clicks, all objects are asked for: a grid of clicks is answered
side by side, and boxes are kept that several clicks agree on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from pix2seq.data.answers import read_answers
from pix2seq.errors import InputError
from pix2seq.examples import Example
from pix2seq.geometry.boxes import box_iou_xyxy, box_xyxy_to_yxyx
from pix2seq.geometry.clicks import first_click, mask_iou, next_click
from pix2seq.geometry.polygons import MIN_POINTS, rasterize
from pix2seq.metrics.click_reward import box_reward, rating_reward
from pix2seq.metrics.clicks import GOOD, Checked, ClickMetric, Trial
from pix2seq.metrics.mask_reward import mask_iou as outline_iou
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.model.decoding.grammar import RangeGrammar, RatedBoxGrammar
from pix2seq.settings import NonNegativeFloat, PositiveInt, PositiveShare, Range, Share
from pix2seq.tasks.lessons import (
    Lesson,
    Scene,
    draw_lesson,
    neighbours_of,
    other_meaning,
    recorded_lesson,
)
from pix2seq.tasks.objects import Objects, Padding, jitter_box
from pix2seq.tasks.outlines import Ring, bounds, in_input, outline_grammar, outline_ids, read_outline, visible_rings
from pix2seq.tasks.request import EncodedImage, Frame, Request
from pix2seq.tasks.task import Judge, Task, TaskConfig, Verdict
from pix2seq.tokenizers.prompted import (
    FIND_LENGTH,
    decode_found,
    decode_quality,
    find_prompt,
    outline_prompt,
    prompt_length,
    quality_id,
)
from pix2seq.tokenizers.segmentation import TOKENS_PER_POINT, decode_polygons
from pix2seq.types import Category, Clicks, Instance, ObjectMask, Target
from pix2seq.vocab import EOS, NEGATIVE, POSITIVE, QUALITY

if TYPE_CHECKING:
    from pix2seq.drawing import Canvas

SAME_OBJECT = 0.7  # IoU from which two boxes, or two masks, mean the same object
MIN_FOUND = 0.5  # quality that the model must say of a box for a click of the grid
MIN_VOTES = 2  # clicks of the grid that must agree on a box
# Evaluation clicks so often, and up to `max_clicks` times while an answer is below the best of `GOOD`.
SCORED_CLICKS = 8
REHEARSED_CLICKS = 4  # to record answers; later ones teach little more


@dataclass(frozen=True)
class PromptedConfig(TaskConfig):
    """How clicks are trained and asked."""

    section = "prompted"

    max_objects: Objects = 6  # clicked on in one image in a training step
    max_outlines: Objects = 2  # of them with an outline, which costs most of a step
    max_clicks: Annotated[int, Range(least=1, most=100)] = 12
    # Of an outline, separators included.
    max_points: Annotated[int, Range(least=MIN_POINTS, most=10_000)] = 48
    even_points: Annotated[int, Range(least=4, most=10_000)] = 28  # of an outline, at equal distances
    short_points: Annotated[int, Range(least=MIN_POINTS, most=10_000)] = 12  # of the previous answer in a prompt
    outlines: bool = True  # false: boxes are the answers, for data without masks
    closeup: bool = True  # outlines are read from closeups of the found boxes; false: from the whole image
    closeup_padding: Padding = 0.25  # share of a box's size that its closeup shows on each side
    find_weight: NonNegativeFloat = 2.0  # loss weight of each token of a quality and a box; those of outlines have 1
    box_jitter: Annotated[float, Range(least=0, below=0.5)] = 0.08  # of the found box in training, as a share
    # In training, how often
    part_share: Share = 0.1  # clicks mean one of an object's parts, if it has several
    group_share: Share = 0.05  # they mean an object and those that touch it
    box_share: Share = 0.1  # the user draws a box, half of the time instead of clicks
    rate_share: Share = 0.3  # an outline with mistakes is rated
    background_share: Share = 0.2  # an image is clicked where no object is
    answer_share: Share = 0.7  # the model's own answers are learned from, where `answers` has some
    answers: str | None = None  # file that `pix2seq data answers` wrote
    num_samples: PositiveInt = 8  # boxes drawn for a set of clicks
    num_candidates: PositiveInt = 3  # answers at most to clicks without a previous answer
    grid: Annotated[int, Range(least=1, most=256)] = 16  # clicks along each side of an image to find all objects
    min_score: Share = 0.3  # least score of an object that is found without a click
    top_p: PositiveShare = 0.4


@dataclass(frozen=True)
class Exam:
    """What evaluation asks: objects to click on, and all objects without a click."""

    outlines: tuple[tuple[Ring, ...], ...]  # of each object, x, y in pixels of the image
    annotation_ids: tuple[int, ...]
    max_clicks: int
    seed: int | None = None  # of clicks near the middle of what is wrong; None: clicks in the middle
    with_grid: bool = True


@dataclass
class _Results:
    """What the questions of an exam came to."""

    exam: Exam
    trials: list[Trial]
    found: list[ObjectMask]


Kind = Literal["find", "outline", "rate"]
"""A step of an answer."""


@dataclass(frozen=True)
class _Step:
    """A step of answering some clicks, and what is known so far. Steps of one `question` stand side by side."""

    kind: Kind
    question: int
    clicks: Clicks
    role: Literal["user", "trial", "grid"]
    results: _Results | None = None  # of the exam that the question is part of
    mask: ObjectMask | None = None  # the box, and after `outline` the polygons, of a candidate


class Prompted(Task[PromptedConfig]):
    """Which object is this?"""

    name = "prompted"
    config_type = PromptedConfig
    main_metric = "mIoU@1"
    scale_range = (0.3, 1.0)
    length_setting = "prompted.max_points"
    uses_classes = False
    takes_clicks = True
    about_format = (
        "clicks as `x,y` or `x,y,-` for what does not belong to it, or a box as `x0,y0,x1,y1`, separated by semicolons"
    )

    @property
    def reads_masks(self) -> bool:
        """See `Task`."""
        return True

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence: clicks, the previous answer, a box, an outline with its end, a quality."""
        config = self.config
        asked = prompt_length(config.max_clicks, config.short_points)
        return asked + (2 * config.max_points + 2 if config.outlines else FIND_LENGTH)

    @property
    def looks_closer(self) -> bool:
        """See `Task`."""
        return self.config.outlines and self.config.closeup

    # Learning

    @cached_property
    def _records(self) -> dict[int, dict[str, Any]]:
        """The model's recorded answers by the annotation's id."""
        if self.config.answers is None:
            return {}
        return {record["annotation_id"]: record for record in read_answers(Path(self.config.answers))}

    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """Return the sequences about up to `max_objects` objects, drawn at random, each with simulated clicks."""
        whole = Frame.of_input(size)
        outlines = [[] if crowd else visible_rings(target, i, size) for i, crowd in enumerate(target.iscrowd.tolist())]
        found: list[Example] = []
        usable = [i for i, rings in enumerate(outlines) if rings]
        for number, i in enumerate(rng.permutation(usable)[: self.config.max_objects].tolist()):
            outlined = number < self.config.max_outlines and bool(target.segmentations[i])
            near = neighbours_of(target, i, outlines)
            config = self.config
            record = self._records.get(int(target.annotation_ids[i])) if rng.random() < config.answer_share else None
            lesson = recorded_lesson(record, outlines[i], target, size, rng) if record is not None else None
            if lesson is not None:
                found += self._examples(lesson, target.only(i), size, outlined, rng)
                continue
            rings = other_meaning(
                outlines[i], near, whole, rng, part_share=config.part_share, group_share=config.group_share
            )
            scene = Scene.around(rings, near, whole)
            if scene.truth.any():
                strangers = [outlines[j] for j in usable if j != i]
                lesson = draw_lesson(rings, scene, config.max_clicks, rng, strangers=strangers, size=size)
                found += self._examples(lesson, target.only(i), size, outlined, rng)
        if rng.random() < self.config.background_share:
            found += self._background(target, outlines, size, rng)
        return found

    def _examples(
        self, lesson: Lesson, target: Target, size: tuple[int, int], outlined: bool, rng: np.random.Generator
    ) -> list[Example]:
        """Return the sequences of the steps about the one object of a target."""
        whole = Frame.of_input(size)
        points, positive, previous = lesson.points_xy, lesson.positive, lesson.previous
        drawn = None
        if rng.random() < self.config.box_share:
            drawn = jitter_box(lesson.box_xyxy, self.config.box_jitter, size, rng)
            if rng.random() < 0.5:
                points, positive, previous = points[:0], positive[:0], []
        prompt = self._prompt(find_prompt, whole, points, positive, drawn, previous)
        box = box_xyxy_to_yxyx(lesson.box_xyxy) / np.array([*size, *size])
        response = np.append(quality_id(lesson.quality), self.vocab.coord_ids(box))
        weights = np.full(len(response), self.config.find_weight, np.float32)
        found = [Example(prompt, response, response, weights, target=_meant(target, lesson.rings, whole, size))]
        if not (self.config.outlines and outlined):
            return found
        shown = [(lesson.rings, False)]
        if lesson.answer and rng.random() < self.config.rate_share:
            shown.append((lesson.answer, True))
        for rings, is_rated in shown:
            moved = jitter_box(bounds(rings), self.config.box_jitter, size, rng).astype(np.float64)
            frame, closeup = whole, None
            if self.config.closeup:
                frame = whole.around(moved, self.config.closeup_padding)
                closeup = whole.to_input_yxyx(frame.xyxy[None])[0].astype(np.float32)
            prompt = self._prompt(outline_prompt, frame, points, positive, moved, previous)
            config = self.config
            response = outline_ids(
                rings, frame, size, self.vocab, even_points=config.even_points, max_points=config.max_points
            )
            response = np.append(response, EOS)
            if len(response) == 1:
                continue  # too small to have an outline
            if is_rated:
                prompt = np.concatenate([prompt, response])
                response = np.array([quality_id(lesson.answer_quality)])
            meant = _meant(target, lesson.rings, frame, size)
            found.append(Example(prompt, response, response, np.ones(len(response), np.float32), closeup, meant))
        return found

    def _background(
        self, target: Target, outlines: Sequence[Sequence[Ring]], size: tuple[int, int], rng: np.random.Generator
    ) -> list[Example]:
        """Return the sequence of a click on no object: quality 0, and a box that does not count."""
        point = rng.uniform(0, size[::-1])
        covered = rasterize([ring for rings in outlines for ring in rings], *size)
        if covered[int(point[1]), int(point[0])]:
            return []
        whole = Frame.of_input(size)
        response = np.append(quality_id(0.0), self.vocab.coord_ids(np.array([0.0, 0.0, 1.0, 1.0])))
        weights = np.array([self.config.find_weight, 0, 0, 0, 0], np.float32)
        prompt = self._prompt(find_prompt, whole, point[None], np.ones(1, np.bool_))
        return [Example(prompt, response, response, weights, target=target.subset([]))]

    def _prompt(
        self,
        write: Callable[..., NDArray[np.int64]],
        frame: Frame,
        points_xy: NDArray[np.floating],
        positive: NDArray[np.bool_],
        box_xyxy: NDArray[np.floating] | None = None,
        previous: Sequence[Ring] = (),
    ) -> NDArray[np.int64]:
        """Write the prompt of a step, by `find_prompt` or `outline_prompt`, in a frame."""
        return write(
            self.vocab.task_id(self.name),
            frame.to_input_yx(points_xy),
            positive,
            self.vocab,
            box_yxyx=None if box_xyxy is None else frame.to_input_yxyx(box_xyxy[None])[0],
            previous=[frame.to_input_yx(ring) for ring in previous],
            short_points=self.config.short_points,
        )

    def generation_of(self, example: Example) -> GenerationConfig:
        """See `Task`."""
        return self._generation(_kind(example))

    def judge(self, captions: Sequence[Sequence[str]]) -> Judge:
        """Reward the IoU after the clicks: of a box with an honest quality, of an outline, and an honest rating."""

        def score(example: Example, completion: Completion, size: tuple[int, int]) -> Verdict:
            kind, target = _kind(example), example.target
            assert target is not None
            frame = Frame.of_input(size)
            if kind == "rate":
                iou = decode_quality(int(example.targets[0]))
                rewards = [rating_reward(decode_quality(int(ids[0])), iou) for ids in completion.tokens]
            elif kind == "find":
                true = target.boxes_xyxy[0] if len(target.boxes_xyxy) else None
                said = [decode_found(ids, self.vocab) for ids in completion.tokens]
                rewards = [box_reward(q, frame.to_image_xy(box.reshape(2, 2)).ravel(), true) for q, box in said]
            else:
                (true_rings,) = target.segmentations
                assert isinstance(true_rings, list)
                answers = [read_outline(ids, frame, size[::-1], self.vocab) for ids in completion.tokens]
                rewards = [outline_iou(rings, true_rings, size) for rings in answers]
            return Verdict(np.array(rewards))

        return score

    # Asking and answering

    def requests(self, image: EncodedImage, about: Clicks | Exam | None) -> list[Request]:
        """Return the first step of a question: about clicks, about all objects, or of an exam."""
        if isinstance(about, Clicks):
            return [self._find(image, _Step("find", 0, about, "user"))]
        if about is None:
            return self._grid(image, None)
        height, width = image.pixels.shape[:2]
        masks = [rasterize(rings, height, width) for rings in about.outlines]
        asked = zip(about.annotation_ids, masks, strict=True)
        results = _Results(about, [Trial(number, mask) for number, mask in asked if mask.any()], [])
        trials = [self._next_click(image, number, results) for number in range(len(results.trials))]
        return [*chain.from_iterable(trials), *(self._grid(image, results) if about.with_grid else [])]

    def follow_up(
        self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> list[Request]:
        """Ask for the outlines of the boxes that were found, then for ratings; in an exam, click again."""
        further: list[Request] = []
        asked = zip(requests, completions, strict=True)
        for _, group in groupby(asked, key=lambda pair: (pair[0].subject.role, pair[0].subject.question)):
            some = list(group)
            step: _Step = some[0][0].subject
            if step.kind == "find" and self.config.outlines and (found := self._candidates(image, some)):
                further += [self._outline_request(image, replace(step, clicks=c, mask=mask)) for c, mask in found]
            elif step.kind == "outline":
                further += [self._rate_request(image, *each) for each in some]
            elif step.results is not None and step.role == "trial":
                further += self._next_click(image, step.question, step.results, step.clicks, self._masks(image, some))
            elif step.results is not None:
                step.results.found = self._suppressed(image, self._masks(image, some))
        return further

    def answers(self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]) -> list[Any]:
        """Return the masks that clicks can mean, or all that were found, best first; of an exam its results."""
        if not requests:
            return []
        step: _Step = requests[0].subject
        if step.results is not None:
            return [Checked(tuple(step.results.trials), tuple(step.results.found))]
        masks = self._masks(image, list(zip(requests, completions, strict=True)))
        return self._suppressed(image, masks) if step.role == "grid" else masks

    def _masks(self, image: EncodedImage, asked: Sequence[tuple[Request, Completion]]) -> list[ObjectMask]:
        """Return the candidates that the last step about some clicks leaves, best first."""
        if asked[0][0].subject.kind == "find":
            return [mask for _, mask in self._candidates(image, asked)]
        rated = [
            replace(request.subject.mask, score=decode_quality(int(completion.tokens[0, 0])))
            for request, completion in asked
        ]
        return sorted((mask for mask in rated if mask.polygons), key=lambda mask: -mask.score)

    def _candidates(
        self, image: EncodedImage, asked: Sequence[tuple[Request, Completion]]
    ) -> list[tuple[Clicks, ObjectMask]]:
        """Return the boxes that samples, or clicks of the grid, agree on, most votes first, with clicks."""
        clicks, qualities, boxes = [], [], []
        for request, completion in asked:
            for ids in completion.tokens:
                quality, box_yxyx = decode_found(ids, self.vocab)
                corners = image.frame().to_image_xy(box_yxyx.reshape(2, 2)).ravel()
                clicks.append(request.subject.clicks)
                qualities.append(quality)
                boxes.append(np.clip(corners, 0, np.tile(image.size, 2)))
        of_grid = asked[0][0].subject.role == "grid"
        xyxy = np.array(boxes)
        usable: NDArray[np.bool_] = np.all(xyxy[:, 2:] > xyxy[:, :2], axis=1)
        if of_grid:
            usable &= np.array(qualities) >= MIN_FOUND
        same = (box_iou_xyxy(xyxy, xyxy) >= SAME_OBJECT) & usable & usable[:, None]
        found: list[tuple[Clicks, ObjectMask]] = []
        left = usable.copy()
        for i in np.argsort(-same.sum(axis=1), kind="stable").tolist():
            members = np.flatnonzero(same[i] & left)
            if not left[i] or (of_grid and len(members) < MIN_VOTES):
                continue
            left[members] = False
            x0, y0, x1, y1 = xyxy[members].mean(axis=0).tolist()
            middle = np.array([x0 + x1, y0 + y1]) / 2
            nearest = min(members.tolist(), key=lambda m: _distance(clicks[m], middle)) if of_grid else i
            mask = ObjectMask((x0, y0, x1, y1), [], float(np.mean([qualities[m] for m in members])))
            found.append((clicks[nearest], mask))
        return found if of_grid else found[: self._num_candidates(clicks[0])]

    def _num_candidates(self, clicks: Clicks) -> int:
        if clicks.num_candidates is not None:
            return clicks.num_candidates
        return 1 if clicks.previous else self.config.num_candidates

    def _find(self, image: EncodedImage, step: _Step) -> Request:
        """Ask which box is meant."""
        clicks = step.clicks
        prompt = self._prompt(find_prompt, image.frame(), *_arrays(clicks), _box(clicks), clicks.previous)
        generation = self._generation("find")
        if step.role == "grid":
            generation = replace(generation, temperature=0.0)
        samples = 1 if step.role == "grid" else self.config.num_samples
        return Request(prompt, generation, subject=step, num_samples=samples)

    def _outline_request(self, image: EncodedImage, step: _Step) -> Request:
        """Ask for the outline of the object in a box."""
        assert step.mask is not None
        box = np.array(step.mask.box_xyxy)
        closeup = image.frame().around(box, self.config.closeup_padding) if self.config.closeup else None
        frame = closeup or image.frame()
        prompt = self._prompt(outline_prompt, frame, *_arrays(step.clicks), box, step.clicks.previous)
        generation = self._generation("outline")
        step = replace(step, kind="outline")
        return Request(prompt, generation, subject=step, closeup=closeup, expected_tokens=2 * self.config.even_points)

    def _rate_request(self, image: EncodedImage, request: Request, completion: Completion) -> Request:
        """Ask how well an outline fits."""
        step: _Step = request.subject
        assert step.mask is not None
        ids = completion.tokens[0]
        end = np.flatnonzero(ids == EOS)
        outline = ids[: end[0]] if len(end) else ids
        rings = read_outline(outline, request.frame(image), image.size, self.vocab)
        box = tuple(bounds(rings).tolist()) if rings else step.mask.box_xyxy
        mask = replace(step.mask, polygons=rings, box_xyxy=box)
        return Request(
            np.concatenate([request.prompt, outline, [EOS]]),
            self._generation("rate"),
            subject=replace(step, kind="rate", mask=mask),
            closeup=request.closeup,
        )

    def _generation(self, kind: Kind) -> GenerationConfig:
        """Return how the answer to a step is generated."""
        vocab, config = self.vocab, self.config
        if kind == "find":
            grammar = RatedBoxGrammar(QUALITY[0], QUALITY[-1], vocab.coord_base, vocab.num_bins)
            return GenerationConfig(FIND_LENGTH, grammar=grammar, eos_id=None, **self.sampling)
        if kind == "rate":
            return GenerationConfig(1, temperature=0.0, grammar=RangeGrammar(QUALITY[0], QUALITY[-1]), eos_id=None)
        return GenerationConfig(
            TOKENS_PER_POINT * config.max_points + 1,
            temperature=0.0,
            grammar=outline_grammar(vocab, config.max_points),
            eos_id=EOS,
            with_logprobs=False,
        )

    def _grid(self, image: EncodedImage, results: _Results | None) -> list[Request]:
        """Ask about a grid of clicks, in the middles of equal cells."""
        number = self.config.grid
        steps = (np.arange(number) + 0.5) / number
        points = [(x * image.size[0], y * image.size[1]) for y in steps.tolist() for x in steps.tolist()]
        clicks = [Clicks((point,), (True,)) for point in points]
        return [self._find(image, _Step("find", 0, each, "grid", results)) for each in clicks]

    def _suppressed(self, image: EncodedImage, masks: Sequence[ObjectMask]) -> list[ObjectMask]:
        """Return the masks of at least `min_score` that overlap no better one, best first."""
        good = [mask for mask in masks if mask.score >= self.config.min_score]
        if not good:
            return []
        width, height = image.size
        coder: Any = mask_utils  # pycocotools accepts more than its stubs say
        rles = [
            coder.merge(
                coder.frPyObjects(
                    [ring.astype(np.float64).ravel().tolist() for ring in self._rings(mask)], height, width
                )
            )
            for mask in good
        ]
        overlaps = coder.iou(rles, rles, [0] * len(rles))
        kept: list[int] = []
        for i in range(len(good)):
            if all(overlaps[i][j] < SAME_OBJECT for j in kept):
                kept.append(i)
        return [good[i] for i in kept]

    def _next_click(
        self,
        image: EncodedImage,
        number: int,
        results: _Results,
        clicks: Clicks | None = None,
        masks: Sequence[ObjectMask] = (),
    ) -> list[Request]:
        """Mark the answer to the `clicks` of a trial, and click on what is wrong in it; none if it is over."""
        trial = results.trials[number]
        answer = np.zeros_like(trial.truth)
        previous: tuple[NDArray[np.float32], ...] = ()
        if clicks is not None:
            drawn = [rasterize(self._rings(mask), *trial.truth.shape) for mask in masks]
            ious = [mask_iou(trial.truth, each) for each in drawn] or [0.0]
            if drawn:
                answer, previous = drawn[0], tuple(masks[0].polygons)
            trial = trial.with_answer(ious, masks[0].score if masks else 0.0, previous)
        over = len(trial.ious) >= SCORED_CLICKS and trial.ious[-1] >= GOOD[-1]
        seed = results.exam.seed
        rng = None if seed is None else np.random.default_rng((seed, trial.annotation_id, len(trial.clicks)))
        click = next_click(trial.truth, answer, trial.clicks, rng) if trial.ious else first_click(trial.truth, rng)
        if click is not None and not over and len(trial.clicks) < results.exam.max_clicks:
            trial = replace(trial, clicks=(*trial.clicks, click))
        results.trials[number] = trial
        if len(trial.clicks) == len(trial.ious):
            return []
        points = tuple((click.x, click.y) for click in trial.clicks)
        asked = Clicks(points, tuple(click.positive for click in trial.clicks), previous=previous)
        return [self._find(image, _Step("find", number, asked, "trial", results))]

    def _rings(self, mask: ObjectMask) -> Sequence[Ring]:
        """Return the outline of an answer; its box, if boxes are the answers."""
        x0, y0, x1, y1 = mask.box_xyxy
        return mask.polygons if self.config.outlines else [np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])]

    def parse_about(self, text: str) -> Clicks:
        """Read `x,y; x,y,-; x0,y0,x1,y1`."""
        points: list[tuple[float, float]] = []
        positive: list[bool] = []
        box: tuple[float, float, float, float] | None = None
        try:
            for part in filter(None, map(str.strip, text.split(";"))):
                values = [value.strip() for value in part.split(",")]
                if len(values) == 4:
                    x0, y0, x1, y1 = map(float, values)
                    box = (x0, y0, x1, y1)
                    continue
                x, y, sign = (*values, "+")[:3]
                if len(values) not in (2, 3) or sign not in ("+", "-"):
                    raise ValueError
                points.append((float(x), float(y)))
                positive.append(sign == "+")
        except ValueError:
            raise InputError(f"clicks {text!r} cannot be read; expected {self.about_format}") from None
        return Clicks(tuple(points), tuple(positive), box)

    def check_about(self, image: EncodedImage, about: Any) -> Clicks | Exam:
        """Check clicks against the image. Raises `InputError` for points outside it, and for too many or none."""
        if isinstance(about, Exam):
            return about
        if not isinstance(about, Clicks):
            raise InputError(f"{self.name} is asked about Clicks, got {type(about).__name__}")
        points, positive = _arrays(about)
        if len(points) != len(positive):
            raise InputError(f"{len(points)} points were given with {len(positive)} labels; give one for each")
        if not len(points) and about.box_xyxy is None:
            raise InputError("there is no click and no box; give one of them")
        if len(points) > self.config.max_clicks:
            raise InputError(f"{len(points)} clicks were given, but the model reads at most {self.config.max_clicks}")
        if not ((points >= 0) & (points <= image.size)).all():  # nor NaN
            raise InputError(f"clicks must lie inside the image of {image.size[0]} x {image.size[1]} pixels")
        box = _box(about)
        if box is not None and not (np.isfinite(box).all() and (box[2:] > box[:2]).all()):
            raise InputError(f"a box needs x1 > x0 and y1 > y0, got {about.box_xyxy}")
        if about.num_candidates is not None and about.num_candidates < 1:
            raise InputError(f"num_candidates is {about.num_candidates}; expected at least 1")
        for ring in about.previous:
            if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < MIN_POINTS or not np.isfinite(ring).all():
                raise InputError(
                    f"a previous polygon must be numbers (P, 2) with at least {MIN_POINTS} points, got {ring.shape}"
                )
        return about

    # Showing and measuring

    def questions(self, target: Target, found: Sequence[Any] | None) -> dict[str, Exam]:
        """Ask about every object by clicks, and about all without."""
        return {"": self._exam(target, self.config.max_clicks, with_grid=self.config.outlines)}

    def _exam(self, target: Target, max_clicks: int, **options: Any) -> Exam:
        size = (target.image.height, target.image.width)
        asked = np.flatnonzero(~target.iscrowd).tolist()
        rings = tuple(tuple(visible_rings(target, i, size)) for i in asked)
        return Exam(rings, tuple(target.annotation_ids[asked].tolist()), max_clicks, **options)

    def rehearsal(self, target: Target, seed: int) -> Exam:
        """Click on every object, near the middle of what is wrong."""
        return self._exam(target, min(REHEARSED_CLICKS, self.config.max_clicks), seed=seed, with_grid=False)

    def records(self, answers: Sequence[Checked]) -> list[dict[str, Any]]:
        """Return, for each object, its annotation's id, the clicks, and rings and IoU of the answer after each."""
        return [
            {
                "annotation_id": trial.annotation_id,
                "clicks": [[click.x, click.y, int(click.positive)] for click in trial.clicks],
                "outlines": [[np.round(ring, 2).tolist() for ring in rings] for rings in trial.outlines],
                "ious": [round(iou, 4) for iou in trial.ious],
            }
            for checked in answers
            for trial in checked.trials
        ]

    def timed(self, target: Target) -> dict[str, Clicks]:
        """Time a first click on the first object."""
        size = (target.image.height, target.image.width)
        for i in np.flatnonzero(~target.iscrowd).tolist():
            mask = rasterize(visible_rings(target, i, size), *size)
            if mask.any():
                click = first_click(mask)
                return {"ms_per_click": Clicks(((click.x, click.y),), (True,))}
        return {}

    def metric(self, categories: Sequence[Category]) -> ClickMetric:
        """See `Task`."""
        return ClickMetric(self.config.max_clicks)

    def draw(self, canvas: Canvas, answers: Sequence[ObjectMask]) -> None:
        """Draw masks with their ranks."""
        canvas.instances(
            [
                Instance(mask.box_xyxy, Category(rank, rank, str(rank)), mask.score, mask.polygons)
                for rank, mask in enumerate(answers, start=1)
            ]
        )

    def summary(self, example: Example) -> str:
        """Say which step it is, and of how many clicks."""
        signs = np.isin(example.prompt, [POSITIVE, NEGATIVE]).sum()
        return f"{_kind(example)}, {signs} clicks"

    def shown(self, example: Example, size: tuple[int, int]) -> list[ObjectMask]:
        """Return the box or the outline that a sequence says."""
        frame = Frame.of_input(size)
        if _kind(example) == "find":
            quality, box = decode_found(example.targets, self.vocab)
            x0, y0, x1, y1 = frame.to_image_xy(box.reshape(2, 2)).ravel().tolist()
            return [ObjectMask((x0, y0, x1, y1), [], quality)] if quality else []
        frame = Frame.of_input(size, example.closeup)
        rings = [frame.to_image_xy(ring).astype(np.float32) for ring in decode_polygons(example.targets, self.vocab)]
        x0, y0, x1, y1 = bounds(rings).tolist() if rings else [0.0, 0.0, 0.0, 0.0]
        return [ObjectMask((x0, y0, x1, y1), rings, 1.0)] if rings else []


def _kind(example: Example) -> Kind:
    """Return which step a training sequence is about."""
    if int(example.targets[0]) not in QUALITY:
        return "outline"
    return "find" if len(example.targets) == FIND_LENGTH else "rate"


def _meant(target: Target, rings: Sequence[Ring], frame: Frame, size: tuple[int, int]) -> Target:
    """Return the target of one object with the outline that is meant, in pixels of an input that shows a frame."""
    moved = in_input(rings, frame, size)
    boxes = bounds(moved)[None].astype(np.float32)
    return replace(target, boxes_xyxy=boxes, segmentations=([ring.astype(np.float32) for ring in moved],))


def _arrays(clicks: Clicks) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return points (N, 2) and whether each is positive (N,)."""
    return np.array(clicks.points, np.float64).reshape(-1, 2), np.array(clicks.positive, np.bool_)


def _box(clicks: Clicks) -> NDArray[np.float64] | None:
    return None if clicks.box_xyxy is None else np.array(clicks.box_xyxy, np.float64)


def _distance(clicks: Clicks, point_xy: NDArray[np.float64]) -> float:
    return float(np.hypot(*(np.array(clicks.points[0]) - point_xy)))
