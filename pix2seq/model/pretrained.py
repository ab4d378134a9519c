"""Checkpoints as they are used: where they lie, and how config.json and model.safetensors are read and written.

A checkpoint is a folder with config.json and model.safetensors. A run keeps its checkpoints in OUT/checkpoints/step-*,
and what it needs to resume lies beside those two files; see `pix2seq.training.checkpoint`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pix2seq.errors import InputError
from pix2seq.files import find_damage
from pix2seq.model.config import ModelConfig
from pix2seq.types import Category

CONFIG_FILE = "config.json"
FORMAT = 1  # of config.json
WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"
POSITION_FILE = "state.json"
SHARDS_FOLDER = "state"
STATE_FILES = (STATE_FILE, SHARDS_FOLDER, POSITION_FILE)


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder, or the newest one of the run in `path`, with intact weights.

    Raises `InputError` if there is none. The state to resume from is left to `load_checkpoint`.
    """
    place = existing_folder(path)
    if (place / CONFIG_FILE).is_file():
        damage = find_damage(place, ignore=STATE_FILES)
        if damage is not None:
            raise InputError(f"checkpoint {path} is damaged: {damage}; give another one")
        return place
    newest = newest_checkpoint(path, weights_only=True)
    if newest is None:
        reason = f"holds neither {CONFIG_FILE} nor checkpoints/step-*"
        if not path.is_dir():
            reason = "is a file" if path.exists() else "does not exist"
        raise InputError(f"checkpoint {path} {reason}; give a folder that training or convert wrote")
    return newest


def newest_checkpoint(out: Path, *, weights_only: bool = False) -> Path | None:
    """The newest intact checkpoint of a run, None where it has no checkpoints; damaged ones are named on stderr.

    `weights_only` lets the state to resume from be damaged. Raises `InputError` where all are damaged.
    """
    found = list_checkpoints(out)
    for folder in reversed(found):
        damage = find_damage(folder, ignore=STATE_FILES if weights_only else ())
        if damage is None:
            return folder
        print(f"warning: checkpoint {folder} is damaged and passed over: {damage}", file=sys.stderr, flush=True)
    if found:
        raise InputError(f"all {len(found)} checkpoints of {out} are damaged; start afresh with another out=FOLDER")
    return None


def list_checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; whether they are intact, `find_damage` says."""
    folder = out / "checkpoints"
    names = {path.name.removeprefix(".old-") for pattern in ("step-*", ".old-step-*") for path in folder.glob(pattern)}
    places = [existing_folder(folder / name) for name in sorted(names)]
    return [place for place in places if (place / CONFIG_FILE).is_file()]


def read_config(folder: Path) -> tuple[ModelConfig, tuple[Category, ...], dict[str, dict[str, Any]]]:
    """Model settings, categories and task settings in a checkpoint's config.json. Raises `InputError` if unreadable."""
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format", FORMAT) > FORMAT:
            raise InputError(
                f"{path} has format {content['format']}, this release reads up to {FORMAT}; install a newer pix2seq"
            )
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), content["model"]))
        categories = tuple(Category.from_json(entry) for entry in content["categories"])
    except FileNotFoundError:
        raise InputError(
            f"{folder} is no checkpoint: it has no {CONFIG_FILE}; give a folder that training or convert wrote"
        ) from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is no config of this project: {reason}; use a folder that training wrote") from error
    assert isinstance(config, ModelConfig)
    return config, categories, content.get("tasks", {})


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `InputError` where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give a folder that training or convert wrote") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); the file is damaged: copy or train it again") from error


def write_checkpoint(folder: Path, config: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write what `Pix2Seq.from_pretrained` reads; `config` is that of `Pix2Seq.config_json`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # safetensors makes files that only their owner may read.
    (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)


def existing_folder(folder: Path) -> Path:
    """A checkpoint's folder, or where `_put_in_place` left the one before it."""
    old = folder.with_name(f".old-{folder.name}")
    return old if not folder.exists() and old.exists() else folder
