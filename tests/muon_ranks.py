"""Muon's steps on given gradients, alone or, in test_optimizer.py, with FSDP on several ranks."""

from pathlib import Path

import torch
from tiny_run import tiny_state
from torch.distributed.tensor import DTensor

from pix2seq.training.checkpoint import RunState, load_checkpoint, save_checkpoint
from pix2seq.training.distributed import Ranks, full_tensor, join_ranks, parallelize, sharded_like
from pix2seq.training.ema import Ema
from pix2seq.training.optimizer import build_optimizer, optimizer_step


def state_with(name, ranks=None):
    """Return the tiny run with small random weights and the optimiser `name`."""
    model = tiny_state().model
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 10)
    parallelize(model, ranks or Ranks(model.device), "fsdp", blocks=model.block_list())
    optimizer = build_optimizer(model, name=name, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    return RunState(model, optimizer, Ema(model, 0.9))


def set_gradients(state, seed, value=None):
    """Set random gradients, with every third number replaced by `value`."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in state.model.parameters():
        gradient = torch.randn(parameter.shape, generator=draw)
        if value is not None:
            gradient.view(-1)[::3] = value
        parameter.grad = sharded_like(parameter, gradient)


def numbers(state):
    """Return copies of all weights, averages and optimiser state by name, as full tensors."""
    found = {f"weights/{name}": tensor.detach() for name, tensor in state.model.state_dict().items()}
    found |= {f"average/{name}": tensor for name, tensor in state.ema.weights.items()}
    for name, parameter in state.model.named_parameters():
        found |= {f"{entry}/{name}": value for entry, value in state.optimizer.state[parameter].items()}
    return {name: full_tensor(tensor).clone() for name, tensor in found.items()}


def train(ranks, out):
    """Take two steps, one that is not finite between them, save, and take a third step in two ways."""
    state, resumed = state_with("muon", ranks), state_with("muon", ranks)

    def step(run, seed, value=None):
        set_gradients(run, seed, value)
        flag = torch.tensor(float(value is not None))
        optimizer_step(run.optimizer, flag)
        run.step += 1
        run.ema.update(run.model, run.step, 1 - flag)

    step(state, 0)
    step(state, 1, torch.nan)
    step(state, 2)
    load_checkpoint(resumed, save_checkpoint(state, out, keep=1, ranks=ranks))
    step(state, 3)
    step(resumed, 3)
    num_sharded = sum(isinstance(parameter, DTensor) for parameter in state.model.parameters())
    return {"unbroken": numbers(state), "resumed": numbers(resumed), "num_sharded": num_sharded}


def main(out):
    """Save what `train` returns in the folder `out`."""
    with join_ranks("cpu") as ranks:
        result = train(ranks, Path(out))
        if ranks.first:
            torch.save(result, Path(out) / "result.pt")
