"""Skeletons: sides found by name, points joined by name, and OKS by name, for classes of several skeletons.

Expected values are worked by hand, made by construction, or come from pycocotools and a slow OKS.
"""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pix2seq.cli import main
from pix2seq.data.dataset import ClassMap, open_dataset, unite_categories
from pix2seq.data.samples import SharedTrainingSet, TrainingSet
from pix2seq.data.shapes.person import KEYPOINTS as COCO_POINTS
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError
from pix2seq.geometry.keypoints import find_points, mirror_order, point_key
from pix2seq.metrics.coco_ap import average_precision, keypoint_sigmas
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.tasks.keypoint import Keypoint, KeypointConfig
from pix2seq.tokenizers.keypoint import decode_keypoints
from pix2seq.training.config import load_config
from pix2seq.training.recipe import prepare
from pix2seq.types import Category, ImageRecord, Instance, Target
from pix2seq.vocab import Vocab

VOCAB = Vocab(num_bins=64, size=1064)
HAND = Category(1, 1, "hand", ("thumb", "left_tip", "right_tip"))
DOG = Category(2, 2, "dog", ("nose", "tail"))
SIZE = (64, 64)


# Sides -------------------------------------------------------------------------------------------------------------

STYLES = {
    "left_eye": "{side}_{part}",
    "eye_left": "{part}_{side}",
    "LeftEye": "{Side}{Part}",
    "eyeLeft": "{part}{Side}",
    "l_eye": "{letter}_{part}",
    "eye_l": "{part}_{letter}",
    "LEye": "{Letter}{Part}",
    "left-eye": "{side}-{part}",
    "Left Eye": "{Side} {Part}",
    "LEFT_EYE": "{SIDE}_{PART}",
    "lefteye": "{side}{part}",
    "L.eye": "{Letter}.{part}",
    "lt eye": "{letter}t {part}",
}
PARTS = ["eye", "ear", "hip", "ankle", "front paw", "wing2"]


def spelled(style, side, part):
    """A point's name in one of the usual spellings; a part of two words is spelled likewise."""
    template = STYLES[style]
    joint = next((mark for mark in "_-." if mark in template), " ")
    words = part.split()
    camel = "".join(word.capitalize() for word in words)
    forms = {"Side": side.capitalize(), "SIDE": side.upper(), "letter": side[0], "Letter": side[0].upper()}
    return template.format(side=side, part=joint.join(words), Part=camel, PART=joint.join(words).upper(), **forms)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("part", ["eye", "knee"])
def test_usual_spellings_say_the_side(style, part):
    assert point_key(spelled(style, "left", part)) == ("left", part)
    assert point_key(spelled(style, "right", part)) == ("right", part)


@given(st.sampled_from(list(STYLES)), st.permutations([(s, p) for p in PARTS for s in ("left", "right", "")]))
def test_left_and_right_swap_in_any_spelling_and_order(style, points):
    names = [spelled(style, side, part) if side else f"middle {part[:3]}" for side, part in points]
    other = {"left": "right", "right": "left", "": ""}
    expected = [points.index((other[side], part)) for side, part in points]
    assert mirror_order(names, []).tolist() == expected
    assert mirror_order([name for name in names if "middle" not in name]) is not None


@pytest.mark.parametrize(
    "names",
    [
        ["front", "back"],  # may be sides of another language
        ["oeil gauche", "oeil droit", "nez"],
        ["1", "2", "3"],
        [f"kp_{i}" for i in range(17)],
        ["left_eye", "right_eye", "face-1", "face-2"],  # the face may have sides too
        ["left_eye", "nose"],  # no right eye
        ["left_eye", "right_eye", "left_ear"],
        ["left_eye", "eye_left", "right_eye"],
        ["k", "l", "m", "r"],  # letters of the alphabet
    ],
)
def test_names_that_leave_sides_open_give_no_order(names):
    assert mirror_order(names) is None
    if len(set(map(point_key, names))) == len(names):
        assert sorted(mirror_order(names, []).tolist()) == list(range(len(names)))
    else:
        with pytest.raises(ValueError, match="one partner each"):
            mirror_order(names, [])


