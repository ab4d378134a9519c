"""See what a model learns from: the sequences of one training sample, token by token, and as an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pix2seq.data.samples import TrainingSet
from pix2seq.drawing import draw_instances
from pix2seq.errors import InputError
from pix2seq.examples import Example, Sample
from pix2seq.geometry.boxes import box_xyxy_to_yxyx
from pix2seq.tasks.task import Task
from pix2seq.tokenizers.captioning import decode_caption
from pix2seq.tokenizers.detection import TOKENS_PER_OBJECT
from pix2seq.tokenizers.keypoint import decode_keypoints
from pix2seq.tokenizers.segmentation import decode_polygons
from pix2seq.training.config import TrainConfig
from pix2seq.training.recipe import prepare
from pix2seq.types import Category, Instance
from pix2seq.vocab import CLASS_BASE, EOS, INVISIBLE, NOISE, SEPARATOR, Vocab

NOISE_CATEGORY = Category(NOISE, NOISE, "noise")


@dataclass(frozen=True)
class Row:
    """One step of the decoder."""

    place: int
    read: int  # the id it reads
    said: int  # the id it should say next
    weight: float  # of that in the loss
    prompt: bool  # whether the id it reads is given rather than learned


def rows(example: Example) -> Iterator[Row]:
    """The steps of a sequence in order."""
    tokens, targets, weights = example.shifted()
    for place, (read, said, weight) in enumerate(zip(tokens, targets, weights, strict=True)):
        yield Row(place, int(read), int(said), float(weight), place < len(example.prompt))


class SequenceView:
    """One training sample of one task, to be read or looked at."""

    def __init__(self, config: TrainConfig, task: str, index: int, *, epoch: int = 0) -> None:
        """Sample `index` as it is in `epoch` of a run with `config`. Raises `InputError` where there is none."""
        recipe = prepare(config)
        (samples,) = (samples for samples in recipe.samples if samples.task.name == task)
        if not isinstance(samples, TrainingSet):
            raise InputError(f"{config.data_of(task)} holds shards, which have no numbers; name the data set itself")
        self.samples = samples
        if not 0 <= index < len(self.samples):
            raise InputError(f"there is no sample {index}; {task} has {len(self.samples)} of them, from 0")
        self.task: Task[Any] = self.samples.task  # type: ignore[assignment]
        self.vocab: Vocab = recipe.vocab
        self.sample: Sample = self.samples[epoch, index]

    def text(self) -> str:
        """A table for each sequence: what the decoder reads, what it should say, and what that counts."""
        lines = [f"image {self.sample.image_id}, {self.task.name}: {len(self.sample.examples)} sequences"]
        for number, example in enumerate(self.sample.examples):
            lines.append(f"\nsequence {number}: {self.summary(example)}")
            lines.append(f"{'place':>5}  {'reads':>5}  {'meaning':<28} {'says':>5}  {'meaning':<28} weight")
            steps = list(rows(example))
            reads, says = self.meanings([row.read for row in steps]), self.meanings([row.said for row in steps])
            for row, read, said in zip(steps, reads, says, strict=True):
                given = f"{read}{' (prompt)' if row.prompt else ''}"
                lines.append(f"{row.place:5d}  {row.read:5d}  {given:<28} {row.said:5d}  {said:<28} {row.weight:g}")
        return "\n".join(lines)

    def meanings(self, tokens: Sequence[int]) -> list[str]:
        """What the ids of a sequence stand for, in words; coordinates are y and x in turn, in pixels of the input."""
        sides = self.sample.image.shape[:2]
        words, axis = [], 0
        for token in tokens:
            word = self.meaning(token)
            if self.vocab.coord_base <= token < self.vocab.coord_end:
                pixels = float(self.vocab.coords(np.array([token]))[0]) * sides[axis]
                word = f"{'yx'[axis]} {word} = {pixels:.1f} px"
            # Separators and invisible points stand in the place of coordinates.
            in_pair = self.vocab.coord_base <= token < self.vocab.coord_end or token in (SEPARATOR, INVISIBLE)
            axis = 1 - axis if in_pair else 0
            words.append(word)
        return words

    def meaning(self, token: int) -> str:
        """What an id stands for wherever it is, in words."""
        label, text_id = token - CLASS_BASE, token - self.vocab.text_base
        if CLASS_BASE <= token < self.vocab.coord_base and label in self.task.categories:
            return f"class {self.task.categories[label].name}"
        if self.task.text is not None and 0 <= text_id < self.task.text.size:
            return f"text {self.task.text.tokens[text_id]!r}"
        return self.vocab.meaning(token)

    def summary(self, example: Example) -> str:
        """A sequence in a few words."""
        if self.task.name == "captioning":
            return decode_caption(example.targets, self.task.text, self.vocab)  # type: ignore[arg-type]
        if self.task.name == "detection":
            classes = example.targets[TOKENS_PER_OBJECT - 1 :: TOKENS_PER_OBJECT]
            return f"{int((classes > NOISE).sum())} objects and {int((classes == NOISE).sum())} noise objects"
        return self.meaning(int(example.prompt[-1]))

    def picture(self) -> Image.Image:
        """The input of the model with what its sequences say drawn on it; noise boxes are thin and white."""
        instances: list[Instance] = []
        captions: list[str] = []
        canvas = Image.fromarray(self.sample.image)
        for example in self.sample.examples:
            if self.task.name == "captioning":
                captions.append(self.summary(example))
            elif self.task.name == "detection":
                for instance in self._objects(example.targets):
                    if instance.category is NOISE_CATEGORY:
                        ImageDraw.Draw(canvas).rectangle(instance.box_xyxy, outline="white")
                    else:
                        instances.append(instance)
            else:
                instances.append(self._object(example))
        caption = " / ".join(captions) or None
        return draw_instances(np.asarray(canvas), instances, scores=False, caption=caption)

    def save(self, path: Path) -> None:
        """Write the image."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.picture().save(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be written ({error}); give a file name such as sequences.png") from None

    def _objects(self, targets: NDArray[np.int64]) -> list[Instance]:
        objects = targets[targets != EOS]
        groups = objects[: len(objects) // TOKENS_PER_OBJECT * TOKENS_PER_OBJECT].reshape(-1, TOKENS_PER_OBJECT)
        return [self._instance(group[:4], int(group[4])) for group in groups]

    def _object(self, example: Example) -> Instance:
        box = self._instance(example.prompt[1:5], int(example.prompt[5]))
        height, width = self.sample.image.shape[:2]
        if self.task.name == "segmentation":
            rings = decode_polygons(example.targets, self.vocab)
            outlines = [(ring[:, ::-1] * [width, height]).astype(np.float32) for ring in rings]
            return Instance(box.box_xyxy, box.category, 1.0, outlines)
        points, given = decode_keypoints(example.targets, len(box.category.keypoints), self.vocab)
        placed = np.column_stack([points[:, ::-1] * [width, height], given * 2]).astype(np.float32)
        return Instance(box.box_xyxy, box.category, 1.0, keypoints=placed)

    def _instance(self, coords: NDArray[np.int64], class_id: int) -> Instance:
        height, width = self.sample.image.shape[:2]
        corners = box_xyxy_to_yxyx(self.vocab.coords(coords)[None])[0] * np.array([width, height] * 2)
        category = NOISE_CATEGORY if class_id == NOISE else self.task.categories[class_id - CLASS_BASE]
        x0, y0, x1, y1 = corners.tolist()
        return Instance((x0, y0, x1, y1), category, 1.0)
