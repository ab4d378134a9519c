"""Ask a trained model about images: encode once, ask many things.

Results are in pixels of the original image (x right, y down, after its EXIF orientation), with the same types whatever
came in.
"""

from __future__ import annotations

import copy
import operator
import os
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from pix2seq.data.image import read_image, warp_image
from pix2seq.device import pick_device
from pix2seq.drawing import Canvas
from pix2seq.errors import InputError, unknown_name
from pix2seq.geometry.affine import fit_affine
from pix2seq.metrics.calibration import TaskCalibration
from pix2seq.model.decoding.completion import Completion
from pix2seq.model.hub import local_folder
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.model.pretrained import CONFIG_FILE, find_checkpoint
from pix2seq.results import Instances
from pix2seq.session import Session
from pix2seq.tasks import get_task, task_names
from pix2seq.tasks.objects import given_objects
from pix2seq.tasks.request import EncodedImage, Exchange, Frame, Reference, Request
from pix2seq.tasks.shown import given_examples
from pix2seq.tasks.task import Task
from pix2seq.tokenizers.text import SENTENCEPIECE_FILE, WORD_FILE
from pix2seq.types import Caption, Clicks, Instance, ObjectMask, category_key

ImageLike = str | Path | Image.Image | NDArray[np.uint8] | Tensor

OneImage = EncodedImage | ImageLike
OneBoxes = Sequence[Instance] | ArrayLike
Names = str | Sequence[str] | None

DEFAULT_THRESHOLD = 0.3  # least score of what is drawn, of a checkpoint that is not calibrated
MAX_ROWS = 512  # sequences that are decoded side by side
MAX_CACHE_BYTES = 2**31  # keys and values of sequences and memories that are decoded side by side
MAX_CROPS = 16  # crops that are encoded side by side
MAX_CLOSEUPS = 64  # closeups that are encoded side by side
_Key = tuple[int, tuple[Any, ...]]  # an image, and which of its memories


class Options(TypedDict, total=False):
    """Options of one call."""

    seed: int  # fixes what sampling draws
    top_p: float  # of the probability, from which tokens are sampled; by default as the checkpoint says


class ObjectOptions(Options, total=False):
    """Options of one call about objects."""

    threshold: float  # least score, 0 to 1; objects below it are neither asked about nor returned
    classes: str | Sequence[str]  # names of the classes to keep; by default all
    num_objects: int  # to ask for, where objects are detected first
    num_samples: int  # masks drawn for each object, which vote


@dataclass(frozen=True)
class Prediction:
    """All that was asked about one image."""

    image: EncodedImage
    answers: dict[str, list[Any]]  # by the task that found them; others may have refined them
    tasks: dict[str, Task[Any]]  # the task that draws and writes these answers
    thresholds: Mapping[str, float] = field(default_factory=dict)  # by task: least score of the objects that are drawn
    exchanges: dict[str, Exchange] = field(default_factory=dict)  # what was asked and said, by task; see `transcribe`

    @property
    def instances(self) -> Instances:
        """Objects, with masks and keypoints where those were asked for."""
        found = [answer for answers in self.answers.values() for answer in answers if isinstance(answer, Instance)]
        return Instances(found, size=self.image.size)

    @property
    def likely(self) -> list[Instance]:
        """Objects of a score that is worth showing: at least the threshold of the task that found them."""
        return [
            answer
            for name, answers in self.answers.items()
            for answer in answers
            if isinstance(answer, Instance) and answer.score >= self.thresholds.get(name, DEFAULT_THRESHOLD)
        ]

    @property
    def captions(self) -> list[Caption]:
        """Sentences about the image."""
        return [answer for answers in self.answers.values() for answer in answers if isinstance(answer, Caption)]

    def to_json(self) -> dict[str, Any]:
        """Return the content of NAME.json, without the image's name."""
        width, height = self.image.size
        content: dict[str, Any] = {"width": width, "height": height, "instances": [], "captions": []}
        for name, answers in self.answers.items():
            content |= self.tasks[name].to_json(answers)
        return content

    def draw(self, *, min_score: float | None = None) -> Image.Image:
        """Draw all answers on the image; of objects, those of at least `min_score`, by default `thresholds`."""
        canvas = Canvas(self.image.pixels)
        for name, answers in self.answers.items():
            canvas.min_score = self.thresholds.get(name, DEFAULT_THRESHOLD) if min_score is None else min_score
            self.tasks[name].draw(canvas, answers)
        return canvas.finish()


