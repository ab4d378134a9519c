"""Checkpoints of a run: complete or absent, and enough to go on as if nothing had happened.

OUT/checkpoints/step-00001000/
    config.json, model.safetensors     what `from_pretrained` opens (averaged weights, if there is an average)
    state.safetensors, state.json      raw weights, optimiser, random state, position
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pix2seq.errors import InputError
from pix2seq.model.pix2seq import CONFIG_FILE, Pix2Seq
from pix2seq.training.ema import Ema

STATE_FILE = "state.safetensors"
POSITION_FILE = "state.json"


@dataclass
class RunState:
    """What a run changes as it goes."""

    model: Pix2Seq
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0  # finished optimiser steps
    seconds: float = 0.0  # spent on training so far, without evaluation and saving


def save_checkpoint(state: RunState, out: Path, *, keep: int) -> Path:
    """Write the checkpoint of this step, then remove all but the newest `keep`."""
    folder = out / "checkpoints" / f"step-{state.step:08d}"
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    raw = {name: tensor.detach().clone() for name, tensor in state.model.state_dict().items()}
    if state.ema is not None:
        state.model.load_state_dict(state.ema.weights)
    try:
        state.model.save_pretrained(partial)
    finally:
        state.model.load_state_dict(raw)

    tensors = {f"weights/{name}": tensor for name, tensor in raw.items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in values.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if state.model.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(state.model.device)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / STATE_FILE)
    (partial / POSITION_FILE).write_text(
        json.dumps({"step": state.step, "seconds": state.seconds}) + "\n", encoding="utf-8"
    )

    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    for old in list_checkpoints(out)[:-keep]:
        shutil.rmtree(old)
    return folder


def load_checkpoint(state: RunState, folder: Path) -> None:
    """Put a run back to where `save_checkpoint` left it. Raises `InputError` if the files do not fit."""
    try:
        tensors = load_file(folder / STATE_FILE)
        position = json.loads((folder / POSITION_FILE).read_text(encoding="utf-8"))
        step, seconds = int(position["step"]), float(position["seconds"])
        averaged = Pix2Seq.from_pretrained(folder).state_dict()
        state.model.load_state_dict(_under("weights/", tensors))
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"cannot resume from {folder}: {str(error).splitlines()[0]}; use the settings the run was "
            "started with, or start afresh with --resume never and another out="
        ) from error
    optimizer_state = state.optimizer.state_dict()
    optimizer_state["state"] = {}
    for name, value in _under("optimizer/", tensors).items():
        index, key = name.split("/")
        optimizer_state["state"].setdefault(int(index), {})[key] = value
    state.optimizer.load_state_dict(optimizer_state)
    if state.ema is not None:
        for name, tensor in averaged.items():
            state.ema.weights[name].copy_(tensor)
    torch.set_rng_state(tensors["rng/cpu"])
    if state.model.device.type == "cuda" and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], state.model.device)
    state.step, state.seconds = step, seconds


def list_checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in (out / "checkpoints").glob("step-*") if (path / CONFIG_FILE).is_file())


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder, or the newest one of the run in `path`. Raises `InputError` if there is none."""
    if (path / CONFIG_FILE).is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        reason = "does not exist" if not path.exists() else f"holds neither {CONFIG_FILE} nor checkpoints/step-*"
        raise InputError(f"checkpoint {path} {reason}; give a folder that training or convert wrote")
    return found[-1]


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
