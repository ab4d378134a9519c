"""What a run reports on its first rank: JSON lines in OUT/log.jsonl, numbers for trackers, a progress bar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from pix2seq.evaluation import EvalResult
from pix2seq.files import output_folder, report_write_errors, write_atomically
from pix2seq.training.checkpoint import RunState
from pix2seq.training.config import TrainConfig
from pix2seq.training.distributed import Ranks
from pix2seq.training.memory import memory_mb
from pix2seq.training.recipe import Recipe
from pix2seq.training.resume import Change
from pix2seq.training.step import StepResult
from pix2seq.training.trackers import make_trackers

LOG_FILE = "log.jsonl"


class Report:
    """A progress bar, and a log line every `log_every` steps and for every evaluation."""

    def __init__(self, config: TrainConfig, recipe: Recipe, state: RunState, ranks: Ranks) -> None:
        self.config = config
        # An image that teaches several tasks counts once.
        self.images_per_step = sum(config.batch_size_of(samples.tasks[0]) for samples in recipe.samples)
        self._log: RunLog | None = None

        def open_log() -> int:
            self._log = RunLog(Path(config.out), start=state.step, trackers=config.trackers, config=asdict(config))
            return self._log.evaluated

        self.evaluated = ranks.on_first(open_log)  # the last step with an evaluation in the log
        options: dict[str, Any] = {"unit": "step", "smoothing": 0.05, "mininterval": 1.0, "disable": not ranks.first}
        self._bar = tqdm(total=config.steps, initial=state.step, **options)
        self._waited = 0.0  # seconds of waiting for data since the last line
        self._sampled = 0.0  # seconds of sampling answers since then
        self._logged_step, self._logged_seconds = state.step, state.seconds
        if ranks.first:
            for note in recipe.notes:
                print(note, flush=True)
            sizes = ", ".join(f"{len(samples)} samples of {'+'.join(samples.tasks)}" for samples in recipe.samples)
            millions = sum(p.numel() for p in state.model.parameters()) / 1e6
            count = f"{ranks.size} processes, " if ranks.size > 1 else ""
            print(f"{sizes}, {millions:.1f} M parameters, {count}{ranks.device}, from step {state.step}", flush=True)

    def step(self, state: RunState, result: StepResult, *, rate: float, waited: float, sampled: float = 0.0) -> None:
        """Report optimiser step `state.step`, which waited `waited` seconds for data and sampled for `sampled`."""
        self._bar.update()
        self._waited += waited
        self._sampled += sampled
        config = self.config
        if self._log is None or not (state.step % config.log_every == 0 or state.step == config.steps):
            return
        seconds = state.seconds - self._logged_seconds
        steps = state.step - self._logged_step
        values: dict[str, float | None] = {"loss": result.loss.item(), "grad_norm": result.grad_norm.item(), "lr": rate}
        if len(result.losses) > 1:
            values |= {f"loss/{name}": loss.item() for name, loss in result.losses.items()}
        values |= {
            "images_per_second": steps * self.images_per_step / seconds,
            "data_wait_share": self._waited / seconds,
            **({"sampling_share": self._sampled / seconds} if config.objective == "reward" else {}),
            **memory_mb(),
            "minutes_left": (config.steps - state.step) * seconds / steps / 60,
            "skipped_steps": state.skipped,
            **self._progress(state),
        }
        self._log.write(state.step, "train", values)
        self._bar.set_postfix(loss=f"{values['loss']:.3f}", img_s=f"{values['images_per_second']:.0f}")
        self._waited = self._sampled = 0.0
        self._logged_step, self._logged_seconds = state.step, state.seconds

    def evaluation(self, state: RunState, result: EvalResult) -> None:
        """Report an evaluation at `state.step`."""
        if self._log is not None:
            self._log.write(state.step, "eval", self._progress(state) | result.metrics)
            tqdm.write(f"step {state.step}: {result.summary()}")

    def skipped(self, step: int, **fields: Any) -> None:
        """Report a step with a non-finite loss or gradient; `fields` describe it."""
        if self._log is not None:
            self._log.event(step, "skipped", **fields)

    def changed(self, step: int, changes: Sequence[Change]) -> None:
        """Report what differs from step `step` on from the run as it was."""
        if self._log is not None and changes:
            self._log.event(step, "changed", settings={change.name: [change.before, change.now] for change in changes})
            tqdm.write(f"from step {step}: {', '.join(map(str, changes))}")

    def _progress(self, state: RunState) -> dict[str, float | None]:
        return {"images": state.step * self.images_per_step, "minutes": state.seconds / 60}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.__exit__(kind, error, trace)


class RunLog:
    """Append to OUT/log.jsonl and to trackers. A resumed run continues both.

    `start` is the step to resume from. Lines of a killed run after that step are dropped first, because the resumed
    run writes them again; so the file reads as one run. `evaluated` is the last step with an evaluation in the
    file, or 0.
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
        with report_write_errors(self._path, "opening the log"):
            kept = _drop_lines_after(self._path, start)
            # Unbuffered: each line is one write, so that a kill can tear only the last line.
            self._file = self._path.open("ab", buffering=0)
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
        """Record values that are not numbers, such as the images of a skipped step; trackers do not get them."""
        self._append({"step": step, "kind": kind, **fields})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _append(self, content: Mapping[str, Any]) -> None:
        line = (json.dumps(content) + "\n").encode()
        with report_write_errors(self._path, f"logging step {content['step']}", num_bytes=len(line)):
            written = self._file.write(line)
            if written != len(line):
                self._file.write(line[written:])  # the disk is full; this write raises the error


def _drop_lines_after(path: Path, start: int) -> list[dict[str, Any]]:
    """Keep only the intact lines up to step `start`, and return their entries."""
    if not path.exists():
        return []
    content = path.read_text(encoding="utf-8", errors="replace")
    kept = [(line, entry) for line in content.splitlines(keepends=True) if (entry := _entry(line, start)) is not None]
    if len(kept) < len(content.splitlines()):
        write_atomically(path, "".join(line for line, _ in kept))
    return [entry for _, entry in kept]


def _entry(line: str, start: int) -> dict[str, Any] | None:
    """Return the content of a complete line up to step `start`, else None."""
    try:
        entry = json.loads(line)
        return entry if line.endswith("\n") and entry["step"] <= start and entry["kind"] else None
    except (ValueError, KeyError, TypeError):
        return None
