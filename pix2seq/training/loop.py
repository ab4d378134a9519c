"""A training run, top to bottom."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from pix2seq.data.folder import open_dataset
from pix2seq.data.sampler import EpochSampler
from pix2seq.data.target import Category, Dataset
from pix2seq.data.training_set import TrainingSet
from pix2seq.device import pick_device
from pix2seq.errors import InputError
from pix2seq.evaluation import evaluate
from pix2seq.model.pix2seq import Pix2Seq, build_model
from pix2seq.predictor import Predictor
from pix2seq.tasks import TASKS
from pix2seq.tasks.detection import Detection
from pix2seq.tasks.example import Batch, collate
from pix2seq.training.checkpoint import (
    RunState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from pix2seq.training.config import TrainConfig, save_config
from pix2seq.training.ema import Ema
from pix2seq.training.log import RunLog
from pix2seq.training.schedule import learning_rate
from pix2seq.training.step import build_optimizer, train_step


def run(config: TrainConfig, *, resume: str = "never") -> Path:
    """Train as `config` says, and return the last checkpoint's folder.

    `resume` is `never`, `auto` (the newest checkpoint of the run, if there is one) or a checkpoint.
    Raises `InputError` where data, settings or checkpoints cannot be used.
    """
    out = Path(config.out)
    done = list_checkpoints(out)
    if resume == "never" and done:
        raise InputError(f"{out} already holds {done[-1].name}; go on with --resume auto, or give another out=FOLDER")

    task, samples, val_data = _open_data(config)
    state = _new_state(config, task, samples.dataset.categories)
    if resume != "never" and (done or resume != "auto"):
        load_checkpoint(state, done[-1] if resume == "auto" else find_checkpoint(Path(resume)))
    model, optimizer, device = state.model, state.optimizer, state.model.device

    out.mkdir(parents=True, exist_ok=True)
    save_config(config, out / "config.yaml")
    num_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(samples)} images, {num_parameters / 1e6:.1f} M parameters, {device}, from step {state.step}", flush=True
    )
    batches = _micro_batches(config, samples, device, start=state.step)
    bar = tqdm(total=config.steps, initial=state.step, unit="step", smoothing=0.05, mininterval=1.0)
    with RunLog(out) as log, bar:
        seconds_logged, step_logged = state.seconds, state.step
        while state.step < config.steps:
            started = time.perf_counter()
            rate = learning_rate(state.step, config.steps, config.lr, config.schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            micro_batches = [next(batches) for _ in range(config.accumulate)]
            loss, grad_norm = train_step(
                model, optimizer, micro_batches, max_grad_norm=config.max_grad_norm, bf16=config.bf16
            )
            state.step += 1
            if state.ema is not None:
                state.ema.update(model, state.step)
            state.seconds += time.perf_counter() - started

            bar.update()
            if state.step % config.log_every == 0 or state.step == config.steps:
                images = (state.step - step_logged) * config.batch_size
                values = {"loss": loss.item(), "grad_norm": grad_norm.item(), "lr": rate}
                values |= {
                    "images_per_second": images / (state.seconds - seconds_logged),
                    "images": state.step * config.batch_size,
                    "minutes": state.seconds / 60,
                }
                seconds_logged, step_logged = state.seconds, state.step
                if not math.isfinite(values["loss"]):
                    raise InputError(f"the loss is {values['loss']} at step {state.step}, lr {rate:.3g}; lower lr")
                log.write(state.step, "train", values)
                bar.set_postfix(loss=f"{values['loss']:.3f}", img_s=f"{values['images_per_second']:.0f}")
            last = state.step == config.steps
            if state.step % config.checkpoint_every == 0 or last:
                save_checkpoint(state, out, keep=config.keep_checkpoints)
            if last or (config.eval_every and state.step % config.eval_every == 0):
                with torch.random.fork_rng():  # a run that is resumed after this goes on with the same draws
                    predictor = _evaluated(state, config)
                    result = evaluate(predictor, val_data, batch_size=config.eval_batch_size, limit=config.eval_images)
                position: dict[str, float | None] = {
                    "images": state.step * config.batch_size,
                    "minutes": state.seconds / 60,
                }
                log.write(state.step, "eval", position | result.ap.metrics)
                tqdm.write(f"step {state.step}: {result.summary()}")
    return list_checkpoints(out)[-1]


def _open_data(config: TrainConfig) -> tuple[Detection, TrainingSet, Dataset]:
    """The task, its training samples, and the validation split as it is."""
    (name,) = config.tasks
    folder = config.data_of(name)
    train_data, val_data = open_dataset(folder, config.train_split), open_dataset(folder, config.val_split)
    for dataset in (train_data, val_data):
        if len(dataset.defects):
            print(
                f"warning: {len(dataset.defects)} annotations or pictures of split {dataset.split!r} have defects and "
                f"were dropped or mended; see: pix2seq data check {dataset.root}",
                file=sys.stderr,
            )
    task = TASKS[name](config.detection, config.model.vocab, train_data.categories)
    if task.max_seq_len > config.model.decoder.max_seq_len:
        raise InputError(
            f"sequences of up to {task.max_seq_len} tokens do not fit model.decoder.max_seq_len="
            f"{config.model.decoder.max_seq_len}; raise it, or lower detection.max_objects"
        )
    samples = TrainingSet(train_data, task, size=config.model.image_size, augment=config.augment, seed=config.seed)
    if not len(samples):
        raise InputError(f"{folder} has no object to learn from in split {config.train_split!r}")
    return task, samples, val_data


def _new_state(config: TrainConfig, task: Detection, categories: Sequence[Category]) -> RunState:
    """A run at step 0: model, optimiser and average."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, categories, load_pretrained=config.init is None)
    model.task_settings = {task.name: task.settings()}
    height, width = config.model.image_size
    stride = model.encoder.stride
    if height % stride or width % stride:
        raise InputError(
            f"model.image_size {height}x{width} does not divide into patches of {stride}; use multiples of it"
        )
    if config.init is not None:
        start = Pix2Seq.from_pretrained(find_checkpoint(Path(config.init)))
        _require_same(start, model, config.init)
        model.load_state_dict(start.state_dict())
    model.to(pick_device(config.device)).train()
    optimizer = build_optimizer(model, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas)
    return RunState(model, optimizer, Ema(model, config.ema_decay) if config.ema_decay else None)


