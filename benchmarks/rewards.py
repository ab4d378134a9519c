"""Reward tuning against more likelihood: the metrics of each task before, and after as much compute of either.

    python benchmarks/rewards.py [--minutes 6] [--seeds 0 1 2] [--images 300] [--out DIR] [--json] [key=value ...]

Starts from checkpoints/shapes, or another model of configs/shapes.yaml given by --init, and trains on generated images
that it has not seen, all tasks together. Minutes are of CPU time, without reading the data set and without evaluation,
so that other work on the machine does not count; set OMP_NUM_THREADS=1. The cost of a step is measured first, and says
how many steps a run has. Settings as `reward:lr=1e-5` or `likelihood:lr=1e-4` are for one objective only. Dated
results: benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
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
from pix2seq.data.dataset import open_dataset
from pix2seq.data.shapes import write_shapes
from pix2seq.evaluation import evaluate
from pix2seq.predictor import Predictor
from pix2seq.training.config import config_file, load_config
from pix2seq.training.loop import run

OBJECTIVES: Mapping[str, tuple[str, tuple[str, ...]]] = {  # config, and what makes it go on from a trained model
    "likelihood": ("shapes.yaml", ("lr=2e-4", "ema_decay=0.98", "schedule.warmup_steps=10", "schedule.hold=0")),
    "reward": ("reward_shapes.yaml", ()),
}
SHOWN = (
    "AP",
    "AP50",
    "segmentation/true_boxes/AP",
    "segmentation/true_boxes/AP50",
    "keypoint/true_boxes/AP",
    "keypoint/true_boxes/AP50",
    "captioning/CIDEr-D",
    "captioning/true",
)
FEW, MORE = 4, 12  # steps of the runs that the cost of a step is measured by


def train(objective: str, settings: Sequence[str], out: Path) -> float:
    """Train in a fresh folder; return the seconds of CPU time that it took in all."""
    shutil.rmtree(out, ignore_errors=True)
    config, own = OBJECTIVES[objective]
    started = time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        run(load_config(config_file(config), [*own, *settings], out=str(out)))
    return time.process_time() - started


def measure_step(objective: str, settings: Sequence[str], out: Path) -> float:
    """Return the seconds of CPU time of a step, by runs of a few and of more steps."""
    few, more = (train(objective, [*settings, f"steps={steps}", "eval_images=1"], out) for steps in (FEW, MORE))
    return (more - few) / (MORE - FEW)


def tune(objective: str, settings: Sequence[str], minutes: float, seconds: float, out: Path) -> dict[str, Any]:
    """Train for `minutes` at `seconds` of CPU time a step; return the metrics at its end, and what the run cost."""
    steps = max(round(60 * minutes / seconds), 1)
    train(objective, [*settings, f"steps={steps}"], out)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps_logged = [line for line in lines if line["kind"] == "train"]
    images = next(line["images"] for line in reversed(lines) if line["kind"] == "eval")
    shares = [line["sampling_share"] for line in steps_logged if "sampling_share" in line]
    return {
        "metrics": next(line for line in reversed(lines) if line["kind"] == "eval"),
        "steps": steps,
        "images_per_cpu_second": images / steps / seconds,
        "sampling_share": statistics.fmean(shares) if shares else 0.0,
    }


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, default=Path("checkpoints/shapes"))
    parser.add_argument("--minutes", type=float, default=6.0, help="of CPU time of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=300, help="of the evaluation")
    parser.add_argument("--train-images", type=int, default=12_000)
    parser.add_argument("--only", choices=OBJECTIVES, help="one objective only")
    parser.add_argument("--out", type=Path, default=Path("runs/rewards"), help="folder for data and runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("settings", nargs="*", metavar="[OBJECTIVE:]key=value")
    args = parser.parse_args(argv)
    data = args.out / f"shapes-{args.train_images}-{args.images}"
    if not data.is_dir():
        write_shapes(data, num_train=args.train_images, num_val=args.images, size=128, seed=77, workers=2)
    before = evaluate(Predictor.from_pretrained(args.init, device="cpu"), open_dataset(data, "val"), batch_size=50)
    rows: list[dict[str, Any]] = [{"name": "before", "metrics": [{name: before.metrics[name] for name in SHOWN}]}]
    _show(rows[-1], json_too=args.json)
    for objective in [args.only] if args.only else OBJECTIVES:
        common = [f"data={data}", f"init={args.init}", "trackers=[]", "num_workers=0", "device=cpu", "eval_every=0"]
        own = [text.removeprefix(f"{objective}:") for text in args.settings if text.startswith(f"{objective}:")]
        own += [text for text in args.settings if ":" not in text.partition("=")[0]]
        settings = [*common, f"eval_images={args.images}", "checkpoint_every=1000000", *own]
        seconds = measure_step(objective, settings, args.out / objective)
        results = [
            tune(objective, [*settings, f"seed={seed}"], args.minutes, seconds, args.out / objective)
            for seed in args.seeds
        ]
        row: dict[str, Any] = {"name": objective, "settings": own}
        row["metrics"] = [{name: result["metrics"][name] for name in SHOWN} for result in results]
        row |= {key: [result[key] for result in results] for key in results[0] if key != "metrics"}
        rows.append(row)
        _show(row, json_too=args.json)
    if args.json:
        report = {"benchmark": "rewards", "minutes": args.minutes, "seeds": args.seeds, "images": args.images}
        print(json.dumps(report | {"rows": rows, "machine": machine()}))


def _show(row: Mapping[str, Any], *, json_too: bool) -> None:
    """Print a row for people; beside JSON, to the other stream."""
    cells = [f"{name} {_spread([each[name] for each in row['metrics']])}" for name in SHOWN]
    costs = [f"{key} {_spread(row[key])}" for key in ("steps", "images_per_cpu_second", "sampling_share") if key in row]
    print(f"{row['name']}: {'; '.join([*cells, *costs])}", flush=True, file=sys.stderr if json_too else sys.stdout)


def _spread(values: Sequence[float]) -> str:
    spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))
