"""Write scenes of cut-outs in COCO layout: a class for each name, and whether training sees it.

Image i of a split is a function of (seed, split, i), so it does not depend on the number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pix2seq.data.image_files import IMAGE_SUFFIXES
from pix2seq.data.shapes.writer import SPLITS, VAL_IDS_FROM, check_numbers, save_image, spread
from pix2seq.data.things.cutouts import find_cutouts, split_names
from pix2seq.data.things.scene import PastedThing, compose
from pix2seq.errors import InputError
from pix2seq.files import new_folder

MAX_OBJECTS = 30

Written = tuple[dict[str, Any], list[dict[str, Any]]]  # entry of an image, of its annotations


def write_things(
    out: str | Path,
    cutouts: str | Path,
    *,
    num_train: int,
    num_val: int,
    size: int = 128,
    seed: int = 0,
    unseen_share: float = 0.25,
    max_objects: int = 6,
    backgrounds: str | Path | None = None,
    workers: int = 1,
) -> tuple[int, int]:
    """Write `num_train` and `num_val` images of `size` pixels a side into `out`, a new or empty folder.

    Cut-outs come from the folder `cutouts`, see `find_cutouts`; backgrounds are generated, or parts of the images in
    the folder `backgrounds`. A share `unseen_share` of the names is in no training image; half of the things of
    validation images are of these. Return the number of names that training sees, and of those that it does not.

    Raises `InputError` if the folder is not empty, a number is out of range, or the cut-outs cannot be used.
    """
    check_numbers(num_train, num_val, size, seed, max_objects, most_objects=MAX_OBJECTS)
    if not 0 <= unseen_share < 1:
        raise InputError(f"unseen is {unseen_share}; expected a share from 0 to below 1")
    behind = [] if backgrounds is None else _images(Path(backgrounds))
    with new_folder(Path(out)) as folder:
        (folder / "annotations").mkdir()
        files: dict[str, list[Path]] = {}
        for cutout in find_cutouts(Path(cutouts)):
            files.setdefault(cutout.name, []).append(cutout.path)
        seen, unseen = split_names(list(files), unseen_share, seed)
        ids = {name: number for number, name in enumerate(sorted(files), start=1)}
        for split, count in (("train", num_train), ("val", num_val)):
            groups = [seen, unseen] if split == "val" and unseen else [seen]
            world: dict[str, Any] = {
                "size": size,
                "seed": seed,
                "files": files,
                "max_objects": max_objects,
                "backgrounds": behind,
            }
            write = partial(write_image, split=split, folder=folder / f"{split}2017", groups=groups, ids=ids, **world)
            (folder / f"{split}2017").mkdir()
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            bar = tqdm(spread(write, range(count), workers), total=count, unit="image", desc=f"things {split}")
            for image, found in bar:
                images.append(image)
                for annotation in found:
                    number = VAL_IDS_FROM * SPLITS[split] + len(annotations) + 1
                    is_seen = "no" if annotation.pop("name") in unseen else "yes"
                    annotations.append({"id": number, **annotation, "seen": is_seen})
            content = {
                "info": {"version": "1.0", "description": f"Composed of cut-outs, {split}, seed {seed}"},
                "images": images,
                "annotations": annotations,
                "categories": [
                    {"id": ids[name], "name": name, "supercategory": "thing", "seen": name not in unseen}
                    for name in sorted(name for group in groups for name in group)
                ],
            }
            path = folder / "annotations" / f"instances_{split}2017.json"
            path.write_text(json.dumps(content), encoding="utf-8")
    return len(seen), len(unseen)


def write_image(
    index: int,
    folder: Path,
    *,
    split: str,
    size: int,
    seed: int,
    groups: Sequence[Sequence[str]],
    ids: Mapping[str, int],
    files: Mapping[str, Sequence[Path]],
    max_objects: int,
    backgrounds: Sequence[Path],
) -> Written:
    """Compose and save image `index` of a split; return its COCO entries, with annotations that have no id yet."""
    rng = np.random.default_rng((seed, SPLITS[split], index))
    pixels, things = compose(rng, size, groups, files, max_objects, backgrounds)
    image = save_image(pixels, folder, split, index)
    return image, [_annotation(thing, image["id"], ids[thing.name]) for thing in things]


def _annotation(thing: PastedThing, image_id: int, category_id: int) -> dict[str, Any]:
    x0, y0, x1, y1 = thing.box_xyxy
    return {
        "name": thing.name,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)],
        "area": round(thing.area, 3),
        "iscrowd": 0,
        "segmentation": [[round(v, 3) for v in ring.ravel().tolist()] for ring in thing.rings],
    }


def _images(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise InputError(f"{folder} has no image to use as a background; give a folder of images, or leave it out")
    return found
