"""Ask a trained model about images: encode once, ask many things.

Results are in pixels of the original image (x right, y down, after its EXIF orientation), with the
same types whatever came in.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from pix2seq.data.image import read_image, warp_image
from pix2seq.device import pick_device
from pix2seq.errors import InputError, unknown_name
from pix2seq.geometry.affine import fit_affine
from pix2seq.geometry.boxes import box_xyxy_to_yxyx, padded_region
from pix2seq.model.decoding.generate import Generated, GenerationConfig
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.model.pretrained import find_checkpoint
from pix2seq.tasks import TASKS
from pix2seq.tasks.captioning import Captioning
from pix2seq.tasks.detection import Detection
from pix2seq.tasks.keypoint import Keypoint
from pix2seq.tasks.segmentation import Segmentation
from pix2seq.tasks.task import Task
from pix2seq.tokenizers.detection import TOKENS_PER_OBJECT
from pix2seq.types import Caption, Category, Instance, category_key

ImageLike = str | Path | Image.Image | NDArray[np.uint8] | Tensor
Boxes = Sequence[Instance] | ArrayLike
"""Objects to ask about: instances, or boxes (N, 4) as x0, y0, x1, y1 in pixels of the image."""

AnyTask = TypeVar("AnyTask", bound=Task[Any])
MAX_ROWS = 256  # sequences that are decoded side by side
MAX_CROPS = 16  # images of single objects that are encoded side by side


@dataclass(frozen=True)
class EncodedImage:
    """An image as the decoder sees it, and as people do. Held by the caller."""

    memory: Tensor  # (N, D)
    pixels: NDArray[np.uint8]  # (H, W, 3), the image itself
    canvas_size: tuple[float, float]  # width, height in original pixels of the model's whole input, padding included

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image."""
        return self.pixels.shape[1], self.pixels.shape[0]


@dataclass(frozen=True)
class Prediction:
    """All that was asked about one image."""

    instances: list[Instance] = field(default_factory=list)
    captions: list[Caption] = field(default_factory=list)


