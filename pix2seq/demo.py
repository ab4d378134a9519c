"""Two demonstrations on generated images: of the repository's trained model, and of training one from scratch."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pix2seq.data.dataset import open_dataset
from pix2seq.data.formats.builder import Dataset
from pix2seq.data.shapes import write_shapes
from pix2seq.data.shapes.truth import is_true_of
from pix2seq.drawing import tile
from pix2seq.errors import InputError
from pix2seq.evaluation import EvalResult, evaluate
from pix2seq.files import output_folder
from pix2seq.infer.predict import predict_files
from pix2seq.model.pretrained import CONFIG_FILE
from pix2seq.predictor import Prediction, Predictor
from pix2seq.types import Target

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "shapes"  # in a checkout; not in a wheel
SEED = 20_261_301  # of the images to show; no model was trained or chosen on them
NUM_IMAGES = 60  # about a minute on two cores: a model of 26 M parameters takes 0.9 s of processor time for each
NUM_SHOWN = 12
MIN_IOU = 0.5  # of the boxes of an object and of what was found, to count as found

NUM_TRAIN, NUM_VAL = 8000, 200
MAX_OBJECTS = 3  # an easier world than the default of 8, learned in minutes


def show_demo(
    out: Path, *, checkpoint: Path | None = None, num_images: int = NUM_IMAGES, seed: int = SEED, device: str = "auto"
) -> None:
    """Show what a trained model makes of new images: write `demo.png`, `metrics.json` and `table.txt` into `out`.

    `out` is a new folder or that of an earlier demo, `checkpoint` by default the one of the repository. Raises
    `InputError` if there is none.
    """
    checkpoint = find_model(checkpoint)
    _check_folder(out)
    started = time.perf_counter()
    predictor = Predictor.from_pretrained(checkpoint, device=device)

    print(f"1/3  {num_images} new images with seed {seed}, generated into {out / 'images'}")
    shutil.rmtree(out / "images", ignore_errors=True)
    write_shapes(out / "images", num_train=0, num_val=num_images, seed=seed)  # the default world, as on the model card
    dataset = open_dataset(out / "images", "val")

    print(f"2/3  asking {', '.join(predictor.tasks)} about them, and scoring the answers")
    result = evaluate(predictor, dataset, progress=True)
    result.save(out / "metrics.json")

    print("3/3  drawing")
    shown = range(min(NUM_SHOWN, len(dataset)))
    tasks = [name for name, task in predictor.tasks.items() if not task.needs_about]
    predictions = predictor.predict_batch([dataset.images[i].path for i in shown], tasks)
    _draw(predictions, out)
    table = demo_table(result, dataset, predictions)
    (out / "table.txt").write_text(table, encoding="utf-8")
    some, run = dataset.images[0].path, typed_command()
    print(
        f"\n{table}\n{time.perf_counter() - started:.0f} seconds in all. "
        f"Look at {out / 'demo.png'}; all scores are in {out / 'metrics.json'}, this table is in {out / 'table.txt'}.\n"
        "Next:\n"
        f"  one image, as JSON too           {run} predict {some} --checkpoint {checkpoint}\n"
        f"  other images                     {run} demo --seed {seed + 1}\n"
        f"  a model of your own, in minutes  {run} demo --train\n"
        f"  your own images (COCO or VOC)    {run} train --config configs/detection_voc.yaml data=MY_DATA"
    )


def typed_command() -> str:
    """Return how to type the running command: its name, or its path where the shell does not find that name."""
    name, path = "pix2seq", Path(sys.argv[0])
    found = shutil.which(name)
    if path.name != name or (found is not None and Path(found).resolve() == path.resolve()):
        return name
    return os.path.relpath(path)


def find_model(checkpoint: Path | None) -> Path:
    """Return a checkpoint, or that of the repository if none is given. Raises `InputError` if there is none."""
    if checkpoint is None and not (CHECKPOINT / CONFIG_FILE).is_file():
        raise InputError(
            f"there is no trained model in {CHECKPOINT}: it comes with the repository, not with the installed package; "
            "run this in a checkout, name a model with --checkpoint, or train one with pix2seq demo --train"
        )
    return checkpoint or CHECKPOINT


def demo_table(result: EvalResult, dataset: Dataset, predictions: Sequence[Prediction]) -> str:
    """Return scores by question, and the truth beside what was predicted for the first images of a data set."""
    width = max(map(len, result.scores))
    lines = [f"{name:<{width}}  {score.summary()}" for name, score in result.scores.items()]
    lines += [f"on {result.num_images} images, {result.seconds / result.num_images:.2f} s each", ""]
    names = {category.label: category.name for category in dataset.categories}
    for index, prediction in enumerate(predictions):
        target = dataset.target(index)
        found, wrong = count_found(target, prediction, names)
        lines.append(f"{target.image.path.name}: {found} of {len(target.labels)} objects found, {wrong} wrong")
        lines += [f"  truth  {text}" for text in target.captions[:1] if prediction.captions]
        for caption in prediction.captions:
            verdict = is_true_of(caption.text, target, names=names)
            lines.append(f"  model  {caption.text}" + ("" if verdict is None else f" ({str(verdict).lower()})"))
    return "\n".join(lines) + "\n"


def count_found(target: Target, prediction: Prediction, names: Mapping[int, str]) -> tuple[int, int]:
    """Return how many objects were found, and how many of the likely predictions are of none.

    An object counts once: the best prediction of its class that overlaps it by at least `MIN_IOU` finds it.
    """
    left = list(range(len(target.labels)))
    likely = sorted(prediction.likely, key=lambda i: -i.score)
    for instance in likely:
        overlaps = {i: _iou(target.boxes_xyxy[i].tolist(), instance.box_xyxy) for i in left}
        same = [i for i in left if names[int(target.labels[i])] == instance.category.name]
        best = max(same, key=lambda i: overlaps[i], default=None)
        if best is not None and overlaps[best] >= MIN_IOU:
            left.remove(best)
    found = len(target.labels) - len(left)
    return found, len(likely) - found


def train_demo(out: Path, overrides: Sequence[str] = ()) -> None:
    """Write a data set, a trained model, metrics and `demo.png` into `out`, a new folder or that of an earlier demo."""
    from pix2seq.training.config import config_file, load_config  # here, because showing a model trains nothing
    from pix2seq.training.loop import run

    _check_folder(out)
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
    predict_files(shown, checkpoint=checkpoint, out=out / "predictions", device=config.device)
    _draw(predictor.predict_batch(shown, tuple(predictor.tasks)), out)
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{result.summary()}; {minutes:.1f} minutes in all\nLook at {out / 'demo.png'}")


def _check_folder(out: Path) -> None:
    """Create the folder if needed. Raises `InputError` if it holds something other than an earlier demo."""
    output_folder(out)
    if any(out.iterdir()) and not any((out / name).is_dir() for name in ("images", "shapes")):
        raise InputError(f"{out} is not empty and holds no earlier demo; give another folder with --out")


def _draw(predictions: Sequence[Prediction], out: Path) -> None:
    tile([prediction.draw() for prediction in predictions], columns=4).save(out / "demo.png")


def _iou(a_xyxy: Sequence[float], b_xyxy: Sequence[float]) -> float:
    """Return the intersection of two boxes as a share of their union."""
    sides = [min(a_xyxy[i + 2], b_xyxy[i + 2]) - max(a_xyxy[i], b_xyxy[i]) for i in (0, 1)]
    both = max(sides[0], 0.0) * max(sides[1], 0.0)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a_xyxy, b_xyxy)]
    return both / (sum(areas) - both) if both else 0.0
