"""A training run, top to bottom."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pix2seq.data.loader import batches
from pix2seq.errors import InputError, Stopped
from pix2seq.evaluation import EvalResult, Measured, measure, merge_measured
from pix2seq.examples import Batch
from pix2seq.files import output_folder
from pix2seq.model.encoders.build import encoder_fingerprint
from pix2seq.model.pix2seq import Pix2Seq, build_model
from pix2seq.model.pretrained import find_checkpoint, list_checkpoints, newest_checkpoint
from pix2seq.predictor import Predictor
from pix2seq.tasks import get_task
from pix2seq.training.checkpoint import (
    RunState,
    is_best,
    load_checkpoint,
    mark_best,
    read_position,
    save_checkpoint,
    set_aside,
)
from pix2seq.training.config import TrainConfig
from pix2seq.training.contrast import NAME, ContrastiveLoss, Queue
from pix2seq.training.distributed import Ranks, full_tensor, join_ranks
from pix2seq.training.ema import Ema
from pix2seq.training.initialize import initialize_from, with_init_model
from pix2seq.training.log import LOG_FILE, Report
from pix2seq.training.memory import keep_freed_memory
from pix2seq.training.objective import CrossEntropy, Objective
from pix2seq.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from pix2seq.training.recipe import Recipe, check_val_images, prepare
from pix2seq.training.recorded_step import BUCKET, RecordedStep
from pix2seq.training.resume import Change, check_data, check_settings, is_measured_anew, keep_settings, run_record
from pix2seq.training.reward import PolicyGradient, Rewards
from pix2seq.training.run_lock import run_lock
from pix2seq.training.step import Step, StepResult, TrainingModel, compile_model, train_step
from pix2seq.training.stop import Interrupted, StopRequest
from pix2seq.training.threads import ThreadTrial

STEPS_BEHIND = 2  # steps whose outcome a GPU may still compute while the next ones are prepared


def run(config: TrainConfig, *, resume: str = "never", accept_changes: bool = False) -> Path:
    """Train with `config`, alone or as one of the processes that torchrun started; return the last checkpoint.

    `resume` is `never`, `auto` (the newest checkpoint of the run, if there is one) or a checkpoint. Settings that
    would change what a resumed run computes are refused unless `accept_changes`; see `training.resume`.
    Raises `InputError` if data, settings or checkpoints cannot be used, and `Stopped` after SIGTERM, with
    everything saved.
    """
    out = Path(config.out)
    with ExitStack() as stack:
        ranks = stack.enter_context(join_ranks(config.device, config.num_processes))
        resumed = ranks.on_first(lambda: _enter(stack, out, resume))
        config = with_init_model(config)
        changes: list[Change] = []
        if resumed is not None:
            done = ranks.on_first(partial(read_position, resumed))["step"]
            if done > config.steps:
                if ranks.first:
                    print(
                        f"{resumed} is past the last step already: step {done} of {config.steps}; raise steps to go on"
                    )
                return resumed
            changes = ranks.on_first(partial(check_settings, config, resumed, accept=accept_changes))
        recipe = prepare(config, resumed=resumed)
        record = ranks.on_first(partial(run_record, config, recipe))
        if resumed is None:
            ranks.on_first(lambda: check_val_images(config, recipe))
        else:
            changes += ranks.on_first(partial(check_data, config, recipe, record, resumed, accept=accept_changes))
        trainer = _Trainer(config, recipe, ranks)
        trainer.state.record = record
        if resumed is not None:
            load_checkpoint(trainer.state, resumed)
        ranks.on_first(partial(_take_over, out, trainer.state, config, resumed, changes))
        with Report(config, recipe, trainer.state, ranks) as report, StopRequest() as stop:
            report.changed(trainer.state.step, changes)
            trainer.train(report, stop)
        # A finished run from another folder has nothing to save here.
        return ranks.on_first(lambda: [*filter(None, [resumed]), *list_checkpoints(out)][-1])


def _enter(stack: ExitStack, out: Path, resume: str) -> Path | None:
    """Lock the run's folder, and find the checkpoint to resume from."""
    output_folder(out)
    stack.enter_context(run_lock(out))
    done = list_checkpoints(out)
    if resume == "never" and done:
        raise InputError(
            f"{out} already holds {done[-1].name}; continue with --resume auto, or give another out=FOLDER"
        )
    if resume == "never" or (resume == "auto" and not done):
        return None
    return newest_checkpoint(out) if resume == "auto" else find_checkpoint(Path(resume))


