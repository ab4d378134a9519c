"""Run by several processes in test_features.py: train with a frozen encoder for some steps, and save what came out."""

from itertools import islice

import torch

from pix2seq.data.loader import batches
from pix2seq.training.config import load_config
from pix2seq.training.distributed import full_tensor, join_ranks
from pix2seq.training.loop import _Trainer
from pix2seq.training.recipe import prepare
from pix2seq.training.step import train_step


def train(ranks, settings):
    config = load_config(None, settings)
    recipe = prepare(config)
    trainer = _Trainer(config, recipe, ranks)
    model, ema = trainer.state.model, trainer.state.ema
    before = {name: full_tensor(tensor).clone() for name, tensor in model.encoder.state_dict().items()}
    stream = batches(
        [(recipe.samples[0], config.batch_size // 2)], rank=ranks.rank, world_size=ranks.size
    )  # two micro-batches a step
    losses = []
    for step in range(3):
        for group in trainer.state.optimizer.param_groups:
            group["lr"] = config.lr
        micro_batches = list(islice(stream, 2))
        result = train_step(trainer.training_model, trainer.state.optimizer, micro_batches, {}, max_grad_norm=1.0)
        ema.update(model, step + 1)
        losses.append(result.loss.item())
    after = {name: full_tensor(tensor) for name, tensor in model.encoder.state_dict().items()}
    averages = {name: full_tensor(tensor) for name, tensor in ema.weights.items() if name.startswith("encoder.")}
    kept = all(torch.equal(after[n], t) and torch.equal(averages[f"encoder.{n}"], t) for n, t in before.items())
    return {"losses": losses, "kept": kept, "num_states": len(trainer.state.optimizer.state)}


def main(out, *runs):
    """Train each run, given as its settings with spaces between them."""
    with join_ranks("cpu") as ranks:
        results = [train(ranks, run.split()) for run in runs]
        if ranks.first:
            torch.save(results, out)
