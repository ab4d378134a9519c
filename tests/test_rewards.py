"""Rewards against numbers worked by hand, pycocotools and COCO's caption scorer."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.cocoeval import COCOeval
from test_caption_metrics import slow_cider_d

from pix2seq.metrics.box_rewards import precision_reward, recall_reward, true_scores
from pix2seq.metrics.caption_reward import CiderD
from pix2seq.metrics.coco_ap import average_precision
from pix2seq.metrics.keypoint_reward import keypoint_similarity
from pix2seq.metrics.mask_reward import mask_iou
from pix2seq.types import Category, ImageRecord, Instance, Target

A, B = (0, 0, 10, 10), (20, 20, 30, 30)
PART_OF_A = (0, 0, 10, 7.8)  # IoU 0.78, so at six of the ten thresholds
PART_OF_B = (20, 20, 30, 26.2)  # IoU 0.62: three of them


def target_of(objects, crowds=()):
    boxes = [*(box for box, _ in objects), *(box for box, _ in crowds)]
    labels = [*(label for _, label in objects), *(label for _, label in crowds)]
    number = len(boxes)
    return Target(
        ImageRecord(1, Path("a.png"), 100, 100),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.ones(number, np.float32) * 100,
        np.arange(number) >= len(objects),
        np.arange(number) + 1,
        (None,) * number,
        np.zeros((number, 0, 3), np.float32),
    )


TWO = target_of([(A, 1), (B, 2)])


def recall(*found, target=TWO):
    boxes = np.array([box for box, _ in found], np.float32).reshape(-1, 4)
    return recall_reward(boxes, np.array([label for _, label in found], np.int64), target)


def precision(*found, target=TWO):
    """Of boxes in descending order of their scores."""
    boxes = np.array([box for box, _ in found], np.float32).reshape(-1, 4)
    scores = np.linspace(1, 0.5, len(found))
    turn = np.random.default_rng(0).permutation(len(found))
    return precision_reward(boxes[turn], np.array([label for _, label in found], np.int64)[turn], scores[turn], target)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], 0.0),
        ([(A, 1)], 1.0),
        ([(B, 2), (A, 1)], 2.0),
        ([(PART_OF_A, 1)], 0.6),
        ([(A, 2)], 0.0),  # another class
        ([(A, 1), (PART_OF_A, 1)], 1 - 0.3 * 0.6),
        ([(PART_OF_A, 1), (A, 1)], 1 - 0.3 * 0.6),  # the better one finds, in any order
        ([(A, 1), (PART_OF_A, 2)], 1.0),  # a duplicate has the same class
        ([(A, 1), (PART_OF_A, 1), (PART_OF_B, 2), ((50, 50, 60, 60), 1)], 1 - 0.18 + 0.3),
        ([(A, 1)] * 4, 1 - 3 * 0.3),
    ],
)
def test_recall_counts_objects_less_duplicates(found, expected):
    assert recall(*found) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], 0.0),
        ([(A, 1)], 0.5),
        ([(A, 1), (B, 2)], 1.0),
        ([(PART_OF_A, 1), (B, 2)], (0.6 * 2 + 0.4 * 0.5) / 2),
        ([((50, 50, 60, 60), 1), (A, 1), (B, 2)], (1 / 2 + 2 / 3) / 2),
        ([(A, 1), ((50, 50, 60, 60), 1), (B, 2)], (1 + 2 / 3) / 2),
        ([(A, 1), (B, 2), ((50, 50, 60, 60), 1)], 1.0),  # what comes after all objects lowers no precision
        ([(A, 1), (A, 1), (B, 2)], (1 + 2 / 3) / 2),
        ([(PART_OF_A, 1), (A, 1)], (0.6 * 1 + 0.4 * 0.5) / 2),  # the surer one takes the object
    ],
)
def test_precision_falls_with_each_false_box_before_an_object(found, expected):
    assert precision(*found) == pytest.approx(expected)


def test_crowds_are_neither_found_nor_missed():
    target = target_of([(A, 1)], crowds=[((50, 50, 90, 90), 1)])
    inside = ((60, 60, 70, 70), 1)
    assert recall(inside, (A, 1), target=target) == 1
    assert precision(inside, (A, 1), target=target) == 1
    assert precision(((60, 60, 70, 70), 2), (A, 1), target=target) == 0.5  # a crowd of another class
    assert true_scores(np.array([inside[0]], np.float32), target)[0].tolist() == [0]
    assert precision((A, 1), target=target_of([])) == recall((A, 1), target=target_of([])) == 0


boxes_of_two_classes = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=6
)


@given(boxes_of_two_classes, boxes_of_two_classes)
def test_precision_of_one_class_is_the_precision_of_pycocotools_at_each_object(true, found):
    """COCO's AP of one image, if precision at each recall is not replaced by the best at a higher one."""
    to_xyxy = lambda boxes: [(x, y, x + w, y + h) for x, y, w, h in boxes]  # noqa: E731
    target = target_of([(box, 1) for box in to_xyxy(true)])
    category = Category(1, 1, "cat")
    scores = np.linspace(1, 0.5, len(found))
    instances = [Instance(box, category, s) for box, s in zip(to_xyxy(found), scores, strict=True)]
    coco = average_precision([target], [category], {1: instances}).metrics
    ours = precision(*((box, 1) for box in to_xyxy(found)), target=target)
    assert ours <= coco["AP"] + 1 / 101 + 1e-9
    assert (ours == 0) == (coco["AR100"] == 0)
    if ours == pytest.approx(1):
        assert coco["AP"] == pytest.approx(1)


