"""Write a generated data set in COCO layout with COCO's file names, and draw a contact sheet of it.

Image i of a split is a function of (seed, split, i), so it does not depend on the number of processes.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pix2seq.data.formats.coco import read_coco
from pix2seq.data.image import read_image
from pix2seq.data.shapes.captions import captions
from pix2seq.data.shapes.person import KEYPOINTS, SKELETON
from pix2seq.data.shapes.scene import CLASS_NAMES, MAX_FIGURES, STUFF, Figure, make_scene
from pix2seq.drawing import draw_target, tile
from pix2seq.errors import InputError, unknown_name
from pix2seq.files import new_folder

SPLITS = {"train": 0, "val": 1}  # part of the seed; also keeps image ids distinct
VAL_IDS_FROM = 5_000_000
JPEG_QUALITY = 92
# As in COCO, ids have gaps and the person comes first; this exposes code that uses ids as indices.
CATEGORY_IDS = {name: 1 if name == "person" else 3 + 2 * i for i, name in enumerate(CLASS_NAMES)}
STUFF_IDS = {name: 101 + 2 * i for i, name in enumerate(STUFF)}

T = TypeVar("T")
Written = tuple[dict[str, Any], list[dict[str, Any]], list[str]]  # entry of an image, of its annotations, captions


def write_shapes(
    out: str | Path,
    *,
    num_train: int,
    num_val: int,
    size: int = 128,
    seed: int = 0,
    max_objects: int = MAX_FIGURES,
    easy: bool = False,
    person_share: float | None = None,
    classes: Sequence[str] | None = None,
    stuff: bool = False,
    workers: int = 1,
) -> None:
    """Write `num_train` and `num_val` images of `size` pixels a side into `out`, a new or empty folder.

    Each has 1 to `max_objects` figures; for the other options, see `make_scene`. Raises `InputError`
    if the folder is not empty, a number is out of range or a class is unknown.
    """
    out = Path(out)
    check_numbers(num_train, num_val, size, seed, max_objects, most_objects=MAX_FIGURES)
    if person_share is not None and not 0 <= person_share <= 1:
        raise InputError(f"person-share is {person_share}; expected a share from 0 to 1")
    for name in classes or ():
        if name not in CLASS_NAMES:
            raise unknown_name("class", name, CLASS_NAMES)
    if person_share is not None and classes is not None and not set(classes) - {"person"}:
        raise InputError("person-share needs a class beside the person; name one more, or leave it out")
    with new_folder(out) as folder:
        (folder / "annotations").mkdir()
        world: dict[str, Any] = {"size": size, "seed": seed, "max_objects": max_objects, "easy": easy}
        world |= {"person_share": person_share, "classes": classes, "stuff": stuff}
        command = f"pix2seq data shapes DIR --train {num_train} --val {num_val} --size {size} --seed {seed}"
        command += f" --max-objects {max_objects}" if max_objects != MAX_FIGURES else ""
        command += " --easy" if easy else ""
        command += f" --person-share {person_share}" if person_share is not None else ""
        command += f" --classes {','.join(classes)}" if classes else ""
        command += " --stuff" if stuff else ""
        info = {"version": "1.0", "year": 2026, "command": command}
        for split, count in (("train", num_train), ("val", num_val)):
            described = {"description": f"Generated shapes, {split}, seed {seed}", **info}
            write = partial(write_image, split=split, **world)
            _write_split(folder, split, count, write, described, workers, stuff)


def check_numbers(num_train: int, num_val: int, size: int, seed: int, max_objects: int, *, most_objects: int) -> None:
    """Raise `InputError` if a number of a generated data set is out of range."""
    if not 32 <= size <= 2048:
        raise InputError(f"size is {size}; expected 32 to 2048 pixels")
    for name, count in (("train", num_train), ("val", num_val)):
        if not 0 <= count < VAL_IDS_FROM:
            raise InputError(f"{name} is {count}; expected 0 to {VAL_IDS_FROM - 1} images")
    if not 1 <= max_objects <= most_objects:
        raise InputError(f"max-objects is {max_objects}; expected 1 to {most_objects}")
    if seed < 0:
        raise InputError(f"seed is {seed}; expected 0 or more")


def save_image(pixels: NDArray[np.uint8], folder: Path, split: str, index: int) -> dict[str, Any]:
    """Write image `index` of a split, (H, W, 3), and return its COCO entry."""
    image_id = VAL_IDS_FROM * SPLITS[split] + index + 1
    name = f"{image_id:012d}.jpg"
    (folder / name).write_bytes(jpeg(pixels))
    return {"file_name": name, "height": pixels.shape[0], "width": pixels.shape[1], "id": image_id}


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Encode pixels (H, W, 3)."""
    encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return bytes(encoded.tobytes())


