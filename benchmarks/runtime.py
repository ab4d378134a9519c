"""An exported model in onnxruntime against the checkpoint in PyTorch on the CPU: time, size, and AP.

    python benchmarks/runtime.py [--checkpoint DIR] [--images N] [--eval-images N] [--threads N] [--json]

Exports the checkpoint in float32 and with int8 weights. Each image is encoded, and each task asked, by PyTorch and by
both exports in turns, one image at a time. Then all three are evaluated on generated images of a seed that no recipe
trains on. Dated results: benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnxruntime
import torch
from machine import machine

from pix2seq.cli import run_guarded
from pix2seq.data.dataset import Dataset, open_dataset
from pix2seq.data.image import read_record_image
from pix2seq.data.shapes import write_shapes
from pix2seq.evaluation import evaluate
from pix2seq.model.pretrained import WEIGHTS_FILE
from pix2seq.onnx_export import DTYPES, export_onnx
from pix2seq.predictor import Predictor
from pix2seq.runtime import Runner

ROOT = Path(__file__).resolve().parent.parent
SEED = 20_181_129  # of images that no recipe trains on
WARMUP = 2  # images that are not timed


class EvaluatedRunner:
    """A runner with what evaluation uses of a predictor."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.tasks = runner, runner.tasks
        self.model = SimpleNamespace(categories=runner.config.categories)

    def require(self, task: str) -> None:
        """See `Predictor`."""

    def encode_batch(self, images: Sequence[Any]) -> list[Any]:
        """See `Predictor`."""
        return [self.runner.encode(image) for image in images]

    def ask(self, task: str, images: Sequence[Any], about: Sequence[Any] | None = None, *, seed: int) -> list[Any]:
        """See `Predictor`."""
        abouts = [None] * len(images) if about is None else about
        return [self.runner.ask(task, image, each, seed=seed) for image, each in zip(images, abouts, strict=True)]


def time_tasks(askers: Mapping[str, Any], dataset: Dataset, num_images: int) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of encoding an image and of each task, by asker, about true boxes."""
    spent: dict[str, dict[str, list[float]]] = {name: {} for name in askers}
    for index in range(num_images + WARMUP):
        target = dataset.target(index)
        pixels = read_record_image(target.image)
        for name, asker in askers.items():
            started = time.perf_counter()
            image = asker.encode_batch([pixels])[0]
            took = {"encode": time.perf_counter() - started}
            for task_name, task in asker.tasks.items():
                about = next(iter(task.questions(target, None).values()), None)
                if task.needs and not about:
                    continue
                started = time.perf_counter()
                asker.ask(task_name, [image], None if about is None else [about], seed=index)
                took[task_name] = time.perf_counter() - started
            if index >= WARMUP:
                for key, seconds in took.items():
                    spent[name].setdefault(key, []).append(1000 * seconds)
    return {name: {key: float(np.median(each)) for key, each in took.items()} for name, took in spent.items()}


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "shapes")
    parser.add_argument("--images", type=int, default=50, help="images to time")
    parser.add_argument("--eval-images", type=int, default=300, help="images to evaluate; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    described = machine() | {"onnxruntime": onnxruntime.__version__}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        predictor = Predictor.from_pretrained(args.checkpoint, device="cpu")
        size = predictor.model.config.image_size[0]
        num_images = max(args.images + WARMUP, args.eval_images)
        write_shapes(folder / "data", num_train=0, num_val=num_images, size=size, seed=SEED, workers=1)
        dataset = open_dataset(folder / "data", "val")
        askers: dict[str, Any] = {"pytorch": predictor}
        bytes_of = {"pytorch": (args.checkpoint / WEIGHTS_FILE).stat().st_size}
        for dtype in DTYPES:
            export_onnx(args.checkpoint, folder / dtype, dtype=dtype)
            askers[dtype] = EvaluatedRunner(Runner(folder / dtype, num_threads=args.threads))
            bytes_of[dtype] = sum(path.stat().st_size for path in (folder / dtype).iterdir())
        milliseconds = time_tasks(askers, dataset, args.images)
        metrics = {}
        for name, asker in askers.items() if args.eval_images else ():
            metrics[name] = evaluate(cast("Predictor", asker), dataset, limit=args.eval_images, progress=True).metrics
    if args.json:
        settings = {"images": args.images, "eval_images": args.eval_images, "seed": SEED}
        found = {"milliseconds": milliseconds, "bytes": bytes_of, "metrics": metrics}
        print(json.dumps({"benchmark": "runtime", "machine": described, "settings": settings} | found))
        return
    print(f"{'milliseconds':28}" + "".join(f"{name:>10}" for name in askers))
    for task in milliseconds["pytorch"]:
        print(f"{task:28}" + "".join(f"{milliseconds[name][task]:10.1f}" for name in askers))
    print(f"{'megabytes':28}" + "".join(f"{bytes_of[name] / 1e6:10.1f}" for name in askers))
    for metric in metrics.get("pytorch", {}):
        values = [metrics[name][metric] for name in askers]
        print(f"{metric:28}" + "".join(f"{'-' if value is None else f'{value:.3f}':>10}" for value in values))


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))
