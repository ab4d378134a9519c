"""What a run tells as it goes: numbers to its log, a line to the terminal. Ranks other than the first are silent."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from pix2seq.evaluation import EvalResult
from pix2seq.training.checkpoint import RunState
from pix2seq.training.config import TrainConfig
from pix2seq.training.distributed import Ranks
from pix2seq.training.log import RunLog
from pix2seq.training.memory import memory_mb
from pix2seq.training.recipe import Recipe
from pix2seq.training.step import StepResult


class Report:
    """A progress bar, and a line in the log every `log_every` steps and for every evaluation."""

    def __init__(self, config: TrainConfig, recipe: Recipe, state: RunState, ranks: Ranks) -> None:
        self.config = config
        self.images_per_step = sum(config.batch_size_of(name) for name in config.tasks)
        self._log: RunLog | None = None

        def open_log() -> int:
            self._log = RunLog(Path(config.out), start=state.step, trackers=config.trackers, config=asdict(config))
            return self._log.evaluated

        self.evaluated = ranks.on_first(open_log)  # the last step whose evaluation is in the log
        self._bar = tqdm(
            total=config.steps,
            initial=state.step,
            unit="step",
            smoothing=0.05,
            mininterval=1.0,
            disable=not ranks.first,
        )
        self._waited = 0.0  # for data, since the last line
        self._logged_step, self._logged_seconds = state.step, state.seconds
        if ranks.first:
            sizes = ", ".join(f"{len(samples)} samples of {samples.task.name}" for samples in recipe.samples)
            millions = sum(p.numel() for p in state.model.parameters()) / 1e6
            spread = f"{ranks.size} processes, " if ranks.size > 1 else ""
            print(f"{sizes}, {millions:.1f} M parameters, {spread}{ranks.device}, from step {state.step}", flush=True)

    def step(self, state: RunState, result: StepResult, *, rate: float, waited: float) -> None:
        """After optimiser step `state.step`, for whose data the run waited so many seconds."""
        self._bar.update()
        self._waited += waited
        config = self.config
        if self._log is None or not (state.step % config.log_every == 0 or state.step == config.steps):
            return
        seconds = state.seconds - self._logged_seconds
        steps = state.step - self._logged_step
        values: dict[str, float | None] = {"loss": result.loss.item(), "grad_norm": result.grad_norm.item(), "lr": rate}
        if len(result.task_losses) > 1:
            values |= {f"loss/{name}": loss.item() for name, loss in result.task_losses.items()}
        values |= {
            "images_per_second": steps * self.images_per_step / seconds,
            "data_wait_share": self._waited / seconds,
            **memory_mb(),
            "minutes_left": (config.steps - state.step) * seconds / steps / 60,
            "skipped_steps": state.skipped,
            **self._position(state),
        }
        self._log.write(state.step, "train", values)
        self._bar.set_postfix(loss=f"{values['loss']:.3f}", img_s=f"{values['images_per_second']:.0f}")
        self._waited = 0.0
        self._logged_step, self._logged_seconds = state.step, state.seconds

    def evaluation(self, state: RunState, result: EvalResult) -> None:
        """After an evaluation at `state.step`."""
        if self._log is not None:
            self._log.write(state.step, "eval", self._position(state) | result.metrics)
            tqdm.write(f"step {state.step}: {result.summary()}")

    def skipped(self, state: RunState, **fields: Any) -> None:
        """After a step whose loss or gradient was not finite; `fields` say what it was made of."""
        if self._log is not None:
            self._log.event(state.step, "skipped", **fields)

    def _position(self, state: RunState) -> dict[str, float | None]:
        return {"images": state.step * self.images_per_step, "minutes": state.seconds / 60}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.__exit__(kind, error, trace)
