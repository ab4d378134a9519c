"""Overfit a few real images with boxes, masks, keypoints and captions, then score them.

    python benchmarks/overfit.py COCO_FOLDER [--images 8] [--out DIR] [--json] [key=value ...]

Uses the first training images with a person's keypoints as both splits, trains configs/overfit.yaml on them,
all four tasks in one model, and evaluates with `pix2seq eval`. A model that cannot overfit them has a broken
part. Dated results: benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pix2seq.cli import main, run_guarded
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.formats.coco_files import find_files
from pix2seq.errors import InputError
from pix2seq.tasks import BUILT_IN
from pix2seq.training.config import config_file

MIN_POINTS = 5  # one person must have more labelled keypoints than this
SHOWN = ("AP50", "segmentation/true_boxes/AP50", "keypoint/true_boxes/AP50", "captioning/BLEU-4")


def write_subset(source: Path, out: Path, num_images: int) -> None:
    """Write the first `num_images` training images with a person's keypoints as both splits of a new COCO folder."""
    found = find_files(source, "train")
    assert found is not None
    dataset = read_coco(source, "train")
    chosen: dict[int, Path] = {}
    for index, image in enumerate(dataset.images):
        if ((dataset.target(index).keypoints[..., 2] > 0).sum(axis=-1) > MIN_POINTS).any():
            chosen[image.id] = image.path
        if len(chosen) == num_images:
            break
    (out / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (out / split).mkdir()
        for path in chosen.values():
            shutil.copy(path, out / split)
        for kind, file in found.files.items():
            content = json.loads(file.read_bytes().decode("utf-8-sig"))
            content["images"] = [image for image in content["images"] if image["id"] in chosen]
            content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
            (out / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def overfit(source: Path, out: Path, num_images: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train and evaluate; return what `pix2seq eval` wrote."""
    if out.exists():
        raise InputError(f"{out} already exists; give a new folder with --out, or remove it")
    write_subset(source, out / "data", num_images)
    config = str(config_file("overfit.yaml"))
    arguments = ["--task", ",".join(BUILT_IN), "--config", config, f"data={out / 'data'}", f"out={out / 'run'}"]
    if main(["train", *arguments, *overrides]):
        raise InputError("training failed")
    arguments = ["--checkpoint", str(out / "run"), "--data", str(out / "data"), "--out", str(out / "metrics.json")]
    if main(["eval", *arguments]):
        raise InputError("evaluation failed")
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="COCO folder")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/overfit"), help="new folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)  # settings may follow options
    metrics = overfit(args.source, args.out, args.images, args.settings)
    for name in SHOWN:
        print(f"{name:32} {metrics['metrics'][name]:.3f}")
    if args.json:
        print(json.dumps({"benchmark": "overfit", "images": args.images, "metrics": metrics["metrics"]}))


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))
