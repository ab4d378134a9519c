"""Whether a run may go on from a checkpoint: its settings and data against the given ones.

Every checkpoint keeps the settings and the data of its run in state.json. Where they differ from the given ones, a
setting of `TAKEN` is taken, one of `FIXED` is refused, and all others are taken only if the user accepts changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pix2seq.data.fingerprint import fingerprint
from pix2seq.errors import InputError, shortened
from pix2seq.files import report_write_errors, write_atomically
from pix2seq.model.pretrained import read_config
from pix2seq.tasks.task import TaskConfig
from pix2seq.training.checkpoint import read_position
from pix2seq.training.config import SETTINGS_FILE, TrainConfig, config_yaml
from pix2seq.training.recipe import Recipe
from pix2seq.types import Category

# What changes neither weights nor data, or, as `steps`, is how one goes on. Data are compared by content.
TAKEN = {
    *("data", "val_data", "train_split", "val_split", "val_fraction"),
    *("annotations", "val_annotations", "max_bad_share"),
    *("steps", "num_workers", "worker_timeout", "max_skipped", "checkpoint_every", "keep_checkpoints"),
    *("eval_every", "eval_images", "eval_batch_size", "best_metric", "log_every", "trackers"),
    *("device", "num_processes", "parallel", "activation_checkpointing", "cuda_graphs", "compile"),
}
FIXED = {"model", "tasks", "optimizer", "freeze"}
# Where the run lies, and settings that a run completes from its data: `check_data` compares what became of them.
NOT_COMPARED = ("out", "model.vocab.num_text", "model.vocab.size", "model.vocab.other_tasks")


@dataclass(frozen=True)
class Change:
    """A setting, or the data of a split, that differs from the run's."""

    name: str
    before: Any
    now: Any

    @property
    def setting(self) -> str:
        """The setting that it is part of: `model` for `model.image_size`."""
        return self.name.split(".")[0]

    def __str__(self) -> str:
        now, before = (value if isinstance(value, str) else json.dumps(value) for value in (self.now, self.before))
        return f"{self.name}={now} (the run has {before})"


def run_record(config: TrainConfig, recipe: Recipe) -> dict[str, Any]:
    """Return what state.json keeps of a run beside its position, as plain JSON values."""
    splits = {f"training data of {name}": data for name, data in recipe.train_data.items()}
    splits |= {f"validation data of {name}": data for name, data in recipe.val_data.items()}
    prints = {key: fingerprint(data) for key, data in {id(data): data for data in splits.values()}.items()}
    return {"settings": _settings(config), "data": {name: prints[id(data)] for name, data in splits.items()}}


def check_settings(config: TrainConfig, checkpoint: Path, *, accept: bool) -> list[Change]:
    """Return the settings that differ from those of the checkpoint's run and may be taken.

    Raises `InputError` for the others. Of a checkpoint of an earlier release only the tasks are known here.
    """
    given = _settings(config)
    recorded = read_position(checkpoint).get("settings")
    if recorded is None:
        before = given | {"tasks": list(read_config(checkpoint)[2])}
    else:
        before = _settings(type(config)(tasks=config.tasks)) | recorded  # a setting that is newer had its default
    changes = [change for change in _differences(before, given) if not _is_part_of(change.name, NOT_COMPARED)]
    _refuse([change for change in changes if change.setting in FIXED], checkpoint)
    _ask([change for change in changes if change.setting not in TAKEN], checkpoint, accept=accept)
    return changes


def check_data(
    config: TrainConfig, recipe: Recipe, record: Mapping[str, Any], checkpoint: Path, *, accept: bool
) -> list[Change]:
    """Compare the vocabulary, the classes and the data of a recipe with those of the checkpoint's run.

    `record` is the recipe's `run_record`. Returns what differs and may be taken, which is validation data. Raises
    `InputError` for the rest.
    """
    model, categories, _ = read_config(checkpoint)
    now = replace(config.model, vocab=recipe.vocab)
    changes = _differences({"model": _plain(model)}, {"model": _plain(now)})
    changes += _differences({"class": _classes(categories)}, {"class": _classes(recipe.categories)})
    _refuse(changes, checkpoint)
    old, new = read_position(checkpoint).get("data", {}), record["data"]
    changes = [Change(name, old[name], new[name]) for name in new if old.get(name, new[name]) != new[name]]
    _refuse([change for change in changes if change.name.startswith("training")], checkpoint)
    _ask(changes, checkpoint, accept=accept)
    return changes


def is_measured_anew(changes: Sequence[Change]) -> bool:
    """Return whether metrics no longer compare with those of the run before, and so neither does its best."""
    return any(change.name == "eval_images" or change.name.startswith("validation data") for change in changes)


def keep_settings(config: TrainConfig, out: Path, step: int) -> None:
    """Write the settings to OUT/config.yaml. If it has others, keep those as OUT/config-until-step-STEP.yaml."""
    path, text = out / SETTINGS_FILE, config_yaml(config)
    with report_write_errors(out, "writing its settings"):
        if path.exists() and (before := path.read_text(encoding="utf-8")) != text:
            kept = out / f"config-until-step-{step:08d}.yaml"
            number = 2
            while kept.exists() and kept.read_text(encoding="utf-8") != before:
                kept = out / f"config-until-step-{step:08d}-{number}.yaml"
                number += 1
            write_atomically(kept, before)
        write_atomically(path, text)


def _refuse(changes: Sequence[Change], checkpoint: Path) -> None:
    if changes:
        raise InputError(
            f"cannot resume from {checkpoint} with {', '.join(shortened(changes))}; a run keeps its model, "
            "vocabulary, tasks, classes and training data: give those, or start a new run with another out=FOLDER and "
            "init=CHECKPOINT"
        )


def _ask(changes: Sequence[Change], checkpoint: Path, *, accept: bool) -> None:
    if changes and not accept:
        raise InputError(
            f"cannot resume from {checkpoint} with {', '.join(shortened(changes))}; add --accept-changes to go "
            "on with these values, or give those of the run, which are in its config.yaml"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    old, new = _flat(before), _flat(now)
    return [Change(name, old.get(name), new.get(name)) for name in sorted(old | new) if old.get(name) != new.get(name)]


def _is_part_of(name: str, settings: Sequence[str]) -> bool:
    return any(name == setting or name.startswith(f"{setting}.") for setting in settings)


def _classes(categories: Sequence[Category]) -> dict[str, str]:
    """Return each class by its label: its name, with those of its keypoints."""
    return {str(c.label): c.name + "".join(f", {point}" for point in c.keypoints) for c in categories}


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of a run as plain values, without those of tasks that it does not train."""
    values = {name: value for name, value in vars(config).items() if not isinstance(value, TaskConfig)}
    return _plain(values | {name: config.task(name) for name in config.tasks})


def _plain(settings: Any) -> Any:
    """Return settings as JSON has them."""
    return json.loads(json.dumps(settings, default=asdict))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