def test_a_box_should_have_the_class_and_the_iou_of_the_object_that_it_finds():
    boxes = np.array([PART_OF_A, A, PART_OF_B, (50, 50, 60, 60), (20, 20, 30, 24)], np.float32)
    labels, scores = true_scores(boxes, TWO)
    assert labels.tolist() == [0, 1, 2, 0, 0]  # a duplicate, two finds, a false box, and an IoU of 0.4
    assert scores.tolist() == pytest.approx([0, 1, 0.62, 0, 0])


def test_box_rewards_read_arrays_in_any_memory_order():
    boxes, labels = np.array([A, PART_OF_B], np.float32), np.array([1, 2])
    turned = np.asfortranarray(boxes)
    assert recall_reward(turned, labels, TWO) == recall_reward(boxes, labels, TWO) == pytest.approx(1.3)


def test_mask_iou_of_squares_and_rings_and_beyond_the_input():
    square = lambda x, y, side: np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]], float)  # noqa: E731
    size = (40, 30)
    assert mask_iou([square(0, 0, 10)], [square(5, 0, 10)], size) == pytest.approx(50 / 150)
    assert mask_iou([square(0, 0, 10), square(20, 20, 10)], [square(0, 0, 10)], size) == pytest.approx(0.5)
    assert mask_iou([square(25, 0, 10)], [square(25, 0, 5)], size) == pytest.approx(0.5)  # 5 of 10 columns are inside
    assert mask_iou([square(0, 30, 10)], [square(0, 30, 10)], size) == 1  # 40 rows, 30 columns
    assert mask_iou([], [square(0, 0, 10)], size) == mask_iou([], [], size) == 0


def test_keypoint_similarity_by_hand():
    sigmas, area = np.array([0.05, 0.1, 0.2]), 400.0
    true = np.array([[10, 10, 2], [20, 10, 1], [0, 0, 0]], float)
    moved = true + [[2 * 0.05 * 20, 0, 0], [0, 0, 0], [9, 9, 2]]  # two sigmas of the first, of a side of 20
    assert keypoint_similarity(moved, true, area, sigmas) == pytest.approx((np.exp(-0.5) + 1) / 2)
    assert keypoint_similarity(true * [[1, 1, 1], [1, 1, 0], [1, 1, 1]], true, area, sigmas) == pytest.approx(0.5)
    assert keypoint_similarity(true, true * [1, 1, 0], area, sigmas) == 0


def test_keypoint_similarity_equals_pycocotools():
    rng = np.random.default_rng(0)
    coco = COCOeval(iouType="keypoints")
    for _ in range(20):
        true = np.column_stack([rng.uniform(0, 100, (17, 2)), rng.integers(0, 3, 17)])
        true[0, 2] = 2
        ours = np.column_stack([true[:, :2] + rng.normal(0, 5, (17, 2)), np.full(17, 2)])
        area = rng.uniform(500, 5000)
        entry = {"bbox": [0, 0, 100, 100], "area": area, "num_keypoints": 1}
        coco._gts[1, 1] = [entry | {"keypoints": true.ravel().tolist()}]
        coco._dts[1, 1] = [{"keypoints": ours.ravel().tolist(), "score": 1}]
        expected = coco.computeOks(1, 1)[0, 0]
        assert keypoint_similarity(ours, true, area, coco.params.kpt_oks_sigmas) == pytest.approx(expected)


def coco_captions(shared):
    captions = {}
    for path in (shared / "data/coco_mini/annotations").glob("captions_*.json"):
        for entry in json.loads(path.read_text())["annotations"]:
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
    return captions


def test_cider_is_the_metric_where_the_frequencies_are_those_of_the_scored_captions(shared):
    """The mean over images, against a second implementation and, if it is installed, COCO's scorer."""
    captions = coco_captions(shared)
    references = {i: texts[1:] for i, texts in captions.items()}
    guesses = {i: texts[0] for i, texts in captions.items()}
    cider = CiderD(references.values())
    ours = np.mean([cider(guesses[i], references[i]) for i in references])
    assert ours == pytest.approx(slow_cider_d(references, guesses), abs=1e-9)
    scorer = pytest.importorskip("pycocoevalcap.cider.cider")
    from pix2seq.metrics.captions import caption_words

    plain = lambda text: " ".join(caption_words(text))  # noqa: E731
    theirs, _ = scorer.Cider().compute_score(
        {i: list(map(plain, texts)) for i, texts in references.items()}, {i: [plain(t)] for i, t in guesses.items()}
    )
    assert ours == pytest.approx(theirs)


def test_cider_takes_its_frequencies_from_other_captions():
    cider = CiderD([["a red star", "a star"], ["a blue star"], ["a moon"], ["a heart"]])
    # log(4 / images with the n-gram): a 0, red log 4, star log 2, moon log 4; words of no image are as rare as can be.
    assert cider("a star", ["a star"]) == pytest.approx(10 / 4 * 2)  # no 3-grams and 4-grams
    one, two = np.array([np.log(4), np.log(2)]), np.array([np.log(4), np.log(2)])
    unigrams = one[1] * two[1] / np.linalg.norm(one) / np.linalg.norm(two)  # red star, green star: star is shared
    assert cider("red star", ["green star"]) == pytest.approx(10 / 4 * unigrams)
    assert cider("a star", ["a star", "a moon"]) == pytest.approx(10 / 4 * 2 / 2)
    assert cider("a star", []) == cider("", ["a star"]) == 0
    longer = "a star " * 8
    assert cider(longer.strip(), ["a star"]) < 0.1 * cider("a star", ["a star"])
