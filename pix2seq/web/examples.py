"""Images to try a model on, for people who have none at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pix2seq.data.image import read_image
from pix2seq.data.image_files import IMAGE_SUFFIXES
from pix2seq.data.shapes.scene import CLASS_NAMES, make_scene
from pix2seq.data.shapes.writer import jpeg
from pix2seq.errors import InputError
from pix2seq.predictor import Predictor

NUM_EXAMPLES = 8
MAX_FIGURES = 4  # in a generated image
PERSON_SHARE = 0.35  # so that keypoints are seen
SIZE = 384  # pixels a side of generated images; the model sees them smaller, people as they are
SEED = 20_261_129  # no model was trained or chosen on these


@dataclass(frozen=True)
class ExampleImage:
    """An image as the page shows and sends it."""

    name: str
    content: bytes  # a JPEG


def example_images(predictor: Predictor, folder: Path | None) -> list[ExampleImage]:
    """Return the first images of a folder; without one, generated images if the model's classes are theirs, or none.

    Raises `InputError` if the folder cannot be read or holds no images.
    """
    if folder is not None:
        return _from_folder(folder)
    known = {category.name for task in predictor.tasks.values() for category in task.categories.values()}
    return [_generated(index) for index in range(NUM_EXAMPLES)] if known <= set(CLASS_NAMES) else []


def _from_folder(folder: Path) -> list[ExampleImage]:
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); give a folder of images") from None
    if not paths:
        raise InputError(f"{folder} holds no images; give a folder with some of {', '.join(sorted(IMAGE_SUFFIXES))}")
    return [ExampleImage(path.stem, jpeg(read_image(path))) for path in paths[:NUM_EXAMPLES]]


def _generated(index: int) -> ExampleImage:
    scene = make_scene(np.random.default_rng((SEED, index)), SIZE, MAX_FIGURES, person_share=PERSON_SHARE)
    return ExampleImage(f"shapes-{index + 1}", jpeg(scene.image))
