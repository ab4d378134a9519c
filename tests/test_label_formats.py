"""Predictions for labelling tools: what each tool's documentation asks for, and numbers worked by hand."""

import json
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO
from test_outputs import MODEL, error, predict, write_images

from pix2seq.cli import main
from pix2seq.data.dataset import open_dataset
from pix2seq.data.formats.predictions import FORMATS, LabelledImage
from pix2seq.types import Category

PERSON = Category(1, 7, "person", ("head", "foot"), ((0, 1),))
CAT = Category(2, 9, "big cat")
SQUARE, TRIANGLE = [20.0, 10, 60, 10, 60, 50, 20, 50], [80.0, 10, 90, 10, 90, 20]


def found(category, bbox, score=0.5, segmentation=(), keypoints=()):
    return {
        "bbox": bbox,
        "category_id": category.id,
        "category": category.name,
        "score": score,
        "segmentation": list(segmentation),
        "keypoints": list(keypoints),
    }


BOXED = found(CAT, [10, 20, 30, 40])
MASKED = found(CAT, [20, 10, 70, 40], 0.75, [SQUARE, TRIANGLE])
POSED = found(PERSON, [0, 0, 50, 80], 0.875, keypoints=[25, 8, 2, 30, 72, 1])
UNSEEN = found(PERSON, [100, 50, 50, 40], 0.25, keypoints=[110, 60, 2, 0, 0, 0])


def image(*instances, name="sub dir/a.jpg", captions=()):
    return LabelledImage(name, 200, 100, instances, captions)


def files(kind, *images):
    return FORMATS[kind](images, (PERSON, CAT))


def test_coco_is_what_pycocotools_reads():
    content = json.loads(files("coco", image(BOXED, MASKED), image(POSED, name="b.jpg"))["coco.json"])
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    boxed, masked, posed = coco.loadAnns([1, 2, 3])
    assert coco.loadImgs([2])[0] == {"id": 2, "file_name": "b.jpg", "width": 200, "height": 100}
    assert coco.loadCats([7])[0]["skeleton"] == [[1, 2]]
    assert (boxed["area"], masked["area"], posed["area"]) == (1200, 40 * 40 + 45, 4000)
    assert boxed["segmentation"] == []  # CVAT reads boxes where the field is empty
    assert coco.annToMask(masked).sum() == 1645
    assert (posed["keypoints"], posed["num_keypoints"]) == ([25, 8, 2, 30, 72, 1], 2)
    assert [each["iscrowd"] for each in content["annotations"]] == [0, 0, 0]


# By labelstud.io/guide/predictions and the tags' pages: what a region's value must hold.
VALUES = {
    "rectanglelabels": {"x", "y", "width", "height", "rotation"},
    "polygonlabels": {"points", "closed"},
    "keypointlabels": {"x", "y", "width"},
}
TAGS = {"RectangleLabels": "rectanglelabels", "PolygonLabels": "polygonlabels", "KeyPointLabels": "keypointlabels"}


