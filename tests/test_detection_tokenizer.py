"""The detection tokenizer against the official arrays and its documented properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pix2seq.tokenizers.detection import (
    NOISE_LABEL,
    TOKENS_PER_OBJECT,
    add_noise_objects,
    corrupt_classes,
    decode_objects,
    encode_objects,
    jitter_boxes,
    random_boxes,
    shift_boxes,
)
from pix2seq.vocab import CLASS_BASE, NOISE, Vocab

VOCAB = Vocab()


def random_boxes_yxyx(rng, count):
    corners = np.sort(rng.random((count, 2, 2)), axis=1)
    return corners.reshape(count, 4).astype(np.float32)


def official_rows(parity_ops):
    """Yield boxes and labels of the recorded images in our numbering; there, -70 is noise and 0 is padding."""
    for row, labels in enumerate(parity_ops["det_label"]):
        count = int((labels != 0).sum())
        ours = np.where(labels[:count] == NOISE - CLASS_BASE, NOISE_LABEL, labels[:count])
        yield row, parity_ops["det_bbox"][row, :count], ours


@pytest.mark.parametrize("noise_weight", [0, 1])
def test_targets_and_weights_equal_the_official_ones(parity_ops, noise_weight):
    for row, boxes, labels in official_rows(parity_ops):
        length = len(labels) * TOKENS_PER_OBJECT
        ours = encode_objects(boxes, labels, VOCAB, np.random.default_rng(0), noise_weight=noise_weight)
        np.testing.assert_array_equal(ours.targets, parity_ops["det_response_seq"][row, :length])
        np.testing.assert_array_equal(ours.weights, parity_ops[f"det_token_weights_noise{noise_weight}"][row, :length])


def test_inputs_differ_from_targets_only_in_classes(parity_ops):
    official = parity_ops["det_response_seq_rand_n_fake_cls_one_draw"]
    for row, boxes, labels in official_rows(parity_ops):
        ours = encode_objects(boxes, labels, VOCAB, np.random.default_rng(row)).inputs.reshape(-1, 5)
        theirs = official[row, : ours.size].reshape(-1, 5)
        np.testing.assert_array_equal(ours[:, :4], theirs[:, :4])
        for classes in (ours[:, 4], theirs[:, 4]):
            assert ((classes == NOISE) | ((classes >= CLASS_BASE) & (classes < VOCAB.coord_base))).all()


@pytest.mark.parametrize(
    ("how", "real", "noise", "drawn"),
    [
        ("none", 1, 0, 0),
        ("rand_cls", 0, 0, 1),
        ("real_n_fake_cls", 1 / 2, 1 / 2, 0),
        ("rand_n_fake_cls", 0, 1 / 2, 1 / 2),
        ("real_n_rand_n_fake_cls", 1 / 2, 1 / 4, 1 / 4),  # two coins: real or not, and if not, noise or drawn
    ],
)
def test_corrupted_classes_follow_the_published_odds(how, real, noise, drawn):
    count, true = 40_000, CLASS_BASE + 700
    read = corrupt_classes(np.full(count, true), how, 899, np.random.default_rng(0))
    assert abs((read == true).mean() - real) < 0.01
    assert abs((read == NOISE).mean() - noise) < 0.01
    others = read[(read != true) & (read != NOISE)]
    assert abs(len(others) / count - drawn) < 0.01
    if drawn:  # uniform from CLASS_BASE, which is no class, to the last class
        assert others.min() == CLASS_BASE
        assert others.max() == CLASS_BASE + 899
        assert abs(others.mean() - CLASS_BASE - 449.5) < 10


def test_an_unknown_corruption_is_refused():
    with pytest.raises(ValueError, match="unknown class corruption"):
        corrupt_classes(np.full(4, CLASS_BASE + 1), "rand", 899, np.random.default_rng(0))


def test_decoding_reproduces_the_official_arrays(parity_ops):
    logits = parity_ops["det_decode_logits_float16"].astype(np.float64)
    log_total = np.log(np.exp(logits).sum(-1))
    real = logits[..., CLASS_BASE : VOCAB.coord_base]
    best = real.argmax(-1) + CLASS_BASE
    logprobs = real.max(-1) - log_total
    for row, ids in enumerate(parity_ops["det_decode_seq"]):
        objects = decode_objects(ids, best[row], logprobs[row], VOCAB)
        np.testing.assert_array_equal(objects.labels, parity_ops["det_decode_class"][row])
        np.testing.assert_allclose(objects.boxes_yxyx, parity_ops["det_decode_bbox_yxyx"][row], atol=1e-7)
        np.testing.assert_allclose(objects.scores, parity_ops["det_decode_score"][row], atol=1e-6)


def test_ten_thousand_boxes_survive_the_round_trip_to_half_a_bin():
    rng = np.random.default_rng(1)
    boxes = random_boxes_yxyx(rng, 10_000)
    labels = rng.integers(1, 91, 10_000)
    ids = encode_objects(boxes, labels, VOCAB, rng).targets
    objects = decode_objects(ids, ids, np.zeros(len(ids)), VOCAB)
    assert np.abs(objects.boxes_yxyx - boxes).max() <= 0.5 / 999 + 1e-6
    np.testing.assert_array_equal(objects.labels, labels)


def test_noise_objects_are_distributed_as_in_the_official_draws(parity_ops):
    boxes = parity_ops["augment_bbox_in"]
    labels = parity_ops["augment_bbox_in_label"].astype(np.int64)
    official = parity_ops["augment_bbox_out_300_draws_float16"].astype(np.float32)
    rng = np.random.default_rng(2)
    draws = [add_noise_objects(boxes, labels, 20, rng) for _ in range(1500)]
    ours = np.stack([drawn for drawn, _ in draws])
    assert ours.shape[1:] == official.shape[1:] == (25, 4)
    np.testing.assert_array_equal(draws[0][0][:5], boxes)
    assert all((drawn[5:] == NOISE_LABEL).all() and (drawn[:5] == labels).all() for _, drawn in draws)

    def summary(all_boxes):
        noise = all_boxes[:, 5:]
        size = noise[..., 2:] - noise[..., :2]
        nearest = np.abs(noise[:, :, None] - boxes[None, None]).max(-1).min(-1)
        near_a_real_box = (nearest < 0.1).mean(1)
        quantiles = np.quantile(noise.reshape(-1, 4), [0.1, 0.25, 0.5, 0.75, 0.9], axis=0)
        return quantiles, np.quantile(size, [0.1, 0.5, 0.9]), near_a_real_box.mean(), near_a_real_box.std()

    for mine, theirs, tolerance in zip(summary(ours), summary(official), (0.04, 0.03, 0.04, 0.03), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=tolerance)


def test_an_image_without_objects_gets_only_random_noise():
    boxes, labels = add_noise_objects(np.zeros((0, 4)), np.zeros(0, int), 7, np.random.default_rng(0))
    assert boxes.shape == (7, 4)
    assert (labels == NOISE_LABEL).all()
    assert ((boxes >= 0) & (boxes <= 1)).all()


def test_an_end_token_follows_if_it_has_a_weight():
    response = encode_objects(np.zeros((1, 4)), np.array([3]), VOCAB, np.random.default_rng(0), eos_weight=0.1)
    assert response.targets.tolist() == [1000, 1000, 1000, 1000, 103, 0]
    np.testing.assert_allclose(response.weights, [1, 1, 1, 1, 1, 0.1])


ANY_IDS = hnp.arrays(np.int64, st.integers(0, 40), elements=st.integers(0, 3299))


@given(ANY_IDS)
def test_decoding_never_raises_and_readable_boxes_lie_in_the_image(ids):
    objects = decode_objects(ids, ids, np.full(len(ids), -1.0), VOCAB)
    boxes = objects.boxes_yxyx[objects.readable]
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_a_cut_off_object_is_dropped_and_an_end_token_ends_the_list():
    complete = [1000, 1000, 1500, 1500, 101]
    ids = np.array(complete + [1000, 1000, 1500])
    assert len(decode_objects(ids, ids, np.zeros(8), VOCAB).labels) == 1
    ids = np.array(complete + [0] + complete)
    assert len(decode_objects(ids, ids, np.zeros(11), VOCAB).labels) == 1


def test_each_way_of_corrupting_a_class_draws_by_its_own_odds():
    """Shares of the true class, of noise and of random classes, by two coins that know nothing of each other."""
    classes = np.full(20_000, CLASS_BASE + 7)
    expected = {
        "none": (1, 0, 0),
        "rand_cls": (0, 0, 1),
        "real_n_fake_cls": (0.5, 0.5, 0),
        "rand_n_fake_cls": (0, 0.5, 0.5),
        "real_n_rand_n_fake_cls": (0.5, 0.25, 0.25),
    }
    for how, shares in expected.items():
        drawn = corrupt_classes(classes, how, 899, np.random.default_rng(0))
        assert drawn.dtype == np.int64
        true, noise = (drawn == classes).mean(), (drawn == NOISE).mean()
        np.testing.assert_allclose([true, noise, 1 - true - noise], shares, atol=0.015, err_msg=how)


def test_random_classes_come_from_the_classes_of_the_model():
    labels = np.full(3000, 2)
    encode = lambda **settings: encode_objects(  # noqa: E731
        np.zeros((3000, 4)), labels, VOCAB, np.random.default_rng(0), class_corruption="rand_cls", **settings
    )
    assert set(encode(num_labels=3).inputs[4::5]) == {100, 101, 102, 103}
    assert encode().inputs[4::5].max() > CLASS_BASE + 850
    assert (encode(num_labels=3).targets[4::5] == CLASS_BASE + 2).all()


def test_a_sequence_by_hand():
    vocab = Vocab(num_bins=11, size=1011)
    boxes = np.array([[0.0, 0.1, 0.5, 1.0], [0.3, 0.2, 0.4, 0.9]])
    encode = lambda **settings: encode_objects(  # noqa: E731
        boxes, np.array([4, NOISE_LABEL]), vocab, np.random.default_rng(0), class_corruption="none", **settings
    )
    tokens = [1000, 1001, 1005, 1010, 104, 1003, 1002, 1004, 1009, NOISE]
    response = encode()
    assert response.inputs.tolist() == response.targets.tolist() == tokens
    assert response.weights.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 1]
    assert response.weights.dtype == np.float32
    ended = encode(noise_weight=0.5, eos_weight=0.25)
    assert ended.inputs.tolist() == ended.targets.tolist() == [*tokens, 0]
    assert ended.weights.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0.5, 0.25]
    assert ended.weights.dtype == np.float32
    with pytest.raises(ValueError, match="labels must lie in"):
        encode_objects(boxes, np.array([900, NOISE_LABEL]), vocab, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("box", "label", "readable"),
    [
        ([1000, 1000, 1500, 1999], 1, True),
        ([1000, 1000, 1001, 1001], 899, True),
        ([1000, 1000, 1500, 2000], 1, False),  # the first id beyond the bins
        ([999, 1000, 1500, 1500], 1, False),  # the last one before them
        ([1500, 1000, 1500, 1500], 1, False),  # no height
        ([1000, 1500, 1500, 1500], 1, False),  # no width
        ([1500, 1500, 1000, 1000], 1, False),
        ([1000, 1000, 1500, 1500], 0, False),  # no class
    ],
)
def test_an_object_is_readable_if_it_has_four_coordinates_an_area_and_a_class(box, label, readable):
    ids = np.array([*box, NOISE])
    best, logprobs = np.full(5, CLASS_BASE + label), np.log(np.array([0.9, 0.9, 0.9, 0.9, 0.25]))
    objects = decode_objects(ids, best, logprobs, VOCAB)
    assert objects.readable.tolist() == [readable]
    assert objects.labels.tolist() == [label]
    assert objects.scores.tolist() == [0.25]
    assert objects.scores.dtype == np.float32


def test_noise_is_made_of_jittered_and_of_moved_boxes():
    """The three kinds apart: what is kept of a box's size and position."""
    rng = np.random.default_rng(0)
    boxes = np.tile(np.array([[0.4, 0.4, 0.6, 0.5]]), (4000, 1))
    offsets = (jitter_boxes(boxes, rng, max_range=0.1) - boxes) / [0.2, 0.1, 0.2, 0.1]
    assert np.abs(offsets).max() <= 0.1 + 1e-6  # two deviations
    np.testing.assert_allclose(offsets.mean(0), 0, atol=0.003)
    np.testing.assert_allclose(offsets.std(0), 0.05 * 0.88, atol=0.002)  # of a normal cut at two deviations
    assert abs(np.corrcoef(offsets.T) - np.eye(4)).max() < 0.06

    moved = shift_boxes(boxes, rng)
    inside = (moved > 0).all(1) & (moved < 1).all(1)
    np.testing.assert_allclose(moved[inside, 2:] - moved[inside, :2], np.tile([[0.2, 0.1]], (inside.sum(), 1)))
    centres = (moved[:, :2] + moved[:, 2:]) / 2
    np.testing.assert_allclose(centres.mean(0), 0.5, atol=0.02)
    np.testing.assert_allclose(centres[inside].min(0), [0.1, 0.05], atol=0.01)
    np.testing.assert_allclose(centres[inside].max(0), [0.9, 0.95], atol=0.01)

    drawn = random_boxes(4000, rng)
    assert drawn.shape == (4000, 4)
    sizes = drawn[:, 2:] - drawn[:, :2]
    assert (sizes >= 0).all()
    assert ((drawn >= 0) & (drawn <= 1)).all()
    np.testing.assert_allclose(drawn.mean(), 0.5, atol=0.02)
    normal = rng.standard_normal((40_000, 2))
    extents = 0.5 * np.abs(normal[(np.abs(normal) <= 2).all(1)])
    centres = rng.random(extents.shape)
    expected = np.minimum(centres + extents / 2, 1) - np.maximum(centres - extents / 2, 0)
    shares = [0.1, 0.25, 0.5, 0.75, 0.9]
    np.testing.assert_allclose(np.quantile(sizes, shares), np.quantile(expected, shares), atol=0.015)
    full = jitter_boxes(np.tile([[0.0, 0.0, 1.0, 1.0]], (100, 1)), rng, max_range=0.1)
    assert ((full >= 0) & (full <= 1)).all()


