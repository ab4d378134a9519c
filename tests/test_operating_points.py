"""F1, precision and recall by score, and classes taken for each other: by hand, and by slow second implementations."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_metrics import CAT, DOG, target_of

from pix2seq.metrics.coco_ap import average_precision
from pix2seq.metrics.operating_points import THRESHOLDS, Matches, curve, operating_points
from pix2seq.types import Instance


def found(box, score=1.0, category=CAT):
    return Instance(tuple(map(float, box)), category, score)


A, B, C = (0, 0, 40, 40), (100, 0, 140, 40), (0, 100, 40, 140)
NOWHERE = (100, 100, 140, 140)
NEAR_A = (0, 0, 40, 50)  # IoU 0.8 with A


def test_the_best_f1_by_hand():
    """Three objects. By falling score: right, wrong, right (IoU 0.8), wrong."""
    result = average_precision(
        [target_of([A, B, C])],
        [CAT],
        {1: [found(B, 0.9), found(NOWHERE, 0.8), found(NEAR_A, 0.6), found((150, 150, 190, 190), 0.3)]},
    )
    metrics = result.metrics
    # F1 is 2 * right / (named + 3): 2/4, 2/5, 4/6, 4/7 at IoU 0.5 and 0.75; at 0.95 the third is wrong: 2/4, ...
    assert metrics["F1@0.5"] == pytest.approx(4 / 6)
    assert metrics["precision@0.5"] == pytest.approx(2 / 3)
    assert metrics["recall@0.5"] == pytest.approx(2 / 3)
    assert metrics["threshold@0.5"] == 0.6
    assert metrics["F1@0.75"] == pytest.approx(4 / 6)
    assert (metrics["F1@0.95"], metrics["precision@0.95"], metrics["threshold@0.95"]) == (0.5, 1.0, 0.9)
    assert metrics["recall@0.95"] == pytest.approx(1 / 3)
    # The box of IoU 0.8 counts at 7 of 10 thresholds (0.5 to 0.8): mean F1 (7 * 4/6 + 3 * 2/6) / 10 = 17/30.
    assert metrics["F1@0.5:0.95"] == pytest.approx(17 / 30)
    assert metrics["threshold@0.5:0.95"] == 0.6
    assert metrics["precision@0.5:0.95"] == pytest.approx((7 * 2 + 3 * 1) / 30)
    assert result.per_class.iloc[0][["F1@0.5", "threshold@0.5"]].tolist() == pytest.approx([4 / 6, 0.6])


def test_a_class_has_a_threshold_of_its_own():
    result = average_precision(
        [target_of([A, B], [1, 2])],
        [CAT, DOG],
        {1: [found(A, 0.2), found(B, 0.9, DOG), found(NOWHERE, 0.5, DOG)]},
    )
    rows = result.per_class.set_index("category")
    assert rows["threshold@0.5"].to_dict() == {"cat": 0.2, "dog": 0.9}
    assert rows["F1@0.5"].to_dict() == {"cat": 1.0, "dog": 1.0}
    # Together: right 0.9, wrong 0.5, right 0.2 -> F1 2/3, 2/4, 4/5.
    assert result.metrics["F1@0.5"] == pytest.approx(4 / 5)


def test_equal_scores_are_taken_together():
    result = average_precision([target_of([A])], [CAT], {1: [found(A, 0.5), found(NOWHERE, 0.5)]})
    assert result.metrics["precision@0.5"] == 0.5
    assert result.metrics["F1@0.5"] == pytest.approx(2 / 3)


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong():
    target = target_of([A, (100, 100, 200, 200)], crowd=[False, True])
    result = average_precision([target], [CAT], {1: [found(NOWHERE, 0.9), found(A, 0.5)]})
    assert result.metrics["precision@0.5"] == result.metrics["F1@0.5"] == 1.0
    assert len(result.graded.scores) == 1


@pytest.mark.parametrize(
    ("targets", "answers", "f1", "precision"),
    [
        ([target_of([A])], {}, 0.0, None),
        ([target_of([])], {1: [found(A)]}, None, None),
        ([target_of([A])], {1: [found(NOWHERE, 0.4)]}, 0.0, 0.0),
    ],
)
def test_what_is_undefined_is_none(targets, answers, f1, precision):
    result = average_precision(targets, [CAT], answers)
    assert (result.metrics["F1@0.5"], result.metrics["precision@0.5"]) == (f1, precision)
    assert result.graded.is_right.tolist() == [False] * len(result.graded.scores)
    assert len(result.graded.scores) == sum(map(len, answers.values()))
    result.to_json()
    assert "F1" in result.text()


@given(st.data())
def test_points_equal_a_slow_second_implementation(data):
    count = data.draw(st.integers(1, 12))
    scores = np.array(data.draw(st.lists(st.sampled_from([0.1, 0.2, 0.4, 0.5, 0.9]), min_size=count, max_size=count)))
    levels = data.draw(st.lists(st.integers(0, len(THRESHOLDS)), min_size=count, max_size=count))  # right below it
    counted = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    is_right = np.arange(len(THRESHOLDS))[:, None] < np.array(levels)
    truths = {1: int(is_right[0].sum()) + data.draw(st.integers(0, 3)) or 1}
    zeros = np.zeros(count, np.int64)
    is_counted = np.tile(counted, (len(THRESHOLDS), 1))
    matches = Matches(zeros, zeros + 1, scores, scores, is_right, is_counted, truths)
    for name, rows in {"0.5": [0], "0.75": [5], "0.95": [9], "0.5:0.95": range(10)}.items():
        best = 0.0
        for threshold in set(scores.tolist()):
            each = []
            for row in rows:
                kept = [i for i in range(count) if scores[i] >= threshold and counted[i]]
                right = sum(is_right[row, i] for i in kept)
                each.append(2 * right / (len(kept) + truths[1]))
            best = max(best, sum(each) / len(each))
        assert operating_points(matches)[name].f1 == pytest.approx(best)


def test_recall_rises_along_the_curve_and_scores_fall():
    rng = np.random.default_rng(0)
    is_right = rng.random((len(THRESHOLDS), 50)) < 0.5
    zeros = np.zeros(50, np.int64)
    drawn = curve(Matches(zeros, zeros, rng.random(50).round(1), zeros + 1.0, is_right, is_right | True, {0: 60}))
    assert (np.diff(drawn.recall) >= 0).all()
    assert (np.diff(drawn.scores) < 0).all()
    assert drawn.recall[:, -1].tolist() == (is_right.sum(axis=1) / 60).tolist()


def test_classes_taken_for_each_other_by_hand():
    """A cat found, a dog taken for a cat, a cat missed, a dog seen where nothing is."""
    result = average_precision(
        [target_of([A, B, C], [1, 2, 1])],
        [CAT, DOG],
        {1: [found(A, 0.9), found(B, 0.8), found(NOWHERE, 0.95, DOG), found(C, 0.01, DOG)]},
    )
    matrix = result.confusion
    assert matrix.threshold == 0.9  # the best F1: 2 / (2 + 3)
    assert matrix.counts.tolist() == [[1, 0, 1], [0, 0, 1], [0, 1, 0]]


def test_the_larger_iou_is_matched_first_whatever_the_score():
    near, exact = found(NEAR_A, 0.9, DOG), found(A, 0.8)
    matrix = average_precision([target_of([A])], [CAT, DOG], {1: [near, exact]}).confusion
    assert matrix.counts.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_a_confusion_counts_no_crowd_and_nothing_in_it():
    target = target_of([A, (100, 100, 200, 200)], crowd=[False, True])
    inside = [found(NOWHERE, 0.9), found((150, 150, 190, 190), 0.9)]
    matrix = average_precision([target], [CAT], {1: [*inside, found(A, 0.9)]}).confusion
    assert matrix.counts.tolist() == [[1, 0], [0, 0]]


def test_a_difficult_object_is_no_confusion():
    target = replace(target_of([A, B], crowd=[False, True]), difficult=np.array([False, True]))
    matrix = average_precision([target], [CAT], {1: [found(A, 0.9), found(B, 0.9)]}).confusion
    assert matrix.counts.tolist() == [[1, 0], [0, 0]]


@given(st.integers(0, 2**32 - 1))
def test_rows_and_columns_of_a_confusion_add_up(seed):
    rng = np.random.default_rng(seed)

    def boxes(count):
        corners = rng.integers(0, 8, (count, 2)) * 20
        return np.concatenate([corners, corners + rng.integers(20, 60, (count, 2))], axis=1)

    targets = [target_of(boxes(4), rng.integers(1, 3, 4), image_id=i) for i in (1, 2)]
    answers = {i: [found(box, 0.5, (CAT, DOG)[rng.integers(2)]) for box in boxes(5)] for i in (1, 2)}
    matrix = average_precision(targets, [CAT, DOG], answers).confusion
    truths = [sum(int((target.labels == label).sum()) for target in targets) for label in (1, 2)]
    assert matrix.counts[:2].sum(axis=1).tolist() == truths
    named = [sum(i.category == category for each in answers.values() for i in each) for category in (CAT, DOG)]
    assert matrix.counts[:, :2].sum(axis=0).tolist() == named
