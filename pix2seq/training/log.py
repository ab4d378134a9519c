"""Where a run's numbers go: a JSON line each, and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Appends to OUT/log.jsonl and OUT/tensorboard. A resumed run goes on in the same files."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._lines = (out / "log.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(out / "tensorboard"))

    def write(self, step: int, kind: str, values: Mapping[str, float | None]) -> None:
        """Record named numbers of one kind (train, eval) at a step; None means undefined."""
        rounded = {name: None if value is None else float(f"{value:.6g}") for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, "kind": kind, **rounded}) + "\n")
        self._lines.flush()
        for name, value in rounded.items():
            if value is not None:
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._board.close()