def test_pairs_go_over_names():
    assert mirror_order(["nose"]).tolist() == [0]
    assert mirror_order(["bright", "upright", "left_eye", "right_eye"]).tolist() == [0, 1, 3, 2]
    names = ["a", "b", "left_eye", "right_eye", "c"]
    assert mirror_order(names, [("A", "c")]).tolist() == [4, 1, 3, 2, 0]
    assert mirror_order(names, [("left_eye", "a")]).tolist() == [2, 1, 0, 3, 4]
    assert mirror_order(names, [("x", "y")]).tolist() == [0, 1, 3, 2, 4]  # of another class
    with pytest.raises(ValueError, match="one partner each"):
        mirror_order(names, [("a", "b"), ("b", "c")])
    with pytest.raises(ValueError, match="'z' is not among the points a, b"):
        mirror_order(names, [("a", "z")])
    with pytest.raises(ValueError, match="'z' is not among the points a, b"):
        mirror_order(names, [("z", "a")])


@given(st.permutations(range(6)), st.integers(0, 6))
def test_points_are_found_by_name_in_any_order(order, count):
    names = ["nose", "left_eye", "right_eye", "left_ear", "right_ear", "tail"]
    theirs = [names[i].replace("left_", "L ").replace("right_", "R ").title() for i in order][:count]
    found = find_points(names, theirs)
    assert [theirs[i] if i >= 0 else None for i in found] == [
        next((name for name, number in zip(theirs, order, strict=False) if number == i), None) for i in range(6)
    ]


# Reading and training ----------------------------------------------------------------------------------------------


def write_pets(root, *, hand=HAND, dog=DOG, split="train", num_images=4, **of_dog):
    """Write images of 60 x 40 with a hand in the left half and a dog in the right one, each with points."""
    points = {
        "thumb": (4, 30, 2), "left_tip": (6, 10, 2), "right_tip": (20, 12, 1), "nose": (40, 10, 2), "tail": (55, 35, 2)
    }  # fmt: skip
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(1, num_images + 1):
        Image.new("RGB", (60, 40), (200, 20 * number, 0)).save(root / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 60, "height": 40})
        for category, box in ((hand, [2, 5, 25, 30]), (dog, [35, 5, 22, 32])):
            flat = [value for name in category.keypoints for value in points[name]]
            fields = {"image_id": number, "category_id": category.id, "bbox": box, "keypoints": flat}
            annotations.append({"id": len(annotations) + 1, **fields})
    categories = [
        {"id": hand.id, "name": hand.name, "keypoints": list(hand.keypoints)},
        {"id": dog.id, "name": dog.name, "keypoints": list(dog.keypoints), **of_dog},
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"person_keypoints_{split}.json").write_text(json.dumps(content))
    return root


def test_every_class_is_read_with_its_own_points(tmp_path):
    root = write_pets(tmp_path, flip_pairs=[["nose", "tail"]])
    dataset = open_dataset(root, "train")
    target = dataset.target(0)
    assert target.keypoints[0].tolist() == [[4, 30, 2], [6, 10, 2], [20, 12, 1]]
    assert target.keypoints[1].tolist() == [[40, 10, 2], [55, 35, 2], [0, 0, 0]]
    assert [category.flip_pairs for category in dataset.categories] == [None, (("nose", "tail"),)]
    assert [Category.from_json(json.loads(json.dumps(c.to_json()))) for c in dataset.categories] == [
        *dataset.categories
    ]
    file = root / "annotations/person_keypoints_train.json"
    content = json.loads(file.read_text())
    content["annotations"][1]["keypoints"] += [1, 1, 2]  # a dog with the points of a hand
    file.write_text(json.dumps(content))
    dataset = open_dataset(root, "train")
    assert dataset.defects[["annotation_id", "detail"]].to_numpy().tolist() == [[2, "expected 6 numbers"]]
    assert not dataset.target(0).keypoints[1].any()
    content["categories"][1]["flip_pairs"] = [[1, 2]]  # numbers count from 0 for some tools, from 1 for others
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="pairs of names"):
        open_dataset(root, "train")


