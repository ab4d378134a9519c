"""Where a run's numbers go: a JSON line each, and trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pix2seq.files import output_folder, write_durably, writing
from pix2seq.training.trackers import make_trackers

LOG_FILE = "log.jsonl"


class RunLog:
    """Appends to OUT/log.jsonl and to trackers. A resumed run goes on in the same places.

    `start` is the step it goes on from: what a killed run wrote after that comes again and is dropped first, so that
    the file reads as one run. `evaluated` is the last step whose evaluation is in it, 0 where there is none.
    """

    def __init__(
        self,
        out: Path,
        *,
        start: int = 0,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        output_folder(out)
        self._path = out / LOG_FILE
        with writing(self._path, "opening the log"):
            kept = _drop_lines_after(self._path, start)
            # Unbuffered: a line is one write, so that a killed run tears at most its last.
            self._lines = self._path.open("ab", buffering=0)
        self.evaluated = max((entry["step"] for entry in kept if entry["kind"] == "eval"), default=0)
        self._trackers = make_trackers(trackers, out, start=start, config=config)

    def write(self, step: int, kind: str, values: Mapping[str, float | None]) -> None:
        """Record named numbers of one kind (train, eval) at a step; None means undefined."""
        rounded = {name: None if value is None else float(f"{value:.6g}") for name, value in values.items()}
        self._append({"step": step, "kind": kind, **rounded})
        defined = {f"{kind}/{name}": value for name, value in rounded.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(step, defined)

    def event(self, step: int, kind: str, **fields: Any) -> None:
        """Record what is not a number, such as the samples of a step that was skipped; trackers do not get it."""
        self._append({"step": step, "kind": kind, **fields})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        for tracker in self._trackers:
            tracker.close()

    def _append(self, content: Mapping[str, Any]) -> None:
        line = (json.dumps(content) + "\n").encode()
        with writing(self._path, f"logging step {content['step']}", num_bytes=len(line)):
            written = self._lines.write(line)
            if written != len(line):
                self._lines.write(line[written:])  # the disk is full, and says so now


def _drop_lines_after(path: Path, start: int) -> list[dict[str, Any]]:
    """Leave what belongs to a run up to a step, and give it; a line that a crash tore is dropped too."""
    if not path.exists():
        return []
    content = path.read_text(encoding="utf-8", errors="replace")
    kept = [(line, entry) for line in content.splitlines(keepends=True) if (entry := _entry(line, start)) is not None]
    if len(kept) < len(content.splitlines()):
        write_durably(path, "".join(line for line, _ in kept))
    return [entry for _, entry in kept]


def _entry(line: str, start: int) -> dict[str, Any] | None:
    """What a whole line of a step up to `start` says."""
    try:
        entry = json.loads(line)
        return entry if line.endswith("\n") and entry["step"] <= start and entry["kind"] else None
    except (ValueError, KeyError, TypeError):
        return None
