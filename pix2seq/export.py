"""Write a trained model for others: the weights without the state of training, and a model card (README.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pix2seq.data.dataset import open_dataset
from pix2seq.data.formats.coco_files import find_files
from pix2seq.errors import InputError
from pix2seq.files import output_folder, read_json, report_write_errors
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.model.pretrained import WEIGHTS_FILE, find_checkpoint
from pix2seq.tasks import get_task, task_names
from pix2seq.training.config import SETTINGS_FILE
from pix2seq.training.log import LOG_FILE
from pix2seq.training.yaml_file import read_yaml

CARD_FILE = "README.md"
TRAINING_FILE = "training.yaml"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Metrics that the card leaves out.
DETAIL = re.compile(r"(AP75|AP[sml]|AR\w*|(precision|recall|threshold)@.*|F1@0.(75|95|5:0.95)|Brier)$")
OF_THIS_MACHINE = ("data", "val_data", "out", "init", "features")  # settings that are paths


@dataclass(frozen=True)
class Scored:
    """What `pix2seq eval` wrote, and what it was measured on."""

    metrics: dict[str, float | None]
    num_images: int
    data: str  # as `describe_data` puts it

    @classmethod
    def read(cls, path: Path, data: str) -> Scored:
        """Read metrics.json. Raises `InputError` if `pix2seq eval --out` did not write it."""
        try:
            content = read_json(path)
            metrics = {str(name): None if value is None else float(value) for name, value in content["metrics"].items()}
            return cls(metrics, int(content["num_images"]), data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no file of metrics ({error!r}); give what pix2seq eval --out wrote") from None


def export_model(
    run: Path,
    out: Path,
    *,
    dtype: str = "float32",
    data: Path | None = None,
    scored: Scored | None = None,
    licence: str | None = None,
) -> None:
    """Write the model of a run, or of one of its checkpoints, with its settings and its card into `out`.

    `data` is the folder that it was trained on, by default as the run's settings name it. Raises `InputError` if there
    is no run, if its data are elsewhere, or if weights do not fit `dtype`.
    """
    checkpoint = find_checkpoint(run)
    folder = next((path for path in (checkpoint, *checkpoint.parents[:2]) if (path / SETTINGS_FILE).is_file()), None)
    if folder is None:
        raise InputError(f"{run} is not of a run: there is no {SETTINGS_FILE}; give the folder that training wrote")
    if out.resolve() in (checkpoint.resolve(), folder.resolve()):
        raise InputError(f"{out} is the run itself; give another folder with --out")
    settings, progress = read_yaml(folder / SETTINGS_FILE), _progress(folder)
    try:
        trained_on = describe_data(data or _data_folder(settings), settings["train_split"])
    except InputError as error:
        raise InputError(f"{error}; --data names the folder that the model was trained on") from None
    model = Pix2Seq.from_pretrained(checkpoint)
    output_folder(out)
    with report_write_errors(out, "exporting a model", then="export again"):
        model.save_pretrained(out, dtype=DTYPES[dtype])
        repeatable = {name: value for name, value in settings.items() if name not in OF_THIS_MACHINE}
        (out / TRAINING_FILE).write_text(yaml.safe_dump(repeatable, sort_keys=False), encoding="utf-8")
        stored = f"{dtype}, {(out / WEIGHTS_FILE).stat().st_size / 1e6:.1f} MB"
        facts = {"name": out.resolve().name, "stored": stored, "data": trained_on}
        card = model_card(model, settings, progress, **facts, scored=scored, licence=licence)
        (out / CARD_FILE).write_text(card, encoding="utf-8")


def describe_data(folder: Path, split: str) -> str:
    """Describe a split of a data set in a phrase: how many images, and what its files say of where they come from."""
    dataset = open_dataset(folder, split)
    words = [f"{len(dataset)} images of split {split}"]
    files = find_files(folder, split)
    if files is not None:
        info = read_json(files.first).get("info")
        if isinstance(info, dict):
            words += [str(info["description"])] if info.get("description") else []
            words += [f"written by `{info['command']}`"] if info.get("command") else []
    return "; ".join(words)


def model_card(
    model: Pix2Seq,
    settings: Mapping[str, Any],
    progress: Mapping[str, float],
    *,
    name: str,
    stored: str,
    data: str,
    scored: Scored | None,
    licence: str | None,
) -> str:
    """Return the card as Markdown. `settings` are those of the run, `progress` the last line of its log."""
    height, width = model.config.image_size
    classes = ", ".join(category.name for category in model.categories)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    start, init = ("from another checkpoint", " init=CHECKPOINT") if settings.get("init") else ("from scratch", "")
    lines = [
        *_front_matter(model, name, scored, licence),
        f"# {name}",
        "",
        f"A model for {', '.join(model.task_settings)}, trained and written by Pix2Seq in PyTorch.",
        "",
        "| | |",
        "|---|---|",
        f"| classes | {classes} |",
        f"| input | {height} x {width} pixels; other images are resized to fit |",
        f"| parameters | {millions:.2f} million, stored as {stored} |",
        f"| training data | {data} |",
        f"| training | {progress['step']:.0f} steps, {progress['images']:.0f} images, {progress['minutes']:.1f} minutes"
        f", {start}, seed {settings['seed']} |",
        "",
        "```",
        "pix2seq predict IMAGE --checkpoint FOLDER    # FOLDER is this one",
        f"pix2seq train --config {TRAINING_FILE} data=DATA out=RUN{init}    # trains it again, with the same seed",
        "```",
    ]
    if scored is not None:
        part = "" if scored.data.startswith(f"{scored.num_images} ") else f"the first {scored.num_images} of "
        shown = {key: value for key, value in scored.metrics.items() if value is not None and not DETAIL.search(key)}
        lines += ["", "## Metrics", "", f"Measured on {part}{scored.data}:", "", "| metric | value |", "|---|---|"]
        lines += [f"| {key} | {value:.3f} |" for key, value in shown.items()]
    lines += [
        "",
        "## Limits",
        "",
        f"The model knows the classes above and no others. It has seen only its training data, at {height} x {width} "
        "pixels: if those are generated drawings, its answers about photographs mean nothing.",
    ]
    if licence is not None:
        lines += ["", "## Licence", "", licence]
    return "\n".join(lines) + "\n"


def _front_matter(model: Pix2Seq, name: str, scored: Scored | None, licence: str | None) -> list[str]:
    """Return the YAML in front of a card, by which the Hugging Face Hub sorts, filters and compares models."""
    installed = [get_task(task) for task in model.task_settings if task in task_names()]
    kinds = [task.hub_pipeline for task in installed if task.hub_pipeline is not None]
    content: dict[str, Any] = {"library_name": "pix2seq", "tags": ["pix2seq", *model.task_settings]}
    if kinds:
        content["pipeline_tag"] = kinds[0]
    if licence is not None:
        known = re.fullmatch(r"[A-Za-z0-9.-]+", licence) is not None  # an identifier such as Apache-2.0
        content |= {"license": licence.lower()} if known else {"license": "other", "license_name": "see-below"}
    if scored is not None:
        metrics = [
            {"type": key, "name": key, "value": round(value, 4)}
            for key, value in scored.metrics.items()
            if value is not None and not DETAIL.search(key)
        ]
        result = {
            "task": {"type": kinds[0] if kinds else "other"},
            "dataset": {"type": "custom", "name": scored.data},
            "metrics": metrics,
        }
        content["model-index"] = [{"name": name, "results": [result]}]
    return ["---", *yaml.safe_dump(content, sort_keys=False, allow_unicode=True).splitlines(), "---", ""]


def _data_folder(settings: Mapping[str, Any]) -> Path:
    folders = settings["data"]
    if isinstance(folders, Mapping):
        raise InputError(f"the run has {len(folders)} data folders; name the one to describe with --data")
    return Path(folders)


def _progress(run: Path) -> dict[str, float]:
    """Return the last line about training in a run's log."""
    try:
        entries = [json.loads(line) for line in (run / LOG_FILE).read_text(encoding="utf-8").splitlines()]
        return next(entry for entry in reversed(entries) if entry["kind"] == "train")
    except (OSError, ValueError, KeyError, StopIteration):
        raise InputError(f"{run / LOG_FILE} says nothing of training; give the folder of a finished run") from None