def contact_sheet(
    folder: str | Path, *, rows: int = 2, columns: int = 4, split: str = "val", first: int = 0, width: int = 1200
) -> Image.Image:
    """Draw a sheet, `width` pixels wide, of a split in COCO layout from image `first` on, with all annotations."""
    dataset = read_coco(folder, split)
    drawn = []
    for index in range(first, min(first + rows * columns, len(dataset))):
        target = dataset.target(index)
        drawn.append(draw_target(read_image(target.image.path), target, dataset.categories))
    sheet = tile(drawn, columns=columns)
    return sheet.resize((width, round(sheet.height * width / sheet.width)), Image.Resampling.LANCZOS)


def _write_split(
    folder: Path,
    split: str,
    count: int,
    write: Callable[..., Written],
    info: dict[str, Any],
    workers: int,
    stuff: bool,
) -> None:
    image_folder = folder / f"{split}2017"
    image_folder.mkdir()
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    bar = tqdm(
        spread(partial(write, folder=image_folder), range(count), workers),
        total=count,
        unit="image",
        desc=f"shapes {split}",
    )
    for image, found, sentences in bar:
        images.append(image)
        for annotation in found:
            instances.append({"id": VAL_IDS_FROM * SPLITS[split] + len(instances) + 1, **annotation})
        for sentence in sentences:
            entry = {"id": VAL_IDS_FROM * SPLITS[split] + len(texts) + 1, "image_id": image["id"], "caption": sentence}
            texts.append(entry)
    people = [annotation for annotation in instances if "keypoints" in annotation]
    plain = [{k: v for k, v in a.items() if k not in ("keypoints", "num_keypoints")} for a in instances]
    categories = [
        {"supercategory": "figure" if name == "person" else "shape", "id": category_id, "name": name}
        for name, category_id in sorted(CATEGORY_IDS.items(), key=lambda item: item[1])
    ]
    if stuff:
        categories = [{**category, "isthing": 1} for category in categories]
        categories += [{"supercategory": "stuff", "id": i, "name": name, "isthing": 0} for name, i in STUFF_IDS.items()]
    person = {**categories[0], "keypoints": KEYPOINTS, "skeleton": [list(pair) for pair in SKELETON]}
    common = {
        "info": info,
        "licenses": [{"id": 1, "name": "Generated; no rights reserved", "url": ""}],
        "images": images,
    }
    for kind, part in (
        ("instances", {"annotations": plain, "categories": categories}),
        ("person_keypoints", {"annotations": people, "categories": [person]}),
        ("captions", {"annotations": texts}),
    ):
        path = folder / "annotations" / f"{kind}_{split}2017.json"
        path.write_text(json.dumps({**common, **part}), encoding="utf-8")


def spread(write: Callable[[int], T], indices: Iterable[int], workers: int) -> Iterator[T]:
    """Yield what a function returns for each index, in order, from several processes."""
    if workers <= 1:
        yield from map(write, indices)
        return
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_one_thread) as pool:
        yield from pool.imap(write, indices, chunksize=32)


def _one_thread() -> None:
    cv2.setNumThreads(1)


def write_image(
    index: int,
    folder: Path,
    *,
    split: str,
    size: int,
    seed: int,
    max_objects: int,
    easy: bool,
    person_share: float | None,
    classes: Sequence[str] | None,
    stuff: bool,
) -> Written:
    """Draw and save image `index` of a split; return its COCO entries, with annotations that have no id yet."""
    rng = np.random.default_rng((seed, SPLITS[split], index))
    scene = make_scene(rng, size, max_objects, easy=easy, person_share=person_share, classes=classes, stuff=stuff)
    image = {"license": 1, **save_image(scene.image, folder, split, index)}
    annotations = [_annotation(figure, image["id"]) for figure in [*scene.figures, *scene.stuff]]
    return image, annotations, captions(scene, rng)


def _annotation(figure: Figure, image_id: int) -> dict[str, Any]:
    x0, y0, x1, y1 = figure.box_xyxy
    entry: dict[str, Any] = {
        "image_id": image_id,
        "category_id": (CATEGORY_IDS | STUFF_IDS)[figure.name],
        "bbox": [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)],
        "area": round(figure.area, 3),
        "iscrowd": 0,
        "segmentation": [[round(v, 3) for v in ring.ravel().tolist()] for ring in figure.rings],
    }
    if figure.name not in STUFF:
        entry |= {"colour": figure.colour, "texture": figure.texture}
    if figure.keypoints is not None:
        points = figure.keypoints
        entry["keypoints"] = [v for x, y, seen in points.tolist() for v in (round(x, 2), round(y, 2), int(seen))]
        entry["num_keypoints"] = int((points[:, 2] > 0).sum())
    return entry
