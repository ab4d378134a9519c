"""The stream of micro-batches: the same with and without workers, and no worker that dies, hangs or stays."""

import gc
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import subprocess
import sys
import time
import traceback
from itertools import islice

import cv2
import numpy as np
import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from pix2seq.data.loader import batches
from pix2seq.data.sampler import EpochSampler
from pix2seq.errors import InputError
from pix2seq.examples import Example, Sample


@pytest.fixture(autouse=True)
def time_limit():
    """Break a test that hangs, also inside a destructor, which swallows exceptions."""
    late = []

    def on_alarm(signum, frame):
        late.append(traceback.format_stack(frame))
        raise TimeoutError("the test took ten minutes")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(600)  # on a machine with much other work, a test of a second can take minutes
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if late:
        pytest.fail("".join(late[0]))


class Numbers:
    """Samples of their own index: the image shows it, and the number of tokens follows it."""

    seed = 3

    def __init__(self, act=lambda epoch, index: None, *, task="numbers", length=10):
        self.act = act
        self.tasks = [task]
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        epoch, index = key
        self.act(epoch, index)
        ids = np.arange(index + 1)
        example = Example(ids[:1], ids, ids, np.ones(len(ids), np.float32))
        return Sample(np.full((2, 2, 3), index, np.uint8), {self.tasks[0]: [example]}, 100 * epoch + index)


def take(count, samples=None, *, batch_size=4, **options):
    return take_mixed(count, [(samples or Numbers(), batch_size)], **options)


def take_mixed(count, sources, **options):
    stream = batches(sources, **options)
    try:
        return list(islice(stream, count))
    finally:
        getattr(stream, "close", lambda: None)()


def test_batches_follow_the_sampler_with_any_number_of_workers():
    expected = [[100 * epoch + index for epoch, index in keys] for keys in islice(EpochSampler(10, 4, seed=3), 8)]
    for num_workers in (0, 2):
        found = take(8, num_workers=num_workers)
        assert [list(batch.image_ids["numbers"]) for batch in found] == expected
        for batch in found:
            numbers = [image_id % 100 for image_id in batch.image_ids["numbers"]]
            assert batch.images[:, 0, 0, 0].tolist() == numbers
            assert batch.lengths.tolist() == [number + 1 for number in numbers]
        later = take(3, num_workers=num_workers, start=5)
        assert [list(batch.image_ids["numbers"]) for batch in later] == expected[5:]
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_has_images_of_every_source_and_each_source_its_own_epochs(num_workers):
    sizes = {"few": (3, 2), "many": (10, 4)}  # images in the data and in a batch
    sources = [(Numbers(task=name, length=length), size) for name, (length, size) in sizes.items()]
    found = take_mixed(8, sources, num_workers=num_workers)
    for name, (length, size) in sizes.items():
        keys = islice(EpochSampler(length, size, seed=3), 8)
        expected = [tuple(100 * epoch + index for epoch, index in some) for some in keys]
        assert [batch.image_ids[name] for batch in found] == expected
    for batch in found:
        assert batch.tasks == ("few", "many")
        assert batch.memory_index.tolist() == list(range(6))
        assert batch.counts == tuple(sum(i % 100 + 1 for i in batch.image_ids[name]) for name in batch.tasks)
    later = take_mixed(3, sources, num_workers=num_workers, start=5)
    assert [batch.image_ids for batch in later] == [batch.image_ids for batch in found[5:]]
    parts = [take_mixed(8, sources, num_workers=num_workers, rank=rank, world_size=2) for rank in range(2)]
    for batch, *pieces in zip(found, *parts, strict=True):
        for name in sizes:
            assert sum((piece.image_ids[name] for piece in pieces), ()) == batch.image_ids[name]


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_together_get_the_batches_of_one_process(world_size):
    complete = take(6, start=1)
    for num_workers in (0, 2):
        options = {"start": 1, "num_workers": num_workers, "world_size": world_size}
        parts = [take(6, **options, rank=rank) for rank in range(world_size)]
        for batch, *pieces in zip(complete, *parts, strict=True):
            ids = [piece.image_ids["numbers"] for piece in pieces]
            assert sum(ids, ()) == batch.image_ids["numbers"]
            assert {len(some) for some in ids} <= {4 // world_size, -(-4 // world_size)}
    with pytest.raises(InputError, match="5 processes are too many for 4 images"):
        take(1, rank=0, world_size=5)


def test_workers_start_even_if_opencv_has_threads_in_the_parent():
    cv2.setNumThreads(4)
    image = np.zeros((1000, 1000, 3), np.uint8)
    cv2.GaussianBlur(image, (31, 31), 5)
    assert len(take(2, num_workers=2, timeout=300)) == 2
    assert cv2.getNumThreads() == 4


def kill_worker(epoch, index):
    if multiprocessing.parent_process() is not None and index == 7:
        os.kill(os.getpid(), signal.SIGKILL)


def hang(epoch, index):
    if multiprocessing.parent_process() is not None and index == 7:
        time.sleep(1000)


def refuse(epoch, index):
    if index == 7:
        raise InputError("image 7 is bad; replace it")


def fail(epoch, index):
    if index == 7:
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (
            kill_worker,
            InputError,
            r"a data worker \(process \d+\) was killed by SIGKILL; .* lower num_workers \(it is 2\)",
        ),
        (hang, InputError, r"no batch came from the 2 data workers for 1.5 s; .* raise worker_timeout"),
        (refuse, InputError, r"^image 7 is bad; replace it$"),
        (fail, RuntimeError, r"a bug"),
    ],
)
def test_a_failing_worker_gives_one_error_and_leaves_no_process(act, kind, message):
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(kind, match=message) as caught:
        take(10, Numbers(act), batch_size=2, num_workers=2, timeout=1.5 if act is hang else 300)
    assert type(caught.value) is kind
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGCHLD) is handler
    # The exception still refers to the iterator; its destructor must have nothing left to wait for.
    iterators = [thing for thing in gc.get_objects() if type(thing) is _MultiProcessingDataLoaderIter]
    assert all(iterator._shutdown for iterator in iterators)


