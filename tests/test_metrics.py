"""COCO AP: against pycocotools called by hand, a slow second implementation, and the traps it has."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pix2seq.data.formats.coco import read_coco
from pix2seq.data.shapes.person import KEYPOINTS as COCO_POINTS
from pix2seq.metrics.coco_ap import ApMetric, average_precision
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


def coco(result):
    """The numbers that pycocotools has too."""
    return {name: value for name, value in result.metrics.items() if name.startswith(("AP", "AR")) and "@" not in name}


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
    np.testing.assert_allclose(list(coco(ours).values()), evaluation.stats, atol=1e-3)
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


PERSON = Category(4, 40, "person", COCO_POINTS)  # whose tolerances are pycocotools' own
POINTED_CAT = replace(CAT, keypoints=COCO_POINTS)


def scene(rng, image_id, width=200, height=150):
    """A target with boxes, polygons, keypoints and maybe a crowd, and predictions near it."""
    sizes = rng.uniform(8, 110, (4, 2))
    origins = rng.uniform(0, 1, (4, 2)) * ([width, height] - sizes)
    boxes = np.concatenate([origins, origins + sizes], axis=1).astype(np.float32)
    unit = np.array([[0, 0], [1, 0.1], [0.9, 1], [0.2, 0.8]])
    rings = [(unit * size + origin).astype(np.float32) for size, origin in zip(sizes, origins, strict=True)]
    points = np.concatenate([rng.uniform(0, 1, (4, 17, 2)) * sizes[:, None] + origins[:, None],
                             rng.integers(0, 3, (4, 17, 1))], axis=2).astype(np.float32)  # fmt: skip
    points[points[..., 2] == 0] = 0
    points[0, :, 2] = np.minimum(points[0, :, 2], 1)  # nothing of the first is visible
    crowd = np.arange(4) == (3 if image_id % 2 else 4)
    target = Target(
        image=ImageRecord(image_id, None, width, height),
        boxes_xyxy=boxes,
        labels=np.array([4, 4, 1, 4]),
        areas=(sizes.prod(1) * 0.6).astype(np.float32),
        iscrowd=crowd,
        annotation_ids=np.arange(4),
        segmentations=tuple(
            mask_utils.frPyObjects([ring.ravel().tolist()], height, width)[0] if c else [ring]
            for ring, c in zip(rings, crowd, strict=True)
        ),
        keypoints=points,
    )
    predictions = []
    for i in [0, 1, 2, 3, 0]:
        move = rng.normal(0, 0.06, 2) * sizes[i]
        moved = points[i] + [*move, 0]
        moved[:, :2] += rng.normal(0, 0.03, (17, 2)) * sizes[i]
        predictions.append(
            found(
                np.clip(boxes[i] + np.tile(move, 2), 0, [width, height] * 2),
                float(rng.random()),
                CAT if i == 2 else PERSON,
                polygons=[np.clip(rings[i] + move.astype(np.float32), 0, [width, height])],
                keypoints=moved.astype(np.float32),
            )
        )
    return target, predictions


def by_hand(targets, predictions, iou_type):
    """Score by pycocotools, from entries as they stand in COCO's files."""
    annotations, results = [], []
    for target in targets:
        for i, (x0, y0, x1, y1) in enumerate(target.boxes_xyxy.astype(float).tolist()):
            mask = target.segmentations[i]
            annotations.append({
                "id": 1000 + len(annotations), "image_id": target.image.id, "iscrowd": int(target.iscrowd[i]),
                "category_id": {1: 7, 4: 40}[int(target.labels[i])], "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": mask if isinstance(mask, dict) else [ring.ravel().tolist() for ring in mask],
                "area": float(target.areas[i]), "keypoints": target.keypoints[i].ravel().tolist(),
                "num_keypoints": int((target.keypoints[i, :, 2] > 0).sum()),
            })  # fmt: skip
        for instance in predictions[target.image.id]:
            x0, y0, x1, y1 = instance.box_xyxy
            parts = {
                "bbox": {"bbox": [x0, y0, x1 - x0, y1 - y0]},
                "segm": {"segmentation": mask_utils.frPyObjects([instance.polygons[0].ravel().tolist()], 150, 200)[0]},
                "keypoints": {"keypoints": instance.keypoints.ravel().tolist()},
            }
            entry = {"image_id": target.image.id, "category_id": instance.category.id, "score": instance.score}
            results.append(entry | parts[iou_type])
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": t.image.id, "width": 200, "height": 150} for t in targets],
            "annotations": annotations,
            "categories": [{"id": 7, "name": "cat"}, {"id": 40, "name": "person"}],
            "info": {},
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize(("kind", "iou_type"), [("box", "bbox"), ("mask", "segm"), ("keypoint", "keypoints")])
@pytest.mark.parametrize("seed", range(3))
def test_boxes_masks_and_keypoints_score_as_by_pycocotools(kind, iou_type, seed):
    rng = np.random.default_rng(seed)
    scenes = [scene(rng, image_id) for image_id in range(1, 7)]
    targets = [target for target, _ in scenes]
    predictions = {target.image.id: some for target, some in scenes}
    metric, other = (ApMetric([POINTED_CAT, PERSON], kind) for _ in range(2))
    for target in targets:
        (metric if target.image.id < 4 else other).add(target, predictions[target.image.id])
    metric.merge(other)
    ours, theirs = metric.result(), by_hand(targets, predictions, iou_type)
    assert 0.1 < ours.metrics["AP"] < 0.9
    order = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    if kind == "keypoint":
        order = ["AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]
    expected = [None if value == -1 else pytest.approx(value, abs=1e-9) for value in theirs.stats]
    assert coco(ours) == dict(zip(order, expected, strict=True))
    assert ours.num_dropped == 0
    table = ours.per_class.set_index("category")
    precision = theirs.eval["precision"][..., 0, -1]  # (thresholds, recalls, classes) of objects of any size
    for position, name in enumerate(["cat", "person"]):
        assert table.loc[name, "AP"] == pytest.approx(precision[:, :, position].mean())
        assert table.loc[name, "AP50"] == pytest.approx(precision[0, :, position].mean())
    assert table["num_detections"].tolist() == [6, 24]
    labelled = [bool((t.keypoints[i, :, 2] > 0).any()) for t in targets for i in range(4)]
    counted = [not t.iscrowd[i] and (kind != "keypoint" or labelled.pop(0)) for t in targets for i in range(4)]
    assert table["num_ground_truth"].sum() == sum(counted) == 21


@pytest.mark.parametrize(("share", "expected"), [(0.002, 1.0), (0.5, 0.0)])
def test_points_of_any_skeleton_are_judged_by_the_size_of_the_object(share, expected):
    category = Category(1, 7, "cat", ("nose", "ear", "tail"))
    target = target_of([BOX])
    points = np.array([[[20, 20, 1], [40, 30, 1], [30, 50, 1]]], np.float32)  # hidden points count
    object.__setattr__(target, "keypoints", points)
    moved = points[0] + np.array([50 * share, 0, 0], np.float32)
    result = average_precision([target], [category], {1: [found(BOX, keypoints=moved)]}, kind="keypoint")
    assert result.metrics["AP"] == expected


def test_objects_without_labelled_points_or_masks_are_not_looked_for():
    category = Category(1, 7, "cat", ("nose",))
    bare = target_of([BOX, (100, 100, 150, 150)])
    object.__setattr__(bare, "keypoints", np.array([[[0, 0, 0]], [[120, 120, 2]]], np.float32))
    object.__setattr__(bare, "segmentations", (None, [np.array([[100, 100], [150, 100], [150, 150]], np.float32)]))
    one = found((100, 100, 150, 150), keypoints=np.array([[120, 120, 2]], np.float32), polygons=bare.segmentations[1])
    for kind in ("keypoint", "mask"):
        result = average_precision([bare], [category], {1: [one]}, kind=kind)
        assert result.metrics["AP"] == 1.0
        assert result.per_class["num_ground_truth"].tolist() == [1]
    unlabelled = target_of([BOX])
    object.__setattr__(unlabelled, "keypoints", np.zeros((1, 1, 3), np.float32))
    undefined = average_precision([unlabelled], [category], {1: [one]}, kind="keypoint")
    assert set(undefined.metrics.values()) == {None}
    nothing_found = average_precision([bare], [category], {}, kind="keypoint")
    assert set(coco(nothing_found)) == {"AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"}
    assert nothing_found.metrics["AR"] == 0


def test_masks_may_be_run_lengths_and_need_at_least_one_ring_of_three_points():
    mask = np.zeros((200, 200), np.uint8, order="F")
    mask[10:60, 10:60] = 1
    target = target_of([BOX])
    raw = {"size": [200, 200], "counts": [10 * 200 + 10, *[50, 150] * 49, 50, 140 * 200 + 140]}
    for annotation in (mask_utils.encode(mask), raw):
        object.__setattr__(target, "segmentations", (annotation,))
        rings = [np.array([[10, 10], [60, 10], [60, 60], [10, 60]], np.float32), np.array([[0, 0], [9, 9]], np.float32)]
        for form in ({"rle": mask_utils.encode(mask)}, {"polygons": rings}):
            result = average_precision([target], [CAT], {1: [found(BOX, **form)]}, kind="mask")
            assert result.metrics["AP"] == 1.0
    assert average_precision([target], [CAT], {1: [found(BOX, polygons=rings[1:])]}, kind="mask").num_dropped == 1
    triangle = [rings[0][:3]]
    assert average_precision([target], [CAT], {1: [found(BOX, polygons=triangle)]}, kind="mask").num_dropped == 0
    beyond = [rings[0] * [1, 100]]
    assert average_precision([target], [CAT], {1: [found(BOX, polygons=beyond)]}, kind="mask").num_dropped == 0
    points = np.array([[np.nan, 1, 2]], np.float32)
    for missing in (None, points):
        assert (
            average_precision([target], [CAT], {1: [found(BOX, keypoints=missing)]}, kind="keypoint").num_dropped == 1
        )


@pytest.mark.parametrize(
    ("side", "letter"), [(1, "s"), (31.9, "s"), (32, "sm"), (33, "m"), (95, "m"), (96, "ml"), (97, "l"), (199, "l")]
)
def test_without_detections_sizes_that_occur_score_zero_and_others_are_undefined(side, letter):
    metrics = average_precision([target_of([(0, 0, side, side)])], [CAT], {}).metrics
    assert {name[-1] for name in ("APs", "APm", "APl") if metrics[name] == 0.0} == set(letter)
    assert {name[-1] for name in ("ARs", "ARm", "ARl") if metrics[name] is None} == set("sml") - set(letter)


def test_a_box_that_touches_the_image_with_its_border_only_is_dropped():
    for outside in [(200, 10, 220, 60), (10, 200, 60, 220), (-5, 10, 0, 60)]:
        assert average_precision([target_of([BOX])], [CAT], {1: [found(outside)]}).num_dropped == 1
    partly = average_precision([target_of([(150, 150, 200, 200)])], [CAT], {1: [found((150, 150, 260, 290))]})
    assert partly.metrics["AP"] == 1.0  # as far as it lies in the image


def test_the_table_shows_classes_that_occur_or_were_found_in_columns():
    bird = Category(3, 3, "a bird of prey")
    result = average_precision([target_of([BOX])], [CAT, DOG, bird], {1: [found(BOX), found(BOX, 0.5, bird)]})
    lines = result.text().splitlines()
    assert lines[0] == "category        objects  found     AP   AP50     F1  score"
    assert lines[1] == "cat                   1      1  1.000  1.000  1.000  1.000"
    assert lines[2] == "a bird of prey        0      1      -      -      -      -"
    assert lines[3].startswith("AP 1.000  AP50 1.000  AP75 1.000  APs     -  APm 1.000  APl     -  AR1 1.000")
    assert lines[4] == "F1@0.5      1.000  precision 1.000  recall 1.000  threshold 1.000"
    assert result.summary() == "AP 1.000, AP50 1.000"
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["num_dropped"] == 0
    assert content["metrics"]["APs"] is None
    assert content["per_class"][1] == {
        "category": "dog", "num_ground_truth": 0, "num_detections": 0, "AP": None, "AP50": None,
        "F1@0.5": None, "precision@0.5": None, "recall@0.5": None, "threshold@0.5": None,
    }  # fmt: skip
