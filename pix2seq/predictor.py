"""Ask a trained model about images: encode once, ask many things.

Results are in pixels of the original image (x right, y down, after its EXIF orientation), with the same types whatever
came in.
"""

from __future__ import annotations

import operator
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from pix2seq.data.image import read_image, warp_image
from pix2seq.device import pick_device
from pix2seq.drawing import Canvas
from pix2seq.errors import InputError
from pix2seq.geometry.affine import fit_affine
from pix2seq.model.decoding.completion import Completion
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.model.pretrained import find_checkpoint
from pix2seq.tasks import get_task, task_names
from pix2seq.tasks.objects import Boxes
from pix2seq.tasks.request import EncodedImage, Frame, Request
from pix2seq.tasks.task import Task
from pix2seq.tokenizers.text import SENTENCEPIECE_FILE, WORD_FILE
from pix2seq.types import Caption, Instance

ImageLike = str | Path | Image.Image | NDArray[np.uint8] | Tensor

MAX_ROWS = 512  # sequences that are decoded side by side
MAX_CACHE_BYTES = 2**31  # keys and values of sequences and memories that are decoded side by side
MAX_CROPS = 16  # crops that are encoded side by side
MAX_CLOSEUPS = 64  # closeups that are encoded side by side
_Key = tuple[int, tuple[float, ...]]  # an image, and which of its memories


