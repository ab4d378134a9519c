"""What filtering captions is worth: captions trained on noisy, filtered, filtered and written, and clean data.

    python benchmarks/caption_filter.py --checkpoint runs/matching [--images N] [--seeds 0 1] [--json] [key=value ...]

Half of the captions of generated images are replaced by those of other images. The checkpoint, which must be able to
match and must not have seen these images, filters them. A model that was trained on the filtered captions writes
others, and these are filtered with the noisy ones. Each set trains configs/captioning_shapes.yaml from scratch, with
the same steps and seeds, and is scored on images with clean captions. `regained` is the share of what the noise cost,
by the means over seeds. Dated results: benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from pix2seq.caption_filter import MIN_SCORE, CaptionFile, Entry, filter_captions, write_captions
from pix2seq.cli import run_guarded
from pix2seq.data.dataset import open_dataset
from pix2seq.data.shapes import write_shapes
from pix2seq.data.shapes.truth import is_true_of
from pix2seq.evaluation import evaluate
from pix2seq.predictor import Predictor
from pix2seq.training.config import config_file, load_config
from pix2seq.training.loop import run

SHOWN = ("captioning/BLEU-4", "captioning/CIDEr-D", "captioning/true")
SETS = ("noisy", "filtered", "filtered and written", "clean")


def replace_captions(captions: CaptionFile, share: float, rng: np.random.Generator) -> list[Entry]:
    """Return all captions, of which a share has the text of another image's; those are marked `replaced`."""
    entries = captions.content["annotations"]
    chosen = rng.permutation(len(entries))[: round(share * len(entries))]
    changed = dict(enumerate(entries))
    for i in chosen.tolist():
        other = entries[int(rng.integers(len(entries)))]
        while other["image_id"] == entries[i]["image_id"]:
            other = entries[int(rng.integers(len(entries)))]
        changed[i] = entries[i] | {"caption": other["caption"], "replaced": True}
    return list(changed.values())


def share_true(data: Path) -> float:
    """Return the share of the training captions that are true of their image."""
    dataset = open_dataset(data, "train")
    names = {category.label: category.name for category in dataset.categories}
    targets = [dataset.target(i) for i in range(len(dataset))]
    verdicts = [bool(is_true_of(text, target, names=names)) for target in targets for text in target.captions]
    return statistics.fmean(verdicts) if verdicts else 0.0


def filter_quality(noisy: Path, filtered: Path) -> dict[str, float]:
    """Return the share of the replaced captions that were dropped, and of the others that were kept."""
    before, after = (CaptionFile.read(data, "train").content["annotations"] for data in (noisy, filtered))
    kept = {entry["id"] for entry in after}
    replaced, others = ([e["id"] in kept for e in before if bool(e.get("replaced")) is flag] for flag in (True, False))
    return {"dropped_of_replaced": 1 - statistics.fmean(replaced), "kept_of_others": statistics.fmean(others)}


def train_and_score(data: Path, clean: Path, out: Path, settings: Sequence[str], seed: int) -> dict[str, float | None]:
    """Train captions from scratch, and score them on the validation images of the clean data."""
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stdout(sys.stderr):
        overrides = ["device=cpu", "trackers=[]", *settings, f"seed={seed}"]
        config = load_config(config_file("captioning_shapes.yaml"), overrides, data=str(data), out=str(out))
        predictor = Predictor.from_pretrained(run(config), device=config.device)
    metrics = evaluate(predictor, open_dataset(clean, "val"), batch_size=50).metrics
    return {name: metrics[name] for name in SHOWN}


def regained(scores: Mapping[str, Sequence[Mapping[str, float | None]]]) -> dict[str, dict[str, float | None]]:
    """Return, by set and metric, which share of the loss from clean to noisy captions it does not have."""

    def mean(name: str, metric: str) -> float:
        return statistics.fmean(each[metric] or 0.0 for each in scores[name])

    found: dict[str, dict[str, float | None]] = {}
    for name in SETS[1:3]:
        found[name] = {}
        for metric in SHOWN:
            lost = mean("clean", metric) - mean("noisy", metric)
            found[name][metric] = (mean(name, metric) - mean("noisy", metric)) / lost if lost > 0 else None
    return found


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="model that can match, to filter with")
    parser.add_argument("--images", type=int, default=4000, help="to train on")
    parser.add_argument("--val", type=int, default=500, help="images to score on")
    parser.add_argument("--size", type=int, default=96, help="pixels a side")
    parser.add_argument("--max-objects", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.5, help="share of the captions that are replaced")
    parser.add_argument("--min-score", type=float, default=MIN_SCORE)
    parser.add_argument("--per-image", type=int, default=2, help="captions to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/caption_filter"), help="new folder for data and runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the training")
    args = parser.parse_args(argv)
    data = {name: args.out / name.replace(" ", "-") for name in SETS}
    world = {"size": args.size, "seed": 1922, "max_objects": args.max_objects, "workers": 1}
    write_shapes(data["clean"], num_train=args.images, num_val=args.val, **world)
    captions = CaptionFile.read(data["clean"], "train")
    noisy = replace_captions(captions, args.noise, np.random.default_rng(0))
    captions.write(data["noisy"], noisy, {"noise": args.noise}, "noise-report.json")
    judge = Predictor.from_pretrained(args.checkpoint)
    filter_captions(judge, CaptionFile.read(data["noisy"], "train"), data["filtered"], min_score=args.min_score)
    sizes: dict[str, Any] = {}
    scores: dict[str, list[dict[str, float | None]]] = {name: [] for name in SETS}
    for seed in args.seeds:
        for name in SETS:
            if name == SETS[2]:  # the writer has learned from the filtered captions of the same seed
                writer, written = Predictor.from_pretrained(args.out / "run-filtered"), args.out / "written"
                for folder in (written, data[name]):
                    shutil.rmtree(folder, ignore_errors=True)
                options = {"num_captions": args.per_image, "seed": seed}
                write_captions(writer, CaptionFile.read(data["noisy"], "train"), written, **options)
                filter_captions(judge, CaptionFile.read(written, "train"), data[name], min_score=args.min_score)
            kept = CaptionFile.read(data[name], "train").content["annotations"]
            sizes[name] = {"captions": len(kept), "true": share_true(data[name])}
            out = args.out / f"run-{name.replace(' ', '-')}"
            scores[name].append(train_and_score(data[name], data["clean"], out, args.settings, seed))
            shown = {"seed": seed, "trained_on": name, **sizes[name], **scores[name][-1]}
            print(json.dumps(shown), file=sys.stderr, flush=True)
    result = {
        "benchmark": "caption_filter",
        "command": " ".join(["python benchmarks/caption_filter.py", *argv]),
        "machine": machine(),
        "filter": filter_quality(data["noisy"], data["filtered"]),
        "data": sizes,
        "metrics": scores,
        "regained": regained(scores),
    }
    print(json.dumps(result) if args.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))