def answers(dataset, config=None, *, categories=None, augment=None, **settings):
    """The points (K, 2) as x, y in pixels that each sample teaches, by class name; only those that are labelled."""
    categories = categories or dataset.categories
    task = Keypoint(KeypointConfig(mask_inputs=False, **settings), VOCAB, categories)
    augment = augment or AugmentConfig(scale_min=1.0, scale_max=1.0, flip=1.0)
    classes = ClassMap(dataset.categories, categories)
    samples = TrainingSet(dataset, task, size=SIZE, augment=augment, seed=0, classes=classes)
    found = {}
    for number in range(len(samples)):
        for example in samples[0, number].examples["keypoint"]:
            category = task.categories[int(example.prompt[5]) - 100]
            points, given = decode_keypoints(example.targets, len(category.keypoints), VOCAB)
            box = VOCAB.coords(example.prompt[1:5])
            names = [name for name, labelled in zip(category.keypoints, given, strict=True) if labelled]
            found[category.name] = (dict(zip(names, points[given][:, ::-1] * 64, strict=True)), box * 64)
    return found, samples.maker


def test_a_flip_swaps_the_sides_of_a_class_and_leaves_one_without_sides_alone(tmp_path):
    dataset = open_dataset(write_pets(tmp_path), "train")
    plain, _ = answers(dataset, augment=AugmentConfig(enabled=False), crop_padding=0)
    flipped, maker = answers(dataset, crop_padding=0)
    assert maker.unflipped == {2: "dog"}
    upright, mirrored = plain["hand"][0], flipped["hand"][0]
    width = 26 / 31 * 64  # the crop, 26 x 31 pixels, fits by its height
    for name, partner in (("left_tip", "right_tip"), ("right_tip", "left_tip"), ("thumb", "thumb")):
        np.testing.assert_allclose(mirrored[name][0], width - upright[partner][0], atol=2.1)
        np.testing.assert_allclose(mirrored[name][1], upright[partner][1], atol=2.1)
    for name, point in plain["dog"][0].items():
        np.testing.assert_allclose(flipped["dog"][0][name], point, atol=1.1)


@pytest.mark.parametrize("pairs", [(("nose", "tail"),), ()])
@pytest.mark.parametrize("where", ["settings", "file", "settings over file"])
def test_pairs_let_a_class_flip(tmp_path, pairs, where):
    of_file = {"file": pairs, "settings": None, "settings over file": [] if pairs else [["nose", "tail"]]}[where]
    dataset = open_dataset(write_pets(tmp_path, flip_pairs=of_file), "train")
    of_settings = None if where == "file" else pairs
    augment = AugmentConfig(scale_min=1.0, scale_max=1.0, flip=1.0, flip_pairs=of_settings)
    found, maker = answers(dataset, augment=augment, crop=False)
    assert maker.unflipped == {}
    # The image, 60 x 40, fills the width of 64 pixels: the dog's nose at 40 and tail at 55 come to 20 and 5.
    x = {name: point[0] * 60 / 64 for name, point in found["dog"][0].items()}
    assert x["nose"] == pytest.approx(5 if pairs else 20, abs=1)
    assert x["tail"] == pytest.approx(20 if pairs else 5, abs=1)
    assert found["hand"][0]["left_tip"][0] * 60 / 64 == pytest.approx(40, abs=1)  # right_tip was at 20


def test_whole_images_with_points_of_unknown_sides_are_not_flipped(tmp_path):
    dataset = open_dataset(write_pets(tmp_path), "train")
    found, _ = answers(dataset, crop=False)
    assert found["dog"][0]["nose"][0] * 60 / 64 == pytest.approx(40, abs=1)
    assert found["hand"][0]["left_tip"][0] * 60 / 64 == pytest.approx(6, abs=1)
    # Nobody learns points here, so that flips are harmless.
    task = Detection(DetectionConfig(noise_objects=0, order="corner"), VOCAB, dataset.categories)
    augment = AugmentConfig(scale_min=1.0, scale_max=1.0, flip=1.0)
    samples = SharedTrainingSet(dataset, [task], size=SIZE, augment=augment, seed=0)
    assert samples.maker.unflipped == {}
    (example,) = samples[0, 0].examples["detection"]
    assert VOCAB.coords(example.targets[[1]])[0] * 60 == pytest.approx(3, abs=1)  # the dog's right edge was at 57


