"""Ask a model about training images, and keep its answers for it to learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from pix2seq.data.answers import write_answers
from pix2seq.data.formats.builder import Dataset
from pix2seq.data.image import batch_by_pixels, read_record_image
from pix2seq.errors import InputError
from pix2seq.predictor import Predictor


def record_answers(
    predictor: Predictor,
    dataset: Dataset,
    task: str,
    folder: Path,
    *,
    batch_size: int = 16,
    limit: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Ask about the first `limit` images (0: all) and return the file of the answers, a function of `seed`.

    Raises `InputError` if the model does not know the task, or the task does not learn from its own answers.
    """
    predictor.require(task)
    asked = predictor.tasks[task]
    images = range(min(limit or len(dataset), len(dataset)))
    records: list[dict[str, Any]] = []
    with tqdm(total=len(images), unit="image", disable=not progress) as bar:
        sizes = [(dataset.images[index].width, dataset.images[index].height) for index in images]
        for part in batch_by_pixels(sizes, batch_size):
            targets = [dataset.target(index) for index in images[part.start : part.stop]]
            abouts = [asked.rehearsal(target, seed) for target in targets]
            if any(about is None for about in abouts):
                raise InputError(f"{task} does not learn from its own answers; record those of another task")
            encoded = predictor.encode_batch([read_record_image(target.image) for target in targets])
            for answers in predictor.ask(task, encoded, abouts, seed=seed):
                records += asked.records(answers)
            bar.update(len(targets))
    return write_answers(folder, records)