@pytest.mark.parametrize("kind", [InputError, RuntimeError])
def test_an_error_comes_after_the_batches_before_it_however_late_they_are(kind):
    first, second = ([index for _, index in keys] for keys in islice(EpochSampler(10, 2, seed=3), 2))

    def act(epoch, index):
        if index in second:
            raise kind("a bad image")  # the second worker has ended long before the first batch comes
        time.sleep(1.2 if epoch == 0 and index in first else 0)

    stream = batches([(Numbers(act), 2)], num_workers=2)
    assert next(stream).image_ids == {"numbers": tuple(first)}
    with pytest.raises(kind, match="a bad image"):
        next(stream)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers inherit a patch by fork only")
def test_a_worker_killed_with_the_lock_of_the_loader_does_not_hang_the_run(monkeypatch):
    real = multiprocessing.synchronize.Event.is_set

    def slow(self):  # workers look at an event of the loader before each batch
        if multiprocessing.parent_process() is not None:
            with self._cond:
                time.sleep(1000)
        return real(self)

    monkeypatch.setattr(multiprocessing.synchronize.Event, "is_set", slow)
    with pytest.raises(InputError, match="no batch came"):
        take(1, num_workers=2, timeout=1.5)
    assert not multiprocessing.active_children()


def test_without_workers_the_error_is_the_same():
    with pytest.raises(InputError, match=r"^image 7 is bad; replace it$"):
        take(10, Numbers(refuse), batch_size=2)


def test_a_death_between_two_batches_is_reported_at_the_next():
    stream = batches([(Numbers(), 2)], num_workers=1)
    next(stream)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    time.sleep(0.2)  # a handler of SIGCHLD would raise here
    with pytest.raises(InputError, match="SIGKILL"):
        list(islice(stream, 100))


def test_far_more_workers_than_cores_are_refused_before_any_starts(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    with pytest.raises(InputError, match=r"num_workers=33 are too many for 2 cores; use at most 32"):
        batches([(Numbers(), 4)], num_workers=33)
    with pytest.warns(UserWarning, match="3 worker processes"):  # PyTorch's own
        assert len(take(1, num_workers=3)) == 1
    assert not multiprocessing.active_children()


SCRIPT = """
import multiprocessing, os, sys, time
from pix2seq.data.loader import batches
from test_loader import Numbers

def act(epoch, index):
    if epoch and multiprocessing.parent_process() is not None:
        time.sleep(1000)

exits = os.fork() == 0  # one process exits, the other is killed
if not exits:
    os.wait()
stream = batches([(Numbers(act), 2)], num_workers=2)
next(stream)
print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
if exits:
    sys.exit(0)
time.sleep(1000)
"""


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_workers_ignore_signals_and_do_not_outlive_their_parent(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, str(tmp_path / "run.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        of_exiting, of_killed = ([int(word) for word in process.stdout.readline().split()] for _ in range(2))
        assert len(of_exiting) == len(of_killed) == 2
        assert not any(map(is_alive, of_exiting))  # the second line was printed after the exit
        for pid in of_killed:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
        assert all(map(is_alive, of_killed))
        process.kill()
    deadline = time.monotonic() + 300
    while any(map(is_alive, of_killed)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, of_killed))
