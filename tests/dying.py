"""Runs that are ended from within at a chosen place, for test_kill.py. Started in a process of their own."""

import os
import signal
import time
from unittest import mock

import pix2seq.training.checkpoint
import pix2seq.training.loop
import pix2seq.training.step
from pix2seq.cli import main
from pix2seq.data.samples import TrainingSet
from pix2seq.predictor import Predictor

# Where a signal comes, as (owner, name) of what is called there.
PLACES = {
    "waiting for data": (pix2seq.training.loop, "TaskBatches"),
    "between micro-batches": (pix2seq.training.step, "sequence_loss"),
    "updating weights": (pix2seq.training.loop, "learning_rate"),
    "evaluating": (Predictor, "ask"),
    "saving": (pix2seq.training.checkpoint, "save_file"),
}


def train(arguments, place=None, call=1, signum=signal.SIGKILL):
    """`pix2seq train`, ended by a signal right after the `call`-th call at a place. The exit code is the process's."""
    if place is None:
        raise SystemExit(main(["train", *arguments]))
    owner, name = PLACES[place]
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
        raise SystemExit(main(["train", *arguments]))


def train_with_a_hanging_image(arguments, index):
    """A training set that never gives the image of this number."""
    original = TrainingSet.__getitem__

    def hanging(self, key):
        if key[1] == index:
            time.sleep(3600)
        return original(self, key)

    with mock.patch.object(TrainingSet, "__getitem__", hanging):
        raise SystemExit(main(["train", *arguments]))
