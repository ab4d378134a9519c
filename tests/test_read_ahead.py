"""Images that are read ahead: their order, their errors, and how far ahead."""

import threading

import numpy as np
import pytest

from pix2seq.data.read_ahead import read_batches_ahead
from pix2seq.errors import InputError

BATCHES = [[0, 1], [2], [3, 4], [5]]


class Reader:
    """Gives an image of each number, none of 4, and notes what was begun."""

    def __init__(self):
        self.begun = [threading.Event() for _ in range(6)]

    def __call__(self, number):
        self.begun[number].set()
        if number == 4:
            raise InputError("image 4 is damaged")
        return np.full((1, 1, 3), number, np.uint8)


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
def test_batches_come_in_order_with_the_errors_of_what_cannot_be_read(ahead):
    found = list(read_batches_ahead(BATCHES, Reader(), ahead=ahead))
    assert [[number for number, _ in batch] for batch in found] == BATCHES
    for number, pixels in (each for batch in found for each in batch):
        if number == 4:
            assert str(pixels) == "image 4 is damaged"
        else:
            assert pixels.tolist() == [[[number] * 3]]


@pytest.mark.parametrize(("ahead", "last"), [(1, 2), (2, 4)])
def test_so_many_batches_are_read_while_one_is_worked_on(ahead, last):
    reader = Reader()
    batches = read_batches_ahead(BATCHES, reader, ahead=ahead)
    next(batches)
    assert all(event.wait(10) for event in reader.begun[: last + 1])  # nobody asked for them yet
    assert not any(event.is_set() for event in reader.begun[last + 1 :])
    batches.close()


def test_nothing_to_read_yields_nothing():
    assert list(read_batches_ahead([], Reader(), ahead=2)) == []