def test_a_point_of_a_crop_is_where_it_is_in_the_image(tmp_path):
    dataset = open_dataset(write_pets(tmp_path), "train")
    found, _ = answers(dataset, augment=AugmentConfig(enabled=False), crop_padding=0.5)
    points, (y0, x0, y1, x1) = found["dog"]
    # The box 35, 5 to 57, 37 has 22 x 32 pixels, the points are given in the image.
    for name, (x, y) in (("nose", (40, 10)), ("tail", (55, 35))):
        assert (points[name][0] - x0) / (x1 - x0) == pytest.approx((x - 35) / 22, abs=0.06)
        assert (points[name][1] - y0) / (y1 - y0) == pytest.approx((y - 5) / 32, abs=0.06)


def test_points_of_a_data_set_are_brought_to_the_order_of_the_model(tmp_path):
    hand = replace(HAND, label=7, keypoints=("Right Tip", "wrist", "thumb", "L tip"))
    ours = (replace(DOG, label=5, keypoints=("Tail", "left_ear", "Nose")), hand)
    dataset = open_dataset(write_pets(tmp_path), "train")
    classes = ClassMap(dataset.categories, ours)
    assert [category.name for category in classes.categories] == ["hand", "dog"]
    target = classes.to_model(dataset.target(0))
    assert target.labels.tolist() == [7, 5]
    assert target.keypoints[1].tolist() == [[55, 35, 2], [0, 0, 0], [40, 10, 2], [0, 0, 0]]
    assert target.keypoints[0].tolist() == [[20, 12, 1], [0, 0, 0], [4, 30, 2], [6, 10, 2]]
    found, _ = answers(dataset, categories=ours, augment=AugmentConfig(enabled=False), crop=False)
    assert set(found["dog"][0]) == {"Tail", "Nose"}
    assert found["dog"][0]["Nose"][0] * 60 / 64 == pytest.approx(40, abs=1)
    with pytest.raises(InputError, match="does not know these keypoints of 'dog': nose; it knows tail"):
        ClassMap(dataset.categories, [HAND, replace(DOG, keypoints=("tail",))])
    without = ClassMap(dataset.categories, [replace(HAND, keypoints=()), replace(DOG, keypoints=())])
    assert without.to_model(dataset.target(0)).keypoints.shape == (2, 0, 3)


def test_data_sets_of_one_class_may_order_and_spell_its_points_in_their_own_way():
    other = replace(HAND, keypoints=("R tip", "thumb", "L tip"))
    assert unite_categories([[HAND], [other]]) == (HAND,)
    fewer = replace(HAND, keypoints=("thumb", "left_tip"))
    for pair in ((HAND, fewer), (fewer, HAND)):
        with pytest.raises(InputError, match="different keypoints for 'hand'"):
            unite_categories([[category] for category in pair])


# Scores ------------------------------------------------------------------------------------------------------------


def target_of(categories, objects, *, image_id=1, width=200, height=100):
    """A target of objects (category index, box, points (k, 3), crowd)."""
    most = max(len(category.keypoints) for category in categories)
    keypoints = np.zeros((len(objects), most, 3), np.float32)
    for i, (_, _, points, _) in enumerate(objects):
        keypoints[i, : len(points)] = points
    boxes = np.array([box for _, box, _, _ in objects], np.float32).reshape(-1, 4)
    return Target(
        image=ImageRecord(image_id, None, width, height),
        boxes_xyxy=boxes,
        labels=np.array([categories[index].label for index, _, _, _ in objects]),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) * 0.6,
        iscrowd=np.array([crowd for _, _, _, crowd in objects], bool),
        annotation_ids=np.arange(len(objects)),
        segmentations=(None,) * len(objects),
        keypoints=keypoints,
    )


def slow_oks(points, found, area, sigmas):
    """OKS as defined: the mean over labelled points, hidden ones included, of exp(-d^2 / (2 s^2 k^2)), k = 2 sigma."""
    values = [
        np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * area * (2 * sigma) ** 2))
        for (x, y, flag), (u, v, _), sigma in zip(points, found, sigmas, strict=True)
        if flag > 0
    ]
    return sum(values) / len(values)


