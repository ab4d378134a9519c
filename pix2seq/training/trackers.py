"""Experiment trackers behind one small interface. The JSON lines of `RunLog` do not depend on them."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pix2seq.errors import InputError, unknown_name

PROJECT = "pix2seq"
ID_FILE = "run_id"  # identifies the run to trackers, so that a resumed run continues the same record


class Tracker(Protocol):
    """Records named numbers per step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers at a step; steps never decrease."""

    def close(self) -> None:
        """Flush and close."""


class TensorBoard:
    """Writes to OUT/tensorboard; hides what an earlier process wrote there after step `start`."""

    def __init__(self, out: Path, *, start: int, config: Mapping[str, Any]) -> None:
        board = _import("torch.utils.tensorboard", "tensorboard", "tensorboard")
        self._writer = board.SummaryWriter(str(out / "tensorboard"), purge_step=start + 1 if start else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Writes to OUT/wandb offline, for `wandb sync`; with WANDB_MODE=online, uploads at once."""

    def __init__(self, out: Path, *, start: int, config: Mapping[str, Any]) -> None:
        wandb = _import("wandb", "wandb", "wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=out.name,
            id=_run_id(out),
            dir=str(out),
            config=dict(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow" if start else None,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Writes to trackio's own folder on this machine; `trackio show` displays it."""

    def __init__(self, out: Path, *, start: int, config: Mapping[str, Any]) -> None:
        trackio = _import("trackio", "trackio", "trackio")
        self._run = trackio.init(
            project=PROJECT,
            name=f"{out.name}-{_run_id(out)}",
            config=dict(config),
            resume="allow" if start else "never",
            embed=False,
        )
        self._finish = trackio.finish

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._finish()


TRACKERS: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def make_trackers(
    names: Sequence[str], out: Path, *, start: int = 0, config: Mapping[str, Any] | None = None
) -> list[Tracker]:
    """Open trackers for a run in `out` that continues after step `start`; they also show `config`.

    Raises `InputError` for an unknown name and for a tracker that is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS)
    return [TRACKERS[name](out, start=start, config=config or {}) for name in dict.fromkeys(names)]


def _import(module: str, tracker: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"tracker {tracker!r} cannot be imported ({error}); run: pip install {package}, or leave it out of trackers"
        ) from None


def _run_id(out: Path) -> str:
    path = out / ID_FILE
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
