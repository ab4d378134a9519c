"""Training one model in several processes: how they communicate, and which part of the tensors each one holds.

`torchrun --nproc-per-node N -m pix2seq.cli train ...` starts N processes, called ranks. Every rank reads its part of
each batch and computes gradients. PyTorch's DDP sums them, or its FSDP2 does and leaves each rank a shard of the
weights. Small messages between ranks use gloo in host memory, so that they do not wait for the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pix2seq.device import pick_device
from pix2seq.errors import InputError, InputErrorElsewhere
from pix2seq.training.sync_batch_norm import synchronize_batch_norms

T = TypeVar("T")

_TIMEOUT = timedelta(hours=1)  # of waiting for a rank that scores an evaluation or writes a checkpoint


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; with one process, every exchange is free."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, prints and scores."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of all ranks' values, on the device of `values`: host or GPU."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank."""
        return bool(self.sum(torch.tensor(int(flag))))

    def gather(self, value: T) -> list[T]:
        """Return all ranks' values in order on the first rank, and an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(value, values)
        return values or []

    def row_counts(self, counts: Sequence[int]) -> Tensor:
        """Return the counts (K,) of each rank, (ranks, K), in host memory."""
        own = torch.tensor(counts)
        if self.size == 1:
            return own[None]
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return torch.stack(found)

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows (n, ...) of all ranks, in the order of ranks. Gradients find their way back.

        Rank r has `counts[r]` rows.
        """
        if self.size == 1:
            return rows
        padded = torch.cat([rows, rows.new_zeros((max(counts) - len(rows), *rows.shape[1:]))])
        parts = all_gather(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def on_first(self, action: Callable[[], T]) -> T:
        """Call `action` on the first rank and return its result on every rank. An `InputError` there ends all ranks."""
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
    """Connect to the other processes that torchrun started, if any, and disconnect at the end.

    Raises `InputError` if another number than `num_processes` (0: any number) was started, or more processes
    than there are GPUs.
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
                f"{torch.cuda.device_count()} GPUs; start one process per GPU with --nproc-per-node"
            )
        picked = torch.device("cuda", local_rank)
        torch.cuda.set_device(picked)
    backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"rank {rank} of {size} cannot connect to the others ({str(error).splitlines()[0]}); "
            "start all of them with torchrun"
        ) from error
    try:
        yield Ranks(picked, rank, size)
        # gloo's threads release the tensors of an exchange shortly after it ends. If that happens while the
        # interpreter shuts down, the process aborts. An exchange without tensors gives them time to finish.
        dist.barrier(device_ids=[local_rank] if picked.type == "cuda" else None)
    finally:
        dist.destroy_process_group()


def parallelize(module: nn.Module, ranks: Ranks, how: str, *, blocks: Sequence[nn.Module]) -> nn.Module:
    """Return `module` with gradients averaged over all ranks. Build the optimiser afterwards.

    With `how="ddp"` every rank holds all weights. With `how="fsdp"` each rank holds a shard of every weight
    and its optimiser state, and gathers the full weights of one of the `blocks` at a time. Batch norms use
    the statistics of all ranks.
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


def no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context without gradient exchange, for every micro-batch of a step but the last."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    if isinstance(module, FSDPModule):
        return _fsdp_no_sync(module)
    return nullcontext()


@contextmanager
def _fsdp_no_sync(module: FSDPModule) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor, gathered if it is sharded; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, sharing its memory, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor | None, value: Tensor) -> Tensor:
    """Shard a full `value` as `tensor` is; return it unchanged if `tensor` is not sharded or `value` already is."""
    if not isinstance(tensor, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements)


def save_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write this rank's shards of `tensors` into a folder, one safetensors file per rank; all ranks must call this.

    Any number of ranks can read the folder back, as other shards or as full tensors. An error on any rank, such
    as an `OSError`, is raised on every rank.
    """
    # Imported here because it takes seconds, and most runs do not need it.
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    _unwrap_errors(lambda: save(dict(tensors), storage_writer=writer))


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return the names and full shapes of the tensors in a folder of shards."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: stored.size for name, stored in found.items() if isinstance(stored, TensorStorageMetadata)}


def load_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill `tensors` in place, sharded ones with this rank's shards; all ranks must call this."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    _unwrap_errors(lambda: load(dict(tensors), storage_reader=reader))


def _unwrap_errors(action: Callable[[], object]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        action()
    except CheckpointException as error:
        # A `CheckpointException` is not an `Exception`; it holds the error of each rank.
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from error
