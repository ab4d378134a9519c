"""Checkpoints of a run: complete or absent, and enough to go on as if nothing had happened.

OUT/checkpoints/step-00001000/
    config.json, model.safetensors     what `from_pretrained` opens (averaged weights, if there is an average)
    state.safetensors, state.json      raw weights and optimiser, and the position; there is no random state,
                                       because every draw is a function of seed, step and sample
    state/                             in place of state.safetensors where weights are sharded: a file a rank
    manifest.json                      sizes and sha256 of all of them
OUT/checkpoints/best/                  the one with the best metric, and best.json, which says what that is

A folder is written under another name and gets its own when every byte is on the disk. What takes the
place of an older one moves that to .old-NAME first, where it is found if the run dies in between.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from pix2seq.errors import InputError
from pix2seq.files import files_in, find_damage, free_bytes, fsync_folder, seal, sync_files, writing
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
from pix2seq.training.distributed import Ranks, local, sharded_like, whole
from pix2seq.training.ema import Ema
from pix2seq.training.sharded_state import load_shards, save_shards, stored_shapes

BEST = "best"
BEST_FILE = "best.json"
SPARE_BYTES = 1 << 20  # room for the JSON files and words beside the tensors


@dataclass
class RunState:
    """What a run changes as it goes."""

    model: Pix2Seq
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0  # finished optimiser steps
    seconds: float = 0.0  # spent on training so far, without evaluation and saving
    skipped: int = 0  # steps that a non-finite loss or gradient made void


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds."""

    weights: Mapping[str, Tensor]  # of model.safetensors, whole: averaged, if there is an average
    tensors: Mapping[str, Tensor]  # of state.safetensors or state/: weights/NAME, optimizer/INDEX/NAME
    position: Mapping[str, float]  # of state.json: the numbers of `RunState`

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the `tensors`."""
        return any(isinstance(tensor, DTensor) for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, those of other ranks too."""
        return sum(t.numel() * t.element_size() for group in (self.weights, self.tensors) for t in group.values())


def save_checkpoint(state: RunState, out: Path, *, keep: int, ranks: Ranks | None = None) -> Path:
    """Write the checkpoint of this step, then remove all but the newest `keep`; every rank must call this.

    Raises `InputError` for weights or optimiser states that are not finite and for a disk that is full or
    read-only; then all checkpoints stay as they were.
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
                f"{name} is not finite at step {state.step}, so it was not saved; go on from the checkpoint before it "
                "with --resume auto and a lower lr"
            )
        with _writing(state, out, num_bytes):
            _sweep(folder.parent)
            if free_bytes(folder) < num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # now, not after minutes of writing
            partial.mkdir(parents=True)

    def finish() -> None:
        with _writing(state, out, num_bytes, removing=partial):
            write_checkpoint(partial, state.model.config_json(), snapshot.weights)
            if state.model.text is not None:
                state.model.text.save(partial)
            if not snapshot.sharded:
                save_file({name: t.contiguous() for name, t in snapshot.tensors.items()}, partial / STATE_FILE)
            (partial / POSITION_FILE).write_text(json.dumps(snapshot.position) + "\n", encoding="utf-8")
            seal(partial)
            _put_in_place(partial, folder)
            _rotate(out, folder, keep)

    ranks.on_first(begin)
    if snapshot.sharded:
        with _writing(state, out, num_bytes, removing=partial):
            save_shards(snapshot.tensors, partial / SHARDS_FOLDER)
    ranks.on_first(finish)
    return folder


@contextmanager
def _writing(state: RunState, out: Path, num_bytes: int, *, removing: Path | None = None) -> Iterator[None]:
    with writing(out, f"saving step {state.step}", num_bytes=num_bytes):
        try:
            yield
        except BaseException:
            if removing is not None:
                shutil.rmtree(removing, ignore_errors=True)
            raise


def take_snapshot(state: RunState, ranks: Ranks | None = None) -> Snapshot:
    """What a checkpoint of `state` holds; every rank must call this.

    Tensors are the run's own, not copies. Of averages that are sharded over ranks, the first rank gathers whole ones
    in host memory, and others keep none.
    """
    raw = {name: tensor.detach() for name, tensor in state.model.state_dict().items()}
    tensors = {f"weights/{name}": tensor for name, tensor in raw.items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in values.items()}
    position = {"step": state.step, "seconds": state.seconds, "skipped": state.skipped}
    averages = {}
    for name, tensor in (raw if state.ema is None else state.ema.weights).items():
        gathered = whole(tensor)
        if ranks is None or ranks.first:
            averages[name] = gathered.cpu() if gathered is not tensor else tensor
    return Snapshot(averages, tensors, position)


def mark_best(out: Path, folder: Path, metric: str, value: float | None, *, higher_is_better: bool = True) -> bool:
    """Make the checkpoint `folder` OUT/checkpoints/best if its `value` of `metric` beats the best so far.

    The files are shared with `folder` where the disk can do that, and stay when it is rotated out. A
    value that is undefined never wins; one of another metric always loses. Returns whether it won.
    """
    if not is_best(out, metric, value, higher_is_better=higher_is_better):
        return False
    place = out / "checkpoints" / BEST
    partial = place.with_name(f".partial-{BEST}")
    with writing(out, f"keeping {folder.name} as the best"):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for path in files_in(folder):
                if path.name != BEST_FILE:
                    _link(path, partial / path.relative_to(folder))
            content = {"checkpoint": folder.name, "metric": metric, "value": value}
            (partial / BEST_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")
            sync_files(partial)
            _put_in_place(partial, place)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return True


def is_best(out: Path, metric: str, value: float | None, *, higher_is_better: bool = True) -> bool:
    """Whether `value` of `metric` beats that of OUT/checkpoints/best; see `mark_best`."""
    if value is None or not math.isfinite(value):
        return False
    best = read_best(out)
    if best is None or best["metric"] != metric or find_damage(existing_folder(out / "checkpoints" / BEST), quick=True):
        return True
    return bool(value > best["value"] if higher_is_better else value < best["value"])


def read_best(out: Path) -> dict[str, Any] | None:
    """`checkpoint`, `metric` and `value` of OUT/checkpoints/best, None where there is none."""
    try:
        content = json.loads((existing_folder(out / "checkpoints" / BEST) / BEST_FILE).read_text(encoding="utf-8"))
        return {"checkpoint": content["checkpoint"], "metric": content["metric"], "value": float(content["value"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_checkpoint(state: RunState, folder: Path) -> None:
    """Put a run back to where `save_checkpoint` left it; every rank must call this.

    Raises `InputError` if the files are damaged or do not fit.
    """
    damage = find_damage(folder)
    if damage is not None:
        raise InputError(f"checkpoint {folder} is damaged: {damage}; give another one, or --resume auto")
    try:
        position = json.loads((folder / POSITION_FILE).read_text(encoding="utf-8"))
        if (folder / SHARDS_FOLDER).is_dir():
            tensors = _empty_tensors(state, stored_shapes(folder / SHARDS_FOLDER))
            load_shards(tensors, folder / SHARDS_FOLDER)
        else:
            tensors = load_file(folder / STATE_FILE)
        snapshot = Snapshot(load_file(folder / WEIGHTS_FILE), tensors, dict(position))
        _restore(state, snapshot)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"cannot resume from {folder}: {str(error).splitlines()[0]}; use the settings the run was "
            "started with, or start afresh with --resume never and another out="
        ) from error


def _empty_tensors(state: RunState, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Room for all that was stored under these names, sharded as the run's own tensors are."""
    weights = state.model.state_dict()
    parameters = _parameters(state.optimizer)
    tensors = {}
    for name, shape in shapes.items():
        kind, _, rest = name.partition("/")
        like = weights[rest] if kind == "weights" else parameters[int(rest.split("/")[0])]
        tensors[name] = torch.empty_like(like) if like.shape == shape else torch.empty(shape)
    return tensors


