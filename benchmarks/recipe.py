"""What helps a small model learn: variants of a recipe, trained for as many steps each, in one table.

    python benchmarks/recipe.py GROUP [--steps N] [--seeds 0 1 2] [--only NAME ...] [--out DIR] [--json]

Groups: `masks` (segmentation alone: how the model looks at an object, and how a mask is written; 35 objects a step, as
crops or on 16 images), `boxes` (detection alone, on the easy world) and `all` (four tasks that share images). Images
have 96 pixels and at most 3 objects, as the default world takes longer to learn than such runs. All variants of a group
train on the same generated images with the same model, apart from what they change. Minutes are processor time of
training and its evaluation; set OMP_NUM_THREADS=1, and other work on the machine changes little. Dated results:
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import machine

from pix2seq.cli import run_guarded
from pix2seq.data.shapes import write_shapes
from pix2seq.training.config import config_file, load_config
from pix2seq.training.loop import run

CLOSEUP = ("model.encoder.closeups=true", "segmentation.closeup=true")
CROP = ("segmentation.crop=true", "batch_size=35")  # 16 images have as many objects
EVEN = ("segmentation.even_points=32", "segmentation.random_start=false")
GROUPS: Mapping[str, Mapping[str, Any]] = {
    "masks": {
        "config": "segmentation_shapes.yaml",
        "world": {"num_train": 8000, "num_val": 200, "size": 96, "max_objects": 3},
        "base": (
            "lr=1e-3",
            "trackers=[]",
            "segmentation.max_objects=4",
            "segmentation.max_points=96",
            "model.decoder.max_seq_len=256",
        ),
        "metrics": ("segmentation/true_boxes/AP", "segmentation/true_boxes/AP50"),
        "variants": {
            "whole images": (),
            "whole images, even points": EVEN,
            "crops": CROP,
            "crops, even points": (*CROP, *EVEN),
            "closeups": CLOSEUP,
            "closeups, 32 points at most": (*CLOSEUP, "segmentation.max_points=32"),
            "closeups, even points": (*CLOSEUP, *EVEN),
            "closeups, even points, random start": (*CLOSEUP, EVEN[0]),
            "closeups, even points, Muon": (*CLOSEUP, *EVEN, "optimizer=muon"),
        },
    },
    "boxes": {
        "config": "demo.yaml",
        "world": {"num_train": 8000, "num_val": 200, "size": 96, "max_objects": 3, "easy": True},
        "base": ("trackers=[]",),
        "metrics": ("AP", "AP50"),
        "variants": {
            "the recipe": (),
            "Muon": ("optimizer=muon",),
            "learning rate doubled": ("lr=1.2e-3",),
            "learning rate halved": ("lr=3e-4",),
            "no averaged weights": ("ema_decay=0",),
            "patches of 8 pixels": ("model.encoder.patch_size=8",),
            "two lists an image": ("detection.sequences_per_image=2",),
            "large objects first": ("detection.order=area",),
            "no noise objects": ("detection.noise_objects=0",),
        },
    },
    "all": {
        "config": "shapes.yaml",
        "world": {"num_train": 8000, "num_val": 200, "size": 96, "max_objects": 3, "person_share": 0.3},
        "base": ("trackers=[]", "schedule.warmup_steps=50", "ema_decay=0.98", "detection.max_objects=6"),
        "metrics": (
            "AP",
            "AP50",
            "segmentation/true_boxes/AP50",
            "segmentation/found_boxes/AP50",
            "keypoint/true_boxes/AP50",
            "captioning/CIDEr-D",
        ),
        "variants": {
            "the recipe": (),
            "Muon": ("optimizer=muon",),
            "learning rate halved": ("lr=5e-4",),
            "learning rate doubled": ("lr=2e-3",),
            "no averaged weights": ("ema_decay=0",),
            "images of their own, a quarter each": ("share_images=false", "batch_size=8"),
            "tasks weigh the same": ("detection.loss_weight=1",),
            "patches of 8 pixels": ("model.encoder.patch_size=8",),
            "two lists an image": ("detection.sequences_per_image=2",),
            "two masks an image": ("segmentation.max_objects=2",),
            "large objects first": ("detection.order=area",),
            "no noise objects": ("detection.noise_objects=0",),
            "masks start anywhere": ("segmentation.random_start=true",),
            "no jitter of prompts": ("segmentation.box_jitter=0", "keypoint.box_jitter=0"),
        },
    },
}


def train_variant(group: Mapping[str, Any], settings: Sequence[str], out: Path, data: Path) -> dict[str, Any]:
    """Train one variant; return the last line of its evaluation, with the minutes of processor time of all."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.process_time()
    run(load_config(config_file(group["config"]), [*group["base"], *settings], data=str(data), out=str(out)))
    minutes = (time.process_time() - started) / 60
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(line for line in reversed(lines) if line["kind"] == "eval") | {"minutes": minutes}


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants to run, by default all")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="folder for data and runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    group = GROUPS[args.group]
    world = hashlib.sha256(json.dumps(group["world"]).encode()).hexdigest()[:8]
    data = args.out / f"shapes-{world}"
    if not data.is_dir():
        write_shapes(data, **group["world"], workers=2)
    rows = []
    for name, settings in group["variants"].items():
        if args.only and name not in args.only:
            continue
        results = []
        for seed in args.seeds:
            more = [f"steps={args.steps}", f"checkpoint_every={args.steps}", "eval_every=0", f"seed={seed}"]
            more += ["eval_images=200", "num_workers=0"]
            results.append(train_variant(group, [*settings, *more], args.out / "run", data))
        row = {"variant": name, "settings": list(settings), "minutes": [r["minutes"] for r in results]}
        rows.append(row | {metric: [result[metric] for result in results] for metric in group["metrics"]})
        if args.json:
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)  # in case that the rest is not waited for
        else:
            cells = [f"{metric} {_spread(rows[-1][metric])}" for metric in group["metrics"]]
            print(f"{name}: {'; '.join(cells)}; {_spread(row['minutes'])} minutes", flush=True)
    if args.json:
        report = {"benchmark": "recipe", "group": args.group, "steps": args.steps, "seeds": args.seeds, "rows": rows}
        print(json.dumps(report | {"machine": machine()}))


def _spread(values: Sequence[float]) -> str:
    spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))