def test_label_studio_regions_fit_the_interface_beside_them():
    written = files("labelstudio", image(BOXED, MASKED, POSED, UNSEEN, captions=["a cat"]), image(name="b.jpg"))
    tasks, view = json.loads(written["labelstudio.json"]), ElementTree.fromstring(written["labelstudio.xml"])
    assert written["labelstudio.xml"].startswith("<View>")  # Label Studio refuses a declaration of the encoding
    controls = {tag.get("name"): tag for tag in view if tag.tag != "Image"}
    assert view.find("Image").attrib == {"name": "image", "value": "$image"}
    assert [task["data"]["image"] for task in tasks] == [
        "/data/local-files/?d=sub%20dir/a.jpg",
        "/data/local-files/?d=b.jpg",
    ]
    (prediction,) = tasks[0]["predictions"]
    regions = prediction["result"]
    assert len({region["id"] for region in regions}) == len(regions)
    assert prediction["score"] == pytest.approx((0.5 + 0.75 + 0.875 + 0.25) / 4)
    for region in regions:
        control = controls[region["from_name"]]
        assert control.get("toName") == region["to_name"] == "image"
        if region["type"] == "textarea":
            assert region["value"] == {"text": ["a cat"]}
            continue
        assert TAGS[control.tag] == region["type"]
        assert (region["original_width"], region["original_height"]) == (200, 100)
        value = dict(region["value"])
        (label,) = value.pop(region["type"])
        assert label in [each.get("value") for each in control]
        assert set(value) == VALUES[region["type"]]
        numbers = np.array(value.get("points", [value.get("x"), value.get("y")]), float)
        assert ((numbers >= 0) & (numbers <= 100)).all()  # per cent
    box, ring, point = VALUES
    assert [each["type"] for each in regions] == [box, ring, ring, box, point, point, box, point, "textarea"]
    assert {key: regions[0]["value"][key] for key in VALUES[box]} == {
        **{"x": 5, "y": 20, "width": 15, "height": 40, "rotation": 0}
    }
    assert regions[2]["value"]["points"] == [[40, 10], [45, 10], [45, 20]]
    assert regions[2]["parentID"] == regions[1]["id"]
    head = next(region for region in regions if region["value"].get("keypointlabels") == ["person: head"])
    assert (head["value"]["x"], head["value"]["y"]) == (12.5, 8)


# By docs.cvat.ai, XML annotation format 1.1: the attributes that each shape has.
SHAPES = {
    "box": {"xtl", "ytl", "xbr", "ybr"},
    "polygon": {"points"},
    "skeleton": set(),
}
COMMON = {"label", "source", "occluded", "z_order"}


def test_cvat_has_the_shapes_of_version_1_1():
    root = ElementTree.fromstring(files("cvat", image(BOXED, MASKED, POSED, UNSEEN), image(name="b.jpg"))["cvat.xml"])
    assert root.tag == "annotations"
    assert root.findtext("version") == "1.1"
    assert [each.text for each in root.findall("meta/task/labels/label/name")] == ["person", "big cat"]
    first, second = root.findall("image")
    assert first.attrib == {"id": "0", "name": "sub dir/a.jpg", "width": "200", "height": "100"}
    assert len(second) == 0
    for shape in first:
        assert set(shape.attrib) - {"group_id"} == COMMON | SHAPES[shape.tag]
    assert first.find("box").attrib | {"z_order": ""} == {
        **{"label": "big cat", "source": "auto", "occluded": "0", "z_order": ""},
        **{"xtl": "10.00", "ytl": "20.00", "xbr": "40.00", "ybr": "60.00"},
    }
    square, triangle = first.findall("polygon")
    assert triangle.get("points") == "80.00,10.00;90.00,10.00;90.00,20.00"
    assert square.get("group_id") == triangle.get("group_id") is not None
    assert int(first.find("box").get("z_order")) > int(square.get("z_order"))  # the first is the best, and on top
    unseen, posed = first.findall("skeleton")
    head, foot = posed
    assert head.attrib == {"label": "head", "points": "25.00,8.00", "occluded": "0", "outside": "0"}
    assert (foot.get("label"), foot.get("occluded"), foot.get("outside")) == ("foot", "1", "0")
    assert [point.get("outside") for point in unseen] == ["0", "1"]


def test_yolo_lines_are_of_one_kind_and_in_shares():
    boxes = files("yolo", image(BOXED), image(name="b.png"))
    assert boxes["yolo/labels/train/sub dir/a.txt"] == "1 0.125 0.4 0.15 0.4\n"
    assert boxes["yolo/labels/train/b.txt"] == ""
    assert boxes["yolo/train.txt"] == "images/train/sub dir/a.jpg\nimages/train/b.png\n"
    config = yaml.safe_load(boxes["yolo/data.yaml"])
    assert config == {"path": ".", "train": "train.txt", "names": {0: "person", 1: "big cat"}}
    masks = files("yolo", image(BOXED, MASKED, POSED))["yolo/labels/train/sub dir/a.txt"].splitlines()
    assert masks == ["1 0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5", "1 0.4 0.1 0.45 0.1 0.45 0.2"]
    poses = files("yolo", image(BOXED, POSED, UNSEEN))
    assert yaml.safe_load(poses["yolo/data.yaml"])["kpt_shape"] == [2, 3]
    assert poses["yolo/labels/train/sub dir/a.txt"].splitlines() == [
        "0 0.125 0.4 0.25 0.8 0.125 0.08 2 0.15 0.72 1",
        "0 0.625 0.7 0.25 0.4 0.55 0.6 2 0 0 0",
    ]


