"""Make data, train a model, evaluate it and predict with it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from pix2seq.data.dataset import open_dataset
from pix2seq.data.shapes import write_shapes
from pix2seq.drawing import tile
from pix2seq.errors import InputError
from pix2seq.evaluation import evaluate
from pix2seq.infer.predict import predict_files
from pix2seq.predictor import Predictor
from pix2seq.training.config import config_file, load_config
from pix2seq.training.loop import run

NUM_TRAIN, NUM_VAL = 8000, 200
MAX_OBJECTS = 3  # an easier world than the default of 8, learned in minutes
NUM_SHOWN = 8
MIN_SCORE = 0.3


def run_demo(out: Path, overrides: Sequence[str] = ()) -> None:
    """Write a data set, a trained model, metrics and `demo.png` into `out`, a new folder or that of an earlier demo."""
    if out.exists() and any(out.iterdir()) and not (out / "shapes").is_dir():
        raise InputError(f"{out} is not empty and holds no earlier demo; give another folder with --out")
    for folder in (out / "run", out / "predictions"):
        shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()

    config = load_config(config_file("demo.yaml"), overrides, data=str(out / "shapes"), out=str(out / "run"))
    print(f"1/4  {NUM_TRAIN + NUM_VAL} images of shapes, generated into {out / 'shapes'}")
    shutil.rmtree(out / "shapes", ignore_errors=True)
    write_shapes(
        out / "shapes",
        num_train=NUM_TRAIN,
        num_val=NUM_VAL,
        size=config.model.image_size[0],
        max_objects=MAX_OBJECTS,
        easy=True,
        workers=os.cpu_count() or 1,
    )

    print("2/4  training a detector on them from scratch")
    checkpoint = run(config)

    print("3/4  scoring it on images that it has not seen")
    predictor = Predictor.from_pretrained(checkpoint, device=config.device)
    dataset = open_dataset(out / "shapes", "val")
    result = evaluate(predictor, dataset)
    print(result.text())
    result.save(out / "metrics.json")

    print("4/4  predicting")
    shown = [image.path for image in dataset.images[:NUM_SHOWN]]
    predict_files(shown, checkpoint=checkpoint, out=out / "predictions", min_score=MIN_SCORE, device=config.device)
    drawn = [found.draw(min_score=MIN_SCORE) for found in predictor.predict_batch(shown, tuple(predictor.tasks))]
    tile(drawn, columns=4).save(out / "demo.png")
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{result.summary()}; {minutes:.1f} minutes in all\nLook at {out / 'demo.png'}")
