"""See what a model learns from: the sequences of one training sample, token by token, and drawn on the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pix2seq.data.samples import TrainingStream
from pix2seq.drawing import Canvas, Chip, Color, category_color, draw_chips, tile
from pix2seq.errors import InputError
from pix2seq.examples import Example, Sample
from pix2seq.tasks.request import Frame
from pix2seq.tasks.task import Task
from pix2seq.tasks.transcript import read_tokens
from pix2seq.training.config import TrainConfig
from pix2seq.training.recipe import prepare


@dataclass(frozen=True)
class Row:
    """One step of the decoder."""

    position: int
    read: int  # the id that the decoder reads
    said: int  # the id that it should say next
    weight: float  # of that in the loss
    prompt: bool  # whether the id that it reads is given rather than learned


def rows(example: Example) -> Iterator[Row]:
    """Yield the steps of a sequence in order."""
    tokens, targets, weights = example.shifted()
    for position, (read, said, weight) in enumerate(zip(tokens, targets, weights, strict=True)):
        yield Row(position, int(read), int(said), float(weight), position < len(example.prompt))


class SequenceView:
    """One training sample of one task, as text or as a drawing."""

    def __init__(self, config: TrainConfig, task: str, index: int, *, epoch: int = 0) -> None:
        """Make sample `index` of an `epoch` of a run with `config`. Raises `InputError` if there is none."""
        recipe = prepare(replace(config, features=None))
        (samples,) = (samples for samples in recipe.samples if task in samples.tasks)
        if isinstance(samples, TrainingStream):
            raise InputError(f"{config.data_of(task)} holds shards, which have no numbers; name the data set itself")
        if not 0 <= index < len(samples):
            raise InputError(f"there is no sample {index}; {task} has {len(samples)} of them, from 0")
        self.task = cast("Task[Any]", next(each for each in samples.maker.tasks if each.name == task))
        self.sample: Sample = samples[epoch, index]
        self.examples = self.sample.examples.get(task, [])

    def text(self) -> str:
        """Return a table for each sequence: what the decoder reads, what it should say, and what that counts."""
        lines = [f"image {self.sample.image_id}, {self.task.name}: {len(self.examples)} sequences"]
        for number, example in enumerate(self.examples):
            lines.append(f"\nsequence {number}: {self.task.summary(example)}")
            lines.append(f"{'step':>5}  {'reads':>5}  {'meaning':<28} {'says':>5}  {'meaning':<28} weight")
            steps = list(rows(example))
            reads = self.meanings([row.read for row in steps], example.closeup)
            says = self.meanings([row.said for row in steps], example.closeup)
            for row, read, said in zip(steps, reads, says, strict=True):
                given = f"{read}{' (prompt)' if row.prompt else ''}"
                lines.append(f"{row.position:5d}  {row.read:5d}  {given:<28} {row.said:5d}  {said:<28} {row.weight:g}")
        return "\n".join(lines)

    def meanings(self, tokens: Sequence[int], closeup: NDArray[np.float32] | None = None) -> list[str]:
        """Say what the ids of a sequence stand for; coordinates are y and x in turn, in pixels of the input.

        `closeup` is that of the sequence's `Example`.
        """
        height, width = self.sample.image.shape[:2]
        y0, x0, y1, x1 = (0.0, 0.0, 1.0, 1.0) if closeup is None else closeup.tolist()
        scale = np.array([width, height], np.float64)
        frame = Frame(np.array([x0, y0]) * scale, np.array([x1 - x0, y1 - y0]) * scale)
        return [str(token) for token in read_tokens(self.task, tokens, frame)]

    def drawing(self) -> Image.Image:
        """Draw what the sequences say on the model's input."""
        canvas = Canvas(self.sample.image, scores=False)
        size = (self.sample.image.shape[0], self.sample.image.shape[1])
        shown = [answer for example in self.examples for answer in self.task.shown(example, size)]
        self.task.draw(canvas, shown)
        return canvas.finish()

    def sheet(self, *, most: int = 3) -> Image.Image:
        """Return the drawing with the tokens of the first `most` sequences beside it, each with its meaning."""
        parts: list[str | Chip] = []
        for example in self.examples[:most]:
            parts.append(self.task.summary(example))
            tokens = [int(token) for token in (*example.prompt, *example.targets)]
            meanings = self.meanings(tokens, example.closeup)
            weights = [0.0] * len(example.prompt) + [float(weight) for weight in example.weights]
            for position, (token, meaning, weight) in enumerate(zip(tokens, meanings, weights, strict=True)):
                kind, _, name = meaning.partition(" ")
                color: Color = (232, 232, 226)
                if kind in "yx":  # y bin:31 = 23.4 px
                    name, color = f"{kind} {float(name.split()[2]):.0f}", (214, 228, 246)
                elif kind == "class":
                    color = category_color(name)
                is_prompt = position < len(example.prompt)
                ends_line = not is_prompt and kind in ("class", "noise")  # of an object
                word = name or kind.removeprefix("task:")
                parts.append(Chip(token, word, color, weight > 0, is_prompt=is_prompt, ends_line=ends_line))
        if len(self.examples) > most:
            parts.append(f"and {len(self.examples) - most} more")
        return tile([self.drawing(), draw_chips(parts)], columns=2, gap=16)

    def save(self, path: Path, *, tokens: bool = False) -> None:
        """Write the drawing, or with `tokens` the sheet."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            (self.sheet() if tokens else self.drawing()).save(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be written ({error}); give a file name such as sequences.png") from None
