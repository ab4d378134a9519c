"""A run small enough to save hundreds of times, with a state that depends only on its step."""

import torch

from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.pix2seq import build_model
from pix2seq.training.checkpoint import RunState
from pix2seq.training.ema import Ema
from pix2seq.types import Category
from pix2seq.vocab import Vocab


def tiny_state(step=0, *, ema=True):
    """Return a model of about 20,000 numbers with AdamW's state and an average, all functions of `step`."""
    torch.manual_seed(step)
    model = build_model(
        ModelConfig(
            image_size=(32, 32),
            encoder=EncoderConfig(name="vit", dim=8, num_layers=1, num_heads=2, mlp_dim=8, drop_path=0.0),
            decoder=DecoderConfig(dim=8, num_layers=1, num_heads=2, mlp_dim=8, max_seq_len=16),
            vocab=Vocab(num_bins=16, size=1040),
        ),
        [Category(1, 1, "cat")],
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = RunState(model, optimizer, Ema(model, 0.9) if ema else None)
    set_step(state, step)
    return state


def set_step(state, step):
    """Fill weights, average and optimiser state with functions of the step."""
    state.step, state.seconds, state.skipped = step, step / 2, step % 3
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(step)
            parameter.grad = torch.zeros_like(parameter)
            if not state.optimizer.state.get(parameter):
                state.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            for name, factor in (("step", 1), ("exp_avg", 2), ("exp_avg_sq", 3)):
                state.optimizer.state[parameter][name].fill_(step * factor)
        if state.ema is not None:
            for tensor in state.ema.weights.values():
                tensor.fill_(step + 0.5)


def assert_at_step(state, step):
    """Check that every number of a restored state is that of `step`."""
    assert (state.step, state.seconds, state.skipped) == (step, step / 2, step % 3)
    for parameter in state.model.parameters():
        values = state.optimizer.state[parameter]
        assert (parameter == step).all()
        assert (values["step"], values["exp_avg"].mean(), values["exp_avg_sq"].mean()) == (step, step * 2, step * 3)
    if state.ema is not None:
        assert all((tensor == step + 0.5).all() for tensor in state.ema.weights.values())
