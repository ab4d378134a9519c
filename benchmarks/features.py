"""Steps a second with a frozen encoder: live, on images, against stored features.

    python benchmarks/features.py [--turns 10] [--threads 2] [--json] [key=value ...]

Both train projection and decoder of configs/detection_shapes.yaml beside timm's DeiT-small at 224 pixels (random
weights) for detection on generated shapes, in batches of 16 with bf16 autocast on the CPU. They run in one process and
take turns, one step each; a step includes reading its batch, which no worker prepares, and the average of the weights.
Neither augments, so both see the same batches: the largest difference of their losses is reported too. `ratio` is the
median over turns of the ratio of wall times. Dated results: benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import machine

from pix2seq.cli import run_guarded
from pix2seq.data.loader import batches
from pix2seq.data.shapes import write_shapes
from pix2seq.model.encoders.build import encoder_fingerprint
from pix2seq.model.pix2seq import build_model
from pix2seq.training.config import TrainConfig, config_file, load_config
from pix2seq.training.ema import Ema
from pix2seq.training.memory import keep_freed_memory
from pix2seq.training.objective import CrossEntropy
from pix2seq.training.optimizer import build_optimizer
from pix2seq.training.recipe import prepare, store_features
from pix2seq.training.step import TrainingModel, train_step

SIZE = 224
NUM_IMAGES = 128
SETTINGS = [
    "device=cpu",
    "bf16=true",
    "batch_size=16",
    "eval_batch_size=16",
    "augment.enabled=false",
    "freeze=encoder",
    f"model.image_size=[{SIZE},{SIZE}]",
    "model.encoder.name=deit_small_patch16_224",
]


def contender(config: TrainConfig) -> Callable[[], dict[str, float]]:
    """Return a function that trains one step, with the seconds of its parts and its loss."""
    recipe = prepare(config)
    torch.manual_seed(config.seed)
    model = build_model(replace(config.model, vocab=recipe.vocab), recipe.categories).train()
    if recipe.features is not None:
        recipe.features.check_encoder(encoder_fingerprint(model.encoder, config.model.encoder, config.model.positions))
    model.freeze_encoder()
    training_model = TrainingModel(model, CrossEntropy(), bf16=config.bf16)
    optimizer = build_optimizer(model, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas)
    ema = Ema(model, config.ema_decay)
    stream = batches([(recipe.samples[0], config.batch_size)])
    steps = 0

    def step() -> dict[str, float]:
        nonlocal steps
        started = time.perf_counter()
        batch = next(stream)
        read = time.perf_counter()
        torch.manual_seed(steps)
        result = train_step(training_model, optimizer, [batch], {}, max_grad_norm=config.max_grad_norm)
        steps += 1
        ema.update(model, steps)
        loss = result.loss.item()
        return {"read": read - started, "seconds": time.perf_counter() - started, "loss": loss}

    return step


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=10, help="steps of each, after two to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of both")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    result: dict[str, Any] = {
        "benchmark": "features",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}",
        "command": " ".join(["python benchmarks/features.py", *argv]),
        "machine": machine(),
    }
    out = sys.stdout
    sys.stdout = sys.stderr if args.json else out  # one JSON object, and nothing else
    with tempfile.TemporaryDirectory() as folder:
        data, features = Path(folder) / "shapes", Path(folder) / "features"
        write_shapes(data, num_train=NUM_IMAGES, num_val=1, size=SIZE, seed=0, workers=1)
        config = load_config(config_file("detection_shapes.yaml"), [*SETTINGS, *args.settings], data=str(data))
        started = time.perf_counter()
        store = store_features(config, features)
        encoding = time.perf_counter() - started
        steps = {"live": contender(config), "stored": contender(replace(config, features=str(features)))}
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
        for _ in range(args.turns + 2):
            for name, step in steps.items():
                turns[name].append(step())
    sys.stdout = out
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(turns["live"], turns["stored"], strict=True))
    timed = {name: some[2:] for name, some in turns.items()}
    pairs = list(zip(timed["live"], timed["stored"], strict=True))
    result |= {
        "settings": [*SETTINGS, *args.settings],
        "ratio": median(live["seconds"] / stored["seconds"] for live, stored in pairs),
        "ratio_without_reading": median(
            (live["seconds"] - live["read"]) / (stored["seconds"] - stored["read"]) for live, stored in pairs
        ),
        "steps_per_second": {name: 1 / median(turn["seconds"] for turn in some) for name, some in timed.items()},
        "read_seconds": {name: median(turn["read"] for turn in some) for name, some in timed.items()},
        "bytes_per_image": store.num_bytes / len(store),
        "encoded_images_per_second": NUM_IMAGES / encoding,
        "largest_loss_difference": difference,
        "turns": timed,
    }
    print(json.dumps(result) if args.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))
