"""The vocabulary against the official layout and arrays."""

import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pix2seq.errors import InputError
from pix2seq.vocab import CLASS_BASE, NO, NOISE, OTHER_TASK_IDS, SLOTS, TASK_IDS, YES, Vocab, dequantize, quantize


def test_the_layout_is_the_official_one():
    vocab = Vocab()
    names = ("detection", "segmentation", "keypoint", "captioning", "prompted", "by_example", "by_words", "matching")
    assert {name: 10 + number for number, name in enumerate(names)} == TASK_IDS
    assert (NO, YES, SLOTS[0], SLOTS[-1]) == (44, 45, 57, 72)
    assert (NOISE, CLASS_BASE, vocab.coord_base, vocab.text_base, vocab.max_label) == (30, 100, 1000, 3000, 899)
    assert vocab.coord_ids(np.array([0.0, 0.5, 1.0], np.float32)).tolist() == [1000, 1500, 1999]


@pytest.mark.parametrize("num_bins", [2, 100, 384, 1000, 2000])
def test_quantize_reproduces_the_official_arrays(parity_ops, num_bins):
    bins = quantize(parity_ops[f"quantize_{num_bins}_in"], num_bins)
    np.testing.assert_array_equal(bins, parity_ops[f"quantize_{num_bins}_out"])
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
    for ids in ({"a": 17}, {"a": 30}, {"a": 10}, {"a": 18, "b": 18}):
        with pytest.raises(ValueError, match="distinct ids from 18 to 29"):
            Vocab(other_tasks=ids)


def test_every_id_has_a_meaning():
    vocab = Vocab(num_text=5, size=3010, other_tasks={"counting": 20})
    words = [vocab.meaning(token) for token in range(vocab.size)]
    assert words[0] == "end"
    assert words[10] == "task:detection"
    assert words[18] == "unused:18"
    assert words[20] == "task:counting"
    assert words[101] == "class:1"
    assert words[1999] == "bin:999"
    assert words[3004] == "text:4"
    assert words[3005] == "unused:3005"


def test_tasks_from_elsewhere_get_the_first_free_ids_and_keep_them():
    vocab = Vocab().with_tasks(["detection", "counting", "counting"]).with_tasks(["depth", "counting"])
    assert vocab.other_tasks == {"counting": 18, "depth": 19}
    assert Vocab(other_tasks={"depth": 19}).with_tasks(["a", "b"]).other_tasks == {"depth": 19, "a": 18, "b": 20}
    assert [vocab.task_id(name) for name in ("captioning", "counting", "depth")] == [13, 18, 19]
    with pytest.raises(ValueError, match="unknown task 'dept'; did you mean 'depth'"):
        vocab.task_id("dept")
    full = Vocab().with_tasks([f"task {i}" for i in OTHER_TASK_IDS])
    assert list(full.other_tasks.values()) == list(OTHER_TASK_IDS)
    with pytest.raises(InputError, match="no id is left for task 'depth'"):
        full.with_tasks(["task 20", "depth"])


def test_tasks_from_elsewhere_survive_a_config_file():
    vocab = Vocab().with_tasks(["counting"])
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Vocab), asdict(vocab))) == vocab
    assert OmegaConf.to_object(OmegaConf.structured(Vocab)) == Vocab()


def test_text_makes_the_vocabulary_grow_unless_its_size_is_given():
    assert Vocab().with_text(500) == Vocab(num_text=500, size=3500)
    assert Vocab(size=5000).with_text(500) == Vocab(num_text=500, size=5000)
    given_size = Vocab(num_text=500, size=3500)
    assert given_size.with_text(400) == given_size
    with pytest.raises(InputError, match=r"501 text ids are needed, but model\.vocab\.num_text is 500"):
        given_size.with_text(501)


def test_vocabulary_geometry_and_tokenizers_need_numpy_only():
    modules = [f"geometry.{name}" for name in ("affine", "boxes", "polygons", "keypoints")]
    modules += [
        "vocab",
        "types",
        *(f"tokenizers.{name}" for name in ("detection", "segmentation", "keypoint", "instance")),
    ]
    program = f"import sys, {', '.join(f'pix2seq.{name}' for name in modules)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert not {"torch", "cv2", "PIL", "pycocotools", "pandas", "omegaconf"} & set(loaded)
