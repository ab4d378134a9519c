"""Options of one call, lists of images, and results as other libraries take them: pycocotools, pandas, supervision."""

import sys

import numpy as np
import pytest
from conftest import ROOT
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from pix2seq import Predictor
from pix2seq.data.shapes import write_shapes
from pix2seq.errors import InputError
from pix2seq.results import COLUMNS, Instances
from pix2seq.types import Category, Instance

PERSON = Category(1, 7, "person", ("head", "foot"))
CAT = Category(2, 9, "cat")
SQUARE = np.array([[2, 1], [6, 1], [6, 5], [2, 5]], np.float32)


def mask_with_a_hole():
    mask = np.zeros((8, 10), np.uint8, order="F")
    mask[1:6, 2:8] = 1
    mask[3, 4] = 0
    return mask


@pytest.fixture
def found():
    ring = Instance((2, 1, 8, 6), CAT, 0.5, [SQUARE], rle=dict(mask_utils.encode(mask_with_a_hole())), mask_score=0.25)
    points = np.array([[1, 2, 2], [3, 4, 0]], np.float32)
    return Instances(
        [Instance((1, 2, 4.5, 6), PERSON, 0.75, [SQUARE], points), ring, Instance((0, 0, 3, 3), CAT, 0.25)],
        size=(10, 8),
    )


def test_coco_entries_are_results_that_pycocotools_reads(found):
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 3, "width": 10, "height": 8}],
        "categories": [{"id": 7, "name": "person"}, {"id": 9, "name": "cat"}],
        "annotations": [],
    }
    truth.createIndex()
    loaded = truth.loadRes(found.to_coco(3))
    entries = loaded.dataset["annotations"]
    assert [(e["image_id"], e["category_id"], e["score"]) for e in entries] == [(3, 7, 0.75), (3, 9, 0.5), (3, 9, 0.25)]
    person, cat, boxed = entries
    assert person["bbox"] == [1, 2, 3.5, 4]
    assert person["keypoints"] == [1, 2, 2, 3, 4, 0]
    assert "keypoints" not in cat
    assert np.array_equal(loaded.annToMask(cat), mask_with_a_hole())
    assert loaded.annToMask(person).sum() == 16
    assert loaded.annToMask(boxed).sum() == 9  # pycocotools takes a box for its own mask


def test_a_table_has_a_row_for_each_object_and_the_same_columns_without_any(found):
    table = found.to_pandas()
    assert tuple(table.columns) == COLUMNS == tuple(Instances(size=(1, 1)).to_pandas().columns)
    assert table["category"].tolist() == ["person", "cat", "cat"]
    assert table[["x0", "y0", "x1", "y1"]].to_numpy().tolist()[0] == [1, 2, 4.5, 6]
    assert table.groupby("category")["score"].max().to_dict() == {"cat": 0.5, "person": 0.75}
    assert np.isnan(table["mask_score"][0])
    assert table["mask_score"][1] == 0.25


def test_detections_of_supervision_hold_boxes_masks_and_names(found):
    sv = pytest.importorskip("supervision")
    detections = found.to_supervision()
    assert detections.xyxy.tolist() == [[1, 2, 4.5, 6], [2, 1, 8, 6], [0, 0, 3, 3]]
    assert detections.class_id.tolist() == [7, 9, 9]
    assert detections["class_name"].tolist() == ["person", "cat", "cat"]
    assert [int(mask.sum()) for mask in detections.mask] == [16, 29, 0]
    assert len(detections[detections.confidence > 0.3].with_nms(0.99)) == 2
    empty = Instances(size=(10, 8)).to_supervision()
    assert len(empty) == 0
    boxes = Instances(found[2:], size=found.size).to_supervision()
    assert boxes.mask is None
    assert len(sv.Detections.merge([empty, boxes])) == 1