def _restore(state: RunState, snapshot: Snapshot) -> None:
    """Put a run back to a snapshot; each rank takes its part of what is sharded."""
    position = snapshot.position
    step, seconds = int(_number(position["step"])), _number(position["seconds"])
    skipped = int(_number(position.get("skipped", 0)))
    weights = state.model.state_dict()
    raw = _under("weights/", snapshot.tensors)
    state.model.load_state_dict({name: sharded_like(weights.get(name), value) for name, value in raw.items()})
    parameters = _parameters(state.optimizer)
    optimizer_state = state.optimizer.state_dict()
    optimizer_state["state"] = {}
    for key, value in _under("optimizer/", snapshot.tensors).items():
        index, entry = key.split("/")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = sharded_like(parameter, value)
        optimizer_state["state"].setdefault(int(index), {})[entry] = value
    state.optimizer.load_state_dict(optimizer_state)
    if state.ema is not None:
        for key, average in state.ema.weights.items():
            average.copy_(sharded_like(average, snapshot.weights[key]))
    state.step, state.seconds, state.skipped = step, seconds, skipped


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _put_in_place(partial: Path, folder: Path) -> None:
    """Give a finished folder its name. The one that had it stays findable until then."""
    old = folder.with_name(f".old-{folder.name}")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sweep(checkpoints: Path) -> None:
    """Remove what a run that died while it saved has left."""
    for path in [*checkpoints.glob(".partial-*"), *checkpoints.glob(".removed-*")]:
        shutil.rmtree(path)
    for path in checkpoints.glob(".old-*"):
        if path.with_name(path.name.removeprefix(".old-")).exists():
            shutil.rmtree(path)


def _rotate(out: Path, newest: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` intact checkpoints up to `newest`, damaged or not."""
    found = [folder for folder in list_checkpoints(out) if folder.name.removeprefix(".old-") <= newest.name]
    intact = [folder for folder in found if find_damage(folder, quick=True) is None]
    if len(intact) < keep:
        return
    for folder in found[: found.index(intact[-keep])]:
        removed = folder.with_name(f".removed-{folder.name}")
        folder.rename(removed)  # or a run that dies here would leave half a checkpoint
        shutil.rmtree(removed)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _not_finite(snapshot: Snapshot) -> str | None:
    """Name of this rank's first tensor with a value that is not finite; one wait for the device, not one a tensor."""
    floats = {
        name: tensor
        for name, tensor in {**snapshot.tensors, **snapshot.weights}.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    if not floats:
        return None
    device = next(iter(floats.values())).device
    finite = torch.stack([local(tensor).isfinite().all().to(device) for tensor in floats.values()])
    return next((name for name, good in zip(floats, finite.tolist(), strict=True) if not good), None)


def _number(value: float | None) -> float:
    if not isinstance(value, int | float):
        raise ValueError(f"{POSITION_FILE} holds {value!r} in place of a number")
    return value


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
