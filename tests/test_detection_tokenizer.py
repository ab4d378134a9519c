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
