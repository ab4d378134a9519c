"""Keypoints and instance prompts, against the official arrays, numbers worked by hand, and random input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pix2seq.tokenizers.instance import instance_prompts
from pix2seq.tokenizers.keypoint import decode_keypoints, encode_keypoints
from pix2seq.vocab import INVISIBLE, TASK_IDS, Vocab

VOCAB = Vocab()


def test_prompts_equal_the_official_ones(shared):
    arrays = np.load(shared / "parity" / "tasks" / "pure_points_seq.npz")
    cases = [key.split("/")[0] for key in arrays.files if key.endswith("/out/prompt_seq")]
    assert cases
    tasks = {number: name for name, number in TASK_IDS.items()}
    for case in cases:
        read = lambda key, case=case: arrays[f"{case}/in/{key}"]  # noqa: E731
        shift, bins = int(read("coord_vocab_shift")), int(read("quantization_bins"))
        vocab = Vocab(num_bins=bins, coord_base=shift, text_base=shift + bins, size=shift + bins)
        real = read("label") > 0
        ours = instance_prompts(tasks[int(read("task_vocab_id"))], read("bbox")[real], read("label")[real], vocab)
        np.testing.assert_array_equal(ours, arrays[f"{case}/out/prompt_seq"][real])


def test_prompts_of_the_default_vocabulary_equal_the_official_ones(parity_ops):
    boxes, labels = parity_ops["det_bbox"], parity_ops["instance_label"]
    real = labels > 0
    for task, key in (("segmentation", "seg"), ("keypoint", "kpt")):
        expected = parity_ops[f"instance_prompt_{key}"]
        np.testing.assert_array_equal(instance_prompts(task, boxes[real], labels[real], VOCAB), expected[real])


def test_responses_equal_the_official_ones(parity_ops):
    points, expected = parity_ops["keypoints_yx"], parity_ops["keypoint_response_seq"]
    points, expected = points.reshape(-1, points.shape[-1]), expected.reshape(-1, expected.shape[-1])
    assert (points == -3).any()
    real = expected.any(axis=1)  # padding instances are all zero
    for row, ids in zip(points[real], expected[real], strict=True):
        pairs = row.reshape(-1, 2)
        response = encode_keypoints(pairs, pairs[:, 0] != -3, VOCAB)
        np.testing.assert_array_equal(response.targets, ids)


def test_a_response_by_hand():
    vocab = Vocab(num_bins=11)
    points = np.array([[0.5, 1.0], [0.2, 0.3], [0.04, 0.96]])
    response = encode_keypoints(points, np.array([True, False, True]), vocab)
    assert response.targets.tolist() == [1005, 1010, INVISIBLE, INVISIBLE, 1000, 1010]
    np.testing.assert_allclose(response.weights, [1, 1, 0.1, 0.1, 1, 1])
    decoded, given_points = decode_keypoints(response.targets, 4, vocab)
    np.testing.assert_allclose(decoded, [[0.5, 1], [0, 0], [0, 1], [0, 0]])
    assert given_points.tolist() == [True, False, True, False]


def test_masking_hides_a_uniform_share_of_the_inputs_only():
    points, visible = np.full((17, 2), 0.5), np.ones(17, bool)
    shares = []
    for seed in range(2000):
        response = encode_keypoints(points, visible, VOCAB, np.random.default_rng(seed))
        assert set(response.inputs) <= {INVISIBLE, VOCAB.coord_base + 500}
        assert (response.targets == VOCAB.coord_base + 500).all()
        assert (response.weights == 1).all()
        shares.append((response.inputs == INVISIBLE).mean())
    # A share uniform in [0, 1) has mean 1/2 and deviation 0.29, a little more for the 34 draws.
    assert abs(np.mean(shares) - 0.5) < 0.03
    assert abs(np.std(shares) - 0.295) < 0.02


@given(hnp.arrays(np.int64, st.integers(0, 50), elements=st.integers(-5, 5000)), st.integers(0, 20))
def test_decoding_never_raises_and_points_lie_in_the_image(ids, num_points):
    points, seen = decode_keypoints(ids, num_points, VOCAB)
    assert points.shape == (num_points, 2)
    assert seen.shape == (num_points,)
    assert ((points >= 0) & (points <= 1)).all()


@given(
    hnp.arrays(np.float64, (13, 2), elements=st.floats(0, 1)),
    hnp.arrays(bool, 13),
    st.integers(2, 2000),
)
def test_round_trip_within_half_a_bin(points, visible, num_bins):
    vocab = Vocab(num_bins=num_bins)
    decoded, given_points = decode_keypoints(encode_keypoints(points, visible, vocab).targets, 13, vocab)
    np.testing.assert_array_equal(given_points, visible)
    assert np.abs(decoded - points)[visible].max(initial=0) <= 0.5 / (num_bins - 1) + 1e-6


@pytest.mark.parametrize(("token", "is_coordinate"), [(999, False), (1000, True), (1999, True), (2000, False)])
def test_coordinates_are_the_ids_of_the_bins_alone(token, is_coordinate):
    for ids in ([token, 1500], [1500, token]):
        points, given_points = decode_keypoints(np.array(ids), 1, VOCAB)
        assert given_points.tolist() == [is_coordinate]
        assert (points[0] == 0).all() == (not is_coordinate)