class Predictor:
    """A model with everything around it: reading, resizing, asking and reading the answers.

    `seed` in any call fixes what sampling draws.
    """

    def __init__(self, model: Pix2Seq, *, bf16: bool = False) -> None:
        self.model = model.eval()
        self.bf16 = bf16
        self.tasks: dict[str, Task[Any]] = {name: TASKS[name].from_model(model) for name in model.task_settings}
        task = next(iter(self.tasks.values()), None)  # all know the same classes
        known = [] if task is None else task.categories.values()
        self._categories = {category_key(category.name): category for category in known}

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str = "auto", bf16: bool = False) -> Self:
        """Open a checkpoint folder, or the newest checkpoint of a run folder."""
        model = Pix2Seq.from_pretrained(find_checkpoint(Path(path)))
        return cls(model.to(pick_device(device)), bf16=bf16)

    def encode(self, image: ImageLike) -> EncodedImage:
        """Read and encode one image: a path, a PIL image, an array (H, W, 3) or (H, W) of uint8, or a
        tensor (3, H, W) of uint8 or of floats in [0, 1]."""
        return self.encode_batch([image])[0]

    def encode_batch(self, images: Sequence[ImageLike]) -> list[EncodedImage]:
        """As `encode`, for several images of any sizes in one pass."""
        pictures = [load_pixels(image) for image in images]
        size = self.model.config.image_size
        affines = [fit_affine(pixels.shape[:2], size) for pixels in pictures]
        inputs = np.stack([warp_image(pixels, affine, size) for affine, pixels in zip(affines, pictures, strict=True)])
        batch = torch.from_numpy(inputs).permute(0, 3, 1, 2).to(self.model.device).float() / 255
        with torch.inference_mode(), self._autocast():
            memory = self.model.encode(batch)
        return [
            EncodedImage(rows, pixels, (size[1] / affine.scale_x, size[0] / affine.scale_y))
            for rows, pixels, affine in zip(memory, pictures, affines, strict=True)
        ]

    def detect(self, image: EncodedImage | ImageLike, *, seed: int = 0) -> list[Instance]:
        """Objects of one image, best first."""
        return self.detect_batch([self._encoded(image)], seed=seed)[0]

    def detect_batch(self, images: Sequence[EncodedImage], *, seed: int = 0) -> list[list[Instance]]:
        """As `detect`, for several encoded images in one pass."""
        task = self._task(Detection)
        memory = torch.stack([image.memory for image in images])
        out = self._generate(task, memory, np.tile(task.prompt(), (len(images), 1)), task.generation(), seed=seed)
        return [task.instances(out, row, np.array(image.canvas_size), image.size) for row, image in enumerate(images)]

    def segment(
        self,
        image: EncodedImage | ImageLike,
        boxes: Boxes | None = None,
        *,
        categories: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> list[Instance]:
        """Objects with their masks: those of `boxes`, or all that `detect` finds.

        Boxes given as numbers need `categories`, one name for all or one for each, unless the model
        knows a single class. Several outlines are drawn for each object and vote on its mask; see
        `set_num_samples`.
        """
        task = self._task(Segmentation)
        encoded = self._encoded(image)
        given = self._instances(encoded, task.name, boxes, categories, seed)
        copies = task.config.num_samples
        found: list[Instance] = []
        for some in _chunks(given, max(MAX_ROWS // copies, 1)):
            prompts = task.prompts(_relative_yxyx(some, encoded), [instance.category for instance in some])
            out = self._generate(task, encoded.memory[None], prompts, task.generation(), num_samples=copies, seed=seed)
            for index, instance in enumerate(some):
                rows = slice(index * copies, (index + 1) * copies)
                likelihood, score = task.scores(out, rows, instance.score)
                rings, rle = task.mask(out, rows, np.array(encoded.canvas_size), encoded.size)
                found.append(replace(instance, score=score, polygons=rings, rle=rle, mask_score=likelihood))
        return sorted(found, key=lambda instance: -instance.score)

    def keypoints(
        self,
        image: EncodedImage | ImageLike,
        boxes: Boxes | None = None,
        *,
        categories: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> list[Instance]:
        """Objects with their keypoints: those of `boxes`, or all that `detect` finds, whose class has some.

        For `boxes` and `categories`, see `segment`.
        """
        task = self._task(Keypoint)
        encoded = self._encoded(image)
        given = self._instances(encoded, task.name, boxes, categories, seed)
        without = [instance for instance in given if not instance.category.keypoints]
        if without and len(without) == len(given) and boxes is not None and categories is not None:
            raise InputError(f"the class {without[0].category.name!r} has no keypoints; ask about one that has")
        given = [instance for instance in given if instance.category.keypoints]
        found: list[Instance] = []
        for some in _chunks(given, MAX_ROWS if task.crop_padding is None else MAX_CROPS):
            named = [instance.category for instance in some]
            if task.crop_padding is None:
                places = [(encoded, np.zeros(2))] * len(some)
                memory, prompts = encoded.memory[None], task.prompts(_relative_yxyx(some, encoded), named)
            else:
                places = self._crops(encoded, some, task.crop_padding)
                memory = torch.stack([crop.memory for crop, _ in places])
                moved = [_moved(instance, -corner) for instance, (_, corner) in zip(some, places, strict=True)]
                boxes_yxyx = [
                    _relative_yxyx([instance], crop) for instance, (crop, _) in zip(moved, places, strict=True)
                ]
                prompts = task.prompts(np.concatenate(boxes_yxyx), named)
            out = self._generate(task, memory, prompts, [task.generation(category) for category in named], seed=seed)
            for row, (instance, (crop, corner)) in enumerate(zip(some, places, strict=True)):
                points = task.points(out, row, instance.category, np.array(crop.canvas_size))
                points[:, :2] = np.clip(points[:, :2] + corner, 0, encoded.size) * (points[:, 2:] > 0)
                likelihood, score = task.scores(out, row, instance.score)
                found.append(replace(instance, score=score, keypoints=points, keypoint_score=likelihood))
        return sorted(found, key=lambda instance: -instance.score)

    def caption(self, image: EncodedImage | ImageLike, *, seed: int = 0) -> Caption:
        """A sentence about one image."""
        return self.caption_batch([self._encoded(image)], seed=seed)[0]

    def caption_batch(self, images: Sequence[EncodedImage], *, seed: int = 0) -> list[Caption]:
        """As `caption`, for several encoded images in one pass."""
        task = self._task(Captioning)
        prompts = np.tile(task.prompt(), (len(images), 1))
        memory = torch.stack([image.memory for image in images])
        out = self._generate(task, memory, prompts, task.generation(), seed=seed)
        cut = out.truncated.tolist()
        return [Caption(*task.caption(out, row), truncated=cut[row]) for row in range(len(images))]

    def predict(
        self,
        image: EncodedImage | ImageLike,
        tasks: Sequence[str],
        boxes: Boxes | None = None,
        *,
        categories: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> Prediction:
        """Everything that `tasks` name about one image, which is encoded once.

        Objects are detected, or taken from `boxes`; masks and keypoints are added to them, and they keep
        the score of their box. For `boxes` and `categories`, see `segment`.
        """
        encoded = self._encoded(image)
        given = None if boxes is None else [self._given(encoded, boxes, categories)]
        return next(self.predict_batch([encoded], tasks, given, seed=seed))

    def predict_batch(
        self,
        images: Sequence[EncodedImage],
        tasks: Sequence[str],
        boxes: Sequence[Sequence[Instance]] | None = None,
        *,
        seed: int = 0,
    ) -> Iterator[Prediction]:
        """As `predict`, image by image; boxes and captions of all of them come from one pass each."""
        tasks = [tasks] if isinstance(tasks, str) else tasks
        for name in tasks:
            self.require(name)
        if not images:
            return
        captions = self.caption_batch(images, seed=seed) if "captioning" in tasks else None
        if boxes is not None:
            found = [list(given) for given in boxes]
        elif {"detection", "segmentation", "keypoint"} & set(tasks):
            found = self.detect_batch(images, seed=seed)
        else:
            found = [[] for _ in images]
        for index, (image, instances) in enumerate(zip(images, found, strict=True)):
            if "segmentation" in tasks:
                likely = self.worth_asking("segmentation", instances)
                instances = _with_answers(instances, self.segment(image, likely, seed=seed))
            if "keypoint" in tasks:
                likely = self.worth_asking("keypoint", instances)
                instances = _with_answers(instances, self.keypoints(image, likely, seed=seed))
            yield Prediction(instances, [] if captions is None else [captions[index]])

    def worth_asking(self, task: str, instances: Sequence[Instance]) -> list[Instance]:
        """Found objects that `task`, segmentation or keypoint, is asked about: those of a likely box."""
        least = self.tasks[task].config.min_box_score
        return [instance for instance in instances if instance.score >= least]

    def require(self, task: str) -> None:
        """Raise `InputError` where the checkpoint does not know a task."""
        if task not in self.tasks:
            known = ", ".join(self.tasks) or "no task"
            hint = "; give it boxes to ask about" if task == Detection.name and self.tasks else ""
            raise InputError(f"this checkpoint was not trained for {task}; it knows {known}{hint}")

    def ask_for(self, *, num_objects: int | None = None, num_samples: int | None = None) -> None:
        """`set_num_objects` and `set_num_samples` where a number is given."""
        if num_objects is not None:
            self.set_num_objects(num_objects)
        if num_samples is not None:
            self.set_num_samples(num_samples)

    def set_num_samples(self, num_samples: int) -> None:
        """Let this many outlines vote on each mask from now on; 1 for speed. Raises `InputError` without that task."""
        self.tasks[Segmentation.name] = self._task(Segmentation).with_settings(num_samples=num_samples)

    def set_num_objects(self, num_objects: int) -> None:
        """Ask for this many objects from now on, whether or not the model would end before."""
        asked = self._task(Detection).with_settings(num_objects=num_objects)
        if asked.max_seq_len > self.model.decoder.max_seq_len:
            most = (self.model.decoder.max_seq_len - 2) // TOKENS_PER_OBJECT
            raise InputError(f"{num_objects} objects are more than this checkpoint can list; ask for at most {most}")
        self.tasks[Detection.name] = asked

    def _encoded(self, image: EncodedImage | ImageLike) -> EncodedImage:
        return image if isinstance(image, EncodedImage) else self.encode(image)

    def _task(self, kind: type[AnyTask]) -> AnyTask:
        self.require(kind.name)
        task = self.tasks[kind.name]
        assert isinstance(task, kind)
        return task

    def _generate(
        self,
        task: Task[Any],
        memory: Tensor,
        prompts: NDArray[np.int64],
        configs: GenerationConfig | Sequence[GenerationConfig],
        *,
        seed: int,
        num_samples: int = 1,
    ) -> Generated:
        """Answers to prompts (B * I, P) about the images of memory (B, N, D), in their order.

        There is a config for each prompt, or one for all. Warns where an answer was cut at its length.
        """
        # A generator for each image, so that none depends on those beside it.
        generators = [torch.Generator(memory.device).manual_seed(seed) for _ in memory]
        with torch.inference_mode(), self._autocast():
            out = self.model.generate_mixed(
                memory,
                torch.from_numpy(prompts).unbind(),
                [configs] * len(prompts) if isinstance(configs, GenerationConfig) else configs,
                num_samples=num_samples,
                generator=generators,
            )
        if bool(out.truncated.any()):
            # The same words every time, so that Python says it once.
            warnings.warn(f"{task.name}: an answer was cut; {task.cut_hint}", stacklevel=2)
        return out

    def _instances(
        self,
        image: EncodedImage,
        task: str,
        boxes: Boxes | None,
        categories: str | Sequence[str] | None,
        seed: int,
    ) -> list[Instance]:
        """What `task` is asked about: what was detected and is likely, where nothing is given."""
        if boxes is None:
            return self.worth_asking(task, self.detect(image, seed=seed))
        return self._given(image, boxes, categories)

    def _given(self, image: EncodedImage, boxes: Boxes, categories: str | Sequence[str] | None) -> list[Instance]:
        given = [box for box in boxes if isinstance(box, Instance)] if isinstance(boxes, Sequence) else []
        if isinstance(boxes, Sequence) and given and len(given) == len(boxes):
            return [replace(i, category=self._category(i.category.name)) for i in given]
        return self.objects((image.size[1], image.size[0]), boxes, categories)

    def objects(
        self, size: tuple[int, int], boxes: Boxes, categories: str | Sequence[str] | None = None
    ) -> list[Instance]:
        """Boxes (N, 4) as x0, y0, x1, y1 in pixels of an image of `size` (height, width) as objects of score 1.

        For `categories`, see `segment`. Raises `InputError` for boxes or names that cannot be.
        """
        corners = np.asarray(boxes, np.float64)
        if not corners.size:
            return []
        if corners.ndim != 2 or corners.shape[1] != 4 or not np.isfinite(corners).all():
            raise InputError(f"boxes must be finite numbers (N, 4) as x0, y0, x1, y1, got shape {corners.shape}")
        corners = np.clip(corners, 0, np.tile(size[::-1], 2))
        if not (corners[:, 2:] > corners[:, :2]).all():
            raise InputError("boxes must have x1 > x0 and y1 > y0, in pixels and inside the image")
        if categories is None and len(self._categories) > 1:
            raise InputError("boxes need categories: one name for all of them, or one for each")
        names = next(iter(self._categories)) if categories is None else categories
        listed = [names] * len(corners) if isinstance(names, str) else list(names)
        if len(listed) != len(corners):
            raise InputError(f"{len(corners)} boxes were given with {len(listed)} categories; give one for each")
        return [
            Instance((float(b[0]), float(b[1]), float(b[2]), float(b[3])), self._category(name), 1.0)
            for b, name in zip(corners, listed, strict=True)
        ]

    def _category(self, name: str) -> Category:
        if category_key(name) not in self._categories:
            raise unknown_name("category", name, [category.name for category in self._categories.values()])
        return self._categories[category_key(name)]

    def _crops(
        self, image: EncodedImage, instances: Sequence[Instance], padding: float
    ) -> list[tuple[EncodedImage, NDArray[np.float64]]]:
        """An image of each object, encoded, and where its corner lies in the whole image."""
        regions = [padded_region(np.array(instance.box_xyxy), *image.size, padding) for instance in instances]
        crops = self.encode_batch([image.pixels[y0:y1, x0:x1] for x0, y0, x1, y1 in regions])
        return [(crop, np.array(region[:2], np.float64)) for crop, region in zip(crops, regions, strict=True)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)


def _relative_yxyx(instances: Sequence[Instance], image: EncodedImage) -> NDArray[np.floating]:
    """Boxes (I, 4) in [0, 1] of the model's input."""
    boxes = np.array([instance.box_xyxy for instance in instances], np.float64).reshape(-1, 4)
    return box_xyxy_to_yxyx(boxes / np.tile(image.canvas_size, 2))


def _moved(instance: Instance, by: NDArray[np.float64]) -> Instance:
    x0, y0, x1, y1 = (np.array(instance.box_xyxy) + np.tile(by, 2)).tolist()
    return replace(instance, box_xyxy=(x0, y0, x1, y1))


def _with_answers(instances: Sequence[Instance], answers: Sequence[Instance]) -> list[Instance]:
    """Masks and keypoints from `answers` on the instances with the same box and class, with their own scores."""
    by_object = {(answer.box_xyxy, answer.category): answer for answer in answers}
    return [
        replace(by_object.get((instance.box_xyxy, instance.category), instance), score=instance.score)
        for instance in instances
    ]


def _chunks(instances: Sequence[Instance], size: int) -> list[Sequence[Instance]]:
    return [instances[start : start + size] for start in range(0, len(instances), size)]


def load_pixels(image: ImageLike) -> NDArray[np.uint8]:
    """Any accepted form of an image to uint8 pixels (H, W, 3). Raises `InputError` for all others."""
    if not isinstance(image, Tensor):
        return read_image(image)
    if image.ndim != 3 or image.shape[0] != 3:
        raise InputError(f"expected a tensor (3, H, W), got one of shape {tuple(image.shape)}")
    values = image.detach().cpu()
    if values.dtype != torch.uint8:
        if not values.is_floating_point() or values.min() < 0 or values.max() > 1:
            raise InputError("expected a tensor of uint8, or of floats in [0, 1]")
        values = (values.float() * 255).round().to(torch.uint8)
    return np.ascontiguousarray(values.permute(1, 2, 0).numpy())
