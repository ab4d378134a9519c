"""The vocabulary against the official layout and arrays."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pix2seq.vocab import CLASS_BASE, NOISE, TASK_IDS, Vocab, dequantize, quantize


def test_the_layout_is_the_official_one():
    vocab = Vocab()
    assert TASK_IDS == {"detection": 10, "segmentation": 11, "keypoint": 12, "captioning": 13}
    assert (NOISE, CLASS_BASE, vocab.coord_base, vocab.text_base, vocab.max_label) == (30, 100, 1000, 3000, 899)
    assert vocab.coord_ids(np.array([0.0, 0.5, 1.0], np.float32)).tolist() == [1000, 1500, 1999]


@pytest.mark.parametrize("num_bins", [2, 100, 384, 1000, 2000])
def test_quantize_reproduces_the_official_arrays(parity_ops, num_bins):
    coords = parity_ops[f"quantize_{num_bins}_in"]
    bins = quantize(coords, num_bins)
    np.testing.assert_array_equal(bins, parity_ops[f"quantize_{num_bins}_out"])
    np.testing.assert_array_equal(quantize(torch.from_numpy(coords), num_bins).numpy(), bins)
    np.testing.assert_array_equal(dequantize(bins, num_bins), parity_ops[f"dequantize_{num_bins}_out"])


def test_rounding_is_half_to_even():
    halves = np.array([0.5, 1.5, 2.5], np.float32) / 4
    assert quantize(halves, 5).tolist() == [0, 2, 2]


@given(st.floats(0, 1, width=32), st.integers(2, 2000))
def test_a_coordinate_survives_the_round_trip_to_half_a_bin(coord, num_bins):
    back = dequantize(quantize(np.float32(coord)[None], num_bins), num_bins)[0]
    assert abs(float(back) - coord) <= 0.5 / (num_bins - 1) + 1e-6


@given(st.floats(allow_nan=False, allow_infinity=True, width=32))
def test_any_number_lands_in_a_bin(coord):
    assert 0 <= int(quantize(np.array([coord], np.float32), 1000)[0]) <= 999


def test_ranges_that_overlap_are_refused():
    with pytest.raises(ValueError, match="text_base"):
        Vocab(num_bins=2500, num_text=10, size=4000)
    with pytest.raises(ValueError, match="size is 1500"):
        Vocab(size=1500)
    with pytest.raises(ValueError, match="labels"):
        Vocab().class_ids(np.array([900]))


def test_every_id_has_a_meaning():
    vocab = Vocab(num_text=5, size=3010)
    words = [vocab.meaning(token) for token in range(vocab.size)]
    assert words[0] == "end"
    assert words[10] == "task:detection"
    assert words[101] == "class:1"
    assert words[1999] == "bin:999"
    assert words[3004] == "text:4"
    assert words[3005] == "unused:3005"
