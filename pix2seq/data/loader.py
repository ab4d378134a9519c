"""From training samples to an endless stream of micro-batches, prepared by worker processes."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from pix2seq.data.sampler import EpochSampler, rank_part
from pix2seq.data.samples import TrainingStream
from pix2seq.errors import InputError
from pix2seq.examples import Batch, Sample, collate

WORKER_TIMEOUT = 300.0  # seconds
_PREFETCH = 4  # micro-batches that each worker is ahead
_POLL = 1.0  # seconds between two looks at whether the workers live


class Samples(Protocol):
    """Training samples by (epoch, index), such as `pix2seq.data.samples.TrainingSet`."""

    @property
    def seed(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: tuple[int, int]) -> Sample: ...


def batches(
    samples: Samples | TrainingStream,
    *,
    batch_size: int,
    start: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
    timeout: float = WORKER_TIMEOUT,
) -> Iterator[Batch]:
    """Endless micro-batches of `batch_size` images over all ranks, of which each rank gets its contiguous part.

    `start` micro-batches were consumed before. Together, the ranks see what one process would see,
    whatever `num_workers` is; from shards, the order depends on ranks x workers, and a run goes on
    exactly where both are what they were. The workers end with the iterator and with the process that made it;
    SIGINT and SIGTERM they leave to that process, which may have a checkpoint to save. Raises
    `InputError` where data cannot be used, where a worker dies, and where no batch comes for `timeout` seconds.
    """
    part = rank_part(batch_size, rank, world_size)
    dataset: Dataset[Batch | InputError]
    if isinstance(samples, TrainingStream):
        options = {"start": start, "num_workers": num_workers, "rank": rank, "world_size": world_size}
        dataset, sampler = _StreamBatches(samples, part.stop - part.start, **options), None
    else:
        dataset = _MicroBatches(samples)
        sampler = EpochSampler(len(samples), batch_size, seed=samples.seed, start=start, part=part)
    loader = DataLoader(
        dataset,
        sampler=sampler,  # an item of it is a whole batch
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or it would draw from the state that dropout is resumed with
        prefetch_factor=_PREFETCH if num_workers else None,
        timeout=min(_POLL, timeout) if num_workers else 0,
        worker_init_fn=_start_worker,
    )
    if not num_workers:
        return map(_batch, loader)
    return _from_workers(loader, timeout)


class _StreamBatches(IterableDataset["Batch | InputError"]):
    """Each worker is a lane, and gives every `num_workers`-th batch of its rank."""

    def __init__(
        self, samples: TrainingStream, size: int, *, start: int, num_workers: int, rank: int, world_size: int
    ) -> None:
        self.samples = samples
        self.size = size
        self.start = start
        self.num_workers = max(num_workers, 1)
        self.rank = rank
        self.world_size = world_size
        self.lane(0)  # raises here and now where there are fewer shards than lanes

    def lane(self, batch: int) -> Iterator[Sample]:
        """The samples from this batch of the rank on, of the lane that it belongs to."""
        done, worker = divmod(batch, self.num_workers)
        lane, num_lanes = self.rank * self.num_workers + worker, self.world_size * self.num_workers
        return self.samples.lane(lane, num_lanes, start=done * self.size)

    def __iter__(self) -> Iterator[Batch | InputError]:
        info = get_worker_info()
        # The loader asks its workers in turn, beginning with worker 0.
        samples = self.lane(self.start + (info.id if info is not None else 0))
        try:
            while True:
                yield collate(list(islice(samples, self.size)))
        except InputError as error:
            yield error


class _MicroBatches(Dataset["Batch | InputError"]):
    """A batch for a list of keys. An `InputError` is handed over, because raising would bury it in a traceback."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, keys: Sequence[tuple[int, int]]) -> Batch | InputError:
        try:
            return collate([self.samples[key] for key in keys])
        except InputError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _batch(batch: Batch | InputError) -> Batch:
    if isinstance(batch, InputError):
        raise batch
    return batch


def _from_workers(loader: DataLoader[Batch | InputError], timeout: float) -> Iterator[Batch]:
    before = set(multiprocessing.active_children())
    # PyTorch's handler raises wherever the main thread is when a worker dies, be it amid a checkpoint.
    child_handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    with _signals_held_back(), _without_opencv_threads():
        iterator = iter(loader)
    if child_handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, child_handler)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    # Registered last and so called first: multiprocessing would wait for workers that SIGTERM does not end.
    at_exit = partial(_kill, workers)
    atexit.register(at_exit)
    try:
        while True:
            yield _batch(_next(iterator, workers, timeout))
    except InputError:
        _kill(workers)  # one may hang
        raise
    finally:
        del iterator  # lets the workers end by themselves, for a few seconds
        _kill(workers)
        atexit.unregister(at_exit)


def _next(iterator: Iterator[Batch | InputError], workers: Sequence[BaseProcess], timeout: float) -> Batch | InputError:
    started = time.monotonic()
    while True:
        try:
            return next(iterator)
        except (RuntimeError, OSError, EOFError) as error:
            timed_out = str(error).startswith("DataLoader timed out")
            # A broken connection may be noticed before the death that broke it.
            wait([worker.sentinel for worker in workers], timeout=0 if timed_out else _POLL)
            dead = [worker for worker in workers if not worker.is_alive()]
            if dead:
                raise InputError(_obituary(dead[0], len(workers))) from None
            if not timed_out:
                raise
        if time.monotonic() - started > timeout:
            raise InputError(
                f"no batch came from the {len(workers)} data workers for {timeout:g} s; look at whether the data can "
                "be read (a network folder that hangs?), lower num_workers, or raise worker_timeout"
            )


def _obituary(worker: BaseProcess, num_workers: int) -> str:
    code = worker.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return (
        f"a data worker (process {worker.pid}) {how}, as the system does where memory or /dev/shm runs out; lower "
        f"num_workers (it is {num_workers}), or look for an image that crashes its decoder with pix2seq data check"
    )


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Children that start here are not met by SIGINT or SIGTERM before they have chosen to ignore them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_opencv_threads() -> Iterator[None]:
    """A fork copies OpenCV's pool without its threads, and a child that touches it waits for them forever."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _start_worker(worker: int) -> None:
    # Workers share the cores with the training process; OpenCV's own threads would fight for them.
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # One of the two tells: a forked sibling may hold the parent's sentinel, and a fork server outlives the parent.
    parent, ancestor = multiprocessing.parent_process(), os.getppid()
    while parent is not None and parent.is_alive() and os.getppid() == ancestor:
        time.sleep(_POLL)
    os._exit(1)
