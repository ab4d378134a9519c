"""An endless stream of micro-batches from training samples, prepared by worker processes."""

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

from pix2seq.data.sampler import EpochSampler, rank_slice
from pix2seq.data.samples import TrainingStream
from pix2seq.errors import InputError
from pix2seq.examples import Batch, Sample, collate

WORKER_TIMEOUT = 300.0  # seconds
_PREFETCH = 4  # micro-batches that each worker prepares ahead
_POLL = 1.0  # seconds between checks that the workers are alive


class Samples(Protocol):
    """Training samples by (epoch, index), for example `pix2seq.data.samples.TrainingSet`."""

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
    """Yield endless micro-batches of `batch_size` images over all ranks; each rank gets its contiguous part.

    The first `start` micro-batches are skipped. The ranks together get the batches of a single process,
    for any `num_workers`. From shards, the order depends on ranks x workers, so a run resumes exactly
    only if both are unchanged. The workers end with the iterator and with the process that made it; they
    ignore SIGINT and SIGTERM, because that process may have a checkpoint to save. Raises `InputError`
    if data cannot be used, if a worker dies, or if no batch arrives for `timeout` seconds.
    """
    part = rank_slice(batch_size, rank, world_size)
    dataset: Dataset[Batch | InputError]
    if isinstance(samples, TrainingStream):
        options = {"start": start, "num_workers": num_workers, "rank": rank, "world_size": world_size}
        dataset, sampler = _StreamBatches(samples, part.stop - part.start, **options), None
    else:
        dataset = _MicroBatches(samples)
        sampler = EpochSampler(len(samples), batch_size, seed=samples.seed, start=start, part=part)
    loader = DataLoader(
        dataset,
        sampler=sampler,  # each item is a full batch
        batch_size=None,
        collate_fn=_identity,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # keeps the global state, which dropout is resumed with, unchanged
        prefetch_factor=_PREFETCH if num_workers else None,
        timeout=min(_POLL, timeout) if num_workers else 0,
        worker_init_fn=_start_worker,
    )
    if not num_workers:
        return map(_raise_error, loader)
    return _from_workers(loader, timeout)


class _StreamBatches(IterableDataset["Batch | InputError"]):
    """Batches from shards; each worker is a reader and gives every `num_workers`-th batch of its rank."""

    def __init__(
        self, samples: TrainingStream, size: int, *, start: int, num_workers: int, rank: int, world_size: int
    ) -> None:
        self.samples = samples
        self.size = size
        self.start = start
        self.num_workers = max(num_workers, 1)
        self.rank = rank
        self.world_size = world_size
        self.read_from(0)  # raises at once if there are fewer shards than readers

    def read_from(self, batch: int) -> Iterator[Sample]:
        """Yield the samples of this batch of the rank, then the next samples of the same reader."""
        done, worker = divmod(batch, self.num_workers)
        reader, num_readers = self.rank * self.num_workers + worker, self.world_size * self.num_workers
        return self.samples.read(reader, num_readers, start=done * self.size)

    def __iter__(self) -> Iterator[Batch | InputError]:
        info = get_worker_info()
        # The loader asks its workers in turn, starting with worker 0.
        samples = self.read_from(self.start + (info.id if info is not None else 0))
        try:
            while True:
                yield collate(list(islice(samples, self.size)))
        except InputError as error:
            yield error


class _MicroBatches(Dataset["Batch | InputError"]):
    """One batch per list of keys. Returns an `InputError`, because raising it in a worker would add its traceback."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, keys: Sequence[tuple[int, int]]) -> Batch | InputError:
        try:
            return collate([self.samples[key] for key in keys])
        except InputError as error:
            return error


def _identity(batch: Any) -> Any:
    return batch


def _raise_error(batch: Batch | InputError) -> Batch:
    if isinstance(batch, InputError):
        raise batch
    return batch


def _from_workers(loader: DataLoader[Batch | InputError], timeout: float) -> Iterator[Batch]:
    before = set(multiprocessing.active_children())
    # PyTorch's handler raises in the main thread when a worker dies, even while it writes a checkpoint.
    child_handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    with _block_signals(), _single_opencv_thread():
        iterator = iter(loader)
    if child_handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, child_handler)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    # Registered last, so called first: multiprocessing would wait for workers, which ignore SIGTERM.
    at_exit = partial(_kill, workers)
    atexit.register(at_exit)
    try:
        while True:
            yield _raise_error(_next(iterator, workers, timeout))
    except InputError:
        _kill(workers)  # a worker may hang
        raise
    finally:
        del iterator  # gives the workers a few seconds to end
        _kill(workers)
        atexit.unregister(at_exit)


def _next(iterator: Iterator[Batch | InputError], workers: Sequence[BaseProcess], timeout: float) -> Batch | InputError:
    started = time.monotonic()
    while True:
        try:
            return next(iterator)
        except (RuntimeError, OSError, EOFError) as error:
            timed_out = str(error).startswith("DataLoader timed out")
            # A broken connection may show before the death of the worker.
            wait([worker.sentinel for worker in workers], timeout=0 if timed_out else _POLL)
            dead = [worker for worker in workers if not worker.is_alive()]
            if dead:
                raise InputError(_death_message(dead[0], len(workers))) from None
            if not timed_out:
                raise
        if time.monotonic() - started > timeout:
            raise InputError(
                f"no batch came from the {len(workers)} data workers for {timeout:g} s; check that the data can be "
                "read (a network folder may hang), lower num_workers, or raise worker_timeout"
            )


def _death_message(worker: BaseProcess, num_workers: int) -> str:
    code = worker.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return (
        f"a data worker (process {worker.pid}) {how}; memory or /dev/shm may be full: lower num_workers (it is "
        f"{num_workers}), or find an image that crashes its decoder with pix2seq data check"
    )


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


@contextmanager
def _block_signals() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back from new child processes until they ignore both."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _single_opencv_thread() -> Iterator[None]:
    """Stop OpenCV's thread pool: a fork copies it without its threads, and a child would wait for them forever."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _start_worker(worker: int) -> None:
    # Workers share the cores with the training process; more threads would compete for them.
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # Either check may fail alone: a forked sibling may hold the parent's sentinel; a fork server outlives the parent.
    parent, ancestor = multiprocessing.parent_process(), os.getppid()
    while parent is not None and parent.is_alive() and os.getppid() == ancestor:
        time.sleep(_POLL)
    os._exit(1)
