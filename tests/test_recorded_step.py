"""Recorded steps compute what plain steps do, with a stand-in for CUDA's graphs that replays Python instead."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from one_by_one import random_sample, varlen_by_loop
from ranks import TASKS, VOCAB, tiny_model

from pix2seq.examples import collate
from pix2seq.training import recorded_step
from pix2seq.training.objective import CrossEntropy
from pix2seq.training.optimizer import build_optimizer, set_learning_rate
from pix2seq.training.recorded_step import EAGER_STEPS, RecordedStep
from pix2seq.training.step import StepResult, TrainingModel, train_step, update

BUCKET = 64


class ReplayedPython:
    """A graph whose replay calls the recorded function, and writes into the results of the recording."""

    recording = None  # the graph that is being recorded
    num_recorded = num_replayed = 0

    def replay(self):
        type(self).num_replayed += 1
        result = update(*self.args, **self.kwargs)
        for name in ("loss", "grad_norm", "finite"):
            getattr(self.result, name).copy_(getattr(result, name))
        for name, loss in result.losses.items():
            self.result.losses[name].copy_(loss)

    def pool(self):
        return None

    @classmethod
    @contextmanager
    def record(cls, graph, **options):
        cls.recording = graph
        cls.num_recorded += 1
        yield
        cls.recording = None

    @classmethod
    def update(cls, training_model, optimizer, micro_batches, names, factors, **options):
        """Remember the call, and compute nothing, as a recording does."""
        graph = cls.recording
        graph.args, graph.kwargs = (training_model, optimizer, micro_batches, names, factors), options
        losses = {name: torch.zeros(()) for name in names}
        graph.result = StepResult(torch.zeros(()), losses, torch.zeros(()), torch.tensor(False))
        return graph.result


@pytest.fixture
def graphs(monkeypatch):
    """A class that counts recordings and replays; attention is that of a GPU, which reads borders on the device."""
    graphs = type("Graphs", (ReplayedPython,), {})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graphs)
    monkeypatch.setattr(torch.cuda, "graph", graphs.record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(recorded_step, "update", graphs.update)
    monkeypatch.setattr("pix2seq.model.packing._has_varlen", lambda x: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_loop)
    return graphs


def random_batch(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 12, (4, len(TASKS), 2)).tolist()
    samples = [
        random_sample(rng, dict(zip(TASKS, some, strict=True)), VOCAB.size, image_id=i)
        for i, some in enumerate(lengths)
    ]
    return collate(samples, TASKS, bucket=BUCKET)


def train(form, num_steps, faulty=None):
    model = tiny_model("conv")
    training_model = TrainingModel(model, CrossEntropy())
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    results = []
    for step in range(num_steps):
        batch = random_batch(step)
        if step == faulty:
            batch = replace(batch, weights=batch.weights * torch.nan)
        set_learning_rate(optimizer, 1e-3 / (step + 1))
        results.append(form(training_model, optimizer, [batch], {"captioning": 0.5}, 1.0))
    return results, model.state_dict()


@pytest.mark.parametrize("faulty", [None, EAGER_STEPS + 6])
def test_replayed_steps_equal_plain_ones(graphs, faulty):
    num_steps = 12
    found, weights = train(RecordedStep(), num_steps, faulty)
    assert 1 <= graphs.num_recorded <= 3
    assert graphs.num_replayed == num_steps - EAGER_STEPS - graphs.num_recorded
    expected, expected_weights = train(train_step, num_steps, faulty)
    assert [bool(result.finite) for result in found] == [step != faulty for step in range(num_steps)]
    for one, other in zip(found, expected, strict=True):
        for name in ("loss", "losses", "grad_norm"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), equal_nan=True)
    torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-5)


def test_shapes_beyond_the_limit_are_not_recorded(graphs, monkeypatch):
    monkeypatch.setattr(recorded_step, "MAX_RECORDINGS", 0)
    train(RecordedStep(), EAGER_STEPS + 2)
    assert graphs.num_recorded == graphs.num_replayed == 0