ONE = (Category(1, 1, "one", ("left_hip", "nose", "knob")), Category(2, 2, "two", ("right_eye", "left_wrist")))


def test_tolerances_go_by_the_names_of_points():
    seventeen = [0.026] + [s for s in (0.025, 0.035, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089) for _ in range(2)]
    np.testing.assert_allclose(keypoint_sigmas(COCO_POINTS), seventeen)
    np.testing.assert_allclose(keypoint_sigmas(COCO_POINTS[::-1]), seventeen[::-1])
    names = [f"p{i}" for i in range(17)]
    np.testing.assert_allclose(keypoint_sigmas(names), np.full(17, sum(seventeen) / 17))
    given = {"paw": 0.5, "LeftEye": 0.3, "p1": 0.7}
    found = keypoint_sigmas(["left_paw", "right paw", "left_eye", "right_eye", "p1"], given)
    np.testing.assert_allclose(found, [0.5, 0.5, 0.3, 0.025, 0.7])


@pytest.mark.parametrize("seed", range(6))
def test_two_skeletons_score_as_a_slow_oks_says(seed):
    rng = np.random.default_rng(seed)
    knob = (0.026 + 2 * (0.025 + 0.035 + 0.079 + 0.072 + 0.062 + 0.107 + 0.087 + 0.089)) / 17
    sigmas = ((0.107, 0.026, knob), (0.025, 0.062))
    targets, predictions, oks = [], {}, ([], [])
    for image_id in range(1, 9):
        objects, predictions[image_id] = [], []
        for index, category in enumerate(ONE):
            box = np.array([10 + 90 * index, 10, 80 + 90 * index, 90.0])
            points = np.column_stack(
                [
                    rng.uniform(box[:2], box[2:], (len(category.keypoints), 2)),
                    rng.integers(0, 3, len(category.keypoints)),
                ]
            )
            points[0, 2] = rng.integers(1, 3)
            objects.append((index, box, points, False))
            moved = points + np.append(rng.normal(0, 6, 2), 0)
            predictions[image_id].append(
                Instance(tuple(box), category, float(rng.random()), keypoints=moved.astype(np.float32))
            )
        targets.append(target_of(ONE, objects, image_id=image_id))
        for index, (_, _, points, _) in enumerate(objects):
            instance = predictions[image_id][index]
            value = slow_oks(points, instance.keypoints, float(targets[-1].areas[index]), sigmas[index])
            oks[index].append((instance.score, value))
    result = average_precision(targets, ONE, predictions, kind="keypoint")
    assert result.num_dropped == 0
    for index in range(2):
        expected = [ap_of_one_each(oks[index], threshold) for threshold in np.arange(0.5, 1.0, 0.05)]
        assert result.per_class["AP"][index] == pytest.approx(np.mean(expected), abs=1e-6)
        assert result.per_class["AP50"][index] == pytest.approx(expected[0], abs=1e-6)


def ap_of_one_each(oks, threshold):
    """Average precision where every image has one object and one detection: (score, OKS) of each."""
    hits = [value >= threshold for _, value in sorted(oks, key=lambda pair: -pair[0])]
    precision = [sum(hits[: k + 1]) / (k + 1) for k in range(len(hits))]
    recall = [sum(hits[: k + 1]) / len(hits) for k in range(len(hits))]
    levels = np.linspace(0, 1, 101)
    return (
        sum(max((p for p, r in zip(precision, recall, strict=True) if r >= level), default=0) for level in levels) / 101
    )


