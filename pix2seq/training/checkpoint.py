"""Checkpoints of a run: complete or absent, and enough to resume as if nothing had happened.

OUT/checkpoints/step-00001000/
    config.json, model.safetensors     for `from_pretrained` (averaged weights, if the run averages them)
    state.safetensors, state.json      raw weights, optimiser state and what the objective keeps; the position,
                                       settings and data of the run.
                                       There is no random state, because every draw is a function of seed, step and
                                       sample
    state/                             replaces state.safetensors if weights are sharded: one file per rank
    manifest.json                      sizes and sha256 of all files
OUT/checkpoints/best/                  the checkpoint with the best metric, and best.json with its value

OUT/aside-001/                         what the run had after an older checkpoint that it went on from

A folder is written under a temporary name and renamed when every byte is on the disk. An older folder of the
same name is renamed to .old-NAME first, and is found there if the run dies in between.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from pix2seq.errors import InputError
from pix2seq.files import (
    find_damage,
    free_bytes,
    fsync_files,
    fsync_folder,
    list_files,
    read_json,
    report_write_errors,
    write_manifest,
)
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.model.pretrained import (
    POSITION_FILE,
    SHARDS_FOLDER,
    STATE_FILE,
    WEIGHTS_FILE,
    existing_folder,
    list_checkpoints,
    write_checkpoint,
)
from pix2seq.training.config import SETTINGS_FILE
from pix2seq.training.distributed import (
    Ranks,
    full_tensor,
    load_shards,
    local_tensor,
    save_shards,
    sharded_like,
    stored_shapes,
)
from pix2seq.training.ema import Ema
from pix2seq.training.optimizer import MuonAdamW

BEST = "best"
BEST_FILE = "best.json"
RECORD = ("settings", "data")  # what state.json has of `RunState.record`
SPARE_BYTES = 1 << 20  # for the JSON files and the text tokenizer beside the tensors


@dataclass
class RunState:
    """The parts of a run that change as it trains."""

    model: Pix2Seq
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    objective: Mapping[str, Tensor] = field(default_factory=dict)  # `Objective.state`
    step: int = 0  # finished optimiser steps
    seconds: float = 0.0  # of training so far, without evaluation and saving
    skipped: int = 0  # steps without an update, because the loss or gradient was not finite
    one_thread: bool | None = None  # on the CPU, of a busy machine; None until `ThreadTrial` has chosen
    record: Mapping[str, Any] = field(default_factory=dict)  # settings and data for state.json; see `training.resume`


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint."""

    weights: Mapping[str, Tensor]  # full tensors of model.safetensors; averaged, if the run averages them
    tensors: Mapping[str, Tensor]  # of state.safetensors or state/: weights/NAME, optimizer/INDEX/NAME, ...
    position: Mapping[str, Any]  # of state.json: the numbers and the record of `RunState`

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a shard of the `tensors`."""
        return any(isinstance(tensor, DTensor) for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, including those of other ranks."""
        return sum(t.numel() * t.element_size() for group in (self.weights, self.tensors) for t in group.values())


def save_checkpoint(state: RunState, out: Path, *, keep: int, ranks: Ranks | None = None) -> Path:
    """Write the checkpoint of this step, then remove all but the newest `keep`; every rank must call this.

    Raises `InputError` if weights or optimiser state are not finite, or the disk is full or read-only. Then all
    older checkpoints stay as they were.
    """
    ranks = ranks or Ranks(state.model.device)
    snapshot = take_snapshot(state, ranks)
    folder = out / "checkpoints" / f"step-{state.step:08d}"
    partial = folder.with_name(f".partial-{folder.name}")
    num_bytes = snapshot.num_bytes + SPARE_BYTES
    not_finite = ranks.gather(_not_finite(snapshot))

    def begin() -> None:
        name = next(filter(None, not_finite), None)
        if name is not None:
            raise InputError(
                f"{name} is not finite at step {state.step}, so the step was not saved; resume from the last "
                "checkpoint with --resume auto and a lower lr"
            )
        with _saving(state, out, num_bytes):
            _remove_leftovers(folder.parent)
            if free_bytes(folder) < num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # fail now, not after minutes of writing
            partial.mkdir(parents=True)

    def finish() -> None:
        with _saving(state, out, num_bytes, partial=partial):
            write_checkpoint(partial, state.model.config_json(), snapshot.weights)
            if state.model.text is not None:
                state.model.text.save(partial)
            if not snapshot.sharded:
                save_file({name: t.contiguous() for name, t in snapshot.tensors.items()}, partial / STATE_FILE)
            (partial / POSITION_FILE).write_text(json.dumps(snapshot.position) + "\n", encoding="utf-8")
            _share_mode(partial)
            write_manifest(partial)
            _put_in_place(partial, folder)
            _rotate(out, folder, keep)

    ranks.on_first(begin)
    if snapshot.sharded:
        with _saving(state, out, num_bytes, partial=partial):
            save_shards(snapshot.tensors, partial / SHARDS_FOLDER)
    ranks.on_first(finish)
    return folder