def _take_over(
    out: Path, state: RunState, config: TrainConfig, resumed: Path | None, changes: Sequence[Change]
) -> None:
    """Set aside what the run does not go on from, and keep its settings, before the first write."""
    aside = set_aside(out, resumed, state.step, best_too=is_measured_anew(changes))
    if aside is not None:
        print(f"checkpoints of {out} that the run does not go on from were set aside in {aside}", flush=True)
    keep_settings(replace(config, model=state.model.config), out, state.step)


class _Trainer:
    """The model, data and state of a run."""

    def __init__(self, config: TrainConfig, recipe: Recipe, ranks: Ranks) -> None:
        """Build the run at step 0."""
        self.config, self.recipe, self.ranks = config, recipe, ranks
        self.out = Path(config.out)
        torch.manual_seed(config.seed)
        model = _new_model(config, recipe)
        # Rewards are of what the model says without dropout, so it learns from that without dropout too.
        model.to(ranks.device).train(config.objective == "likelihood")
        if config.freezes_encoder:
            model.freeze_encoder()
        model.set_activation_checkpointing(config.activation_checkpointing)
        if ranks.device.type == "cpu":
            keep_freed_memory()
        if config.compile:
            compile_model(model)
        self.rewards: Rewards | None = None
        contrast = self._contrast(model)
        objective: Objective = CrossEntropy(config.label_smoothing, contrast)
        if config.objective == "reward":
            self.rewards = Rewards(
                model, recipe.tasks, recipe.train_data, config.reward, seed=config.seed, bf16=config.bf16
            )
            objective = PolicyGradient()
        self.training_model = TrainingModel(model, objective, bf16=config.bf16, ranks=ranks, parallel=config.parallel)
        optimizer = build_optimizer(
            model, name=config.optimizer, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas
        )
        ema = Ema(model, config.ema_decay) if config.ema_decay else None
        self.state = RunState(model, optimizer, ema, objective.state)
        self._has_contrast = contrast is not None
        self._skipped_in_a_row = 0
        self._pending: deque[_Outcome] = deque()  # steps whose outcome was not looked at
        self._saved: Path | None = None  # the last written checkpoint
        self._saved_step = -1

    def _contrast(self, model: Pix2Seq) -> ContrastiveLoss | None:
        """Return the contrastive loss, if the model makes embeddings and a task tells sentences; else freeze them."""
        settings = self.config.model.contrast
        if model.contrast is None or settings is None:
            return None
        if self.config.objective == "reward" or not self.recipe.tells_sentences:
            model.contrast.requires_grad_(False)
            return None
        return ContrastiveLoss(self.ranks, Queue.empty(self.config.contrast.queue, settings.dim, self.ranks.device))

    def train(self, report: Report, stop: StopRequest) -> None:
        """Train to the last step. Raises `Stopped` once the state is saved, if `stop` was requested."""
        config, state = self.config, self.state
        recorded = self._records_steps()
        stream = batches(
            [(samples, config.batch_size_of(samples.tasks[0]) // config.accumulate) for samples in self.recipe.samples],
            start=state.step * config.accumulate,
            num_workers=config.num_workers,
            timeout=config.worker_timeout,
            pin_memory=self.ranks.device.type == "cuda",
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            bucket=BUCKET if recorded else 1,
            keep_samples=self.rewards is not None,
        )
        step: Step = RecordedStep() if recorded else train_step
        loss_weights = {name: config.task(name).loss_weight for name in config.tasks}
        loss_weights[NAME] = config.contrast.loss_weight
        if self.rewards is not None:
            loss_weights |= self.rewards.likelihood_weights(loss_weights)
        may_try = self.ranks.device.type == "cpu" and self.ranks.size == 1 and not config.compile
        trial = ThreadTrial(state.one_thread if may_try else False)
        while True:
            if self._evaluation_is_due(report):
                self._evaluate(report, stop)
            if state.step >= config.steps:
                return
            started = time.perf_counter()
            micro_batches: list[Batch] = []
            try:
                with stop.interruptible():
                    micro_batches = [next(stream) for _ in range(config.accumulate)]
            except Interrupted:
                pass
            self._stop_if_requested(report, stop)
            waited = time.perf_counter() - started
            trial.before_step(state.step)

            sampling = time.perf_counter()
            if self.rewards is not None:
                micro_batches = [self.rewards.sample(batch, state.step) for batch in micro_batches]
            sampled = time.perf_counter() - sampling
            torch.manual_seed(self._seed_of_step())
            rate = learning_rate(state.step, config.steps, config.lr, config.schedule)
            set_learning_rate(state.optimizer, rate)
            result = step(self.training_model, state.optimizer, micro_batches, loss_weights, config.max_grad_norm)
            state.step += 1
            if state.ema is not None:
                if self.ranks.device.type == "cuda":
                    state.ema.update(state.model, state.step, result.finite)
                elif bool(result.finite):  # read without a wait, and a plain update is faster
                    state.ema.update(state.model, state.step)
            seconds = time.perf_counter() - started
            state.seconds += seconds
            trial.after_step(state.step - 1, seconds - waited)
            state.one_thread = trial.one_thread
            report.step(state, result, rate=rate, waited=waited, sampled=sampled)
            self._pending.append(_Outcome.of(state.step, result, micro_batches))
            saving = state.step % config.checkpoint_every == 0 or state.step == config.steps
            self._count_skipped(report, leave=0 if saving or self.ranks.device.type != "cuda" else STEPS_BEHIND)
            if saving:
                self._save()

    def _records_steps(self) -> bool:
        """Whether steps are CUDA graphs: on one GPU, for the optimiser that can be recorded.

        A recording has no place for closeups, compared sentences and joined memories, of which every batch has another
        number.
        """
        config, ranks = self.config, self.ranks
        alone = ranks.device.type == "cuda" and ranks.size == 1 and config.accumulate == 1
        return (
            alone
            and self.rewards is None
            and not config.model.encoder.closeups
            and not self._has_contrast
            and not config.model.memory.references
            and config.cuda_graphs
            and config.optimizer == "adamw"
            and config.bf16
            and not config.compile
        )

    def _seed_of_step(self) -> int:
        """Return the seed of dropout, a function of seed, step and rank, so that a resumed run draws the same."""
        sequence = np.random.SeedSequence((self.config.seed, self.state.step, self.ranks.rank))
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _stop_if_requested(self, report: Report, stop: StopRequest) -> None:
        if self.ranks.any(stop.requested):
            self._count_skipped(report, leave=0)
            self._save()
            raise Stopped(
                f"stopped by SIGTERM after step {self.state.step} of {self.config.steps}; everything is saved in "
                f"{self.out}, continue with --resume auto"
            )

    def _count_skipped(self, report: Report, *, leave: int) -> None:
        """Look at the outcomes of all but the last `leave` steps, and log the images of those without an update.

        Ends the run after too many such steps in a row. A GPU has finished a step of some steps ago, so that looking
        at it does not wait.
        """
        while len(self._pending) > leave:
            outcome = self._pending.popleft()
            if outcome.copied is not None:
                outcome.copied.synchronize()
            if bool(outcome.finite):
                self._skipped_in_a_row = 0
                continue
            self._skipped_in_a_row += 1
            self.state.skipped += 1
            samples = self.ranks.gather(outcome.image_ids)
            self.ranks.on_first(partial(self._log_skipped, report, outcome, samples))

    def _log_skipped(self, report: Report, outcome: _Outcome, samples: Any) -> None:
        loss, grad_norm = str(outcome.loss.item()), str(outcome.grad_norm.item())
        report.skipped(outcome.step, loss=loss, grad_norm=grad_norm, image_ids_by_rank=samples)
        if self._skipped_in_a_row == self.config.max_skipped:
            raise InputError(
                f"no finite loss and gradient in {self._skipped_in_a_row} steps in a row, the last in step "
                f"{outcome.step} (loss {loss}, gradient norm {grad_norm}); {self.out / LOG_FILE} names their "
                "images; lower lr, and continue from the last checkpoint with --resume auto"
            )

    def _save(self) -> Path:
        """Return the checkpoint of this step; write it if it is not there yet."""
        if self._saved is None or self._saved_step != self.state.step:
            self._saved = save_checkpoint(self.state, self.out, keep=self.config.keep_checkpoints, ranks=self.ranks)
            self._saved_step = self.state.step
        return self._saved

    def _keep_if_best(self, metrics: Mapping[str, float | None]) -> None:
        """Keep this step's checkpoint as OUT/checkpoints/best if its metric is the best so far."""
        first = get_task(self.config.tasks[0])
        name = self.config.best_metric or first.metric_name(first.main_metric)
        if name not in metrics:
            self._save()
            raise InputError(f"best_metric={name} is not a metric of this run; it has {', '.join(metrics)}")
        value = metrics[name]
        if self.ranks.on_first(lambda: is_best(self.out, name, value)):
            folder = self._save()
            self.ranks.on_first(lambda: mark_best(self.out, folder, name, value))

    def _evaluation_is_due(self, report: Report) -> bool:
        step, every = self.state.step, self.config.eval_every
        due = step == self.config.steps or (every > 0 and step > 0 and step % every == 0)
        return due and report.evaluated < step

    def _evaluate(self, report: Report, stop: StopRequest) -> None:
        """Score the averaged weights on the validation splits; the ranks share the images."""
        config, ranks = self.config, self.ranks
        started = time.perf_counter()
        predictor = self._averaged_model()
        measured: Measured = {}
        num_images = 0
        try:
            with stop.interruptible():
                for dataset, names in self.recipe.evaluations():
                    images = range(min(config.eval_images or len(dataset), len(dataset)))
                    mine = images[ranks.rank :: ranks.size]
                    measured |= measure(predictor, dataset, names, mine, batch_size=config.eval_batch_size)
                    num_images = max(num_images, len(images))
        except Interrupted:
            pass
        self._stop_if_requested(report, stop)
        parts = ranks.gather(measured)
        seconds = time.perf_counter() - started

        results: list[EvalResult] = []

        def score() -> dict[str, float | None]:
            results.append(EvalResult.of(merge_measured(parts), num_images=num_images, seconds=seconds))
            return results[0].metrics

        self._keep_if_best(ranks.on_first(score))
        # A run that dies before this line evaluates again, and so keeps its best.
        ranks.on_first(lambda: report.evaluation(self.state, results[0]))
        report.evaluated = self.state.step

    def _averaged_model(self) -> Predictor:
        """Return a copy of the model with the averaged weights."""
        model = self.state.model
        copy = build_model(model.config, model.categories, model.text, load_pretrained=False)
        copy.task_settings = model.task_settings
        weights = self.state.ema.weights if self.state.ema is not None else model.state_dict()
        copy.load_state_dict({name: full_tensor(tensor) for name, tensor in weights.items()})
        return Predictor(copy.to(model.device).eval(), bf16=self.config.bf16)


@dataclass(frozen=True)
class _Outcome:
    """Whether a step was finite, and what it was made of. Tensors are on their way to host memory until `copied`."""

    step: int
    finite: Tensor
    loss: Tensor
    grad_norm: Tensor
    image_ids: dict[str, list[tuple[int, ...]]]  # by task, of each micro-batch
    copied: torch.cuda.Event | None  # reading a tensor on the GPU would wait for all steps that were started

    @classmethod
    def of(cls, step: int, result: StepResult, micro_batches: Sequence[Batch]) -> _Outcome:
        """Take note of a step."""
        image_ids = {name: [batch.image_ids[name] for batch in micro_batches] for name in micro_batches[0].tasks}
        tensors = (result.finite, result.loss, result.grad_norm)
        finite, loss, grad_norm = (tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors)
        copied = torch.cuda.Event() if result.loss.is_cuda else None
        if copied is not None:
            copied.record()
        return cls(step, finite, loss, grad_norm, image_ids, copied)


def _new_model(config: TrainConfig, recipe: Recipe) -> Pix2Seq:
    """Build the model at step 0, for the classes and words of the recipe."""
    settings = replace(config.model, vocab=recipe.vocab)
    model = build_model(settings, recipe.categories, recipe.text, load_pretrained=config.init is None)
    model.task_settings = {name: asdict(config.task(name)) for name in config.tasks}
    height, width = config.model.image_size
    stride = model.encoder.stride
    if height % stride or width % stride:
        raise InputError(
            f"model.image_size {height}x{width} does not divide into patches of {stride}; use multiples of it"
        )
    if config.init is not None:
        start = Pix2Seq.from_pretrained(find_checkpoint(Path(config.init)))
        print(f"from {config.init}: {initialize_from(model, start, config.init)}")
    if recipe.features is not None:
        fingerprint = encoder_fingerprint(model.encoder, config.model.encoder, config.model.positions)
        recipe.features.check_encoder(fingerprint)
    return model