def test_without_supervision_a_line_says_what_to_install(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(InputError, match="pip install supervision"):
        found.to_supervision()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "shapes"
    write_shapes(folder, num_train=0, num_val=3, size=128, seed=5, workers=1)
    return sorted((folder / "val2017").iterdir())


@pytest.fixture(scope="module")
def predictor():
    return Predictor.from_pretrained(ROOT / "checkpoints/shapes", device="cpu")


def shown(found):
    return [
        {key: round(value, 4) if "score" in key else value for key, value in instance.to_json().items()}
        for instance in found
    ]


def test_a_list_of_images_gives_what_each_image_gives(predictor, images):
    encoded = predictor.encode_batch(images)
    for answers, single in (
        (predictor.detect(encoded), predictor.detect),
        (predictor.keypoints(encoded, threshold=0.5), lambda each: predictor.keypoints(each, threshold=0.5)),
    ):
        assert [type(each) for each in answers] == [Instances] * 3
        assert [each.size for each in answers] == [(128, 128)] * 3
        assert [shown(each) for each in answers] == [shown(single(each)) for each in encoded]
    assert [c.text for c in predictor.caption(tuple(encoded))] == [predictor.caption(each).text for each in encoded]
    assert predictor.detect([]) == []
    assert predictor.caption([]) == []


def test_boxes_for_a_list_of_images_are_one_entry_each(predictor, images):
    first, second = predictor.encode_batch(images[:2])
    box, best = [[10, 10, 60, 60]], predictor.detect(second)[:2]
    both = predictor.segment([first, second], [box, best], categories="person", num_samples=1)
    assert shown(both[0]) == shown(predictor.segment(first, box, categories="person", num_samples=1))
    assert {each.box_xyxy for each in both[1]} == {each.box_xyxy for each in best}
    with pytest.raises(InputError, match="one entry for each image"):
        predictor.segment([first, second], [box], categories="person")


def test_threshold_and_classes_leave_objects_out_before_they_are_asked_about(predictor, images, monkeypatch):
    for image in map(predictor.encode, images):
        found = predictor.detect(image)
        least = sorted(each.score for each in found)[1]  # leaves out one object, and others of another class remain
        if len({each.category.name for each in found if each.score >= least}) > 1:
            break
    best = found[0].category.name
    kept = predictor.detect(image, threshold=least, classes=[best.upper()])
    assert shown(kept) == shown([i for i in found if i.score >= least and i.category.name == best])
    assert 0 < len(kept) < len(predictor.detect(image, threshold=least)) < len(found)
    asked = []
    original = Predictor._complete

    def counting(self, task, images, requests, seed, held):
        asked.append((task.name, len(requests[0])))
        return original(self, task, images, requests, seed, held)

    monkeypatch.setattr(Predictor, "_complete", counting)
    masks = predictor.segment(image, threshold=least, classes=best, num_samples=1)
    assert asked == [("detection", 1), ("segmentation", len(kept))]
    assert {i.box_xyxy for i in masks} == {i.box_xyxy for i in kept}
    (prediction,) = predictor.predict_batch([image], ["segmentation"], threshold=least, classes=best, num_samples=1)
    assert {i.box_xyxy for i in prediction.instances} == {i.box_xyxy for i in kept}
    asked.clear()
    given = predictor.predict(image, ["segmentation"], found, threshold=least, classes=best, num_samples=1)
    assert len(given.instances) == len(kept)
    assert asked == [("segmentation", len(kept))]
    asked.clear()
    assert len(predictor.segment(image, found, threshold=least, classes=best, num_samples=1)) == len(kept)
    assert asked == [("segmentation", len(kept))]


def test_settings_of_a_call_end_with_it(predictor, images):
    image = predictor.encode(images[0])
    before = shown(predictor.detect(image))
    assert len(predictor.detect(image, num_objects=2)) <= 2 < len(before)
    assert len(predictor.segment(image, num_objects=2, num_samples=1)) <= 2  # of the task that finds the objects
    few = predictor.with_settings(num_objects=1)
    assert len(few.detect(image)) <= 1
    assert shown(predictor.detect(image)) == before
    box = {"boxes": [[10, 10, 90, 90]], "categories": "person"}
    assert predictor.segment(image, **box, num_samples=3)[0].rle is not None  # three samples vote
    assert predictor.segment(image, **box)[0].rle is None  # a single one is taken as it is


def test_options_are_taken_by_predict_and_ask_too(predictor, images):
    (prediction,) = predictor.predict_batch([images[0]], ["detection"], num_objects=2)
    assert len(prediction.instances) <= 2
    assert isinstance(prediction.instances, Instances)
    (answers,) = predictor.ask("detection", [images[0]], num_objects=2, threshold=0.01)
    assert shown(answers) == shown(i for i in prediction.instances if i.score >= 0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, i: p.detect(i, classes=["persn"]), "unknown class 'persn'; did you mean 'person'"),
        (lambda p, i: p.detect(i, classes=[3]), "unknown class '3'"),
        (lambda p, i: p.detect(i, threshold=2), "from 0 to 1"),
        (lambda p, i: p.detect(i, threshold="0.5"), "from 0 to 1"),
        (lambda p, i: p.detect(i, treshold=0.5), "unknown option 'treshold'; did you mean 'threshold'"),
        (lambda p, i: p.detect(i, num_samples=2), "unknown setting of detection 'num_samples'"),
        (lambda p, i: p.detect(i, num_objects=0), "at least 1"),
        (lambda p, i: p.caption(i, threshold=0.5), "unknown option 'threshold'"),
        (lambda p, i: p.ask("detection", [i], top_pp=1), "did you mean 'top_p'"),
        (lambda p, i: p.predict(i, ["detection"], nonsense=1), "none of this checkpoint's tasks"),
    ],
)
def test_wrong_options_are_named(predictor, images, call, message):
    with pytest.raises(InputError, match=message):
        call(predictor, images[0])