@contextmanager
def _saving(state: RunState, out: Path, num_bytes: int, *, partial: Path | None = None) -> Iterator[None]:
    """Report write errors as `InputError`, and remove the folder `partial` after any error."""
    with report_write_errors(out, f"saving step {state.step}", num_bytes=num_bytes):
        try:
            yield
        except BaseException:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def take_snapshot(state: RunState, ranks: Ranks | None = None) -> Snapshot:
    """Return the content of a checkpoint of `state`; every rank must call this.

    Tensors are the run's own, not copies. If averages are sharded over ranks, the first rank gathers the full tensors
    in host memory, and the other ranks keep none.
    """
    raw = {name: tensor.detach() for name, tensor in state.model.state_dict().items()}
    tensors = {f"weights/{name}": tensor for name, tensor in raw.items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in values.items()}
    tensors |= {f"objective/{name}": tensor for name, tensor in state.objective.items()}
    position: dict[str, Any] = {"step": state.step, "seconds": state.seconds, "skipped": state.skipped}
    position |= {"one_thread": state.one_thread, **state.record}
    averages = {}
    for name, tensor in (raw if state.ema is None else state.ema.weights).items():
        gathered = full_tensor(tensor)
        if ranks is None or ranks.first:
            averages[name] = gathered.cpu() if gathered is not tensor else tensor
    return Snapshot(averages, tensors, position)