def _micro_batches(config: TrainConfig, samples: TrainingSet, device: torch.device, *, start: int) -> Iterator[Batch]:
    size = config.batch_size // config.accumulate
    sampler = EpochSampler(len(samples), size, seed=config.seed, start=start * config.accumulate)
    loader = DataLoader(
        samples,
        batch_sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or it would draw from the state that dropout is resumed with
        prefetch_factor=4 if config.num_workers else None,
        worker_init_fn=_one_thread,
    )
    return iter(loader)


def _one_thread(worker: int) -> None:
    # Workers share the cores with the training process; OpenCV's own threads would fight for them.
    import cv2

    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _evaluated(state: RunState, config: TrainConfig) -> Predictor:
    """A predictor with the averaged weights, on a copy, so that training goes on undisturbed."""
    copy = build_model(config.model, state.model.categories, load_pretrained=False)
    copy.task_settings = state.model.task_settings
    copy.load_state_dict(state.ema.weights if state.ema is not None else state.model.state_dict())
    return Predictor(copy.to(state.model.device).eval(), bf16=config.bf16)


def _require_same(start: Pix2Seq, model: Pix2Seq, name: str) -> None:
    ours, theirs = model.state_dict(), start.state_dict()
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in ours or key not in theirs or ours[key].shape != theirs[key].shape:
            raise InputError(f"init={name} is another model (see {key}); use model settings that equal its config.json")
