"""Commands that kill themselves at a chosen point, for tests; each runs in its own process."""

import multiprocessing
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from colours import SeeingColours

import pix2seq.data.loader
import pix2seq.files
import pix2seq.search
import pix2seq.training.checkpoint
import pix2seq.training.loop
from pix2seq.cli import main
from pix2seq.data.samples import TrainingSet
from pix2seq.infer.outputs import Outputs
from pix2seq.predictor import Predictor
from pix2seq.search import open_index, update_index
from pix2seq.training.step import TrainingModel

# Owner and name of the function that triggers the signal when it is called.
KILL_POINTS = {
    "waiting for data": (pix2seq.data.loader, "_raise_error"),
    "between micro-batches": (TrainingModel, "backward"),
    "updating weights": (pix2seq.training.loop, "learning_rate"),
    "evaluating": (Predictor, "ask"),
    "saving": (pix2seq.training.checkpoint, "save_file"),
}
PREDICTION_POINTS = {
    "asking": (Predictor, "_ask"),
    "noting in the journal": (Outputs, "_append"),
    "writing a file": (pix2seq.files, "fsync_file"),
    "replacing a file": (Path, "replace"),
}
INDEX_POINTS = {
    "embedding": (SeeingColours, "embed"),
    "writing a file": (pix2seq.files, "fsync_file"),
    "replacing a file": (Path, "replace"),
    "joining files": (torch, "cat"),
    "removing a file": (Path, "unlink"),
}


def train(arguments, point=None, call=1, signum=signal.SIGKILL):
    """Run `pix2seq train`, with a signal right after call number `call` at a point. Exits with the command's code."""
    run(["train", *arguments], None if point is None else KILL_POINTS[point], call, signum)


def predict(arguments, point, call):
    """Run `pix2seq predict`, killed right after call number `call` at a point."""
    run(["predict", *arguments], PREDICTION_POINTS[point], call, signal.SIGKILL)


def index(folder, out, point=None, call=1):
    """Bring an index with files of four images up to date, killed right after call number `call` at a point."""
    with (
        mock.patch.object(pix2seq.data.image_index, "SHARD_IMAGES", 4),
        mock.patch.object(pix2seq.search, "SHARD_IMAGES", 4),
        signalled(None if point is None else INDEX_POINTS[point], call, signal.SIGKILL),
    ):
        update_index(SeeingColours(), open_index(out, folder, checkpoint=folder, model="m"), batch_size=2)


def run(command, point, call, signum):
    """Run a command, with a signal right after call number `call` of a function."""
    with signalled(point, call, signum):
        raise SystemExit(main(command))


@contextmanager
def signalled(point, call, signum):
    """Send this process a signal right after call number `call` of a function, given by owner and name."""
    if point is None:
        yield
        return
    owner, name = point
    original = getattr(owner, name)
    calls = 0

    def dying(*args, **kwargs):
        nonlocal calls
        result = original(*args, **kwargs)
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signum)
        return result

    with mock.patch.object(owner, name, dying):
        yield


def train_for(arguments, seconds):
    """Run `pix2seq train`, and let the kernel end the process at any instruction after `seconds` of its time."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    raise SystemExit(main(["train", *arguments]))


def train_with_a_hanging_image(arguments, index, mark):
    """Run `pix2seq train` on a training set that never returns image number `index`, and creates a file instead."""
    # A forked worker inherits the patch below; this process was started by a fork server, whose method it would take.
    multiprocessing.set_start_method("fork", force=True)
    original = TrainingSet.__getitem__

    def hanging(self, key):
        if key[1] == index:
            mark.touch()
            time.sleep(3600)
        return original(self, key)

    with mock.patch.object(TrainingSet, "__getitem__", hanging):
        raise SystemExit(main(["train", *arguments]))