def test_noise_copies_every_object_as_often_as_any_other_and_comes_shuffled():
    rng = np.random.default_rng(0)
    real = np.array([[0.1, 0.1, 0.2, 0.2], [0.7, 0.7, 0.9, 0.8]], np.float32)
    copies = np.zeros((2, 2000), int)  # of each object by draw
    first, counts = [], []
    for draw in range(2000):
        boxes, labels = add_noise_objects(real, np.array([5, 6]), 10, rng)
        assert boxes.shape == (12, 4)
        assert boxes.dtype == np.float32
        assert labels.tolist() == [5, 6, *[NOISE_LABEL] * 10]
        sizes = real[:, 2:] - real[:, :2]
        near = np.abs(boxes[2:, None] - real).max(-1) <= 0.1 * sizes.max(-1) + 1e-6  # (10, 2)
        copies[:, draw] = near.sum(0)
        first.append(near[0].any())
        counts.append(near.sum())
    # Duplicates are uniform from 0 to 10: their mean is 5, and each of ten places holds one in half of the draws.
    assert np.mean(counts) == pytest.approx(5, abs=0.3)
    assert np.mean(first) == pytest.approx(0.5, abs=0.04)
    assert {0, 10} <= set(counts)
    assert copies[0].mean() == pytest.approx(copies[1].mean(), abs=0.15)
    assert copies.max() <= 7  # of at most ten duplicates, five of each, and boxes moved by chance
    none, labels = add_noise_objects(real, np.array([5, 6]), 0, rng)
    np.testing.assert_array_equal(none, real)
    assert labels.tolist() == [5, 6]
