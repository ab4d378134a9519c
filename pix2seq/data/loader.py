"""An endless stream of micro-batches from training samples, prepared by worker processes."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import cv2
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pix2seq.data.sampler import EpochSampler, rank_slice
from pix2seq.data.samples import TrainingStream
from pix2seq.errors import InputError
from pix2seq.examples import Batch, Sample, collate

WORKER_TIMEOUT = 300.0  # seconds
WORKERS_PER_CORE = 16  # many readers of a slow network folder may be of use, and hundreds are a mistake
_PREFETCH = 4  # micro-batches that each worker prepares ahead
_POLL = 1.0  # seconds between checks that the workers are alive


class Samples(Protocol):
    """Training samples by (epoch, index), for example `pix2seq.data.samples.TrainingSet`."""

    @property
    def tasks(self) -> Sequence[str]: ...
    @property
    def seed(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: tuple[int, int]) -> Sample: ...


def batches(
    sources: Sequence[tuple[Samples | TrainingStream, int]],
    *,
    start: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
    timeout: float = WORKER_TIMEOUT,
    bucket: int = 1,
    keep_samples: bool = False,
) -> Iterator[Batch]:
    """Yield endless micro-batches over all ranks; each rank gets its contiguous part of each source's images.

    `sources` are samples, and how many images of them a micro-batch has. The first `start` micro-batches are
    skipped. The ranks together get the batches of a single process, for any `num_workers`. From shards, the order
    depends on ranks x workers, so a run resumes exactly only if both are unchanged. The workers end with the iterator
    and with the process that made it; they ignore SIGINT and SIGTERM, because that process may have a checkpoint to
    save. `bucket` and `keep_samples` are those of `collate`. Raises `InputError` if data cannot be used, if a worker
    dies, if no batch arrives for `timeout` seconds, or if there are more than `WORKERS_PER_CORE` workers a core.
    """
    _check_num_workers(num_workers)
    loader = DataLoader(
        _Batches(
            sources,
            start=start,
            num_workers=max(num_workers, 1),
            rank=rank,
            world_size=world_size,
            collate=partial(collate, bucket=bucket, keep_samples=keep_samples),
        ),
        batch_size=None,
        collate_fn=_identity,  # each item is a full batch
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


def _check_num_workers(num_workers: int) -> None:
    """Raise `InputError` for far more workers than cores; PyTorch warns of a few more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers > WORKERS_PER_CORE * cores:
        raise InputError(
            f"num_workers={num_workers} are too many for {cores} cores; use at most {WORKERS_PER_CORE * cores}, and "
            f"about {cores} if the data lie on this machine"
        )


class _Batches(IterableDataset["Batch | InputError"]):
    """Batches of all sources. The loader asks its workers in turn; each makes every `num_workers`-th batch.

    Yields an `InputError` in place of raising it, because a worker would add its traceback.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Samples | TrainingStream, int]],
        *,
        start: int,
        num_workers: int,
        rank: int,
        world_size: int,
        collate: Callable[[list[Sample], list[str]], Batch],
    ) -> None:
        self.sources = sources
        self.collate = collate
        self.start = start
        self.num_workers = num_workers
        self.rank = rank
        self.world_size = world_size
        self.tasks = list(dict.fromkeys(name for samples, _ in sources for name in samples.tasks))
        for samples, size in sources:
            self._parts(samples, size, 0)  # raises at once if there are too few images or shards

    def __iter__(self) -> Iterator[Batch | InputError]:
        info = get_worker_info()
        first = self.start + (info.id if info is not None else 0)
        parts = [self._parts(samples, size, first) for samples, size in self.sources]
        while True:
            try:
                yield self.collate([sample for part in parts for sample in next(part)], self.tasks)
            except InputError as error:
                yield error
                return

    def _parts(self, samples: Samples | TrainingStream, size: int, first: int) -> Iterator[list[Sample]]:
        """Yield this rank's samples of batch `first`, then of every `num_workers`-th batch after it."""
        part = rank_slice(size, self.rank, self.world_size)
        if not isinstance(samples, TrainingStream):
            keys = EpochSampler(len(samples), size, seed=samples.seed, start=first, part=part)
            return ([samples[key] for key in some] for some in islice(keys, 0, None, self.num_workers))
        done, worker = divmod(first, self.num_workers)
        reader, num_readers = self.rank * self.num_workers + worker, self.world_size * self.num_workers
        num_images = part.stop - part.start
        stream = samples.read(reader, num_readers, start=done * num_images)
        return iter(lambda: list(islice(stream, num_images)), None)


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
        iterator: Any = iter(loader)
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
        if any(worker.exitcode for worker in workers):
            _kill(workers)
            # A worker that was killed while it looked at this event keeps the lock of the event. The loader sets the
            # event when it ends, and would wait for that lock forever.
            iterator._workers_done_event = threading.Event()
        # Gives the workers a few seconds to end. An exception may still refer to the iterator: its destructor would do
        # the same at any later time, and wait for the lock of a worker that was killed below.
        iterator._shutdown_workers()
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
            # A worker that sent an error ends with code 0, while batches before the error may still be on their way.
            dead = [worker for worker in workers if worker.exitcode]
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