@pytest.mark.parametrize("kind", ["yolo", "coco"])
def test_what_is_written_trains_again(tmp_path, kind):
    """The way back: the folder with its images is a data set, with the same objects."""
    for name, text in files(kind, image(MASKED, name="a.jpg")).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    folder = tmp_path / ("yolo/images/train" if kind == "yolo" else "images")
    folder.mkdir(parents=True)
    Image.new("RGB", (200, 100)).save(folder / "a.jpg")
    dataset = open_dataset(tmp_path / "yolo" if kind == "yolo" else tmp_path, "train")
    target = dataset.target(0)
    assert {{c.label: c.name for c in dataset.categories}[label] for label in target.labels.tolist()} == {"big cat"}
    masks = [ring for rings in target.segmentations for ring in rings]
    assert [ring.round(3).ravel().tolist() for ring in masks] == [SQUARE, TRIANGLE]


def test_predict_writes_a_format_beside_its_own_files(tmp_path, capsys):
    images, out = write_images(tmp_path / "images", 3), tmp_path / "out"
    for kind in FORMATS:
        assert predict(tmp_path / "images", "--out", out, "--format", kind, "--min-score", "0", "--resume") == 0
    assert "3 of 3 files are done already" in capsys.readouterr().err
    content = json.loads((out / "coco.json").read_text())
    assert [entry["file_name"] for entry in content["images"]] == [path.name for path in images]
    own = [json.loads((out / f"{path.stem}.json").read_text())["instances"] for path in images]
    assert [a["bbox"] for a in content["annotations"]] == [each["bbox"] for some in own for each in some]
    assert len(content["annotations"]) > 0
    assert len(ElementTree.parse(out / "cvat.xml").findall("image/box")) == len(content["annotations"])
    assert len((out / "yolo/labels/train/00.txt").read_text().splitlines()) == len(own[0])
    assert predict(tmp_path / "images", "--out", out, "--format", "coco", "--min-score", "1", "--resume") == 0
    assert json.loads((out / "coco.json").read_text())["annotations"] == []
    (out / "coco.json").write_text("corrected by hand")
    assert predict(tmp_path / "images", "--out", out, "--format", "coco") == 2
    assert "coco.json would be replaced" in error(capsys)


def test_an_unreadable_image_is_left_out_of_a_format(tmp_path, capsys):
    images, out = write_images(tmp_path / "images", 2), tmp_path / "out"
    images[0].write_bytes(images[0].read_bytes()[:60])
    assert predict(tmp_path / "images", "--out", out, "--format", "coco") == 2
    assert "00.png" in error(capsys)
    assert [each["file_name"] for each in json.loads((out / "coco.json").read_text())["images"]] == ["01.png"]


def test_names_that_a_format_cannot_tell_apart_are_refused_before_the_work(tmp_path, capsys):
    (image_path,) = write_images(tmp_path / "images", 1)
    shutil.copy(image_path, tmp_path / "images" / "coco.png")
    shutil.copy(image_path, tmp_path / "images" / "00.bmp")
    assert predict(tmp_path / "images", "--out", tmp_path / "a", "--format", "coco") == 2
    assert "rename the image" in error(capsys)
    assert predict(tmp_path / "images", "--out", tmp_path / "b", "--format", "yolo") == 2
    assert "same labels in YOLO" in error(capsys)
    assert not list((tmp_path / "b").glob("*.json"))
    arguments = ["predict", str(image_path), "--checkpoint", str(MODEL), "--format", "yolov5"]
    assert main(arguments) == 2
    assert "unknown --format 'yolov5'; did you mean 'yolo'" in error(capsys)
