"""Detectors trained on the same images for the same minutes: ours, ours as earlier, and torchvision's.

    python benchmarks/peers.py DATA [--minutes 10] [--threads 2] [--seeds 0 1 2] [--models ours ...] [--json]

DATA is a folder in COCO or Pascal VOC layout with the splits train and val. All models see the same augmentation, batch
size and AdamW settings of --config, and average their weights as it says. All but `tuned` start from scratch:

- `tuned` is --config as it is, from the model that it names as `init`: by default the shipped one, which has seen
  generated shapes alone. Without `init` there is no such row.
- `ours` is the same model from scratch.
- `earlier` is `ours` with the choices of earlier implementations in PyTorch: no noise objects (a list ends by
  its end token), no positions added to the memory again, and every sequence padded to the length of the longest.
- torchvision's `ssdlite320_mobilenet_v3_large` and `fasterrcnn_mobilenet_v3_large_320_fpn` in float32, on images of 320
  pixels in height, the size that they are made for, at the peak rate --peer-lr.

Minutes are processor time of training divided by --threads, so that other work on the machine changes no result:
reading and augmenting images counts, evaluation and saving do not. Ours needs its number of steps in advance, so it
times some steps first. The learning rate of torchvision's falls with the share of the minutes that has passed. All are
scored by pycocotools on the full split val, through the metric of `pix2seq eval`. Results go to benchmarks/results/,
dated; --json prints them as one JSON object and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from numpy.typing import NDArray
from torch import Tensor, nn

from pix2seq import register_task
from pix2seq.cli import run_guarded
from pix2seq.data.dataset import Dataset, open_dataset
from pix2seq.data.image import read_record_image, warp_image
from pix2seq.data.targets import transform_target
from pix2seq.data.transforms import color_jitter, random_affine
from pix2seq.errors import InputError
from pix2seq.examples import Example
from pix2seq.geometry.affine import fit_affine
from pix2seq.metrics.coco_ap import average_precision
from pix2seq.tasks.detection import Detection
from pix2seq.training.config import TrainConfig, config_file, load_config
from pix2seq.training.ema import Ema
from pix2seq.training.log import LOG_FILE
from pix2seq.training.loop import run
from pix2seq.training.optimizer import build_optimizer, set_learning_rate
from pix2seq.types import Category, Instance, Target
from pix2seq.vocab import PAD

TUNED, OURS, EARLIER = "tuned", "ours", "earlier"
PEER_OPTIONS: dict[str, dict[str, Any]] = {
    # All likely boxes, as COCO's measure expects; by default, Faster R-CNN leaves out those below 0.05.
    "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.001, "detections_per_img": 100},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"box_score_thresh": 0.001, "box_detections_per_img": 100},
}
MODELS = (TUNED, OURS, EARLIER, *PEER_OPTIONS)
PEER_HEIGHT = 320  # pixels
TRIAL_STEPS = (8, 8, 32)  # the first run warms up, the others differ by 24 steps
WARMUP_STEPS = 50
MIN_SIDE = 1.0  # pixels; torchvision refuses boxes without area


@register_task
class PaddedDetection(Detection):
    """Detection on sequences of one length."""

    name = "padded_detection"

    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """Return the sequences of detection, filled up by tokens that are read and not scored."""
        return [self._padded(example) for example in super().examples(target, size, rng)]

    def _padded(self, example: Example) -> Example:
        missing = self.max_seq_len - len(example.prompt) - len(example.targets)
        padding = np.full(missing, PAD, np.int64)
        return Example(
            example.prompt,
            np.concatenate([example.inputs, padding]),
            np.concatenate([example.targets, padding]),
            np.concatenate([example.weights, np.zeros(missing, np.float32)]),
        )


def train_ours(base: TrainConfig, model: str, minutes: float, out: Path) -> dict[str, Any]:
    """Train `tuned`, `ours` or `earlier` for some minutes, and return the row of its result."""
    config = replace(base, log_every=20, eval_every=0, eval_images=1, num_workers=0, trackers=())
    config = replace(config, checkpoint_every=10**9)
    if model != TUNED:
        config = replace(config, init=None)
    if model == EARLIER:
        config = as_earlier(config)
    times = [processor_time(config, steps, out / f"trial{index}") for index, steps in enumerate(TRIAL_STEPS)]
    step_seconds = (times[-1] - times[-2]) / (TRIAL_STEPS[-1] - TRIAL_STEPS[-2])
    steps = max(round(60 * minutes * torch.get_num_threads() / step_seconds), 2)
    processor_seconds = processor_time(replace(config, eval_images=0), steps, out / "run")
    lines = [json.loads(line) for line in (out / "run" / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    scores = next(line for line in reversed(lines) if line["kind"] == "eval")
    return {
        "AP": scores["AP"],
        "AP50": scores["AP50"],
        "processor_seconds": round(processor_seconds),  # of the evaluation too
        "steps": steps,
        "images": steps * config.batch_size,
    }


def processor_time(config: TrainConfig, steps: int, out: Path) -> float:
    """Train for a number of steps, and return the processor time in seconds."""
    schedule = replace(config.schedule, warmup_steps=min(config.schedule.warmup_steps, steps - 1))
    started = time.process_time()
    run(replace(config, steps=steps, schedule=schedule, out=str(out)))
    return time.process_time() - started


def as_earlier(config: TrainConfig) -> TrainConfig:
    """Return the settings with the choices of earlier implementations."""
    detection = config.task(Detection.name)
    settings = {PaddedDetection.name: asdict(detection) | {"noise_objects": 0}}
    model = replace(config.model, memory=replace(config.model.memory, positions=False))
    return load_config(None, [], **asdict(replace(config, model=model)) | settings | {"tasks": [PaddedDetection.name]})


def train_peer(config: TrainConfig, name: str, minutes: float, lr: float) -> dict[str, Any]:
    """Train one of torchvision's detectors for some minutes, and return the row of its result."""
    torch.manual_seed(config.seed)
    dataset = open_dataset(config.data_of(Detection.name), config.train_split)
    height, width = config.model.image_size
    size = (PEER_HEIGHT, round(PEER_HEIGHT * width / height))
    categories = sorted(dataset.categories, key=lambda category: category.label)  # class i + 1; 0 is the background
    model = build_peer(name, 1 + len(categories))
    optimizer = build_optimizer(model, lr=lr, weight_decay=config.weight_decay, betas=config.betas)
    ema = Ema(model, config.ema_decay)
    batches = peer_batches(config, dataset, size)
    model.train()
    steps, started, budget = 0, time.process_time(), 60 * minutes * torch.get_num_threads()
    while (share := (time.process_time() - started) / budget) < 1:
        images, labels = next(batches)
        steps += 1
        set_learning_rate(optimizer, lr * min(steps / WARMUP_STEPS, 1) * 0.5 * (1 + math.cos(math.pi * share)))
        loss = sum(model(images, labels).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        ema.update(model, steps)
    model.load_state_dict(ema.weights)
    source = config.val_source(Detection.name)
    val = open_dataset(source.location, source.split, annotations=source.annotations)
    scores = score_peer(model.eval(), categories, val, size)
    return {
        **scores,
        "processor_seconds": round(time.process_time() - started),  # of the evaluation too
        "steps": steps,
        "images": steps * config.batch_size,
    }


def build_peer(name: str, num_classes: int) -> nn.Module:
    """Build a detector of torchvision with fresh weights; one of its classes is the background."""
    import torchvision

    options = PEER_OPTIONS[name] | {"weights": None, "weights_backbone": None, "num_classes": num_classes}
    model: nn.Module = getattr(torchvision.models.detection, name)(**options)
    return model


def peer_batches(
    config: TrainConfig, dataset: Dataset, size: tuple[int, int]
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Yield batches without end, with the augmentation of `config` at `size` (height, width)."""
    rng = np.random.default_rng(config.seed)
    samples = iter(peer_samples(config, dataset, size, rng))
    while True:
        images, labels = zip(*(next(samples) for _ in range(config.batch_size)), strict=True)
        yield list(images), list(labels)


def peer_samples(
    config: TrainConfig, dataset: Dataset, size: tuple[int, int], rng: np.random.Generator
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield an image (3, H, W) in [0, 1] with its boxes and classes from 1, each image once an epoch, without end."""
    known = np.sort([category.label for category in dataset.categories])
    while True:
        for index in rng.permutation(len(dataset)).tolist():
            target = dataset.target(index)
            pixels = read_record_image(target.image)
            affine = random_affine(pixels.shape[:2], size, config.augment, rng, scale_range=Detection.scale_range)
            pixels = color_jitter(warp_image(pixels, affine, size), config.augment, rng)
            moved = transform_target(target, affine, size, min_visible=config.augment.min_visible, with_masks=False)
            sides = moved.boxes_xyxy[:, 2:] - moved.boxes_xyxy[:, :2]
            kept = ~moved.iscrowd & (sides >= MIN_SIDE).all(axis=1)
            classes = 1 + np.searchsorted(known, moved.labels[kept])
            boxes = torch.from_numpy(moved.boxes_xyxy[kept])
            yield to_input(pixels), {"boxes": boxes, "labels": torch.from_numpy(classes)}


@torch.inference_mode()
def score_peer(
    model: nn.Module, categories: Sequence[Category], dataset: Dataset, size: tuple[int, int]
) -> dict[str, float | None]:
    """Return AP and AP50 on a data set, with images resized as in our evaluation; class i + 1 is category i."""
    targets = [dataset.target(index) for index in range(len(dataset))]
    predictions: dict[int, list[Instance]] = {}
    for target in targets:
        pixels = read_record_image(target.image)
        affine = fit_affine(pixels.shape[:2], size)
        (found,) = model([to_input(warp_image(pixels, affine, size))])
        boxes = affine.inverse().boxes(found["boxes"].numpy()).tolist()
        predictions[target.image.id] = [
            Instance((box[0], box[1], box[2], box[3]), categories[number - 1], score)
            for box, number, score in zip(boxes, found["labels"].tolist(), found["scores"].tolist(), strict=True)
        ]
    metrics = average_precision(targets, dataset.categories, predictions).metrics
    return {name: metrics[name] for name in ("AP", "AP50")}


def to_input(pixels: NDArray[np.uint8]) -> Tensor:
    """Convert an image (H, W, 3) to (3, H, W) in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder in COCO or Pascal VOC layout")
    parser.add_argument("--config", default=str(config_file("detection_voc.yaml")))
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        help="processor time of training, divided by --threads",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--peer-lr", type=float, default=1e-3)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    if args.minutes <= 0 or args.threads < 1:
        raise InputError(f"--minutes {args.minutes} and --threads {args.threads} must be positive")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # a run keeps to it
    torch.set_num_threads(args.threads)
    about = {"data": args.data.name, "config": Path(args.config).name, "peer_lr": args.peer_lr}
    result = {"benchmark": "peers", "machine": machine(), **about, "minutes": args.minutes, "rows": []}
    for seed in args.seeds:
        for name in args.models:
            config = load_config(args.config, [], data=str(args.data), seed=seed, tasks=[Detection.name], device="cpu")
            if name == TUNED and config.init is None:
                continue
            with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
                if name in PEER_OPTIONS:
                    row = train_peer(config, name, args.minutes, args.peer_lr)
                else:
                    row = train_ours(config, name, args.minutes, Path(folder))
            result["rows"].append({"model": name, "seed": seed, **row})
            if not args.json:
                shown = {key: f"{value:.3f}" if isinstance(value, float) else value for key, value in row.items()}
                print(f"{name}, seed {seed}: {shown}", flush=True)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))