@pytest.mark.parametrize("order", [range(17), range(16, -1, -1)])
def test_a_person_scores_as_pycocotools_says_in_any_order_of_points(order):
    rng = np.random.default_rng(0)
    truth, results = [], []
    targets, predictions = [], {}
    person = Category(1, 1, "person", tuple(COCO_POINTS[i] for i in order))
    for image_id in range(1, 13):
        box = np.array([20, 10, 120, 90.0])
        points = np.column_stack([rng.uniform(box[:2], box[2:], (17, 2)), rng.integers(0, 3, 17)])
        moved = points + np.column_stack([rng.normal(0, 4, (17, 2)), np.zeros(17)])
        target = target_of([person], [(0, box, points[list(order)], False)], image_id=image_id)
        targets.append(target)
        score = float(rng.random())
        predictions[image_id] = [Instance(tuple(box), person, score, keypoints=moved[list(order)].astype(np.float32))]
        xywh = [20, 10, 100, 80]
        flat = points.astype(np.float32).astype(float).ravel().tolist()
        fields = {"image_id": image_id, "category_id": 1, "bbox": xywh}
        area = float(target.areas[0])
        truth.append({"id": image_id, "area": area, "iscrowd": 0, "num_keypoints": 9, "keypoints": flat, **fields})
        results.append({"score": score, "keypoints": moved.astype(np.float32).astype(float).ravel().tolist(), **fields})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {}, "images": [{"id": i, "width": 200, "height": 100} for i in range(1, 13)], "annotations": truth,
            "categories": [{"id": 1, "name": "person"}],
        }  # fmt: skip
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ours = average_precision(targets, [person], predictions, kind="keypoint").metrics
    assert 0.05 < ours["AP"] < 0.95
    expected = [None if value < 0 else pytest.approx(value, abs=1e-9) for value in evaluation.stats]
    assert list(ours.values())[: len(expected)] == expected


def test_crowds_and_objects_without_points_are_neither_found_nor_missed():
    points = [[20, 20, 2], [30, 30, 1], [40, 40, 2]]
    objects = [
        (0, [10, 10, 90, 90], points, False),
        (0, [110, 10, 190, 90], [[0, 0, 0]] * 3, False),
        (1, [10, 10, 90, 90], [[20, 20, 2], [30, 30, 2]], True),
    ]
    target = target_of(ONE, objects)
    right = Instance((10, 10, 90, 90), ONE[0], 0.5, keypoints=np.array(points, np.float32))
    short = Instance((10, 10, 90, 90), ONE[0], 0.9, keypoints=np.array(points[:2], np.float32))
    result = average_precision([target], ONE, {1: [right, short]}, kind="keypoint")
    assert result.metrics["AP"] == 1.0
    assert result.per_class["num_ground_truth"].tolist() == [1, 0]
    assert result.num_dropped == 1
    task = Keypoint(KeypointConfig(), VOCAB, ONE)
    assert task.samples(target) == [0]
    assert [instance.box_xyxy for instance in task.questions(target, None)["true_boxes"]] == [
        (10, 10, 90, 90), (110, 10, 190, 90)
    ]  # fmt: skip
    detection = Detection(DetectionConfig(noise_objects=0, class_corruption="none"), VOCAB, ONE)
    (example,) = detection.examples(target, (100, 200), np.random.default_rng(0))
    assert sorted(example.targets[4::5].tolist()) == [101, 101]


def test_classes_are_one_in_any_case():
    target = target_of(ONE, [(0, [10, 10, 90, 90], [[20, 20, 2]] * 3, False)])
    shouted = replace(ONE[0], name=" ONE")
    found = Instance((10, 10, 90, 90), shouted, 0.5)
    result = average_precision([target], ONE, {1: [found]})
    assert result.metrics["AP"] == 1.0
    assert result.num_dropped == 0
    assert result.per_class["category"].tolist() == ["one", "two"]


def test_sigmas_are_a_setting_and_a_wrong_name_is_refused():
    config = load_config(None, ["keypoint.sigmas.knob=0.5", "keypoint.sigmas={eye: 0.1}"], tasks=["keypoint"])
    assert config.keypoint.sigmas == {"knob": 0.5, "eye": 0.1}
    task = Keypoint(config.keypoint, VOCAB, ONE)
    assert task.metric(ONE).sigmas == config.keypoint.sigmas
    assert Keypoint(KeypointConfig(**task.settings()), VOCAB, ONE).config == task.config
    target = target_of(ONE, [(0, [10, 10, 90, 90], [[20, 20, 2], [30, 30, 2], [40, 40, 2]], False)])
    far = np.array([[20, 20, 2], [30, 30, 2], [40, 70, 2]], np.float32)

    def ap(task):
        metric = task.metric(ONE)
        metric.add(target, [Instance((10, 10, 90, 90), ONE[0], 0.5, keypoints=far)])
        return metric.result().metrics["AP"]

    assert ap(task) == 1.0
    assert ap(Keypoint(KeypointConfig(), VOCAB, ONE)) < 0.5
    with pytest.raises(InputError, match="'knop'; did you mean 'knob'"):
        Keypoint(KeypointConfig(sigmas={"knop": 0.5}), VOCAB, ONE)


