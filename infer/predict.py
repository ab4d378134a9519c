"""Ask about images: `python infer/predict.py IMAGE... --checkpoint DIR --task ...`, or `pix2seq predict`.

Writes NAME.json and NAME.png for every image.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pix2seq.data.image import read_image
from pix2seq.errors import InputError
from pix2seq.files import output_folder
from pix2seq.predictor import Prediction, Predictor
from pix2seq.tasks.objects import Boxes
from pix2seq.tasks.request import EncodedImage


def predict_files(
    images: Sequence[Path],
    *,
    checkpoint: Path,
    out: Path,
    tasks: Sequence[str] | None = None,
    boxes: Path | None = None,
    about: str | None = None,
    settings: Mapping[str, Any] | None = None,
    min_score: float = 0.3,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "auto",
    bf16: bool = False,
) -> None:
    """Run `tasks`, by default all that the checkpoint knows, on image files; write NAME.json and NAME.png into `out`.

    An image that cannot be read stops nothing: the others are done first, then an `InputError` names it. Tasks about
    objects take them from detection, or from `boxes`: a file as this writes it, or a folder of such files. `about` is
    text for the tasks that take some, see `Task.parse_about`; `settings` are those of `Predictor.configure`.
    `min_score` applies to the drawing alone.
    """
    if not images:
        raise InputError("no image was given; name one or more image files")
    repeated = [stem for stem, count in Counter(path.stem for path in images).items() if count > 1]
    if repeated:
        raise InputError(f"{len(repeated)} names are shared by several images, {repeated[0]!r} for one; rename them")
    output_folder(out)
    predictor = Predictor.from_pretrained(checkpoint, device=device, bf16=bf16)
    tasks = tuple(predictor.tasks) if tasks is None else tasks
    for name in tasks:
        predictor.require(name)
    predictor.configure(**(settings or {}))
    asked = {name: predictor.tasks[name] for name in tasks}
    texts = {} if about is None else {name: t.parse_about(about) for name, t in asked.items() if t.about_format}
    if about is not None and not texts:
        raise InputError(f"--about was given, but none of {', '.join(tasks)} takes it; they ask about whole images")
    with_boxes = [name for name, task in asked.items() if boxes is not None and task.needs]
    if boxes is not None and not with_boxes:
        raise InputError(f"--boxes was given, but none of {', '.join(tasks)} asks about objects")

    unreadable: list[InputError] = []
    with tqdm(total=len(images), unit="image", disable=len(images) <= batch_size) as bar:
        for start in range(0, len(images), batch_size):
            some = images[start : start + batch_size]
            readable, encoded = _encode(predictor, some, unreadable)
            given: dict[str, list[Any]] = {name: [value] * len(encoded) for name, value in texts.items()}
            if boxes is not None:
                read = [read_boxes(boxes, path) for path in readable]
                given |= dict.fromkeys(with_boxes, read)
            predictions = predictor.predict_batch(encoded, tasks, given, seed=seed)
            for path, prediction in zip(readable, predictions, strict=True):
                write_result(out / path.stem, path, prediction, min_score=min_score)
            bar.update(len(some))
    if unreadable:
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise InputError(f"{unreadable[0]}{more}")


def _encode(
    predictor: Predictor, paths: Sequence[Path], unreadable: list[InputError]
) -> tuple[list[Path], list[EncodedImage]]:
    readable, pixels = [], []
    for path in paths:
        try:
            pixels.append(read_image(path))
            readable.append(path)
        except InputError as error:
            unreadable.append(error)
    return readable, predictor.encode_batch(pixels) if pixels else []


def read_boxes(boxes: Path, image: Path) -> Boxes:
    """Read the objects of an image from a NAME.json, or from the file of its name in a folder."""
    path = boxes / f"{image.stem}.json" if boxes.is_dir() else boxes
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["instances"]
        sides = [[float(value) for value in entry["bbox"]] for entry in entries]
        corners = [(x, y, x + width, y + height) for x, y, width, height in sides]
        names = [str(entry["category"]) for entry in entries]
        return Boxes(corners, names, [float(entry.get("score", 1.0)) for entry in entries])
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a NAME.json for each image, as predict writes it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no file of boxes ({type(error).__name__}: {error}); expected "
            '{"instances": [{"bbox": [x, y, width, height], "category": NAME, "score": 0 to 1}]}'
        ) from None


def write_result(stem: Path, source: Path, prediction: Prediction, *, min_score: float) -> None:
    """Write `stem`.json and `stem`.png."""
    content = {"image": source.name} | prediction.to_json()
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    prediction.draw(min_score=min_score).save(stem.with_name(f"{stem.name}.png"))


if __name__ == "__main__":
    from pix2seq.cli import main

    sys.exit(main(["predict", *sys.argv[1:]]))