def mark_best(out: Path, folder: Path, metric: str, value: float | None, *, higher_is_better: bool = True) -> bool:
    """Make the checkpoint `folder` OUT/checkpoints/best if its `value` of `metric` beats the best so far.

    Files are hard links to those in `folder` if the disk supports them, and stay when `folder` is removed. An
    undefined value never wins, and a stored best of another metric always loses. Returns whether `folder` won.
    """
    if not is_best(out, metric, value, higher_is_better=higher_is_better):
        return False
    best = out / "checkpoints" / BEST
    partial = best.with_name(f".partial-{BEST}")
    with report_write_errors(out, f"keeping {folder.name} as the best"):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for path in list_files(folder):
                if path.name != BEST_FILE:
                    _link(path, partial / path.relative_to(folder))
            content = {"checkpoint": folder.name, "metric": metric, "value": value}
            (partial / BEST_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")
            fsync_files(partial)
            _put_in_place(partial, best)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return True


def is_best(out: Path, metric: str, value: float | None, *, higher_is_better: bool = True) -> bool:
    """Return whether `value` of `metric` beats that of OUT/checkpoints/best; see `mark_best`."""
    if value is None or not math.isfinite(value):
        return False
    best = read_best(out)
    if best is None or best["metric"] != metric or find_damage(existing_folder(out / "checkpoints" / BEST), quick=True):
        return True
    return bool(value > best["value"] if higher_is_better else value < best["value"])


def read_best(out: Path) -> dict[str, Any] | None:
    """Return `checkpoint`, `metric` and `value` of OUT/checkpoints/best, or None if there is none."""
    try:
        content = json.loads((existing_folder(out / "checkpoints" / BEST) / BEST_FILE).read_text(encoding="utf-8"))
        return {"checkpoint": content["checkpoint"], "metric": content["metric"], "value": float(content["value"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_position(folder: Path) -> dict[str, Any]:
    """Return the content of state.json: `step`, `seconds`, and what `RunState.record` was.

    Raises `InputError` if there is none, as in a checkpoint that was converted, or if it has no step.
    """
    path = folder / POSITION_FILE
    try:
        position = read_json(path)
    except FileNotFoundError:
        raise InputError(
            f"cannot resume from {folder}: it has no {POSITION_FILE}, so no training state; start a new run with "
            "init=CHECKPOINT"
        ) from None
    if not isinstance(position, dict) or not all(isinstance(position.get(name, {}), dict) for name in RECORD):
        raise InputError(f"cannot resume from {folder}: {POSITION_FILE} holds no mapping; give another checkpoint")
    for name, kinds in (("step", (int,)), ("seconds", (int, float))):
        value: Any = position.get(name)
        if type(value) not in kinds or not math.isfinite(value) or (name == "step" and value < 0):
            raise InputError(f"cannot resume from {folder}: {POSITION_FILE} has {name}={value!r}; give another one")
    return position


def set_aside(out: Path, resumed: Path | None, step: int, *, best_too: bool = False) -> Path | None:
    """Move what is newer than `step` in a run that goes on from checkpoint `resumed`, or starts, to OUT/aside-NUMBER.

    That folder is a run like any other. If `resumed` is not one of OUT, all checkpoints and the log are moved; with
    `best_too`, the best is moved in any case. Returns the folder, or None if there was nothing to move. The best goes
    first: if the process dies in between, no later run compares with it, and the others are neither lost nor mixed with
    new ones.
    """
    checkpoints = out / "checkpoints"
    ours = resumed is None or resumed.resolve().parent == checkpoints.resolve()
    moved = [folder for folder in list_checkpoints(out) if not ours or _step_of(folder.name) > step]
    best = existing_folder(checkpoints / BEST)
    content = read_best(out)
    if best.is_dir() and (best_too or not ours or content is None or _step_of(str(content["checkpoint"])) > step):
        moved.insert(0, best)
    if not moved:
        return None
    number = 1
    while (aside := out / f"aside-{number:03d}").exists():
        number += 1
    with report_write_errors(out, f"setting newer checkpoints aside in {aside.name}"):
        (aside / "checkpoints").mkdir(parents=True)
        for path in (out / SETTINGS_FILE, out / "log.jsonl"):
            if path.exists():
                shutil.copy2(path, aside / path.name)
        fsync_files(aside)
        if not ours:
            (out / "log.jsonl").unlink(missing_ok=True)
        for folder in moved:
            folder.rename(aside / "checkpoints" / folder.name)
        fsync_folder(aside / "checkpoints")
        fsync_folder(checkpoints)
    return aside


def load_checkpoint(state: RunState, folder: Path) -> None:
    """Restore a run to the state that `save_checkpoint` wrote; every rank must call this.

    Raises `InputError` if the files are damaged or do not fit the run.
    """
    damage = find_damage(folder)
    if damage is not None:
        raise InputError(f"checkpoint {folder} is damaged: {damage}; give another one, or use --resume auto")
    try:
        position = read_position(folder)
        if (folder / SHARDS_FOLDER).is_dir():
            tensors = _empty_tensors(state, stored_shapes(folder / SHARDS_FOLDER))
            load_shards(tensors, folder / SHARDS_FOLDER)
        else:
            tensors = load_file(folder / STATE_FILE)
        snapshot = Snapshot(load_file(folder / WEIGHTS_FILE), tensors, position)
        _restore(state, snapshot)
    except InputError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise InputError(
            f"cannot resume from {folder}: {str(error).splitlines()[0]}; use the settings the run "
            "started with, or start a new run with --resume never and another out=FOLDER"
        ) from error


def _empty_tensors(state: RunState, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Allocate tensors with these names and shapes, sharded as the run's own tensors are."""
    weights = state.model.state_dict()
    parameters = _parameters(state.optimizer)
    tensors = {}
    for name, shape in shapes.items():
        kind, _, rest = name.partition("/")
        if kind == "objective":
            held = state.objective.get(rest)
            if held is not None and held.shape == shape:
                tensors[name] = torch.empty_like(held)
            continue
        like = weights[rest] if kind == "weights" else parameters[int(rest.split("/")[0])]
        tensors[name] = torch.empty_like(like) if like.shape == shape else torch.empty(shape)
    return tensors


def _restore(state: RunState, snapshot: Snapshot) -> None:
    """Restore a run from a snapshot; each rank takes its own shards."""
    position = snapshot.position
    step, seconds, skipped = int(position["step"]), position["seconds"], int(position.get("skipped", 0))
    stored = _with_prefix("optimizer/", snapshot.tensors)
    muon = any(key.endswith("/momentum_buffer") for key in stored)
    if stored and muon != isinstance(state.optimizer, MuonAdamW):
        raise ValueError(f"its optimizer is {'muon' if muon else 'adamw'}")
    weights = state.model.state_dict()
    raw = _with_prefix("weights/", snapshot.tensors)
    state.model.load_state_dict({name: sharded_like(weights.get(name), value) for name, value in raw.items()})
    parameters = _parameters(state.optimizer)
    optimizer_state = state.optimizer.state_dict()
    optimizer_state["state"] = {}
    for key, value in stored.items():
        index, entry = key.split("/")
        if int(index) >= len(parameters) or (value.ndim and value.shape != parameters[int(index)].shape):
            raise ValueError("its optimizer has other parameters, which freeze=encoder changes")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = sharded_like(parameter, value)
        optimizer_state["state"].setdefault(int(index), {})[entry] = value
    state.optimizer.load_state_dict(optimizer_state)
    if state.ema is not None:
        for key, average in state.ema.weights.items():
            average.copy_(sharded_like(average, snapshot.weights[key]))
    for key, value in _with_prefix("objective/", snapshot.tensors).items():
        held = state.objective.get(key)
        if held is not None and held.shape == value.shape:  # else its size was changed, and it starts anew
            held.copy_(value)
    state.step, state.seconds, state.skipped = step, seconds, skipped
    chosen = position.get("one_thread")
    state.one_thread = None if chosen is None else bool(chosen)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename a finished folder to its final name. An older folder of that name stays findable until then."""
    old = folder.with_name(f".old-{folder.name}")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _step_of(name: str) -> int:
    """Return the step of a checkpoint by the name of its folder."""
    found = re.fullmatch(r"(?:\.old-)?step-(\d+)", name)
    return int(found[1]) if found else -1


def _share_mode(folder: Path) -> None:
    """Give all files the mode of state.json; safetensors creates files that only their owner can read."""
    mode = (folder / POSITION_FILE).stat().st_mode
    for path in list_files(folder):
        path.chmod(mode)


def _remove_leftovers(checkpoints: Path) -> None:
    """Remove the files of a run that died while it saved."""
    for path in [*checkpoints.glob(".partial-*"), *checkpoints.glob(".removed-*")]:
        shutil.rmtree(path)
    for path in checkpoints.glob(".old-*"):
        if path.with_name(path.name.removeprefix(".old-")).exists():
            shutil.rmtree(path)


def _rotate(out: Path, newest: Path, keep: int) -> None:
    """Keep the newest `keep` intact checkpoints up to `newest`; remove all older ones, damaged or not."""
    found = [folder for folder in list_checkpoints(out) if folder.name.removeprefix(".old-") <= newest.name]
    intact = [folder for folder in found if find_damage(folder, quick=True) is None]
    if len(intact) < keep:
        return
    for folder in found[: found.index(intact[-keep])]:
        removed = folder.with_name(f".removed-{folder.name}")
        folder.rename(removed)  # so that a run that dies during the removal does not leave half a checkpoint
        shutil.rmtree(removed)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:  # this file system has no hard links
        shutil.copy2(source, target)


def _not_finite(snapshot: Snapshot) -> str | None:
    """Return the name of this rank's first non-finite tensor; wait for the device once, not once per tensor."""
    floats = {
        name: tensor
        for name, tensor in {**snapshot.tensors, **snapshot.weights}.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    if not floats:
        return None
    device = next(iter(floats.values())).device
    finite = torch.stack([local_tensor(tensor).isfinite().all().to(device) for tensor in floats.values()])
    return next((name for name, good in zip(floats, finite.tolist(), strict=True) if not good), None)


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
