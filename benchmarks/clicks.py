"""What clicks are worth: against detecting all objects and segmenting the box under the click, on the same images.

    python benchmarks/clicks.py --checkpoint runs/prompted --baseline checkpoints/shapes --data world

The first click on each object is the one that `pix2seq eval` makes. A user without clicks takes the best detected box
that the click lies in; where there is none, the IoU is 0. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pix2seq import Predictor
from pix2seq.data.dataset import open_dataset
from pix2seq.data.image import read_record_image
from pix2seq.geometry.clicks import Click, first_click, mask_iou
from pix2seq.geometry.polygons import rasterize


def main() -> None:
    """Measure, and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="model that answers clicks")
    parser.add_argument("--baseline", type=Path, required=True, help="model that detects and segments")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, default=0, help="only the first N images")
    args = parser.parse_args()
    clicked, detector = Predictor.from_pretrained(args.checkpoint), Predictor.from_pretrained(args.baseline)
    dataset = open_dataset(args.data, args.split)
    found: dict[str, list[float]] = {"clicks": [], "detect_then_segment": []}
    milliseconds: list[float] = []
    for index in tqdm(range(min(args.limit or len(dataset), len(dataset)))):
        target = dataset.target(index)
        pixels = read_record_image(target.image)
        image, other = clicked.encode(pixels), detector.encode(pixels)
        objects = detector.segment(other)
        for rings, crowd in zip(target.segmentations, target.iscrowd, strict=True):
            truth = rasterize(rings, *pixels.shape[:2]) if isinstance(rings, list) and not crowd else np.zeros((1, 1))
            if not truth.any():
                continue
            click = first_click(truth)
            started = time.perf_counter()
            answers = clicked.click(image, [(click.x, click.y)])
            milliseconds.append(1e3 * (time.perf_counter() - started))
            found["clicks"].append(iou_of(answers[0].polygons if answers else [], truth))
            under = [each for each in objects if contains(each.box_xyxy, click)]
            best = max(under, key=lambda each: each.score, default=None)
            found["detect_then_segment"].append(iou_of(best.polygons if best else [], truth))
    numbers: dict[str, Any] = {f"mIoU@1 of {name}": float(np.mean(ious)) for name, ious in found.items()}
    numbers |= {"ms_per_click": float(np.median(milliseconds)), "num_objects": len(milliseconds)}
    print(json.dumps(numbers, indent=2))


def iou_of(rings: list[NDArray[np.float32]], truth: NDArray[np.bool_]) -> float:
    """Return the IoU of rings with a mask (H, W)."""
    return mask_iou(rasterize(rings, *truth.shape), truth)


def contains(box_xyxy: tuple[float, float, float, float], click: Click) -> bool:
    """Return whether a click lies in a box."""
    x0, y0, x1, y1 = box_xyxy
    return x0 <= click.x <= x1 and y0 <= click.y <= y1


if __name__ == "__main__":
    main()
