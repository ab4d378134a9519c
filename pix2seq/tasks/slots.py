"""What tasks have in common whose prompt says what a slot stands for, and whose answer is all objects of the slots.

A slot is an id without a meaning of its own, drawn anew for every prompt in training. So the model cannot learn what a
slot is; it has to read the prompt.

The model is asked in two steps. The first lists all objects of the image, whatever they are. The second compares each
of them with what the slots stand for; it can read the object from a closeup, where every object has the same size. One
list serves all that is asked about an image. Where outlines are learned, a third step asks for those of what was found.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pix2seq.examples import Example, OtherView
from pix2seq.geometry.boxes import box_iou_xyxy, box_xyxy_to_yxyx
from pix2seq.geometry.polygons import MIN_POINTS
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.model.decoding.grammar import BoxGrammar, RangeGrammar
from pix2seq.settings import NonNegativeFloat, PositiveInt, PositiveShare, Range, Share
from pix2seq.tasks.objects import Objects, Padding, instance_at, jitter_box, token_score
from pix2seq.tasks.outlines import outline_grammar, outline_ids, read_outline, visible_rings
from pix2seq.tasks.request import EncodedImage, Frame, Reference, Request
from pix2seq.tasks.task import Task, TaskConfig
from pix2seq.tokenizers.detection import NOISE_LABEL, TOKENS_PER_OBJECT, add_noise_objects
from pix2seq.tokenizers.segmentation import TOKENS_PER_POINT
from pix2seq.tokenizers.slots import (
    KINDS,
    NO_SLOT,
    OBJECT,
    comparison_choices,
    comparison_prompt,
    decode_list,
    encode_list,
    outline_prompt,
)
from pix2seq.types import Category, Instance, Target
from pix2seq.vocab import EOS, NOISE

ANY = Category(0, 0, "object")  # no answer has this label
SAME_OBJECT = 0.7  # IoU from which two listed boxes are one object, as lists repeat some
MIN_OBJECT = 0.1  # score from which a listed box is compared: each comparison costs, and few objects score lower
BOX_TOKENS = 4


@dataclass(frozen=True)
class SlotConfig(TaskConfig):
    """How objects of slots are trained and asked for."""

    max_objects: Objects = 100  # in a list; in training, boxes without an object included
    noise_objects: Annotated[int, Range(least=0, most=10_000)] = 4  # boxes without an object, in training
    named: PositiveInt = 2  # objects of a slot that a prompt is compared with in training, at most
    others: PositiveInt = 1  # objects of no slot that it is compared with for each of them, and where there is none
    closeup: bool = True  # objects are compared by closeups; false: by the whole image
    closeup_padding: Padding = 0.25  # share of a box's size that its closeup shows on each side
    box_jitter: Annotated[float, Range(least=0, below=0.5)] = 0.08  # of a compared box in training, as a share
    outlines: bool = False  # what is found gets an outline, learned from the masks of the data
    max_outlines: Objects = 2  # of an image in a training step
    # Of an outline, separators included.
    max_points: Annotated[int, Range(least=MIN_POINTS, most=10_000)] = 48
    even_points: Annotated[int, Range(least=4, most=10_000)] = 28  # of an outline, at equal distances
    comparison_weight: NonNegativeFloat = 4.0  # loss weight of an answer to a comparison; a list's tokens have 1
    outline_weight: NonNegativeFloat = 0.5  # loss weight of each token of an outline
    eos_weight: NonNegativeFloat = 0.1  # loss weight of a list's end
    min_score: Share = 0.5  # least score of an object that counts as found
    top_p: PositiveShare = 0.4


Config = TypeVar("Config", bound=SlotConfig)


@dataclass(frozen=True)
class Meaning:
    """What slots stand for, and what that is for."""

    prompt: NDArray[np.int64]  # (P,) of a comparison, without the box
    names: tuple[str, ...]  # of the slots, the first one first
    subject: Any  # of what is found
    references: tuple[Reference, ...] = ()  # what the prompt speaks of, read after the object
    outlined_from: float = inf  # score from which an object gets an outline, as what scores less is shown to nobody


@dataclass(frozen=True)
class _Listing:
    """The first step of asking about an image."""

    meanings: tuple[Meaning, ...]


@dataclass(frozen=True)
class _Comparison:
    """The second step: an object that was listed, and one of the meanings by its number."""

    listing: _Listing
    number: int
    listed: Instance


@dataclass(frozen=True)
class _Outline:
    """The third step: an object that was found, and all answers to comparisons."""

    listing: _Listing
    found: list[list[Instance]]  # of each meaning
    box_xyxy: tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """What a training sequence reads of an object."""

    frame: Frame  # of the first view, in pixels of the input; that of an object's closeup alone is in `views`
    box_xyxy: NDArray[np.floating]  # (4,) in pixels of the input
    views: tuple[OtherView, ...]

    @property
    def box_yxyx(self) -> NDArray[np.floating]:
        """The box (4,) in [0, 1] of the first view."""
        return self.frame.to_input_yxyx(self.box_xyxy[None])[0]


class SlotTask(Task[Config]):
    """All objects of what a prompt describes."""

    uses_classes = False

    @property
    def looks_closer(self) -> bool:
        """See `Task`."""
        return self.config.closeup

    @property
    def reads_masks(self) -> bool:
        """See `Task`."""
        return self.config.outlines

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence: a list, a comparison or an outline."""
        outline = 1 + BOX_TOKENS + self._max_outline if self.config.outlines else 0
        return max(2 + TOKENS_PER_OBJECT * self.config.max_objects, self.max_prompt + BOX_TOKENS + 1, outline)

    @property
    def _max_outline(self) -> int:
        """Tokens of the longest outline, with its end."""
        return TOKENS_PER_POINT * self.config.max_points + 1

    @property
    @abstractmethod
    def max_prompt(self) -> int:
        """Tokens of the longest prompt that says what slots stand for."""

    @property
    @abstractmethod
    def sees_whole(self) -> bool:
        """Whether an object is compared by the whole image, with its closeup beside it; false: by the closeup alone."""

    # Learning

    def learned_list(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> Example:
        """Return the sequence that lists the target's objects in random order, then boxes without an object."""
        config = self.config
        real = target.boxes_xyxy[~target.iscrowd]
        boxes = (box_xyxy_to_yxyx(real) / np.array([*size, *size])).astype(np.float32)
        boxes = boxes[rng.permutation(len(boxes))][: config.max_objects]
        num_noise = min(config.noise_objects, config.max_objects - len(boxes))
        boxes, labels = add_noise_objects(boxes, np.ones(len(boxes), np.int64), num_noise, rng)
        response = encode_list(boxes, labels != NOISE_LABEL, self.vocab, rng, eos_weight=config.eos_weight)
        return Example(self.prompt(), response.inputs, response.targets, response.weights)

    def learned_comparisons(
        self,
        prompt: NDArray[np.int64],
        slots: NDArray[np.int64],
        asked: range,
        objects: Mapping[int, View],
        rng: np.random.Generator,
        others: tuple[OtherView, ...] = (),
    ) -> list[Example]:
        """Return the sequences that compare some of the `objects` with a prompt about the slots `asked`.

        `slots` (N,) are those of the target's objects, `NO_SLOT` for none; `others` are what the prompt speaks of.
        """
        real = np.array([*objects], np.int64)
        meant = rng.permutation(real[slots[real] != NO_SLOT])[: self.config.named]
        rest = rng.permutation(real[slots[real] == NO_SLOT])[: self.config.others * max(len(meant), 1)]
        found = []
        for i in (*meant.tolist(), *rest.tolist()):
            box, views = objects[i].box_yxyx, objects[i].views
            answer = np.array([NOISE if slots[i] == NO_SLOT else KINDS[slots[i]]])
            found.append(
                Example(
                    comparison_prompt(prompt, box, self.vocab),
                    answer,
                    answer,
                    np.full(1, self.config.comparison_weight, np.float32),
                    closeup=views[0].closeup,
                    choices=comparison_choices(asked),
                    others=(*views[1:], *others),
                )
            )
        return found

    def learned_outlines(
        self, target: Target, objects: Mapping[int, View], size: tuple[int, int], rng: np.random.Generator
    ) -> list[Example]:
        """Return the sequences of outlines of some of the `objects` that have a mask; none if none are learned."""
        config = self.config
        masked = [i for i in objects if target.segmentations[i]] if config.outlines else []
        found = []
        for i in rng.permutation(masked)[: config.max_outlines].tolist() if masked else []:
            closeup = objects[i].views[-1].closeup
            frame = Frame.of_input(size, closeup)
            ids = outline_ids(
                visible_rings(target, i, size),
                frame,
                size,
                self.vocab,
                even_points=config.even_points,
                max_points=config.max_points,
            )
            if len(ids):
                box = frame.to_input_yxyx(objects[i].box_xyxy[None])[0]
                prompt = outline_prompt(self.vocab.task_id(self.name), box, self.vocab)
                response = np.append(ids, EOS)
                weights = np.full(len(response), config.outline_weight, np.float32)
                found.append(Example(prompt, response, response, weights, closeup))
        return found

    def objects(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> dict[int, View]:
        """Return what is read of each object of a target that is no crowd; sequences about one share its memory."""
        return {i: self.view(target, i, size, rng) for i in np.flatnonzero(~target.iscrowd).tolist()}

    def view(self, target: Target, i: int, size: tuple[int, int], rng: np.random.Generator) -> View:
        """Return what is read of an object, whose box is moved at random."""
        whole = Frame.of_input(size)
        box = jitter_box(target.boxes_xyxy[i], self.config.box_jitter, size, rng).astype(np.float64)
        if not self.config.closeup:
            return View(whole, box, (OtherView(None),))
        frame = whole.around(box, self.config.closeup_padding)
        closeup = OtherView(None, whole.to_input_yxyx(frame.xyxy[None])[0].astype(np.float32))
        if self.sees_whole:
            return View(whole, box, (OtherView(None), closeup))
        return View(frame, box, (closeup,))

    def summary(self, example: Example) -> str:
        """Count the objects of a list, or the tokens of an outline."""
        if says_outline(example):
            return f"outline of {len(example.targets)} tokens"
        return f"{len(self.shown(example, (1, 1)))} objects"

    def shown(self, example: Example, size: tuple[int, int]) -> list[Instance]:
        """Return the objects of a list, the one of a comparison if it has a slot, or that of an outline."""
        frame = Frame.of_input(size, example.closeup)
        if says_outline(example):
            found = instance_at(example.prompt[-BOX_TOKENS:], ANY, frame, self.vocab)
            return [replace(found, polygons=read_outline(example.targets, frame, size[::-1], self.vocab))]
        if example.choices is None:
            ids = example.targets[: len(example.targets) // TOKENS_PER_OBJECT * TOKENS_PER_OBJECT]
            groups = ids.reshape(-1, TOKENS_PER_OBJECT)
            return [instance_at(group[:4], ANY, frame, self.vocab) for group in groups if group[4] == OBJECT]
        if example.targets[0] == NOISE:
            return []
        category = slot_category(int(example.targets[0]) - KINDS[0])
        return [instance_at(example.prompt[-BOX_TOKENS:], category, frame, self.vocab)]

    # Asking and answering

    @abstractmethod
    def meanings(self, image: EncodedImage, about: Any) -> list[Meaning]:
        """Return what is asked about an image. Raises `InputError` if that is nothing."""

    @abstractmethod
    def told(self, meaning: Meaning, found: list[Instance]) -> list[Any]:
        """Return the answers to a question of which `found` are all objects that were listed, best first."""

    def requests(self, image: EncodedImage, about: Any) -> list[Request]:
        """Ask for a list of all objects."""
        grammar = BoxGrammar(
            coord_base=self.vocab.coord_base,
            num_bins=self.vocab.num_bins,
            class_base=OBJECT - 1,
            max_label=1,
            noise_id=NOISE,
            eos_id=EOS,
        )
        generation = GenerationConfig(
            TOKENS_PER_OBJECT * self.config.max_objects + 1,
            grammar=grammar,
            eos_id=EOS,
            score_range=(OBJECT, OBJECT + 1),
            score_steps=(TOKENS_PER_OBJECT, TOKENS_PER_OBJECT - 1),
            with_logprobs=False,
            score_allowed=True,
            **self.sampling,
        )
        return [Request(self.prompt(), generation, subject=_Listing(tuple(self.meanings(image, about))))]

    def follow_up(
        self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> list[Request]:
        """Compare each object of a list with each meaning; ask for the outlines of those that some meaning may mean."""
        compared = [request.subject for request in requests if isinstance(request.subject, _Comparison)]
        if compared and self.config.outlines:
            listing = compared[0].listing
            return self._outline_requests(image, listing, self._found(listing, requests, completions))
        return [
            self._compare(image, _Comparison(request.subject, number, listed))
            for request, completion in zip(requests, completions, strict=True)
            if isinstance(request.subject, _Listing)
            for listed in self._listed(image, completion)
            for number in range(len(request.subject.meanings))
        ]

    def _outline_requests(self, image: EncodedImage, listing: _Listing, found: list[list[Instance]]) -> list[Request]:
        """Ask for the outline of each object that is found by any meaning, once."""
        pairs = zip(listing.meanings, found, strict=True)
        boxes = dict.fromkeys(
            each.box_xyxy for meaning, some in pairs for each in some if each.score >= meaning.outlined_from
        )
        generation = GenerationConfig(
            self._max_outline,
            temperature=0.0,
            grammar=outline_grammar(self.vocab, self.config.max_points),
            eos_id=EOS,
        )
        further = []
        for box_xyxy in boxes:
            box = np.array(box_xyxy)
            closeup = self.closeup_of(image, box)
            inside = (closeup or image.frame()).to_input_yxyx(box[None])[0]
            further.append(
                Request(
                    outline_prompt(self.vocab.task_id(self.name), inside, self.vocab),
                    generation,
                    subject=_Outline(listing, found, box_xyxy),
                    closeup=closeup,
                    expected_tokens=TOKENS_PER_POINT * self.config.even_points,
                )
            )
        return further

    def closeup_of(self, image: EncodedImage, box_xyxy: NDArray[np.float64]) -> Frame | None:
        """Return what is read of an object in an image, None for the whole image."""
        return image.frame().around(box_xyxy, self.config.closeup_padding) if self.config.closeup else None

    def _compare(self, image: EncodedImage, comparison: _Comparison) -> Request:
        """Ask which slot an object has."""
        meaning = comparison.listing.meanings[comparison.number]
        box, whole = np.array(comparison.listed.box_xyxy), image.frame()
        frame, closeup, references = whole, self.closeup_of(image, box), meaning.references
        if closeup is not None:
            if self.sees_whole:
                closeup, references = None, (Reference(image, closeup), *references)
            else:
                frame = closeup
        slots = (KINDS[0], KINDS[len(meaning.names) - 1])
        generation = GenerationConfig(
            1,
            temperature=0.0,
            grammar=RangeGrammar(*slots, other=NOISE),
            eos_id=None,
            score_range=(slots[0], slots[1] + 1),
            score_allowed=True,
        )
        prompt = comparison_prompt(meaning.prompt, frame.to_input_yxyx(box[None])[0], self.vocab)
        return Request(prompt, generation, subject=comparison, closeup=closeup, references=references)

    def _listed(self, image: EncodedImage, completion: Completion) -> list[Instance]:
        """Return the objects of a list, best first, each once."""
        found = [each for each in self._in_list(image, completion) if each.score >= MIN_OBJECT]
        found.sort(key=lambda each: -each.score)
        boxes = np.array([each.box_xyxy for each in found], np.float64).reshape(-1, 4)
        same = box_iou_xyxy(boxes, boxes) >= SAME_OBJECT
        kept: list[int] = []
        for i in range(len(found)):
            if not same[i, kept].any():
                kept.append(i)
        return [found[i] for i in kept]

    def _in_list(self, image: EncodedImage, completion: Completion) -> list[Instance]:
        """Read all objects of a list, in its order, in pixels of the image."""
        assert completion.best_tokens is not None
        assert completion.best_logprobs is not None
        objects = decode_list(completion.tokens[0], completion.best_tokens[0], completion.best_logprobs[0], self.vocab)
        corners = image.frame().to_image_xy(objects.boxes_yxyx.reshape(-1, 2, 2)).reshape(-1, 4)
        boxes = np.clip(corners, 0, np.tile(image.size, 2))
        usable = objects.readable & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        return [
            Instance((x0, y0, x1, y1), ANY, score)
            for (x0, y0, x1, y1), score in zip(boxes[usable].tolist(), objects.scores[usable].tolist(), strict=True)
        ]

    def answers(self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]) -> list[Any]:
        """Return what `told` makes of the objects of each meaning.

        The class of an object is its likeliest slot, its score the probability that it is an object and of that slot.
        """
        if not requests:
            return []
        first = requests[0].subject
        listing: _Listing = first if isinstance(first, _Listing) else first.listing
        if isinstance(first, _Outline):
            found = self._outlined(image, requests, completions)
        else:
            found = self._found(listing, requests, completions)
        pairs = zip(listing.meanings, found, strict=True)
        return [
            answer
            for meaning, some in pairs
            for answer in self.told(meaning, sorted(some, key=lambda each: -each.score))
        ]

    def _found(
        self, listing: _Listing, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> list[list[Instance]]:
        """Return all compared objects with their likeliest slot, for each meaning of a list."""
        found: list[list[Instance]] = [[] for _ in listing.meanings]
        for request, completion in zip(requests, completions, strict=True):
            if isinstance(comparison := request.subject, _Comparison):
                names = listing.meanings[comparison.number].names
                found[comparison.number].append(_compared(comparison.listed, names, completion))
        return found

    def _outlined(
        self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> list[list[Instance]]:
        """Return all compared objects, with outlines where they were asked for."""
        outlines: dict[Any, dict[str, Any]] = {}
        for request, completion in zip(requests, completions, strict=True):
            outlines[request.subject.box_xyxy] = {
                "polygons": read_outline(completion.tokens[0], request.frame(image), image.size, self.vocab),
                "mask_score": float(token_score(completion.tokens, completion.logprobs).mean()),
            }
        found: list[list[Instance]] = requests[0].subject.found
        return [[replace(each, **outlines.get(each.box_xyxy, {})) for each in some] for some in found]

    def parts(
        self, image: EncodedImage, request: Request, completion: Completion
    ) -> list[tuple[int, int, Instance | None]]:
        """Return the tokens of each object of a list, see `Task.parts`: five an object; boxes outside are none."""
        if isinstance(request.subject, _Outline):
            return [(0, completion.tokens.shape[1], Instance(request.subject.box_xyxy, ANY, 1.0))]
        if isinstance(request.subject, _Comparison):
            return super().parts(image, request, completion)
        end = np.flatnonzero(completion.tokens[0] == EOS)
        length = int(end[0]) if len(end) else completion.tokens.shape[1]
        found: list[tuple[int, int, Instance | None]] = []
        for start in range(0, length - length % TOKENS_PER_OBJECT, TOKENS_PER_OBJECT):
            stop = start + TOKENS_PER_OBJECT
            objects = self._in_list(image, completion.steps(start, stop))
            found.append((start, stop, objects[0] if objects else None))
        return found


def says_outline(example: Example) -> bool:
    """Whether a training sequence says the outline of an object."""
    return example.choices is None and len(example.prompt) == 1 + BOX_TOKENS


def _compared(listed: Instance, names: Sequence[str], completion: Completion) -> Instance:
    """Return an object with its likeliest slot."""
    assert completion.best_tokens is not None
    assert completion.best_logprobs is not None
    slot = int(completion.best_tokens[0, 0]) - KINDS[0]
    probability = float(np.exp(completion.best_logprobs[0, 0]))
    return replace(listed, category=slot_category(slot, names[slot]), score=listed.score * probability)


def slot_category(slot: int, name: str | None = None) -> Category:
    """Return the class of a slot, numbered from 0."""
    return Category(slot + 1, slot + 1, f"slot {slot + 1}" if name is None else name)
