"""A training step as a CUDA graph, for one GPU.

A step of a small model is a thousand operations of some microseconds each, and a GPU is done with them before Python
has asked for the next. A CUDA graph asks for all of them at once, but only for the shapes that it was recorded with. So
the loader pads batches to multiples of `BUCKET` tokens, and each padded shape is recorded when it first comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pix2seq.examples import Batch
from pix2seq.model.packing import Layout
from pix2seq.training.step import StepResult, TrainingModel, loss_factors, train_step, update

BUCKET = 2048  # tokens and scored tokens; a fifteenth of those of 192 images with four tasks
EAGER_STEPS = 3  # before anything is recorded: libraries and the optimiser's state are set up by their first steps
MAX_RECORDINGS = 64  # more shapes than this run step by step, so that recording ends
FIELDS = ("images", "tokens", "positions", "scored", "targets", "weights", "task_index")


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    batch: Batch  # what the graph reads: filled before each replay
    factors: Tensor
    result: StepResult  # what it writes

    def fill(self, batch: Batch, layout: Layout, factors: Tensor) -> None:
        """Copy a batch of the same shape into what the graph reads."""
        for name in FIELDS:
            getattr(self.batch, name).copy_(getattr(batch, name), non_blocking=True)
        for name in ("borders", "image_borders", "image_of_token"):
            getattr(self.batch.layout, name).copy_(getattr(layout, name), non_blocking=True)
        self.factors.copy_(factors, non_blocking=True)


class RecordedStep:
    """`train_step` for one micro-batch on one GPU, replayed from a recording of its padded shape."""

    def __init__(self) -> None:
        self._recordings: dict[Any, _Recording] = {}
        self._pool: Any = None
        self._eager_steps = 0

    def __call__(
        self,
        training_model: TrainingModel,
        optimizer: torch.optim.Optimizer,
        micro_batches: Sequence[Batch],
        loss_weights: Mapping[str, float],
        max_grad_norm: float,
    ) -> StepResult:
        """See `train_step`."""
        (batch,) = micro_batches
        device = training_model.model.device
        layout = Layout(batch.lengths, batch.memory_index, len(batch.images), device)
        # The kernels of a graph start for sequences of up to this many tokens.
        longest = -(-layout.longest // 128) * 128
        longest_image = 1 << (layout.longest_image - 1).bit_length()
        key = (*(getattr(batch, name).shape for name in FIELDS), len(batch.lengths), longest, longest_image)
        if self._eager_steps < EAGER_STEPS or (key not in self._recordings and len(self._recordings) >= MAX_RECORDINGS):
            self._eager_steps += 1
            return train_step(training_model, optimizer, micro_batches, loss_weights, max_grad_norm)
        names, factors = loss_factors(training_model, micro_batches, loss_weights)
        factors = factors.pin_memory()
        if key not in self._recordings:
            layout.longest, layout.longest_image = longest, longest_image
            self._recordings[key] = self._record(
                training_model, optimizer, batch, layout, names, factors, max_grad_norm
            )
            return train_step(training_model, optimizer, micro_batches, loss_weights, max_grad_norm)
        recording = self._recordings[key]
        recording.fill(batch, layout, factors)
        recording.graph.replay()
        result = recording.result
        values = torch.stack([result.loss, result.grad_norm, *result.losses.values()]).clone()
        losses = dict(zip(names, values[2:], strict=True))
        return StepResult(values[0], losses, values[1], result.finite.clone())

    def _record(
        self,
        training_model: TrainingModel,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        layout: Layout,
        names: Sequence[str],
        factors: Tensor,
        max_grad_norm: float,
    ) -> _Recording:
        """Record a step for the shape of a batch. Recording computes nothing, so the weights stay."""
        device = training_model.model.device
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.tensor(float(group["lr"]), device=device)
            group["capturable"] = True
        static = replace(batch.to(device), layout=layout)
        _ = layout.borders, layout.image_borders, layout.image_of_token  # on the device before the recording
        static_factors = factors.to(device, non_blocking=True)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # The loader pins batches meanwhile, in a thread of its own.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = update(training_model, optimizer, [static], names, static_factors, max_grad_norm=max_grad_norm)
        self._pool = graph.pool()
        return _Recording(graph, static, static_factors, result)
