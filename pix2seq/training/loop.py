"""A training run, top to bottom."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from pix2seq.data.loader import batches
from pix2seq.device import pick_device
from pix2seq.errors import InputError
from pix2seq.evaluation import EvalResult, evaluate
from pix2seq.model.pix2seq import Pix2Seq, build_model
from pix2seq.output import output_folder
from pix2seq.predictor import Predictor
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
from pix2seq.training.recipe import Recipe, prepare
from pix2seq.training.schedule import learning_rate
from pix2seq.training.start import start_from, with_model_of_start
from pix2seq.training.step import TaskBatches, build_optimizer, train_step


def run(config: TrainConfig, *, resume: str = "never") -> Path:
    """Train as `config` says, and return the last checkpoint's folder.

    `resume` is `never`, `auto` (the newest checkpoint of the run, if there is one) or a checkpoint.
    Raises `InputError` where data, settings or checkpoints cannot be used.
    """
    out = Path(config.out)
    done = list_checkpoints(out)
    if resume == "never" and done:
        raise InputError(f"{out} already holds {done[-1].name}; go on with --resume auto, or give another out=FOLDER")
    resumed = None
    if resume != "never" and (done or resume != "auto"):
        resumed = done[-1] if resume == "auto" else find_checkpoint(Path(resume))

    config = with_model_of_start(config)
    output_folder(out)
    recipe = prepare(config, resumed=resumed)
    state = _new_state(config, recipe)
    if resumed is not None:
        load_checkpoint(state, resumed)
    model, optimizer, device = state.model, state.optimizer, state.model.device

    save_config(replace(config, model=model.config), out / "config.yaml")
    num_parameters = sum(p.numel() for p in model.parameters())
    sizes = ", ".join(f"{len(samples)} samples of {samples.task.name}" for samples in recipe.samples)
    print(f"{sizes}, {num_parameters / 1e6:.1f} M parameters, {device}, from step {state.step}", flush=True)
    streams = {
        samples.task.name: batches(
            samples,
            batch_size=config.batch_size_of(samples.task.name) // config.accumulate,
            start=state.step * config.accumulate,
            num_workers=config.num_workers,
            pin_memory=device.type == "cuda",
            timeout=config.worker_timeout,
        )
        for samples in recipe.samples
    }
    images_per_step = sum(config.batch_size_of(name) for name in streams)
    bar = tqdm(total=config.steps, initial=state.step, unit="step", smoothing=0.05, mininterval=1.0)
    with RunLog(out) as log, bar:
        seconds_logged, step_logged = state.seconds, state.step
        while state.step < config.steps:
            started = time.perf_counter()
            rate = learning_rate(state.step, config.steps, config.lr, config.schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            task_batches = [
                TaskBatches(name, config.task(name).loss_weight, [next(stream) for _ in range(config.accumulate)])
                for name, stream in streams.items()
            ]
            result = train_step(
                model,
                optimizer,
                task_batches,
                max_grad_norm=config.max_grad_norm,
                bf16=config.bf16,
                label_smoothing=config.label_smoothing,
            )
            state.step += 1
            if state.ema is not None:
                state.ema.update(model, state.step)
            state.seconds += time.perf_counter() - started

            bar.update()
            if state.step % config.log_every == 0 or state.step == config.steps:
                images = (state.step - step_logged) * images_per_step
                values = {"loss": result.loss.item(), "grad_norm": result.grad_norm.item(), "lr": rate}
                if len(streams) > 1:
                    values |= {f"loss/{name}": loss.item() for name, loss in result.task_losses.items()}
                values |= {
                    "images_per_second": images / (state.seconds - seconds_logged),
                    "images": state.step * images_per_step,
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
                    result_by_task = _evaluate(_evaluated(state, config), recipe, config)
                position: dict[str, float | None] = {
                    "images": state.step * images_per_step,
                    "minutes": state.seconds / 60,
                }
                log.write(state.step, "eval", position | result_by_task.metrics)
                tqdm.write(f"step {state.step}: {result_by_task.summary()}")
    return list_checkpoints(out)[-1]


def _new_state(config: TrainConfig, recipe: Recipe) -> RunState:
    """A run at step 0: model, optimiser and average."""
    torch.manual_seed(config.seed)
    settings = replace(config.model, vocab=recipe.vocab)
    model = build_model(settings, recipe.categories, recipe.text, load_pretrained=config.init is None)
    model.task_settings = {samples.task.name: asdict(config.task(samples.task.name)) for samples in recipe.samples}
    height, width = config.model.image_size
    stride = model.encoder.stride
    if height % stride or width % stride:
        raise InputError(
            f"model.image_size {height}x{width} does not divide into patches of {stride}; use multiples of it"
        )
    if config.init is not None:
        start = Pix2Seq.from_pretrained(find_checkpoint(Path(config.init)))
        print(f"from {config.init}: {start_from(model, start, config.init)}")
    model.to(pick_device(config.device)).train()
    optimizer = build_optimizer(model, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas)
    return RunState(model, optimizer, Ema(model, config.ema_decay) if config.ema_decay else None)


def _evaluated(state: RunState, config: TrainConfig) -> Predictor:
    """A predictor with the averaged weights, on a copy, so that training goes on undisturbed."""
    model = state.model
    copy = build_model(model.config, model.categories, model.text, load_pretrained=False)
    copy.task_settings = model.task_settings
    copy.load_state_dict(state.ema.weights if state.ema is not None else model.state_dict())
    return Predictor(copy.to(model.device).eval(), bf16=config.bf16)


def _evaluate(predictor: Predictor, recipe: Recipe, config: TrainConfig) -> EvalResult:
    """All tasks, those of one data set together."""
    results = []
    for dataset in {id(data): data for data in recipe.val_data.values()}.values():
        tasks = [name for name, data in recipe.val_data.items() if data is dataset]
        results.append(evaluate(predictor, dataset, tasks, batch_size=config.eval_batch_size, limit=config.eval_images))
    return EvalResult.joined(results)
