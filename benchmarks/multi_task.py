"""Cost of multi-task training for detection: detection alone against all four tasks, with the same steps.

    python benchmarks/multi_task.py [--out DIR] [--json] [key=value ...]

Trains configs/multi_task_shapes.yaml from scratch on generated shapes, twice, and evaluates both.
Dated results: benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pix2seq.cli import run_guarded
from pix2seq.data.dataset import open_dataset
from pix2seq.data.shapes import write_shapes
from pix2seq.evaluation import EvalResult, evaluate
from pix2seq.predictor import Predictor
from pix2seq.training.config import config_file, load_config
from pix2seq.training.loop import run

ALL = ("detection", "segmentation", "keypoint", "captioning")
NUM_TRAIN, NUM_VAL, MAX_OBJECTS = 8000, 200, 3
SHOWN = (
    "AP",
    "AP50",
    "segmentation/found_boxes/AP50",
    "segmentation/true_boxes/AP50",
    "keypoint/found_boxes/AP50",
    "keypoint/true_boxes/AP50",
    "captioning/BLEU-4",
    "captioning/CIDEr-D",
)


def train_and_score(out: Path, tasks: Sequence[str], overrides: Sequence[str]) -> EvalResult:
    """Train `tasks` in one run, and evaluate all of them."""
    name = "multi_task" if len(tasks) > 1 else tasks[0]
    fixed = {"tasks": list(tasks), "data": str(out / "shapes"), "out": str(out / name)}
    config = load_config(config_file("multi_task_shapes.yaml"), overrides, **fixed)
    if not (out / "shapes").is_dir():
        write_shapes(
            out / "shapes",
            num_train=NUM_TRAIN,
            num_val=NUM_VAL,
            size=config.model.image_size[0],
            max_objects=MAX_OBJECTS,
            workers=2,
        )
    predictor = Predictor.from_pretrained(run(config), device=config.device)
    return evaluate(predictor, open_dataset(out / "shapes", "val"), tasks, batch_size=50, progress=True)


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/multi_task"), help="new folder for data and runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the config")
    args = parser.parse_args(argv)
    alone = train_and_score(args.out, ["detection"], args.settings).metrics
    together = train_and_score(args.out, ALL, args.settings).metrics
    if args.json:
        found = {"detection alone": alone, "four tasks": together}
        print(json.dumps({"benchmark": "multi_task", "settings": args.settings, "metrics": found}))
        return
    print(f"{'metric':32} {'detection alone':>16} {'four tasks':>12}")
    for name in SHOWN:
        cells = (f"{value:.3f}" if (value := found.get(name)) is not None else "-" for found in (alone, together))
        print("{:32} {:>16} {:>12}".format(name, *cells))


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))
