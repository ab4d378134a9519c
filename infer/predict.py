"""Ask about images: `python infer/predict.py IMAGE... --checkpoint DIR --task ...`, or `pix2seq predict`.

Writes NAME.json and NAME.png for every image.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from pix2seq.cli import add_predict, run_guarded
from pix2seq.data.image import read_image
from pix2seq.drawing import draw_instances
from pix2seq.errors import InputError
from pix2seq.files import output_folder
from pix2seq.predictor import EncodedImage, Prediction, Predictor
from pix2seq.types import Instance


def predict_files(
    images: Sequence[Path],
    *,
    checkpoint: Path,
    out: Path,
    tasks: Sequence[str] | None = None,
    boxes: Path | None = None,
    num_objects: int | None = None,
    num_samples: int | None = None,
    min_score: float = 0.3,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "auto",
    bf16: bool = False,
) -> None:
    """Do `tasks`, all that the checkpoint knows by default, on image files; write NAME.json and NAME.png into `out`.

    An image that cannot be read stops nothing: the others are done first, then an `InputError`
    names it. Objects are detected, or taken from `boxes`: a file as this writes it, or a folder of
    such files. `min_score` applies to the drawing alone.
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
    predictor.ask_for(num_objects=num_objects, num_samples=num_samples)

    unreadable: list[InputError] = []
    one_by_one = {"segmentation", "keypoint"} & set(tasks)  # these take long even for a few images
    with tqdm(total=len(images), unit="image", disable=len(images) <= (1 if one_by_one else batch_size)) as bar:
        for start in range(0, len(images), batch_size):
            some = images[start : start + batch_size]
            readable, encoded = _encode(predictor, some, unreadable)
            bar.update(len(some) - len(readable))
            given = None
            if boxes is not None:
                given = [read_boxes(boxes, p, e.size, predictor) for p, e in zip(readable, encoded, strict=True)]
            predictions = predictor.predict_batch(encoded, tasks, given, seed=seed)
            for path, image, prediction in zip(readable, encoded, predictions, strict=True):
                write_result(out / path.stem, path, image, prediction, min_score=min_score)
                bar.update()
    if unreadable:
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise InputError(f"{unreadable[0]}{more}")


def _encode(
    predictor: Predictor, paths: Sequence[Path], unreadable: list[InputError]
) -> tuple[list[Path], list[EncodedImage]]:
    readable, pictures = [], []
    for path in paths:
        try:
            pictures.append(read_image(path))
            readable.append(path)
        except InputError as error:
            unreadable.append(error)
    return readable, predictor.encode_batch(pictures) if pictures else []


def read_boxes(boxes: Path, image: Path, size: tuple[int, int], predictor: Predictor) -> list[Instance]:
    """The objects in NAME.json, or in a folder's NAME.json, of an image of `size` (width, height)."""
    path = boxes / f"{image.stem}.json" if boxes.is_dir() else boxes
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["instances"]
        sides = [[float(value) for value in entry["bbox"]] for entry in entries]
        corners = [(x, y, x + width, y + height) for x, y, width, height in sides]
        names = [str(entry["category"]) for entry in entries]
        scores = [float(entry.get("score", 1.0)) for entry in entries]
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a NAME.json for each image, as predict writes it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no file of boxes ({type(error).__name__}: {error}); expected "
            '{"instances": [{"bbox": [x, y, width, height], "category": NAME, "score": 0 to 1}]}'
        ) from None
    found = predictor.objects((size[1], size[0]), corners, names)
    return [replace(instance, score=score) for instance, score in zip(found, scores, strict=True)]


def write_result(stem: Path, source: Path, image: EncodedImage, prediction: Prediction, *, min_score: float) -> None:
    """Write `stem`.json and `stem`.png."""
    width, height = image.size
    content = {
        "image": source.name,
        "width": width,
        "height": height,
        "instances": [instance.to_json() for instance in prediction.instances],
        "captions": [caption.to_json() for caption in prediction.captions],
    }
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    caption = prediction.captions[0].text if prediction.captions else None
    drawing = draw_instances(image.pixels, prediction.instances, min_score=min_score, caption=caption)
    drawing.save(stem.with_name(f"{stem.name}.png"))


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_predict(parser)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))