# From data to scores -----------------------------------------------------------------------------------------------

TINY = [
    "steps=2", "batch_size=2", "num_workers=0", "trackers=[]", "bf16=false", "device=cpu", "model.image_size=[32,32]",
    "model.encoder.name=vit", "model.encoder.dim=16", "model.encoder.num_layers=1", "model.encoder.num_heads=2",
    "model.encoder.mlp_dim=16", "model.decoder.dim=16", "model.decoder.num_layers=1", "model.decoder.num_heads=2",
    "model.decoder.mlp_dim=16", "model.decoder.max_seq_len=32", "model.vocab.num_bins=32", "model.vocab.size=1040",
]  # fmt: skip


def test_two_skeletons_train_evaluate_and_predict_and_a_validation_set_may_order_them_anew(tmp_path, capsys):
    data, out = write_pets(tmp_path / "pets"), tmp_path / "run"
    turned = replace(HAND, id=9, keypoints=("right_tip", "thumb", "left_tip")), replace(DOG, id=4, name="Dog ")
    write_pets(data, split="val", hand=turned[0], dog=turned[1], num_images=2)
    assert main(["train", "--task", "keypoint", f"data={data}", f"out={out}", *TINY]) == 0
    assert "images with keypoints of 'dog' are not flipped" in capsys.readouterr().err
    assert main(["eval", "--checkpoint", str(out), "--data", str(data), "--out", str(tmp_path / "m.json")]) == 0
    (score,) = json.loads((tmp_path / "m.json").read_text())["scores"].values()
    assert {row["category"]: row["num_ground_truth"] for row in score["per_class"]} == {"hand": 2, "dog": 2}
    assert sum(row["num_detections"] for row in score["per_class"]) == 4
    command = ["predict", str(data / "val/1.png"), "--checkpoint", str(out), "--out", str(tmp_path / "p")]
    assert main([*command, "--about", "2,5,27,35 hand; 35,5,57,37 dog"]) == 0
    instances = json.loads((tmp_path / "p/1.json").read_text())["instances"]
    assert {i["category"]: len(i["keypoints"]) for i in instances} == {"hand": 9, "dog": 6}


@pytest.mark.parametrize(
    ("settings", "points", "message"),
    [
        ([], ("nose", "tail", "ear"), "does not know these keypoints of 'dog': ear"),
        (["augment.flip_pairs=[[nose,tial]]"], ("nose", "tail"), "'tial' is not among the points nose, tail"),
        (["augment.flip_pairs=[[paw,claw]]"], ("nose", "tail"), "unknown keypoint in augment.flip_pairs: 'paw'"),
        (["augment.flip_pairs=[[nose]]"], ("nose", "tail"), "flip_pairs must have 2 values, got 1"),
        (["keypoint.sigmas={ear: 0.1}"], ("nose", "tail"), "unknown keypoint"),
        (["augment.scale_max=0.2"], ("nose", "tail"), "no scale is left: keypoint 0.3 to 1, from 0.3 to 0.2"),
    ],
)
def test_what_cannot_be_meant_of_skeletons_is_said_before_training(tmp_path, settings, points, message):
    write_pets(tmp_path)
    write_pets(tmp_path, split="val")
    file = tmp_path / "annotations/person_keypoints_val.json"
    content = json.loads(file.read_text())
    content["categories"][1]["keypoints"] = list(points)
    for annotation in content["annotations"][1::2]:
        annotation["keypoints"] = [40, 10, 2] * len(points)
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        prepare(load_config(None, [*TINY, *settings], tasks=["keypoint"], data=str(tmp_path)))