@dataclass(frozen=True)
class Prediction:
    """All that was asked about one image."""

    image: EncodedImage
    answers: dict[str, list[Any]]  # by the task that found them; others may have refined them
    tasks: dict[str, Task[Any]]  # the task that draws and writes these answers

    @property
    def instances(self) -> list[Instance]:
        """Objects, with masks and keypoints where those were asked for."""
        return [answer for answers in self.answers.values() for answer in answers if isinstance(answer, Instance)]

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

    def draw(self, *, min_score: float = 0.0) -> Image.Image:
        """Draw all answers on the image; of objects, those of at least `min_score`."""
        canvas = Canvas(self.image.pixels, min_score=min_score)
        for name, answers in self.answers.items():
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

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str = "auto", bf16: bool = False) -> Self:
        """Open a checkpoint folder, or the newest checkpoint of a run folder. Raises `InputError` if it cannot be."""
        model = Pix2Seq.from_pretrained(find_checkpoint(Path(path)))
        return cls(model.to(pick_device(device)), bf16=bf16)

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
            EncodedImage(memory, each, (height, width), maps)
            for (memory, maps), each in zip(self._encode_pixels(pixels), pixels, strict=True)
        ]

    def ask(
        self,
        task: str,
        images: Sequence[EncodedImage | ImageLike],
        about: Sequence[Any] | None = None,
        *,
        seed: int = 0,
    ) -> list[list[Any]]:
        """Ask a task about images, and return its answers for each of them.

        `about` holds what each image is asked about, in the form that the task takes: `Boxes` or instances for masks
        and keypoints, nothing for tasks about whole images. Without it, a task that needs another one asks about what
        that one finds. An answer depends on the image, the question and `seed`, not on what else is asked. Raises
        `InputError` if the model does not know the task, or cannot be asked so.
        """
        self.require(task)
        self._check_ready()
        seed = _checked_seed(seed)
        asked = self.tasks[task]
        encoded = self._encoded(images)
        if about is None and asked.needs:
            if asked.needs[0] not in self.tasks:
                raise InputError(
                    f"{task} is asked about the answers of {asked.needs[0]}, for which this checkpoint was not "
                    "trained; give it boxes to ask about"
                )
            about = [asked.subjects(found) for found in self.ask(asked.needs[0], encoded, seed=seed)]
        abouts = [None] * len(encoded) if about is None else _one_each(encoded, about)
        requests = [
            asked.requests(image, asked.check_about(image, each) if each is not None else None)
            for image, each in zip(encoded, abouts, strict=True)
        ]
        completions = iter(self._complete(asked, encoded, requests, seed))
        return [
            asked.answers(image, some, [next(completions) for _ in some])
            for image, some in zip(encoded, requests, strict=True)
        ]

    def detect(self, image: EncodedImage | ImageLike, *, seed: int = 0) -> list[Instance]:
        """Return the objects of an image, best first."""
        return self.ask("detection", [image], seed=seed)[0]

    def segment(
        self,
        image: EncodedImage | ImageLike,
        boxes: Sequence[Instance] | ArrayLike | None = None,
        *,
        categories: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> list[Instance]:
        """Return objects with their masks: those of `boxes`, or all that `detect` finds.

        Boxes are instances, or numbers (N, 4) as x0, y0, x1, y1 in pixels of the image. Numbers need `categories`,
        one name for all or one for each, unless the model knows a single class. Several masks are drawn for each
        object and vote; see `segmentation.num_samples`.
        """
        return self.ask("segmentation", [image], _about(boxes, categories), seed=seed)[0]

    def keypoints(
        self,
        image: EncodedImage | ImageLike,
        boxes: Sequence[Instance] | ArrayLike | None = None,
        *,
        categories: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> list[Instance]:
        """Return objects with their keypoints: those of `boxes`, or all that `detect` finds, if their class has some.

        For `boxes` and `categories`, see `segment`.
        """
        return self.ask("keypoint", [image], _about(boxes, categories), seed=seed)[0]

    def caption(self, image: EncodedImage | ImageLike, *, seed: int = 0) -> Caption:
        """Return a sentence about an image."""
        return self.ask("captioning", [image], seed=seed)[0][0]

    def predict(
        self,
        image: EncodedImage | ImageLike,
        tasks: Sequence[str],
        boxes: Sequence[Instance] | ArrayLike | None = None,
        *,
        categories: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> Prediction:
        """Run several tasks on one image, encoding it once.

        Objects are detected, or taken from `boxes`; masks and keypoints are added to them, and they keep the score of
        their box. For `boxes` and `categories`, see `segment`.
        """
        names = [tasks] if isinstance(tasks, str) else tasks
        for name in names:
            self.require(name)
        given = _about(boxes, categories)
        about = {} if given is None else {name: given for name in names if self.tasks[name].needs}
        return self.predict_batch([image], names, about, seed=seed)[0]

    def predict_batch(
        self,
        images: Sequence[EncodedImage | ImageLike],
        tasks: Sequence[str],
        about: Mapping[str, Sequence[Any]] | None = None,
        *,
        seed: int = 0,
    ) -> list[Prediction]:
        """Run several tasks on several images. `about` holds, by task, what each image is asked about; see `ask`."""
        tasks = _listed(tasks, "tasks")
        about = about or {}
        for name in (*tasks, *about):
            self.require(name)
        encoded = self._encoded(images)
        answers: dict[str, list[list[Any]]] = {}
        writers: dict[str, Task[Any]] = {}
        for name in about:
            task = self.tasks[name]
            if task.needs:  # what is given takes the place of what would have been found
                given = zip(encoded, _one_each(encoded, about[name]), strict=True)
                answers[task.needs[0]] = [task.check_about(image, each) for image, each in given]
        for name in sorted(dict.fromkeys(tasks), key=lambda name: bool(self.tasks[name].needs)):
            task = self.tasks[name]
            key = task.needs[0] if task.needs else name
            writers[key] = task
            if key not in answers:
                answers[key] = self.ask(key, encoded, about.get(key), seed=seed)
            if task.needs:
                found = answers[key]
                refined = self.ask(name, encoded, [task.subjects(each) for each in found], seed=seed)
                answers[key] = [task.merge(*pair) for pair in zip(found, refined, strict=True)]
        return [
            Prediction(image, {key: found[index] for key, found in answers.items()}, writers)
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

    def configure(self, **settings: Any) -> None:
        """Change settings, such as `num_samples=1` or `num_objects=50`, of every task that has them.

        Raises `InputError` if no task has one of them, or the answers would be longer than the model's sequences.
        """
        for key, value in settings.items():
            having = [name for name, task in self.tasks.items() if key in {f.name for f in fields(task.config)}]
            if not having:
                raise InputError(f"none of this checkpoint's tasks ({', '.join(self.tasks)}) has the setting {key}")
            for name in having:
                changed = self.tasks[name].with_settings(**{key: value})
                self._check_length(changed, f"{key}={value}", f"give a smaller {key}")
                self.tasks[name] = changed

    def _check_length(self, task: Task[Any], source: str, remedy: str) -> None:
        """Raise `InputError` if a task, as `source` sets it, needs longer sequences than the model has."""
        longest = self.model.decoder.max_seq_len
        if task.max_seq_len > longest:
            raise InputError(
                f"{source} needs sequences of {task.max_seq_len} tokens ({task.name}), but this checkpoint ends at "
                f"{longest}; {remedy}"
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

    def _encode_pixels(self, images: Sequence[NDArray[np.uint8]]) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        """Memory (N, D) and finer maps of each image (H, W, 3), of any sizes."""
        size = self.model.config.image_size
        inputs = np.stack([warp_image(pixels, fit_affine(pixels.shape[:2], size), size) for pixels in images])
        batch = torch.from_numpy(inputs).permute(0, 3, 1, 2).to(self.model.device).float() / 255
        with torch.inference_mode(), self._autocast():
            memory, maps = self.model.encode_with_maps(batch)
        return [(memory[i], tuple(each[i] for each in maps)) for i in range(len(images))]

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
        self, task: Task[Any], images: Sequence[EncodedImage], requests: Sequence[Sequence[Request]], seed: int
    ) -> list[Completion]:
        """Answer the requests about each image, in as few calls as memory allows, and return completions in order.

        Warns if an answer was cut at its length.
        """
        asked = [(image, request) for image, some in zip(images, requests, strict=True) for request in some]
        completions: list[Completion | None] = [None] * len(asked)
        for batch in self._batches(asked):
            some = [asked[i] for i in batch]
            memory, memory_index = self._memories(some)
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
                    warnings.warn(f"{task.name}: an answer was cut; {hint}", stacklevel=4)
        return [completion for completion in completions if completion is not None]

    def _batches(self, asked: Sequence[tuple[EncodedImage, Request]]) -> list[list[int]]:
        """Indices of requests to answer side by side: of like length and as many samples, as many as memory allows."""
        decoder = self.model.decoder
        width = decoder.token_embedding.weight.shape[1]
        token_bytes = 2 * len(decoder.blocks) * width * (2 if self.bf16 else 4)
        order = sorted(range(len(asked)), key=lambda i: (asked[i][1].num_samples, -asked[i][1].length))
        batches: list[list[int]] = []
        rows = slots = samples = 0
        memories: set[_Key] = set()
        for i in order:
            image, request = asked[i]
            key = (id(image), request.memory_key)
            slots = max(slots, len(request.prompt) + request.generation.max_new_tokens)
            more = rows + request.num_samples
            cached = token_bytes * (more * slots + len(memories | {key}) * image.memory.shape[0])
            if not batches or samples != request.num_samples or more > MAX_ROWS or cached > MAX_CACHE_BYTES:
                batches.append([])
                rows, slots, memories = 0, len(request.prompt) + request.generation.max_new_tokens, set()
            batches[-1].append(i)
            rows, samples = rows + request.num_samples, request.num_samples
            memories.add(key)
        return batches

    def _memories(self, asked: Sequence[tuple[EncodedImage, Request]]) -> tuple[Tensor, list[int]]:
        """Memories (B, N, D) of all that is asked about, each once, and which is whose."""
        keys = {(id(image), request.memory_key): (image, request) for image, request in asked}
        crops, closeups, memories = {}, {}, {}
        for key, (image, request) in keys.items():
            if request.region is not None:
                x0, y0, x1, y1 = request.region
                crops[key] = image.pixels[y0:y1, x0:x1]
            elif request.closeup is not None:
                closeups[key] = (image, request.closeup)
            else:
                memories[key] = image.memory
        for some in _chunks(list(crops), MAX_CROPS):
            encoded = self._encode_pixels([crops[key] for key in some])
            memories |= {key: memory for key, (memory, _) in zip(some, encoded, strict=True)}
        for some in _chunks(list(closeups), MAX_CLOSEUPS):
            memories |= zip(some, self._look_closer([closeups[key] for key in some]), strict=True)
        number = {key: i for i, key in enumerate(keys)}
        index = [number[id(image), request.memory_key] for image, request in asked]
        return torch.stack([memories[key] for key in keys]), index

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)


def _chunks(keys: list[_Key], size: int) -> list[list[_Key]]:
    return [keys[start : start + size] for start in range(0, len(keys), size)]


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


def _about(
    boxes: Sequence[Instance] | ArrayLike | None, categories: str | Sequence[str] | None
) -> list[Boxes | list[Instance]] | None:
    """What one image is asked about, None if nothing was given."""
    if boxes is None:
        return None
    given = [box for box in boxes if isinstance(box, Instance)] if isinstance(boxes, Sequence) else []
    if given and len(given) != len(boxes):  # type: ignore[arg-type]
        raise InputError(f"boxes mix {len(given)} instances with others; give instances or numbers")
    return [given or Boxes(boxes, categories)]  # type: ignore[arg-type]


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
