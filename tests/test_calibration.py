"""Scores as probabilities: the errors by hand and by a slow second implementation, and the maps that mend them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_operating_points import A, B, found, target_of

from pix2seq.calibrate import calibrate_scores, choose_threshold
from pix2seq.metrics.calibration import (
    IDENTITY,
    CalibrationReport,
    Graded,
    ScoreMap,
    TaskCalibration,
    fit_isotonic,
    fit_temperature,
    reliability,
)
from pix2seq.metrics.captions import CaptionMetric
from pix2seq.metrics.coco_ap import average_precision
from pix2seq.types import Caption, Category

CAT, DOG = Category(1, 7, "cat"), Category(2, 9, "dog")


def graded_of(scores, is_right, classes="cat", *, num_truths=None, images=None):
    scores, is_right = np.array(scores, np.float64), np.array(is_right, np.bool_)
    count = len(scores)
    return Graded(
        scores,
        is_right,
        np.arange(count) if images is None else np.array(images),
        np.array([classes] * count if isinstance(classes, str) else classes, np.str_),
        np.full(count, "small"),
        int(is_right.sum()) if num_truths is None else num_truths,
    )


def test_the_errors_by_hand():
    """Bins of width 1/15: 0.62 and 0.65 share [0.6, 0.667), 0.1 is alone, 1.0 falls into the last."""
    result = reliability(np.array([0.62, 0.65, 0.1, 1.0]), np.array([True, False, False, True]))
    # |0.5 - 0.635| * 2/4 + |0 - 0.1| / 4 + |1 - 1| / 4
    assert result.error == pytest.approx(0.0675 + 0.025)
    assert result.brier == pytest.approx((0.38**2 + 0.65**2 + 0.1**2) / 4)
    assert [each.count for each in result.bins if each.count] == [1, 2, 1]
    assert (result.bins[9].mean_score, result.bins[9].share_right) == (pytest.approx(0.635), 0.5)


def slow_error(scores, is_right):
    total = 0.0
    for k in range(15):
        inside = [i for i, s in enumerate(scores) if k / 15 <= s < (k + 1) / 15 or (k == 14 and s == 1)]
        total += abs(sum(is_right[i] - scores[i] for i in inside))
    return total / len(scores)


@given(
    hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 1).map(lambda x: round(x, 3))), st.integers(0, 99)
)
def test_the_error_equals_a_slow_second_implementation(scores, seed):
    is_right = np.random.default_rng(seed).random(len(scores)) < scores
    edge = np.isclose((scores * 15) % 1, 0, atol=1e-9) | np.isclose((scores * 15) % 1, 1, atol=1e-9)
    scores = np.where(edge & (scores < 1), scores + 1e-4 * (scores < 0.5) - 1e-4 * (scores >= 0.5), scores)
    assert reliability(scores, is_right).error == pytest.approx(slow_error(scores, is_right))


def test_scores_that_are_probabilities_have_no_error_and_inflated_ones_have_theirs():
    rng = np.random.default_rng(0)
    chances = rng.random(100_000)
    is_right = rng.random(100_000) < chances
    assert reliability(chances, is_right).error < 0.01
    assert reliability(chances, is_right).brier == pytest.approx(1 / 6, abs=0.003)  # mean of p (1 - p)
    assert reliability(np.sqrt(chances), is_right).error == pytest.approx(2 / 3 - 1 / 2, abs=0.01)


def test_low_scores_do_not_flatter():
    likely = graded_of([0.5, 0.5], [True, True])
    flooded = graded_of([0.5, 0.5, *[0.04] * 1000], [True, True, *[False] * 1000])
    assert CalibrationReport.of(flooded).metrics == CalibrationReport.of(likely).metrics == {"ECE": 0.5, "Brier": 0.25}


def test_errors_by_class_and_size():
    graded = replace(
        graded_of([0.9, 0.9, 0.4], [True, False, True], ["cat", "cat", "dog"]),
        sizes=np.array(["small", "large", "large"]),
    )
    report = CalibrationReport.of(graded)
    assert {name: each.error for name, each in report.by_class.items()} == pytest.approx({"cat": 0.4, "dog": 0.6})
    assert {name: each.count for name, each in report.by_size.items()} == {"small": 1, "large": 2}
    # The two of the large ones are in different bins: (0.9 + 0.6) / 2.
    assert report.by_size["large"].error == pytest.approx(0.75)


@pytest.mark.parametrize("fit", [fit_temperature, fit_isotonic])
def test_a_fitted_map_undoes_a_known_distortion(fit):
    rng = np.random.default_rng(1)
    chances = rng.random(20_000)
    is_right = rng.random(20_000) < chances
    logits = np.log(chances / (1 - chances))
    distorted = 1 / (1 + np.exp(-(2 * logits + 1)))  # too sure of itself, and too hopeful
    fitted = fit(distorted, is_right)(distorted)
    assert np.abs(fitted - chances).mean() < 0.02
    assert reliability(distorted, is_right).error > 0.1 > 0.02 > reliability(fitted, is_right).error


@given(st.integers(0, 2**32 - 1), st.integers(20, 200), st.sampled_from([fit_temperature, fit_isotonic]))
def test_a_map_keeps_the_order_of_scores_whatever_is_right(seed, count, fit):
    rng = np.random.default_rng(seed)
    scores = rng.random(count) ** rng.choice([0.1, 1, 20])
    mapped = fit(scores, rng.random(count) < rng.random())(np.sort(scores))
    assert (np.diff(mapped)[np.diff(np.sort(scores)) > 1e-9] > 0).all()
    assert ((mapped >= 0) & (mapped <= 1)).all()


def test_ap_of_a_class_stays_and_the_score_is_replaced():
    rng = np.random.default_rng(2)
    targets, answers = [], {}
    for image in range(30):
        corners = rng.integers(0, 140, (3, 2))
        boxes = np.concatenate([corners, corners + 40], axis=1)
        targets.append(target_of(boxes, [1, 2, 1], image_id=image))
        answers[image] = [
            found(box + rng.integers(0, 16), rng.random(), (CAT, DOG)[rng.integers(2)]) for box in [*boxes, *boxes]
        ]
    plain = average_precision(targets, [CAT, DOG], answers)
    calibration = calibrate_scores("x", plain.graded).calibration
    mapped = average_precision(
        targets,
        [CAT, DOG],
        {
            image: [replace(i, score=calibration.probability(i.score, i.category.name)) for i in each]
            for image, each in answers.items()
        },
    )
    assert mapped.per_class["AP"].tolist() == plain.per_class["AP"].tolist()
    assert CalibrationReport.of(mapped.graded).overall.error < CalibrationReport.of(plain.graded).overall.error / 2


def test_cross_validation_chooses_what_the_scores_need():
    rng = np.random.default_rng(3)
    chances = rng.random(3000)
    classes = np.where(np.arange(3000) % 2, "cat", "dog")
    honest = calibrate_scores("x", graded_of(chances, rng.random(3000) < chances, classes))
    assert honest.after.overall.error < 0.04
    # Cats are right half as often as their scores say: they need a map of their own.
    half = calibrate_scores(
        "x", graded_of(chances, rng.random(3000) < chances * np.where(classes == "cat", 0.5, 1), classes)
    )
    assert "one map a class" in half.how
    assert half.before.by_class["cat"].error > 0.2
    assert half.calibration.probability(0.8, "cat") == pytest.approx(0.4, abs=0.08)
    assert half.calibration.probability(0.8, "dog") == pytest.approx(0.8, abs=0.08)
    # A step, which no temperature has: right if the score is beyond 0.3, whatever it is.
    step = calibrate_scores("x", graded_of(chances, rng.random(3000) < np.where(chances > 0.3, 0.9, 0.1)))
    assert step.how == "isotonic, one map"


def test_what_is_left_out_does_not_see_itself():
    """Only the fifth image has right answers, with the highest scores: maps of the other four cannot know."""
    images = np.repeat(np.arange(5), 40)
    scores = (images + np.random.default_rng(4).random(200)) / 5
    result = calibrate_scores("x", graded_of(scores, images == 4, images=images))
    assert result.after.overall.brier > 0.1


def test_the_threshold_of_a_precision_by_hand():
    """By falling score: right, right, wrong, right, wrong: precision 1, 1, 2/3, 3/4, 3/5; five objects."""
    graded = graded_of([0.9, 0.8, 0.7, 0.6, 0.5], [True, True, False, True, False], num_truths=5)
    assert choose_threshold(graded, 0.7) == (0.6, 0.75, 0.6)
    assert choose_threshold(graded, 0.9) == (0.8, 1.0, 0.4)
    assert choose_threshold(graded, 0.0) == (0.5, 0.6, 0.6)
    assert choose_threshold(graded, None) == (0.6, 0.75, 0.6)  # F1 of 2/6, 4/7, 4/8, 6/9, 6/10
    assert choose_threshold(graded_of([0.9, 0.8], [False, True]), 0.6) is None
    lucky = graded_of([0.9, 0.8, 0.7], [True, False, False], num_truths=101)
    assert choose_threshold(lucky, 0.9) is None  # one right answer for 101 objects promises nothing
    assert choose_threshold(replace(lucky, num_truths=100), 0.9) == (0.9, 1.0, 0.01)
    assert choose_threshold(graded_of([0.5, 0.5], [True, False]), 0.9) is None  # equal scores cannot be parted


def test_captions_are_graded_by_their_truth():
    metric = CaptionMetric(lambda text, target: {"a": True, "b": False}.get(text))
    metric.add(target_of([A], image_id=1), [Caption("a", math.log(0.25))])
    other = CaptionMetric(metric.is_true_of)
    other.add(target_of([A], image_id=2), [Caption("b", -1.0, probability=0.75)])
    other.add(target_of([A], image_id=3), [Caption("nobody knows", -1.0)])
    metric.merge(other)
    graded = metric.result().graded
    assert (graded.image_ids.tolist(), graded.is_right.tolist()) == ([1, 2], [True, False])
    assert graded.scores.tolist() == pytest.approx([0.25, 0.75])


def test_boxes_are_graded_by_class_and_size():
    large = (0, 100, 100, 200)
    target = target_of([A, large], [1, 2])
    result = average_precision([target], [CAT, DOG], {1: [found(A, 0.9), found(large, 0.8), found(B, 0.2, DOG)]})
    rows = zip(result.graded.scores, result.graded.is_right, result.graded.classes, result.graded.sizes, strict=True)
    assert sorted(rows) == [(0.2, False, "dog", "medium"), (0.8, False, "cat", "large"), (0.9, True, "cat", "medium")]
    assert result.graded.num_truths == 2


MAP = ScoreMap("isotonic", (0.0, 0.5, 1.0), (0.1, 0.2, 0.9))
KNOWN = TaskCalibration(0.25, 0.9, None, ((("Cat",), MAP), ((), IDENTITY)))


def test_a_calibration_survives_json_and_finds_the_map_of_a_class():
    read = TaskCalibration.from_json(json.loads(json.dumps(KNOWN.to_json())))
    assert read == KNOWN
    assert read.probability(0.75, "cat ") == pytest.approx(0.55)
    assert read.probability(0.75, "dog") == read.probability(0.75) == 0.75


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 2},
        {"threshold": None},
        {"precision": "high"},
        {"maps": 3},
        {"maps": [{"classes": [1], "kind": "isotonic", "scores": [0, 1], "probabilities": [0, 1]}]},
        {"maps": [{"classes": [], "kind": "isotonic", "scores": [0, 1], "probabilities": [0.5, 0.5]}]},
        {"maps": [{"classes": [], "kind": "isotonic", "scores": [0, 0.9], "probabilities": [0, 1]}]},
        {"maps": [{"classes": [], "kind": "isotonic", "scores": [0, math.nan, 1], "probabilities": [0, 0.5, 1]}]},
        {"maps": [{"classes": [], "kind": "isotonic", "scores": [], "probabilities": []}]},
    ],
)
def test_a_broken_calibration_is_refused(change):
    with pytest.raises((ValueError, TypeError, KeyError)):
        TaskCalibration.from_json(KNOWN.to_json() | change)