class Predictor:
    """A model with everything around it: reading, resizing, asking and reading the answers.

    `seed` in any call, 0 to 2**64 - 1, fixes what sampling draws. Empty lists give empty lists; what cannot be used
    raises `InputError`. Several threads may ask at the same time. After a fork, the child asks with one torch thread
    on the CPU, and is refused on other devices.
    """

    def __init__(self, model: Pix2Seq, *, bf16: bool = False) -> None:
        """Set the model to evaluation mode. Warn of tasks that it was trained with and that are not installed."""
        if not isinstance(model, Pix2Seq):
            raise InputError(
                f"expected a Pix2Seq, got {type(model).__name__}; open files with Predictor.from_pretrained"
            )
        self.model = model.eval()
        self.bf16 = bf16
        self._process = os.getpid()
        known = task_names()
        self.missing = tuple(name for name in model.task_settings if name not in known)
        if self.missing:
            print(
                f"warning: this checkpoint was trained for {', '.join(self.missing)} too, which no installed package "
                "provides; install the package, or ask for other tasks",
                file=sys.stderr,
            )
        self.tasks: dict[str, Task[Any]] = {
            name: get_task(name).from_model(model) for name in model.task_settings if name in known
        }
        for task in self.tasks.values():
            self._check_length(task, "config.json", f"lower {task.length_setting} in it")
        self.calibration = {
            name: _calibration(model.calibration[name]) for name in self.tasks if name in model.calibration
        }

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        bf16: bool = False,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Open a checkpoint folder, the newest checkpoint of a run folder, or a model of the hub, USER/NAME.

        For `revision` and `token`, see `pix2seq.model.hub.local_folder`. Raises `InputError` if it cannot be opened.
        """
        model = Pix2Seq.from_pretrained(find_checkpoint(local_folder(path, revision=revision, token=token)))
        return cls(model.to(pick_device(device)), bf16=bf16)

    @property
    def thresholds(self) -> dict[str, float]:
        """The least score that is worth showing, by task: as `pix2seq calibrate` chose it, else 0.3."""
        own = self.calibration
        return {name: own[name].threshold if name in own else DEFAULT_THRESHOLD for name in self.tasks}

    @property
    def can_match(self) -> bool:
        """Whether the checkpoint was trained to tell if a sentence is true of an image."""
        return "matching" in self.tasks

    @property
    def can_find_like(self) -> bool:
        """Whether the checkpoint was trained to find objects like one of another image."""
        return "by_example" in self.tasks

    @property
    def can_find_words(self) -> bool:
        """Whether the checkpoint was trained to find what words name."""
        return "by_words" in self.tasks

    def encode(self, image: ImageLike) -> EncodedImage:
        """Read and encode one image: a path, a PIL image, an array (H, W, 3) or (H, W) of uint8, or a
        tensor (3, H, W) of uint8 or of floats in [0, 1]."""
        return self.encode_batch([image])[0]

    def encode_batch(self, images: Sequence[ImageLike]) -> list[EncodedImage]:
        """Read and encode several images of any sizes in one pass."""
        self._check_ready()
        pixels = [load_pixels(image) for image in _listed(images, "images")]
        if not pixels:
            return []
        height, width = self.model.config.image_size
        return [
            EncodedImage(memory, each, (height, width), maps, embedding)
            for (memory, maps, embedding), each in zip(self._encode_pixels(pixels), pixels, strict=True)
        ]

    def ask(
        self,
        task: str,
        images: Sequence[EncodedImage | ImageLike],
        about: Sequence[Any] | None = None,
        *,
        threshold: float = 0.0,
        classes: str | Sequence[str] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> list[list[Any]]:
        """Ask a task about images, and return its answers for each of them.

        `about` holds what each image is asked about, in the form that the task takes: `Boxes` or instances for masks
        and keypoints, nothing for tasks about whole images. Without it, a task that needs another one asks about what
        that one finds. Objects with a score below `threshold`, and with `classes` those of other classes, are neither
        asked about nor returned. `settings` go over the task's own for this call, or over those of the task that it
        needs. An answer depends on the image, the question, the settings and `seed`, not on what else is asked.
        Raises `InputError` if the model does not know the task, or cannot be asked so.
        """
        self.require(task)
        asking = self._with(task, settings) if settings else self
        exchanges = asking._ask(task, images, about, threshold=threshold, classes=classes, seed=seed)
        return [exchange.answers for exchange in exchanges]

    def _ask(
        self,
        task: str,
        images: Sequence[EncodedImage | ImageLike],
        about: Sequence[Any] | None,
        *,
        threshold: float = 0.0,
        classes: str | Sequence[str] | None = None,
        seed: int,
    ) -> list[Exchange]:
        """Ask as `ask` does, and return what was said too."""
        self.require(task)
        self._check_ready()
        seed = _checked_seed(seed)
        keeps = self._filter(threshold, classes)
        asked = self.tasks[task]
        encoded = self._encoded(images)
        if about is None and asked.needs:
            if asked.needs[0] not in self.tasks:
                raise InputError(
                    f"{task} is asked about the answers of {asked.needs[0]}, for which this checkpoint was not "
                    "trained; give it boxes to ask about"
                )
            found = self.ask(asked.needs[0], encoded, threshold=threshold, classes=classes, seed=seed)
            about = [asked.subjects(each) for each in found]
        abouts = [None] * len(encoded) if about is None else _one_each(encoded, about)
        if about is not None:
            abouts = asked.encoded(abouts, self._encoded)
        requests = [
            asked.requests(image, keeps(asked.check_about(image, each)) if each is not None else None)
            for image, each in zip(encoded, abouts, strict=True)
        ]
        exchanges = [Exchange([], [], []) for _ in encoded]
        left = list(range(len(encoded)))
        held: dict[_Key, Tensor] = {}  # memories of closeups that the step before read, which the next may read again
        while left:
            completions = iter(self._complete(asked, [encoded[i] for i in left], requests, seed, held))
            said = [[next(completions) for _ in some] for some in requests]
            further: dict[int, list[Request]] = {}
            for i, some, completed in zip(left, requests, said, strict=True):
                before = exchanges[i]
                exchanges[i] = Exchange([*before.requests, *some], [*before.completions, *completed], [])
                if more := asked.follow_up(encoded[i], some, completed):
                    further[i] = more
                else:
                    answers = asked.calibrated(asked.answers(encoded[i], some, completed), self.calibration.get(task))
                    exchanges[i] = replace(exchanges[i], answers=keeps(answers))
            left, requests = list(further), list(further.values())
        return exchanges

    @overload
    def detect(self, image: OneImage, **options: Unpack[ObjectOptions]) -> Instances: ...  # type: ignore[overload-overlap]
    @overload
    def detect(self, image: Sequence[OneImage], **options: Unpack[ObjectOptions]) -> list[Instances]: ...
    def detect(
        self, image: OneImage | Sequence[OneImage], **options: Unpack[ObjectOptions]
    ) -> Instances | list[Instances]:
        """Return the objects of an image, best first, or of each image of a list. For `options`, see `ObjectOptions`.

        `Instances` is a list that converts: `to_coco()`, `to_supervision()`, `to_pandas()`.
        """
        return self._find("detection", image, None, None, options)

    @overload
    def segment(  # type: ignore[overload-overlap]
        self,
        image: OneImage,
        boxes: OneBoxes | None = None,
        *,
        categories: Names = None,
        **options: Unpack[ObjectOptions],
    ) -> Instances: ...
    @overload
    def segment(
        self,
        image: Sequence[OneImage],
        boxes: Sequence[OneBoxes] | None = None,
        *,
        categories: str | Sequence[Names] | None = None,
        **options: Unpack[ObjectOptions],
    ) -> list[Instances]: ...
    def segment(
        self, image: Any, boxes: Any = None, *, categories: Any = None, **options: Unpack[ObjectOptions]
    ) -> Instances | list[Instances]:
        """Return objects with their masks: those of `boxes`, or all that `detect` finds.

        Boxes are instances, or numbers (N, 4) as x0, y0, x1, y1 in pixels of the image. Numbers need `categories`,
        one name for all or one for each, unless the model knows a single class. Several masks are drawn for each
        object and vote; see `segmentation.num_samples`. A list of images takes and gives a list with one entry each.
        For `options`, see `ObjectOptions`.
        """
        return self._find("segmentation", image, boxes, categories, options)

    @overload
    def keypoints(  # type: ignore[overload-overlap]
        self,
        image: OneImage,
        boxes: OneBoxes | None = None,
        *,
        categories: Names = None,
        **options: Unpack[ObjectOptions],
    ) -> Instances: ...
    @overload
    def keypoints(
        self,
        image: Sequence[OneImage],
        boxes: Sequence[OneBoxes] | None = None,
        *,
        categories: str | Sequence[Names] | None = None,
        **options: Unpack[ObjectOptions],
    ) -> list[Instances]: ...
    def keypoints(
        self, image: Any, boxes: Any = None, *, categories: Any = None, **options: Unpack[ObjectOptions]
    ) -> Instances | list[Instances]:
        """Return objects with their keypoints: those of `boxes`, or all that `detect` finds, if their class has some.

        For lists of images, `boxes`, `categories` and `options`, see `segment`.
        """
        return self._find("keypoint", image, boxes, categories, options)

    @overload
    def caption(self, image: OneImage, **options: Unpack[Options]) -> Caption: ...  # type: ignore[overload-overlap]
    @overload
    def caption(self, image: Sequence[OneImage], **options: Unpack[Options]) -> list[Caption]: ...
    def caption(self, image: OneImage | Sequence[OneImage], **options: Unpack[Options]) -> Caption | list[Caption]:
        """Return a sentence about an image, or one about each image of a list. For `options`, see `Options`."""
        images, many = _many(image)
        _check_options(options, Options)
        captions = [found[0] for found in self.ask("captioning", images, **options)]
        return captions if many else captions[0]

    def match(self, image: OneImage, sentences: Sequence[str]) -> NDArray[np.float64]:
        """Return the probability that each sentence is true of an image, (S,), each 0 to 1."""
        about = list(_listed(sentences, "sentences"))
        return np.array([match.score for match in self.ask("matching", [image], [about])[0]], np.float64)

    def embed(self, images: Sequence[OneImage]) -> NDArray[np.float32]:
        """Return unit vectors (B, E) of images, to compare with those of other images and of sentences.

        Raises `InputError` if the model makes none.
        """
        size = self._embedding_size()
        found = [image.embedding for image in self._encoded(images)]
        return torch.stack(found).cpu().numpy() if found else np.zeros((0, size), np.float32)

    def embed_text(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors (S, E) of sentences. Raises `InputError` if the model makes none."""
        from pix2seq.tokenizers.captioning import encode_caption

        size = self._embedding_size()
        self._check_ready()
        text, longest = self.model.text, self.model.decoder.max_seq_len
        if text is None:
            raise InputError("this checkpoint has no text tokenizer, so it reads no sentences")
        ids = [
            encode_caption(each, text, self.model.config.vocab, max_tokens=longest)
            for each in _listed(sentences, "sentences")
        ]
        return self._embed_sentences(ids) if ids else np.zeros((0, size), np.float32)

    def click(
        self,
        image: EncodedImage | ImageLike,
        points: ArrayLike,
        labels: Sequence[bool | int] | None = None,
        box: Sequence[float] | None = None,
        *,
        previous: ObjectMask | None = None,
        num_candidates: int | None = None,
        seed: int = 0,
    ) -> list[ObjectMask]:
        """Return what clicks on an object of any class can mean, best first.

        `points` (N, 2) are x, y in pixels of the image, `labels` whether each lies on the object (1, the default) or
        on what does not belong to it (0), `box` is x0, y0, x1, y1 around the object. `previous` is the answer to all
        clicks but the last, which this improves. At most `num_candidates` are returned; by default as many as the
        checkpoint is set to, and one where `previous` says what is meant.
        """
        about = _clicks(points, labels, box, previous, num_candidates)
        return self.ask("prompted", [image], [about], seed=seed)[0]

    def everything(self, image: EncodedImage | ImageLike, *, seed: int = 0) -> list[ObjectMask]:
        """Return the masks of all objects of any class, best first."""
        return self.ask("prompted", [image], seed=seed)[0]

    def find(
        self,
        image: EncodedImage | ImageLike,
        like: Any = None,
        words: str | Sequence[str] | None = None,
        *,
        threshold: float | None = None,
        seed: int = 0,
    ) -> Instances:
        """Return the objects of an image that are like examples, or that a phrase names, best first.

        `like` is an (image, (x0, y0, x1, y1)): an image in any form that `encode` takes, or encoded before, and a box
        in its pixels, or a polygon (P, 2), or a list of polygons. A list of such pairs are examples of one kind of
        object, and a dictionary has the examples of several kinds by name, which answers have as their category.

        `words` is a phrase, such as "striped star on the left", and can stand in the second place too. Several are
        asked side by side; the category of an object has its phrase as its name.

        Objects have a score of at least `threshold`; by default the task's `min_score` in the checkpoint. Boxes
        that are an object with a probability below 0.1, and those that repeat another one, are no answers.
        """
        if words is None and (isinstance(like, str) or (isinstance(like, list) and like and isinstance(like[0], str))):
            like, words = None, like
        if (like is None) == (words is None):
            raise InputError(
                "give what to look for, as examples or in words: like=(image, (x0, y0, x1, y1)), or a phrase such as "
                "'striped star'"
            )
        name = "by_words" if like is None else "by_example"
        self.require(name)
        least = self.tasks[name].config.min_score if threshold is None else threshold
        (encoded,) = self._encoded([image])
        about = words if like is None else given_examples(like)
        found = self.ask(name, [encoded], [about], seed=seed, min_score=least)[0]
        return Instances(found, size=encoded.size)

    def session(self, image: EncodedImage | ImageLike, box: Sequence[float] | None = None, *, seed: int = 0) -> Session:
        """Return a series of clicks on one object of an image, which is encoded once."""
        (encoded,) = self._encoded([image])
        self.require("prompted")
        drawn = _clicks([], [], box, None, None).box_xyxy
        return Session(lambda clicks: self.ask("prompted", [encoded], [clicks], seed=seed)[0], drawn)

    def predict(
        self,
        image: EncodedImage | ImageLike,
        tasks: Sequence[str],
        boxes: Sequence[Instance] | ArrayLike | None = None,
        *,
        categories: str | Sequence[str] | None = None,
        threshold: float = 0.0,
        classes: str | Sequence[str] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Prediction:
        """Run several tasks on one image, encoding it once.

        Objects are detected, or taken from `boxes`; masks and keypoints are added to them, and they keep the score of
        their box. For `boxes` and `categories`, see `segment`; for what else may be given, `predict_batch`.
        """
        names = [tasks] if isinstance(tasks, str) else tasks
        for name in names:
            self.require(name)
        about = {}
        if boxes is not None:
            given = [given_objects(boxes, categories)]
            about = {name: given for name in names if self.tasks[name].needs}
        options = {"threshold": threshold, "classes": classes, "seed": seed, **settings}
        return self.predict_batch([image], names, about, **options)[0]

    def predict_batch(
        self,
        images: Sequence[EncodedImage | ImageLike],
        tasks: Sequence[str],
        about: Mapping[str, Sequence[Any]] | None = None,
        *,
        threshold: float = 0.0,
        classes: str | Sequence[str] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> list[Prediction]:
        """Run several tasks on several images.

        `about` holds, by task, what each image is asked about; for `threshold` and `classes`, see `ask`. `settings`
        are those of `configure`, for this call.
        """
        options: dict[str, Any] = {"threshold": threshold, "classes": classes, "seed": seed}
        if settings:
            return self.with_settings(**settings).predict_batch(images, tasks, about, **options)
        keeps = self._filter(threshold, classes)
        tasks = _listed(tasks, "tasks")
        about = about or {}
        for name in (*tasks, *about):
            self.require(name)
        encoded = self._encoded(images)
        answers: dict[str, list[list[Any]]] = {}
        writers: dict[str, Task[Any]] = {}
        exchanges: dict[str, list[Exchange]] = {}
        for name in about:
            task = self.tasks[name]
            if task.needs:  # what is given takes the place of what would have been found
                given = zip(encoded, _one_each(encoded, about[name]), strict=True)
                answers[task.needs[0]] = [keeps(task.check_about(image, each)) for image, each in given]
        for name in sorted(dict.fromkeys(tasks), key=lambda name: bool(self.tasks[name].needs)):
            task = self.tasks[name]
            key = task.needs[0] if task.needs else name
            writers[key] = task
            if key not in answers:
                exchanges[key] = self._ask(key, encoded, about.get(key), **options)
                answers[key] = [exchange.answers for exchange in exchanges[key]]
            if task.needs:
                found = answers[key]
                exchanges[name] = self._ask(name, encoded, [task.subjects(each) for each in found], seed=seed)
                answers[key] = [
                    task.merge(each, exchange.answers) for each, exchange in zip(found, exchanges[name], strict=True)
                ]

        def of_image(index: int, values: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
            return {key: each[index] for key, each in values.items()}

        return [
            Prediction(image, of_image(index, answers), writers, self.thresholds, of_image(index, exchanges))
            for index, image in enumerate(encoded)
        ]

    def require(self, task: str) -> None:
        """Raise `InputError` if the checkpoint does not know a task, or lacks the words that it needs."""
        if task in self.missing:
            raise InputError(f"no installed package provides the task {task}; install the one it was trained with")
        if not isinstance(task, str) or task not in self.tasks:
            known = ", ".join(self.tasks) or "no task"
            raise InputError(f"this checkpoint was not trained for {task}; it knows {known}")
        if self.tasks[task].reads_text and self.model.text is None:
            raise InputError(
                f"{task} needs words, but this checkpoint has no text tokenizer; copy {WORD_FILE} or "
                f"{SENTENCEPIECE_FILE} from the checkpoint that training wrote, or ask for other tasks"
            )

    def configure(self, tasks: Collection[str] | None = None, /, **settings: Any) -> None:
        """Change settings, such as `num_samples=1` or `num_objects=50`, of every task, or of `tasks`, that has them.

        Raises `InputError` if no task has one of them, or the answers would be longer than the model's sequences.
        """
        for key, value in settings.items():
            having = [name for name, task in self.tasks.items() if key in {f.name for f in fields(task.config)}]
            having = [name for name in having if tasks is None or name in tasks]
            if not having and tasks is None:
                raise InputError(f"none of this checkpoint's tasks ({', '.join(self.tasks)}) has the setting {key}")
            for name in having:
                self._set(name, key, value)

    def with_settings(self, **settings: Any) -> Self:
        """Return a predictor of the same model with other settings, see `configure`; this one stays as it is."""
        other = self._copy()
        other.configure(**settings)
        return other

    def _copy(self) -> Self:
        other = copy.copy(self)
        other.tasks = dict(self.tasks)
        return other

    def _with(self, name: str, settings: Mapping[str, Any]) -> Self:
        """Return a predictor in which a task, or else the one that it needs, has other settings."""
        other = self._copy()
        asked = [name, *(need for need in self.tasks[name].needs if need in self.tasks)]
        for key, value in settings.items():
            known = {each: {field.name for field in fields(self.tasks[each].config)} for each in asked}
            having = next((each for each in asked if key in known[each]), None)
            if having is None:
                raise unknown_name(f"setting of {name}", key, known[name])
            other._set(having, key, value)
        return other

    def _set(self, name: str, key: str, value: Any) -> None:
        changed = self.tasks[name].with_settings(**{key: value})
        self._check_length(changed, f"{key}={value}", f"give a smaller {key}")
        self.tasks[name] = changed

    def _filter(self, threshold: float, classes: str | Sequence[str] | None) -> Callable[[Any], Any]:
        """Return a function that drops objects of other classes or lower scores from a list, and changes nothing else.

        Raises `InputError` if the threshold is no share, or a class unknown.
        """
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise InputError(f"threshold is {threshold!r}; expected a number from 0 to 1")
        names = None
        if classes is not None:
            names = {self._class_key(name) for name in ([classes] if isinstance(classes, str) else classes)}

        def keeps(found: Any) -> Any:
            if not isinstance(found, list) or (names is None and not threshold):
                return found
            return [
                each
                for each in found
                if not isinstance(each, Instance)
                or (each.score >= threshold and (names is None or category_key(each.category.name) in names))
            ]

        return keeps

    def _class_key(self, name: Any) -> str:
        known = {each.name for task in self.tasks.values() for each in task.categories.values()}
        if not isinstance(name, str) or category_key(name) not in map(category_key, known):
            raise unknown_name("class", str(name), known)
        return category_key(name)

    def _find(
        self, task: str, image: Any, boxes: Any, categories: Any, options: ObjectOptions
    ) -> Instances | list[Instances]:
        """Ask a task about the objects of an image, or of each image of a list."""
        images, many = _many(image)
        _check_options(options, ObjectOptions)
        if boxes is None:
            about = None
        elif not many:
            about = [given_objects(boxes, categories)]
        else:
            names = [categories] * len(images) if categories is None or isinstance(categories, str) else categories
            if len(_listed(boxes, "boxes, one entry for each image")) != len(images) or len(names) != len(images):
                raise InputError(
                    f"{len(images)} images were given with boxes for {len(boxes)} and categories for {len(names)}; "
                    "give one entry for each image"
                )
            pairs = zip(boxes, names, strict=True)
            about = [[] if some is None else given_objects(some, name) for some, name in pairs]
        encoded = self._encoded(images)
        answers = self.ask(task, encoded, about, **options)
        found = [Instances(each, size=image.size) for image, each in zip(encoded, answers, strict=True)]
        return found if many else found[0]

    def _check_length(self, task: Task[Any], source: str, remedy: str) -> None:
        """Raise `InputError` if a task, as `source` sets it, needs more tokens or references than the model has."""
        longest = self.model.decoder.max_seq_len
        if task.max_seq_len > longest:
            raise InputError(
                f"{source} needs sequences of {task.max_seq_len} tokens ({task.name}), but this checkpoint ends at "
                f"{longest}; {remedy}"
            )
        places = self.model.config.memory.references
        if task.num_references > places:
            raise InputError(
                f"{source} lets {task.name} read {task.num_references} memories beside the first, but this checkpoint "
                f"has places for {places}; ask for fewer, or set {task.name}.closeup=false"
            )

    def _check_ready(self) -> None:
        """Raise `InputError` where answers would change without a word, or never come."""
        if any(module.training for module in self.model.modules()):
            raise InputError(
                "the model was set to training mode, in which dropout changes answers; call model.eval() before asking"
            )
        if os.getpid() != self._process:
            if self.model.device.type != "cpu":
                raise InputError(
                    f"this predictor came through a fork, after which {self.model.device} cannot be used; build one in "
                    "each worker, such as with gunicorn without preload, or start processes by spawn"
                )
            # The parent's threads do not exist in this process; waiting for them would never end.
            torch.set_num_threads(1)
            self._process = os.getpid()

    def _encoded(self, images: Sequence[EncodedImage | ImageLike]) -> list[EncodedImage]:
        fresh = [image for image in _listed(images, "images") if not isinstance(image, EncodedImage)]
        width = self.model.decoder.token_embedding.weight.shape[1]
        expected = (tuple(self.model.config.image_size), width, self.model.encoder.finer_dims)
        for image in images:
            if isinstance(image, EncodedImage) and expected != (
                image.input_size, image.memory.shape[-1], tuple(len(each) for each in image.maps)
            ):  # fmt: skip
                raise InputError("an image was encoded by another model; encode it with this predictor")
        encoded = iter(self.encode_batch(fresh))
        return [image if isinstance(image, EncodedImage) else next(encoded) for image in images]

    def _encode_pixels(
        self, images: Sequence[NDArray[np.uint8]]
    ) -> list[tuple[Tensor, tuple[Tensor, ...], Tensor | None]]:
        """Memory (N, D), finer maps and embedding (E,), if any, of each image (H, W, 3), of any sizes."""
        size = self.model.config.image_size
        inputs = np.stack([warp_image(pixels, fit_affine(pixels.shape[:2], size), size) for pixels in images])
        batch = torch.from_numpy(inputs).permute(0, 3, 1, 2).to(self.model.device).float() / 255
        with torch.inference_mode(), self._autocast():
            memory, maps = self.model.encode_with_maps(batch)
            embeddings = self.model.embed_images(memory) if self.model.contrast is not None else None
        return [
            (memory[i], tuple(each[i] for each in maps), None if embeddings is None else embeddings[i])
            for i in range(len(images))
        ]

    def _embedding_size(self) -> int:
        settings = self.model.config.contrast
        if settings is None:
            raise InputError(
                "this checkpoint makes no embeddings; train one with model.contrast.dim=128, as in "
                "configs/matching_shapes.yaml"
            )
        return settings.dim

    def _embed_sentences(self, sentences: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """Embed sentences (L,), ends included, each as it would be alone: (S, E)."""
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        found = np.zeros((len(sentences), self._embedding_size()), np.float32)
        for start in range(0, len(order), MAX_ROWS):
            some = order[start : start + MAX_ROWS]
            tokens = torch.from_numpy(np.concatenate([sentences[i] for i in some])).to(self.model.device)
            lengths = torch.tensor([len(sentences[i]) for i in some])
            with torch.inference_mode(), self._autocast():
                found[some] = self.model.embed_sentences(tokens, lengths).cpu().numpy()
        return found

    def _look_closer(self, asked: Sequence[tuple[EncodedImage, Frame]]) -> Tensor:
        """Memories (R, N, D) of frames of encoded images."""
        images = list({id(image): image for image, _ in asked}.values())
        number = {id(image): i for i, image in enumerate(images)}
        maps = tuple(torch.stack(level) for level in zip(*(image.maps for image in images), strict=True))
        corners = np.stack([image.frame().to_input_yxyx(frame.xyxy) for image, frame in asked])
        frames = torch.from_numpy(corners).float().to(self.model.device)
        with torch.inference_mode(), self._autocast():
            return self.model.look_closer(maps, frames, [number[id(image)] for image, _ in asked])

    def _complete(
        self,
        task: Task[Any],
        images: Sequence[EncodedImage],
        requests: Sequence[Sequence[Request]],
        seed: int,
        held: dict[_Key, Tensor] | None = None,
    ) -> list[Completion]:
        """Answer the requests about each image, in as few calls as memory allows, and return completions in order.

        `held` are memories of closeups that need not be made again; those that were read take their place.
        Warns if an answer was cut at its length.
        """
        asked = [(image, request) for image, some in zip(images, requests, strict=True) for request in some]
        completions: list[Completion | None] = [None] * len(asked)
        embedded = [i for i, (_, request) in enumerate(asked) if request.embeds]
        if embedded:
            embeddings = self._embed_sentences([asked[i][1].prompt for i in embedded])
            for i, embedding in zip(embedded, embeddings, strict=True):
                completions[i] = Completion.of_embedding(embedding)
        held = {} if held is None else held
        before = dict(held)
        held.clear()
        for batch in self._batches(asked):
            some = [asked[i] for i in batch]
            memory, memory_index = self._memories(some, before, held)
            with torch.inference_mode(), self._autocast():
                out = self.model.generate_mixed(
                    memory,
                    [torch.from_numpy(request.prompt) for _, request in some],
                    [request.generation for _, request in some],
                    num_samples=some[0][1].num_samples,
                    generator=[torch.Generator().manual_seed(request.random_seed(seed)) for _, request in some],
                    memory_index=memory_index,
                )
            for i, completion in zip(batch, out.completions(some[0][1].num_samples), strict=True):
                completions[i] = completion
                if completion.truncated.any():
                    hint = task.cut_hint(asked[i][1].generation.max_new_tokens)
                    # The same words every time, so that Python says it once.
                    warnings.warn(f"{task.name}: an answer was cut; {hint}", stacklevel=5)
        return [completion for completion in completions if completion is not None]

    def _batches(self, asked: Sequence[tuple[EncodedImage, Request]]) -> list[list[int]]:
        """Indices of requests to answer side by side: of like length and as many samples, as many as memory allows."""
        decoder = self.model.decoder
        width = decoder.token_embedding.weight.shape[1]
        token_bytes = 2 * len(decoder.blocks) * width * (2 if self.bf16 else 4)
        # Memories of one call are equally long.
        kinds = [(request.num_samples, len(request.references)) for _, request in asked]
        order = sorted(
            (i for i, (_, request) in enumerate(asked) if not request.embeds),
            key=lambda i: (kinds[i], -asked[i][1].length),
        )
        batches: list[list[int]] = []
        rows = slots = 0
        memories: set[_Key] = set()
        for i in order:
            image, request = asked[i]
            key = (id(image), request.memory_key)
            slots = max(slots, len(request.prompt) + request.generation.max_new_tokens)
            more = rows + request.num_samples
            memory_length = image.memory.shape[0] * (1 + len(request.references))
            cached = token_bytes * (more * slots + len(memories | {key}) * memory_length)
            if not batches or kinds[batches[-1][-1]] != kinds[i] or more > MAX_ROWS or cached > MAX_CACHE_BYTES:
                batches.append([])
                rows, slots, memories = 0, len(request.prompt) + request.generation.max_new_tokens, set()
            batches[-1].append(i)
            rows += request.num_samples
            memories.add(key)
        return batches

    def _memories(
        self,
        asked: Sequence[tuple[EncodedImage, Request]],
        known: Mapping[_Key, Tensor],
        held: dict[_Key, Tensor],
    ) -> tuple[Tensor, list[int]]:
        """Memories (B, N, D) of all that is asked about, each once, and which is whose.

        Closeups that are `known` are not made again; all that are read are put into `held`.
        Where requests have references, K for each, memories are joined: (B, (1 + K) * N, D).
        """
        keys = {(id(image), request.memory_key): (image, request) for image, request in asked}
        crops, closeups, memories = {}, {}, {}
        for image, request in keys.values():
            key = (id(image), request.own_key)
            if request.region is not None:
                x0, y0, x1, y1 = request.region
                crops[key] = image.pixels[y0:y1, x0:x1]
            elif request.closeup is not None:
                closeups[key] = (image, request.closeup)
            else:
                memories[key] = image.memory
            for reference in request.references:
                key = (id(reference.image), reference.own_key)
                if reference.closeup is not None:
                    closeups[key] = (reference.image, reference.closeup)
                else:
                    memories[key] = reference.image.memory
        for some in _chunks(list(crops), MAX_CROPS):
            encoded = self._encode_pixels([crops[key] for key in some])
            memories |= {key: memory for key, (memory, _, _) in zip(some, encoded, strict=True)}
        held |= {key: known[key] for key in closeups if key in known}
        for some in _chunks([key for key in closeups if key not in held], MAX_CLOSEUPS):
            held |= zip(some, self._look_closer([closeups[key] for key in some]), strict=True)
        memories |= {key: held[key] for key in closeups}
        number = {key: i for i, key in enumerate(keys)}
        index = [number[id(image), request.memory_key] for image, request in asked]
        joined = [self._joined(memories[id(image), r.own_key], r.references, memories) for image, r in keys.values()]
        return torch.stack(joined), index

    def _joined(self, memory: Tensor, references: Sequence[Reference], memories: Mapping[_Key, Tensor]) -> Tensor:
        """Join the memories of references to that of an image: (N, D) to ((1 + K) * N, D)."""
        if not references:
            return memory
        parts = torch.stack([memory, *(memories[id(each.image), each.own_key] for each in references)])
        with torch.inference_mode():
            return self.model.at_places(parts, torch.arange(len(parts), device=parts.device)).flatten(0, 1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)


def _calibration(content: dict[str, Any]) -> TaskCalibration:
    try:
        return TaskCalibration.from_json(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if type(error) is KeyError else error
        raise InputError(
            f"the calibration in {CONFIG_FILE} cannot be used: {reason}; run pix2seq calibrate again"
        ) from None


def _chunks(keys: list[_Key], size: int) -> list[list[_Key]]:
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def _many(image: Any) -> tuple[Sequence[Any], bool]:
    """Return images as a list, and whether a list was given."""
    many = isinstance(image, list | tuple)
    return (image if many else [image]), many


def _check_options(options: Options, kind: type[Options]) -> None:
    for name in options:
        if name not in kind.__annotations__:
            raise unknown_name("option", name, kind.__annotations__)


def _listed(values: Sequence[Any], what: str) -> Sequence[Any]:
    """Return a list of `what`. Raises `InputError` for a single one, which would be taken apart."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InputError(f"expected a list of {what}, got one {type(values).__name__}; put it in a list")
    return values


def _one_each(images: Sequence[EncodedImage], about: Sequence[Any]) -> Sequence[Any]:
    """Return what images are asked about. Raises `InputError` unless there is one for each image."""
    if len(_listed(about, "what to ask about, one for each image")) != len(images):
        raise InputError(f"{len(images)} images were given with {len(about)} things to ask about; give one each")
    return about


def _checked_seed(seed: int) -> int:
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if not 0 <= value < 2**64:
        raise InputError(f"seed is {seed!r}; expected a whole number from 0 to 2**64 - 1")
    return value


def _clicks(
    points: ArrayLike,
    labels: Sequence[bool | int] | None,
    box: Sequence[float] | None,
    previous: ObjectMask | None,
    num_candidates: int | None,
) -> Clicks:
    """Return clicks as the task takes them. Raises `InputError` for what are no numbers (N, 2), (N,) or (4,)."""
    try:
        at = np.asarray(points, np.float64)
        at = at.reshape(-1, 2) if not at.size else at
        signs = np.ones(len(at), np.int64) if labels is None else np.asarray(labels).astype(np.int64)
        corners = None if box is None else np.asarray(box, np.float64)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        raise InputError("points must be numbers (N, 2) as x, y, labels (N,) 0 or 1, and a box four numbers") from None
    if at.ndim != 2 or at.shape[1] != 2 or signs.shape != (len(at),) or not np.isin(signs, [0, 1]).all():
        raise InputError(
            f"points must be (N, 2) as x, y, with a label of 0 or 1 each; got shapes {at.shape} and {signs.shape}"
        )
    if corners is not None and corners.shape != (4,):
        raise InputError(f"a box is x0, y0, x1, y1, got shape {corners.shape}")
    x0, y0, x1, y1 = [0.0] * 4 if corners is None else corners.tolist()
    return Clicks(
        tuple((x, y) for x, y in at.tolist()),
        tuple((signs == 1).tolist()),
        None if corners is None else (x0, y0, x1, y1),
        () if previous is None else tuple(previous.polygons),
        num_candidates,
    )


def load_pixels(image: ImageLike) -> NDArray[np.uint8]:
    """Return the uint8 pixels (H, W, 3) of an image in any accepted form. Raises `InputError` for all others."""
    if not isinstance(image, Tensor):
        return read_image(image)
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise InputError(f"expected a tensor (3, H, W) with pixels, got one of shape {tuple(image.shape)}")
    values = image.detach().cpu()
    if values.dtype != torch.uint8:
        if not values.is_floating_point() or not ((values >= 0) & (values <= 1)).all():  # NaN is neither
            raise InputError("expected a tensor of uint8, or of floats in [0, 1]")
        values = (values.float() * 255).round().to(torch.uint8)
    return np.ascontiguousarray(values.permute(1, 2, 0).numpy())
