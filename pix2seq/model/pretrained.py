"""Finding checkpoints, and reading and writing their config.json and model.safetensors.

A checkpoint is a folder with these two files. A training run keeps its checkpoints in OUT/checkpoints/step-*, with
the files it needs to resume beside these two; see `pix2seq.training.checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pix2seq.errors import InputError
from pix2seq.files import find_damage, fsync_file, read_json, sha256, write_atomically
from pix2seq.model.config import ModelConfig
from pix2seq.types import Category

CONFIG_FILE = "config.json"
FORMAT = 1  # of config.json
CALIBRATION_KEY = "calibration"  # in config.json; checkpoints without it are as readable
WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"
POSITION_FILE = "state.json"
SHARDS_FOLDER = "state"
STATE_FILES = (STATE_FILE, SHARDS_FOLDER, POSITION_FILE)


def find_checkpoint(path: Path) -> Path:
    """Return `path` if it is a checkpoint, else the newest checkpoint of the run in `path`.

    Raises `InputError` if there is none with intact weights. `load_checkpoint` checks the training state.
    """
    try:
        folder = existing_folder(path)
        if (folder / CONFIG_FILE).is_file():
            damage = find_damage(folder, ignore=STATE_FILES)
            if damage is not None:
                raise InputError(f"checkpoint {path} is damaged: {damage}; give another one")
            return folder
        newest = newest_checkpoint(path, weights_only=True)
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read ({error.strerror}); give another one") from None
    if newest is None:
        reason = f"holds neither {CONFIG_FILE} nor checkpoints/step-*"
        if not path.is_dir():
            reason = "is a file" if path.exists() else "does not exist"
        raise InputError(f"checkpoint {path} {reason}; give a folder that training or convert wrote")
    return newest


def newest_checkpoint(out: Path, *, weights_only: bool = False) -> Path | None:
    """Return the newest intact checkpoint of a run, or None if it has no checkpoints. Warn of damaged ones on stderr.

    With `weights_only`, the training state may be damaged. Raises `InputError` if all checkpoints are damaged.
    """
    found = list_checkpoints(out)
    for folder in reversed(found):
        damage = find_damage(folder, ignore=STATE_FILES if weights_only else ())
        if damage is None:
            return folder
        print(f"warning: checkpoint {folder} is damaged and skipped: {damage}", file=sys.stderr, flush=True)
    if found:
        raise InputError(f"all {len(found)} checkpoints of {out} are damaged; start a new run with another out=FOLDER")
    return None


def list_checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first. `find_damage` tells whether they are intact."""
    folder = out / "checkpoints"
    names = {path.name.removeprefix(".old-") for pattern in ("step-*", ".old-step-*") for path in folder.glob(pattern)}
    folders = [existing_folder(folder / name) for name in sorted(names)]
    return [folder for folder in folders if (folder / CONFIG_FILE).is_file()]


def read_config(folder: Path) -> tuple[ModelConfig, tuple[Category, ...], dict[str, dict[str, Any]]]:
    """Read model settings, categories and task settings from config.json.

    Raises `InputError` if it is unreadable, of a newer format, or has a value that is out of range.
    """
    path = folder / CONFIG_FILE
    try:
        content = read_json(path)
        stored = content.get("format", FORMAT)
        if type(stored) is not int or stored < 1:
            raise ValueError(f"format is {stored!r}; expected a whole number from 1")
        if stored > FORMAT:
            raise InputError(f"{path} has format {stored}, this release reads up to {FORMAT}; install a newer pix2seq")
        tasks = content.get("tasks", {})
        if not isinstance(tasks, dict) or not all(isinstance(settings, dict) for settings in tasks.values()):
            raise ValueError("tasks is no mapping of names to settings")
        if not isinstance(content["categories"], list):
            raise ValueError("categories is no list")
        if "${" in json.dumps([content["model"], tasks]):  # OmegaConf would put in variables of the environment
            raise ValueError("its settings hold ${...}, which a checkpoint cannot refer to")
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), content["model"]))
        assert isinstance(config, ModelConfig)
        categories = tuple(Category.from_json(entry) for entry in content["categories"])
        labels = [category.label for category in categories]
        if len(set(labels)) < len(labels) or max(labels, default=0) > config.vocab.max_label:
            raise ValueError(f"its classes need distinct labels from 1 to {config.vocab.max_label}, got {labels}")
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not a checkpoint: it has no {CONFIG_FILE}; give a folder that training or convert wrote"
        ) from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OmegaConfBaseException) as error:
        reason = f"{error} is missing" if type(error) is KeyError else str(error).partition("\n")[0]
        raise InputError(f"{path} is not a valid model config: {reason}; use a folder that training wrote") from error
    return config, categories, tasks


def read_calibration(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what a readable config.json knows of the scores of each task. Raises `InputError` if it is no mapping."""
    found = read_json(folder / CONFIG_FILE).get(CALIBRATION_KEY, {})
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise InputError(f"calibration in {folder / CONFIG_FILE} is no mapping by task; run pix2seq calibrate again")
    return found


def fingerprint(folder: Path) -> str:
    """Return the sha256 of what the model of a readable checkpoint computes: its weights and its settings."""
    settings = json.dumps(read_json(folder / CONFIG_FILE)["model"], sort_keys=True)
    return hashlib.sha256(f"{settings} {sha256(folder / WEIGHTS_FILE)}".encode()).hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file. Raises `InputError` if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give a folder that training or convert wrote") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); the file is damaged: copy or train it again") from error


def as_stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as `dtype` if it is one of floats. Raises `InputError` if a finite number becomes infinite."""
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    if not stored.isfinite().all() and tensor.isfinite().all():
        largest = tensor.abs().max().item()
        raise InputError(f"{name} reaches {largest:.4g}, too large for {dtype}; store it as bfloat16 or float32")
    return stored


def write_checkpoint(folder: Path, config: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write the two files that `Pix2Seq.from_pretrained` reads; `config` comes from `Pix2Seq.config_json`.

    Files that they replace stay whole until the new ones are complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".partial-weights"  # no name that a check of the folder would take for weights
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial)
        fsync_file(partial)
        write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        # safetensors creates files that only their owner can read.
        partial.chmod((folder / CONFIG_FILE).stat().st_mode)
        partial.replace(folder / WEIGHTS_FILE)
    finally:
        partial.unlink(missing_ok=True)


def existing_folder(folder: Path) -> Path:
    """Return a checkpoint's folder, or the previous one that an interrupted save left behind."""
    old = folder.parent / f".old-{folder.name}"
    return old if not folder.exists() and old.exists() else folder
