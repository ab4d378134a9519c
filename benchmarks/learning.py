"""Learning curve of a detector on the generated shapes: AP against images seen and minutes trained.

    python benchmarks/learning.py [--out DIR] [--json] [key=value ...]

Trains configs/detection_shapes.yaml from scratch and reads the run's log. Minutes count training
only, not evaluation. Dated results: benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pix2seq.cli import run_guarded
from pix2seq.data.shapes import write_shapes
from pix2seq.training.config import config_file, load_config
from pix2seq.training.loop import run

COLUMNS = ("images", "minutes", "AP", "AP50", "AP75", "AR100")


def learning_curve(out: Path, overrides: Sequence[str], *, num_train: int, num_val: int) -> list[dict[str, Any]]:
    """Train, and return one mapping with COLUMNS for each evaluation of the run."""
    config = load_config(
        config_file("detection_shapes.yaml"), overrides, data=str(out / "shapes"), out=str(out / "run")
    )
    if not (out / "shapes").is_dir():
        size = config.model.image_size[0]
        write_shapes(out / "shapes", num_train=num_train, num_val=num_val, size=size, seed=0, workers=2)
    run(config)
    lines = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: line[name] for name in COLUMNS} for line in lines if line["kind"] == "eval"]


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="new folder for data and run")
    parser.add_argument("--train", type=int, default=20_000, help="training images")
    parser.add_argument("--val", type=int, default=500, help="validation images")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the config")
    args = parser.parse_args(argv)
    curve = learning_curve(args.out, args.settings, num_train=args.train, num_val=args.val)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    machine["torch"] = torch.__version__
    if args.json:
        print(json.dumps({"benchmark": "learning", "machine": machine, "settings": args.settings, "curve": curve}))
        return
    print(machine)
    print("".join(f"{name:>10}" for name in COLUMNS))
    for row in curve:
        cells = (f"{row[name]:>10.0f}" if name == "images" else f"{row[name] or 0:>10.3f}" for name in COLUMNS)
        print("".join(cells))


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))
