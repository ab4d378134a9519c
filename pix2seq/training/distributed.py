"""Several processes that train one model: who they are, what they tell each other, and what each holds of it.

`torchrun --nproc-per-node N -m pix2seq.cli train ...` starts N processes, called ranks. Every rank reads its part of
each batch and computes gradients; PyTorch's DDP adds them up, or its FSDP2 does and leaves each rank a shard of the
weights. Words between ranks go over gloo in host memory, so that the GPU is not waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pix2seq.device import pick_device
from pix2seq.errors import InputError, InputErrorElsewhere
from pix2seq.training.sync_batch_norm import synchronize_batch_norms

T = TypeVar("T")

_PATIENCE = timedelta(hours=1)  # with a rank that scores an evaluation or writes a checkpoint


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone, every exchange costs nothing."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, prints and scores."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values, in host memory where they are there and on the GPU where they are there."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.sum(torch.tensor(int(flag))))

    def gather(self, value: T) -> list[T]:
        """All ranks' values on the first, in their order; nothing on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(value, values)
        return values or []

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action` gives on the first rank, on every rank. An `InputError` there ends them all."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except InputError as error:
                outcome[1] = str(error)
                dist.broadcast_object_list(outcome)
                raise
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise InputErrorElsewhere(outcome[1])
        return outcome[0]


@contextmanager
def join_ranks(device: str, num_processes: int = 0) -> Iterator[Ranks]:
    """Meet the other processes that torchrun started, if it did, and part from them at the end.

    Raises `InputError` where `num_processes` (0: any number) are not what was started, and where there are
    more of them than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes and num_processes != size:
        raise InputError(
            f"num_processes={num_processes}, but {size} {'was' if size == 1 else 'were'} started; start training with: "
            f"torchrun --nproc-per-node {num_processes} -m pix2seq.cli train ..."
        )
    if size == 1:
        yield Ranks(pick_device(device))
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    picked = pick_device(device)
    if picked.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"{os.environ.get('LOCAL_WORLD_SIZE', size)} processes were started on a machine with "
                f"{torch.cuda.device_count()} GPUs; start one a GPU with --nproc-per-node"
            )
        picked = torch.device("cuda", local_rank)
        torch.cuda.set_device(picked)
    backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"rank {rank} of {size} did not meet the others ({str(error).splitlines()[0]}); start all with torchrun"
        ) from error
    try:
        yield Ranks(picked, rank, size)
        # gloo's threads drop the tensors of an exchange a moment after it; one that meets the interpreter
        # at its end aborts the process. An exchange without tensors lets them finish.
        dist.barrier(device_ids=[local_rank] if picked.type == "cuda" else None)
    finally:
        dist.destroy_process_group()


def spread(module: nn.Module, ranks: Ranks, how: str, *, blocks: Sequence[nn.Module]) -> nn.Module:
    """`module` so that its gradients are averaged over all ranks. Build optimisers after this.

    `how` is `ddp`, where every rank holds all weights, or `fsdp`, where each holds a part of every
    weight and its optimiser state, and gathers the weights of one of the `blocks` inside at a time. Batch
    normalisation takes its statistics from all ranks.
    """
    if ranks.size == 1:
        return module
    synchronize_batch_norms(module)
    if how == "ddp":
        return DistributedDataParallel(module, gradient_as_bucket_view=True)
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def accumulating(module: nn.Module) -> AbstractContextManager[None]:
    """Around a forward and backward pass that is not the step's last: gradients stay where they are until then."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    if isinstance(module, FSDPModule):
        return _unsynchronized(module)
    return nullcontext()


@contextmanager
def _unsynchronized(module: FSDPModule) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards, where it is sharded; every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, sharing its memory; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor | None, value: Tensor) -> Tensor:
    """A whole `value`, or this rank's shard of it where `tensor` is sharded; one that is sharded already as it is."""
    if not isinstance(tensor, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements)
