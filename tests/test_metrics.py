"""COCO AP: against pycocotools called by hand, a slow second implementation, and the traps it has."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pix2seq.data.formats.coco import read_coco
from pix2seq.metrics.coco_ap import average_precision
from pix2seq.types import Category, ImageRecord, Instance, Target

CAT, DOG = Category(1, 7, "cat"), Category(2, 9, "dog")


def target_of(boxes, labels=None, *, image_id=1, crowd=None, ids=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    count = len(boxes)
    return Target(
        image=ImageRecord(image_id, None, 200, 200),
        boxes_xyxy=boxes,
        labels=np.array(labels if labels is not None else [1] * count, np.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        iscrowd=np.array(crowd if crowd is not None else [False] * count),
        annotation_ids=np.array(ids if ids is not None else range(count), np.int64),
        segmentations=(None,) * count,
        keypoints=np.zeros((count, 0, 3), np.float32),
    )


def found(box, score=1.0, category=CAT, **more):
    return Instance(tuple(map(float, box)), category, score, **more)


BOX = (10, 10, 60, 60)


def jittered(dataset, rng):
    """Ground truth moved about, with misses, doubles and wrong classes."""
    by_label = {category.label: category for category in dataset.categories}
    predictions = {}
    for index in range(len(dataset)):
        target = dataset.target(index)
        predictions[target.image.id] = []
        for box, label in zip(target.boxes_xyxy, target.labels.tolist(), strict=True):
            for _ in range(int(rng.integers(0, 3))):
                size = np.tile(box[2:] - box[:2], 2)
                moved = np.clip(box + size * rng.normal(0, 0.08, 4), 0, [target.image.width, target.image.height] * 2)
                if rng.random() < 0.1:
                    label = int(rng.choice(list(by_label)))
                if (moved[2:] > moved[:2]).all():
                    predictions[target.image.id].append(found(moved, rng.random(), by_label[label]))
    return predictions


def test_all_twelve_numbers_equal_pycocotools(shared):
    root = shared / "data/coco_mini"
    dataset = read_coco(root, "val")
    predictions = jittered(dataset, np.random.default_rng(0))
    results = [
        {
            "image_id": i,
            "category_id": p.category.id,
            "score": p.score,
            "bbox": [p.box_xyxy[0], p.box_xyxy[1], p.box_xyxy[2] - p.box_xyxy[0], p.box_xyxy[3] - p.box_xyxy[1]],
        }
        for i, instances in predictions.items()
        for p in instances
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(root / "annotations/instances_val2017.json")
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ours = average_precision([dataset.target(i) for i in range(len(dataset))], dataset.categories, predictions)
    assert 0.1 < ours.metrics["AP"] < 0.9
    np.testing.assert_allclose(list(ours.metrics.values()), evaluation.stats, atol=1e-3)
    assert ours.num_dropped == 0


def slow_ap(truths, detections, threshold):
    """Average precision of one class by the textbook: greedy matches, 101 recall levels."""
    matched, hits = set(), []
    for image, box, _ in sorted(detections, key=lambda d: -d[2]):
        best, best_overlap = None, threshold
        for index, (other_image, other) in enumerate(truths):
            if other_image != image or index in matched:
                continue
            w = min(box[2], other[2]) - max(box[0], other[0])
            h = min(box[3], other[3]) - max(box[1], other[1])
            inter = max(w, 0) * max(h, 0)
            area = lambda b: (b[2] - b[0]) * (b[3] - b[1])  # noqa: E731
            overlap = inter / (area(box) + area(other) - inter)
            if overlap >= best_overlap:
                best, best_overlap = index, overlap
        hits.append(best is not None)
        matched |= {best} - {None}
    precision = [sum(hits[: k + 1]) / (k + 1) for k in range(len(hits))]
    recall = [sum(hits[: k + 1]) / len(truths) for k in range(len(hits))]
    levels = np.linspace(0, 1, 101)  # COCO's own: 0.7 is a hair more than 7 of 10
    return (
        sum(max((p for p, r in zip(precision, recall, strict=True) if r >= level), default=0) for level in levels) / 101
    )


@pytest.mark.parametrize("seed", range(8))
def test_random_cases_equal_a_slow_second_implementation(seed):
    rng = np.random.default_rng(seed)
    targets, predictions, truths, detections = [], {}, [], []
    for image_id in range(1, 5):
        corners = rng.uniform(0, 140, (int(rng.integers(1, 5)), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(20, 60, corners.shape)], axis=1).astype(np.float32)
        targets.append(target_of(boxes, image_id=image_id))
        truths += [(image_id, box.tolist()) for box in boxes]
        predictions[image_id] = []
        for box in boxes.tolist() + rng.permutation(boxes)[:1].tolist():
            moved = np.clip(np.array(box) + rng.normal(0, 6, 4), 0, 200)
            score = float(rng.random())
            predictions[image_id].append(found(moved, score))
            detections.append((image_id, moved.tolist(), score))
    ours = average_precision(targets, [CAT], predictions).metrics
    expected = [slow_ap(truths, detections, threshold) for threshold in np.arange(0.5, 1.0, 0.05)]
    assert ours["AP50"] == pytest.approx(expected[0], abs=1e-9)
    assert ours["AP"] == pytest.approx(np.mean(expected), abs=1e-9)


def test_perfect_predictions_score_one_with_annotation_id_zero():
    targets = [target_of([BOX, (70, 70, 90, 90)], [1, 2], ids=[0, 1]), target_of([BOX], image_id=2, ids=[5])]
    predictions = {1: [found(BOX), found((70, 70, 90, 90), 0.9, DOG)], 2: [found(BOX, 0.8)]}
    result = average_precision(targets, [CAT, DOG], predictions)
    assert result.metrics["AP"] == result.metrics["AP50"] == result.metrics["AR100"] == 1.0
    assert result.per_class["AP"].tolist() == [1.0, 1.0]


def test_nothing_found_is_zero_and_nothing_there_is_undefined():
    nothing_found = average_precision([target_of([BOX])], [CAT], {})
    assert nothing_found.metrics["AP"] == 0.0
    assert nothing_found.metrics["APl"] is None  # there is no large object
    assert nothing_found.metrics["APm"] == 0.0
    nothing_there = average_precision([target_of([])], [CAT], {1: [found(BOX)]})
    assert set(nothing_there.metrics.values()) == {None}
    assert average_precision([], [], {}).metrics["AP"] is None
    json.dumps(nothing_there.to_json(), allow_nan=False)
    assert "undefined" not in nothing_there.text()


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong():
    crowd = target_of([BOX, (100, 100, 190, 190)], crowd=[False, True])
    inside_crowd = [found((110, 110, 130, 130), 0.99), found((150, 150, 170, 170), 0.98)]
    result = average_precision([crowd], [CAT], {1: [found(BOX, 0.5), *inside_crowd]})
    assert result.metrics["AP"] == 1.0
    only_crowd = average_precision([target_of([BOX], crowd=[True])], [CAT], {1: [found(BOX)]})
    assert only_crowd.metrics["AP"] is None


def test_a_difficult_object_is_ignored_once_and_by_its_iou():
    target = target_of([BOX, (100, 100, 190, 190)], crowd=[False, True])
    object.__setattr__(target, "difficult", np.array([False, True]))
    exact, part = found((100, 100, 190, 190), 0.9), found((110, 110, 130, 130), 0.8)
    result = average_precision([target], [CAT], {1: [found(BOX, 0.5), exact]})
    assert result.metrics["AP"] == 1.0
    assert result.num_ignored == result.to_json()["num_ignored"] == 1
    assert result.per_class["num_ground_truth"].tolist() == [1]
    # A part of the object, and a second detection of it, are wrong: one right of two, found second.
    for wrong in ([part], [exact, found((100, 100, 190, 190), 0.8)]):
        assert average_precision([target], [CAT], {1: [found(BOX, 0.5), *wrong]}).metrics["AP50"] == 0.5
    only = target_of([BOX], crowd=[True])
    object.__setattr__(only, "difficult", np.array([True]))
    assert average_precision([only], [CAT], {1: [found(BOX)]}).metrics["AP"] is None


def test_an_object_without_a_mask_is_ignored_for_mask_ap_and_counted():
    ring = np.array([[10, 10], [60, 10], [60, 60], [10, 60]], np.float32)
    target = target_of([BOX, (100, 100, 190, 190)])
    object.__setattr__(target, "segmentations", ([ring], None))
    inside = np.array([[100, 100], [190, 100], [190, 190], [100, 190]], np.float32)
    answers = {1: [found(BOX, 0.5, polygons=[ring]), found((100, 100, 190, 190), 0.9, polygons=[inside])]}
    result = average_precision([target], [CAT], answers, kind="mask")
    assert result.metrics["AP"] == 1.0
    assert result.num_ignored == 1
    assert "1 objects ignored" in result.text()
    assert average_precision([target], [CAT], answers).num_ignored == 0


def test_unusable_detections_are_dropped_and_counted():
    bad = [found((np.nan, 0, 1, 1)), found((1e9, 1e9, 2e9, 2e9)), found((5, 5, 5, 9)), found(BOX, float("nan"))]
    bad.append(found(BOX, 1.0, Category(5, 5, "unicorn")))
    result = average_precision([target_of([BOX])], [CAT], {1: [found(BOX, 0.5), *bad], 99: [found(BOX)]})
    assert result.num_dropped == 6
    assert result.metrics["AP"] == 1.0


def test_classes_are_matched_by_name_not_by_id():
    result = average_precision([target_of([BOX])], [CAT], {1: [found(BOX, category=Category(44, 55, "cat"))]})
    assert result.metrics["AP"] == 1.0


def test_polygons_with_wild_numbers_do_not_end_the_process():
    ring = np.array([[10, 10], [60, 10], [60, 60], [10, 60]], np.float32)
    target = target_of([BOX])
    object.__setattr__(target, "segmentations", ([ring],))
    wild = [ring * np.nan, ring * 1e9]
    predictions = {1: [found(BOX, 0.9, polygons=[ring]), *(found(BOX, 0.1, polygons=[r]) for r in wild)]}
    result = average_precision([target], [CAT], predictions, kind="mask")
    assert result.metrics["AP"] == 1.0
    assert result.num_dropped == 1
