"""Data as people have it: which files are read, and as what. Every image has a grey of its own, so pixels tell it."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from pycocotools import mask as mask_utils

from pix2seq.cli import main
from pix2seq.data.check import check_dataset
from pix2seq.data.dataset import find_splits, has_split, open_dataset
from pix2seq.data.formats.coco_files import find_files
from pix2seq.data.image import read_image
from pix2seq.data.image_files import ImageFinder
from pix2seq.data.splits import is_of_other_split
from pix2seq.errors import InputError

A, B, C = [4, 3, 10, 8], [20, 10, 12, 15], [1, 15, 9, 9]  # x, y, width, height in images of 40 x 30
CATS = ({"id": 1, "name": "cat"}, {"id": 2, "name": "dog"})
JPEG, PNG = {"format": "JPEG", "quality": 95}, {"format": "PNG"}


def paint(path, grey, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    options = save or (JPEG if path.suffix.lower() in (".jpg", ".jpeg") else PNG)
    Image.new("RGB", (40, 30), (grey,) * 3).save(path, **options)


def paint_all(root, files):
    for grey, name in enumerate(files, start=1):
        paint(root / name, 20 * grey)


def image(number, name, **fields):
    return {"id": number, "file_name": name, "width": 40, "height": 30} | fields


def box(number, of, xywh=A, category=1, **fields):
    return {"id": number, "image_id": of, "category_id": category, "bbox": xywh} | fields


def write(path, images, annotations, categories=CATS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": list(categories)}))


def write_names(root, names, file="annotations/instances_train.json"):
    """Annotations with a box in each of the images of these names."""
    images = [image(i, name) for i, name in enumerate(names, start=1)]
    write(root / file, images, [box(i, i) for i in range(1, len(names) + 1)])


def greys(dataset):
    """The number of the image that each entry was read from, by the ids of the entries."""
    return {i.id: round(float(read_image(i.path).mean()) / 20) for i in dataset.images}


def seen(dataset, index=0):
    """The objects of an image as (class, x, y, width, height, crowd), in order."""
    target, names = dataset.target(index), {c.label: c.name for c in dataset.categories}
    corners = target.boxes_xyxy
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    rows = zip(target.labels.tolist(), boxes, target.iscrowd.tolist(), strict=True)
    return sorted((names[label], *xywh, crowd) for label, xywh, crowd in rows)


NFD = unicodedata.normalize("NFD", "café.png")
RIGHT = {
    # what lies there, what is listed: the number of the file that each name means, 0 for none
    "a folder counts": (["images/c1/a.png", "images/c2/a.png", "images/a.png"], ["c1/a.png", "c2/a.png"], [1, 2]),
    "a folder that is not there": (["images/c1/a.png", "images/a.png"], ["c1/a.png", "c2/a.png"], [1, 0]),
    "masks": (["images/train/a.png", "train_masks/a.png"], ["a.png"], [1]),
    "only another folder": (["train/a.png", "train_old/b.png", "valid/b.png"], ["a.png", "b.png"], [1, 0]),
    "not in images": (["train/a.png", "images/b.png", "b.png"], ["a.png", "b.png"], [1, 0]),
    "no folder of the split": (["a.png", "val/b.png"], ["a.png", "b.png"], [1, 0]),
    "deeper": (["train/x/a.png", "train/y/b.png", "images/b.png"], ["a.png", "b.png"], [1, 2]),
    "two deeper": (["train/x/a.png", "train/y/a.png", "train/b.png"], ["a.png", "b.png"], [0, 3]),
    "direct before deeper": (["images/x/a.png", "images/a.png"], ["a.png"], [2]),
    "a word for the split": (["Training-Images/a.png", "validation/a.png"], ["a.png"], [1]),
    "another computer": (["train/a.png", "train/b.png"], ["C:\\w\\train\\a.png", "C:\\w\\train\\b.png"], [1, 2]),
    "two of its folders": (["p/a.png", "q/a.png"], ["/w/p/a.png", "/w/q/a.png"], [1, 2]),
    "a path from the root": (["images/train/a.png", "extra/a.png"], ["images/train/a.png"], [1]),
    "case": (["train/A.PNG", "train/b.png"], ["a.png", "B.png"], [1, 2]),
    "two cases": (["train/A.png", "train/a.PNG", "train/b.png"], ["a.png", "b.png"], [0, 3]),
    "the exact case": (["train/A.png", "train/a.png"], ["a.png", "A.png"], [2, 1]),
    "one file for two cases": (["train/a.png"], ["A.png", "a.png"], [0, 1]),
    "Unicode": ([f"train/{NFD}", "train/b.png"], ["café.png", "b.png"], [1, 2]),
    "a local file of Label Studio": (["images/a.png"], ["/data/local-files/?d=images/a.png"], [1]),
    "outside": (["a.png"], ["a.png", "../a.png"], [1, 0]),
}


@pytest.mark.parametrize(("files", "names", "expected"), RIGHT.values(), ids=RIGHT)
def test_the_right_image_is_read_or_none(tmp_path, files, names, expected):
    paint_all(tmp_path, files)
    write_names(tmp_path, names)
    dataset = open_dataset(tmp_path, "train")
    assert greys(dataset) == {i: number for i, number in enumerate(expected, start=1) if number}
    missing = dataset.defects[dataset.defects["defect"] == "missing image file"]
    assert missing["image"].tolist() == [i for i, number in enumerate(expected, start=1) if not number]


def test_if_no_image_is_found_the_error_says_what_was_looked_for_and_what_lies_there(tmp_path):
    paint_all(tmp_path, ["train/a.jpeg", "train/b.jpeg"])
    write_names(tmp_path, ["a.png"])
    with pytest.raises(InputError, match=r"looked for 'a\.png' in train/, .*; found train/a\.jpeg$"):
        open_dataset(tmp_path, "train")


PARTS = st.sampled_from(["a", "images", "train", "val", "train_old"])
FILES = st.builds(lambda folders, name: "/".join([*folders, name]), st.lists(PARTS, max_size=2), st.sampled_from("xXy"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.sets(FILES, min_size=1, max_size=5), st.lists(FILES, min_size=1, max_size=4, unique=True))
def test_a_found_file_ends_as_its_name_and_means_no_other(tmp_path_factory, files, names):
    root = tmp_path_factory.mktemp("tree")
    for name in sorted(files):
        if not any(f"{name}/" in f"{other}/" for other in files - {name}):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    found = ImageFinder(root, "train").find(names)
    parts = [name.lower().split("/") for name in names]
    shared = next(i for i in range(9) if len({tuple(p[: i + 1]) for p in parts}) > 1 or i + 1 >= min(map(len, parts)))
    for name, path in zip(names, found, strict=True):
        if path is None:
            continue
        assert (root / path).is_file()
        ending = name.lower().split("/")[shared:]
        assert path.lower().split("/")[-len(ending) :] == ending
        unnamed = path.split("/")[: -len(name.split("/"))]
        assert not any(is_of_other_split(folder, "train") for folder in unnamed)
        rivals = [n for n, p in zip(names, found, strict=True) if p == path and n != name]
        assert all(rival.endswith(path.rpartition("/")[2]) for rival in [name, *rivals] if rivals)


OBJECTS, PERSONS, TEXTS = "annotations/instances_", "annotations/person_keypoints_", "annotations/captions_"
CHOSEN = {
    "exact": ("train", ["train", "train2017", "train_v2"], "train"),
    "latest year": ("train", ["train2014", "train2017"], "train2017"),
    "by name": ("train2014", ["train2014", "train2017"], "train2014"),
    "another word": ("val", ["valid"], "valid"),
    "the first word": ("val", ["validation", "valid"], "valid"),
    "one that is left": ("train", ["train_v2"], "train_v2"),
    "none for it": ("val", ["train", "test", "default", "trainval", "train_val"], None),
    "no split in the name": ("train", ["default", "val"], "default"),
    "not another's": ("train", ["trainval", "val"], None),
    "own name": ("trainval", ["trainval", "train"], "trainval"),
}


@pytest.mark.parametrize(("split", "names", "chosen"), CHOSEN.values(), ids=CHOSEN)
def test_which_of_several_files_is_taken(tmp_path, split, names, chosen):
    for name in names:
        write(tmp_path / f"{OBJECTS}{name}.json", [], [])
    found = find_files(tmp_path, split)
    if chosen is None:
        assert found is None
        return
    assert found.first == tmp_path / f"{OBJECTS}{chosen}.json"
    assert found.split == (chosen if chosen != "default" else "train")


def test_several_files_without_a_rule_are_refused_and_one_can_be_chosen(tmp_path):
    for number, name in enumerate(("train_a", "train_b"), start=1):
        write(tmp_path / f"{OBJECTS}{name}.json", [image(1, f"{number}.png")], [box(1, 1)])
        paint(tmp_path / f"images/{number}.png", 20 * number)
    with pytest.raises(InputError, match=r"instances_train_a\.json, annotations/instances_train_b\.json; choose with"):
        open_dataset(tmp_path, "train")
    for file in (f"{OBJECTS}train_b.json", tmp_path / f"{OBJECTS}train_b.json"):
        assert greys(open_dataset(tmp_path, "train", annotations=file)) == {1: 2}
    with pytest.raises(InputError, match=r"gone\.json is no file"):
        open_dataset(tmp_path, "train", annotations="gone.json")


def test_the_choice_is_said_where_others_were_left_out(tmp_path):
    paint(tmp_path / "images/a.png", 20)
    for year in (2014, 2017):
        write_names(tmp_path, ["a.png"], f"{OBJECTS}train{year}.json")
        write(
            tmp_path / f"{TEXTS}train{year}.json", [image(1, "a.png")], [{"id": 1, "image_id": 1, "caption": str(year)}]
        )
    dataset = open_dataset(tmp_path, "train")
    assert dataset.target(0).captions == ("2017",)
    (said,) = dataset.defects["detail"]
    assert said.startswith("annotations/instances_train2017.json, not annotations/instances_train2014.json, ")
    assert "annotations=FILE" in said
    assert find_splits(tmp_path) == ["train"]
    assert "instances_train2014.json" in check_dataset(tmp_path).text()


def test_other_files_are_no_annotations(tmp_path):
    paint(tmp_path / "train/a.png", 20)
    write_names(tmp_path, ["a.png"], "train/_annotations.coco.json")
    (tmp_path / "train/a.json").write_text('{"version": "5.0", "shapes": []}')
    (tmp_path / "package.json").write_text('{"name": "x"}')
    write(tmp_path / "annotations/panoptic_train.json", [], [])
    assert find_splits(tmp_path) == ["train"]
    assert find_files(tmp_path, "train").files == {"instances": tmp_path / "train/_annotations.coco.json"}
    assert has_split(tmp_path, "train")
    assert not has_split(tmp_path, "val")


# The same across files


def test_images_classes_and_objects_are_known_by_file_name_and_box(tmp_path):
    paint_all(tmp_path, ["train/a.png", "train/b.png", "train/c.png"])
    write(
        tmp_path / f"{OBJECTS}train.json",
        [image(1, "a.png"), image(2, "b.png")],
        [box(1, 1, A, 2), box(2, 2, B), box(3, 2, C)],
    )
    person = {"id": 9, "name": "Cat ", "keypoints": ["nose", "tail"]}
    of_b, of_a = [21, 11, 2, 30, 20, 1], [5, 5, 2, 0, 0, 0]
    near = [B[0] + 0.4, *B[1:]]
    persons = [box(1, 7, near, 9, keypoints=of_b), box(2, 8, B, 9, keypoints=of_a)]
    write(tmp_path / f"{PERSONS}train.json", [image(8, "a.png"), image(7, "b.png")], persons, [person])
    captions = [{"id": 1, "image_id": n, "caption": text} for n, text in ((1, "third"), (3, "first"))]
    write(tmp_path / f"{TEXTS}train.json", [image(1, "c.png"), image(3, "train/a.png")], captions)
    dataset = open_dataset(tmp_path, "train")
    assert greys(dataset) == {1: 1, 2: 2, 3: 3}
    assert [c.name for c in dataset.categories] == ["cat", "dog"]
    assert seen(dataset, 0) == [("cat", *B, False), ("dog", *A, False)]
    assert seen(dataset, 1) == [("cat", *C, False), ("cat", *B, False)]
    points = {int(i): k.ravel().tolist() for n in (0, 1) for i, k in zip(*_ids_and_points(dataset, n), strict=True)}
    assert points == {1: [0] * 6, 4: of_a, 2: of_b, 3: [0] * 6}
    assert [dataset.target(i).captions for i in range(3)] == [("first",), (), ("third",)]


def _ids_and_points(dataset, index):
    return dataset.target(index).annotation_ids, dataset.target(index).keypoints


def test_a_person_in_both_files_is_one_by_its_box_whatever_the_ids(tmp_path):
    paint(tmp_path / "train/a.png", 20)
    categories = [{"id": 1, "name": "cat", "keypoints": ["nose"]}]
    write(
        tmp_path / f"{OBJECTS}train.json",
        [image(1, "a.png")],
        [box(i, 1, b) for i, b in enumerate((A, B, B, C), start=1)],
    )
    people = [
        box(1, 1, B, keypoints=[21, 11, 2]),
        box(3, 1, B, keypoints=[22, 12, 2]),
        box(4, 1, None, keypoints=[2, 16, 1]),
    ]
    write(tmp_path / f"{PERSONS}train.json", [image(1, "a.png")], people, categories)
    ids, points = _ids_and_points(open_dataset(tmp_path, "train"), 0)
    assert ids.tolist() == [1, 2, 3, 4]
    assert points[:, 0].tolist() == [[0, 0, 0], [21, 11, 2], [22, 12, 2], [2, 16, 1]]


def test_a_file_listed_twice_is_one_image_and_an_id_of_two_files_is_none(tmp_path):
    paint_all(tmp_path, ["train/a.png", "train/b.png", "train/c.png"])
    images = [
        image(1, "a.png"),
        image(2, "train/a.png"),
        image(3, "b.png"),
        image(3, "c.png"),
        image(4, "a.png", width=80),
    ]
    write(tmp_path / f"{OBJECTS}train.json", images, [box(1, 1, A), box(2, 2, B, 2), box(3, 3, C), box(4, 4, C)])
    dataset = open_dataset(tmp_path, "train")
    assert greys(dataset) == {1: 1}
    assert seen(dataset) == [("cat", *A, False), ("dog", *B, False)]
    assert dataset.defects[["image", "defect", "action"]].to_numpy().tolist() == [
        [2, "image file listed twice", "joined with image 1"],
        [3, "image id of two files", "dropped"],
        [3, "image id of two files", "dropped"],
        [4, "image file listed twice, in two sizes", "dropped"],
    ]


def test_classes_of_one_name_are_one_and_said(tmp_path):
    paint(tmp_path / "train/a.png", 20)
    categories = [{"id": i, "name": name} for i, name in ((1, "car"), (2, "bus"), (3, "Car "))]
    write(tmp_path / f"{OBJECTS}train.json", [image(1, "a.png")], [box(i, 1, A, i) for i in (1, 2, 3)], categories)
    dataset = open_dataset(tmp_path, "train")
    assert [(c.label, c.name) for c in dataset.categories] == [(1, "car"), (2, "bus")]
    assert dataset.target(0).labels.tolist() == [1, 2, 1]
    assert dataset.defects["detail"].tolist() == ["'Car ' has the ids 1 and 3", "'car', 'Car '"]
    skeletons = [{"id": 1, "name": "car", "keypoints": ["a"]}, {"id": 3, "name": "car", "keypoints": ["b"]}]
    write(tmp_path / f"{OBJECTS}train.json", [image(1, "a.png")], [], skeletons)
    with pytest.raises(InputError, match="two classes 'car' with different keypoints: a, and b"):
        open_dataset(tmp_path, "train")


def test_points_of_short_skeletons_are_kept_beside_longer_ones(tmp_path):
    paint(tmp_path / "train/a.png", 20)
    categories = [
        CATS[0] | {"keypoints": ["head", "hips", "tail"]},
        CATS[1] | {"keypoints": ["nose"]},
        {"id": 3, "name": "x"},
    ]
    sets = [[5, 5, 2, 6, 6, 1, 7, 7, 2], [21, 11, 2], [0] * 9, [21, 11, 2]]
    annotations = [
        box(i, 1, A, c, keypoints=k) for i, (c, k) in enumerate(zip((1, 2, 3, 3), sets, strict=True), start=1)
    ]
    write(tmp_path / f"{OBJECTS}train.json", [image(1, "a.png")], annotations, categories)
    dataset = open_dataset(tmp_path, "train")
    assert dataset.target(0).keypoints.reshape(4, 9).tolist() == [sets[0], [*sets[1], *[0] * 6], [0] * 9, [0] * 9]
    assert dataset.defects[["annotation_id", "defect"]].to_numpy().tolist() == [[4, "bad keypoints"]]


# Values as text


def test_text_is_read_where_its_meaning_is_certain(tmp_path):
    paint_all(tmp_path, ["train/a.png", "train/b.png"])
    images = [image("12", "a.png", width="40", height="30.0"), image("scene b", "b.png")]
    crowds = ["0", "1", "false", "True", "no", " YES ", 0.0, True, None, ""]
    annotations = [box(str(i), "12", list(map(str, A)), "1", iscrowd=c, area="33.5") for i, c in enumerate(crowds)]
    annotations.append(box("x1", "scene b", B, "a dog"))
    write(
        tmp_path / f"{OBJECTS}train.json",
        images,
        annotations,
        [{"id": "1", "name": "cat"}, {"id": "a dog", "name": "dog"}],
    )
    dataset = open_dataset(tmp_path, "train")
    assert dataset.defects.empty
    assert greys(dataset) == {12: 1, 13: 2}
    assert dataset.target(0).iscrowd.tolist() == [False, True, False, True, False, True, False, True, False, False]
    assert set(dataset.target(0).areas.tolist()) == {33.5}
    assert seen(dataset, 1) == [("dog", *B, False)]


def test_a_missing_area_is_that_of_the_mask(tmp_path):
    paint(tmp_path / "train/a.png", 20)
    triangle, mask = [4, 3, 14, 3, 4, 11], np.zeros((30, 40), np.uint8)
    mask[10:14, 20:23] = mask[20, 20] = 1
    packed = mask_utils.encode(np.asfortranarray(mask))["counts"].decode()
    segmentations = [[triangle], {"size": [30, 40], "counts": packed}, None]
    segmentations.append({"size": [30, 40], "counts": [int(n) for n in _run_lengths(mask)]})
    annotations = [box(i, 1, A, segmentation=s) for i, s in enumerate(segmentations)]
    write(tmp_path / f"{OBJECTS}train.json", [image(1, "a.png")], annotations)
    assert open_dataset(tmp_path, "train").target(0).areas.tolist() == [40, 13, 80, 13]


def _run_lengths(mask):
    values, lengths = mask.T.ravel().tolist(), [0]
    for before, value in zip([0, *values], values, strict=False):
        lengths += [0] if before != value else []
        lengths[-1] += 1
    return lengths


@pytest.mark.parametrize("num_pixels", [0, 1])
def test_boxes_in_shares_of_the_image_are_refused(tmp_path, num_pixels):
    paint(tmp_path / "train/a.png", 20)
    shares = [[0.2, 0.25, 0.3, 0.4], [0.0, 0.1, 1.0, 0.6], [0, 0, 0, 0]]
    annotations = [box(i, 1, b) for i, b in enumerate([*shares, *[A] * num_pixels])]
    write(tmp_path / f"{OBJECTS}train.json", [image(1, "a.png")], annotations)
    with pytest.raises(InputError, match=r"instances_train\.json: 2 of \d boxes are normalised.*multiply"):
        open_dataset(tmp_path, "train")


# Pascal VOC


def xml(objects, *, root="annotation", attributes="", filename="", head=""):
    """The text of a VOC file; an object is a class, corners as VOC counts them, and `difficult`."""
    lines = [f"{head}<{root}{attributes}><filename>{filename}</filename>"]
    lines.append("<size><width>40</width><height>30</height></size>")
    for name, corners, difficult in objects:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        inner = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        lines.append(f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{inner}</bndbox></object>")
    return "".join([*lines, f"</{root}>"])


CORNERS = (5, 4, 14, 11)  # A as VOC counts


def voc(root, names, *, listed=None, suffix=".jpg", encoding="utf-8", **options):
    """A VOC folder of an image for each name, and the list of a training split."""
    for grey, name in enumerate(names, start=1):
        path = root / f"Annotations/{name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(xml([("bolt", CORNERS, 0)], filename=f"{Path(name).name}{suffix}", **options).encode(encoding))
        paint(root / f"JPEGImages/{name}{suffix}", 20 * grey)
    if listed is not None:
        (root / "ImageSets/Main").mkdir(parents=True)
        (root / "ImageSets/Main/train.txt").write_text("".join(f"{line}\n" for line in listed), encoding="utf-8")
    return root


@pytest.mark.parametrize(
    "lines",
    [
        ["k 1", "sub/k2"],
        ["k 1.jpg", "sub/k2.jpg"],
        ["/home/x/JPEGImages/k 1.jpg", "C:\\JPEGImages\\sub\\k2.jpg"],
        ["k 1 1", "k2  -1"],
        ["K 1.xml", "k2"],
    ],
)
def test_lists_of_voc_may_have_extensions_paths_spaces_and_flags(tmp_path, lines):
    dataset = open_dataset(voc(tmp_path, ["k 1", "sub/k2", "z"], listed=lines), "train")
    assert greys(dataset) == {1: 1, 2: 2}
    assert dataset.defects.empty
    assert seen(dataset, 1) == [("bolt", *A, False)]


FORMATS = {
    ".jfif": JPEG,
    ".JPE": JPEG,
    ".camera": JPEG,
    ".mpo": {"format": "MPO"},
    ".PNG": PNG,
    ".webp": {"format": "WEBP", "lossless": True},
    ".tiff": {"format": "TIFF"},
    ".bmp": {"format": "BMP"},
    ".gif": {"format": "GIF"},
    ".avif": {"format": "AVIF", "quality": 100},
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_images_of_all_formats_are_found_by_name(tmp_path, suffix):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow does not write AVIF")
    root = voc(tmp_path, ["w"])
    (root / "JPEGImages/w.jpg").unlink()
    paint(root / f"JPEGImages/w{suffix}", 60, **FORMATS[suffix])
    path = root / "Annotations/w.xml"
    path.write_text(path.read_text().replace("w.jpg", f"w{suffix}" if suffix == ".camera" else "lost.jpg"))
    assert greys(open_dataset(root, "train")) == {1: 3}


def test_of_two_images_with_a_stem_the_filename_decides(tmp_path):
    root = voc(tmp_path, ["a", "b"])
    for name, grey in (("a.png", 100), ("b.png", 120)):
        paint(root / "JPEGImages" / name, grey)
    path = root / "Annotations/b.xml"
    path.write_text(path.read_text().replace("b.jpg", "b.bmp"))
    dataset = open_dataset(root, "train")
    assert greys(dataset) == {1: 1}
    assert dataset.defects["defect"].tolist() == ["missing image file"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"attributes": ' xmlns="http://example.org/x"'}, "bolt"),
        ({"root": "doc"}, "bolt"),
        ({"head": '<?xml version="1.0" encoding="GBK"?>', "encoding": "gbk"}, "\u7ea2\u706f"),
        ({"head": "<?xml version='1.0' encoding='utf-16'?>", "encoding": "utf-16"}, "\u7ea2\u706f"),
        ({"head": '<?xml version="1.0" encoding="Windows-1252"?>', "encoding": "cp1252"}, "B\u00e4r"),
    ],
    ids=["namespace", "root", "GBK", "UTF-16", "Windows"],
)
def test_xml_of_any_root_namespace_and_declared_encoding_is_read(tmp_path, options, name):
    root, encoding = voc(tmp_path, ["a"]), options.pop("encoding", "utf-8")
    content = xml([(name, CORNERS, "false"), (name.upper(), CORNERS, "True")], filename="a.jpg", **options)
    (root / "Annotations/a.xml").write_bytes(content.encode(encoding))
    dataset = open_dataset(root, "train")
    (category,) = dataset.categories
    assert category.name.casefold() == name.casefold()
    assert dataset.target(0).iscrowd.tolist() == [False, True]
    assert dataset.target(0).difficult.tolist() == [False, True]


def test_names_of_xml_files_may_have_dots_and_capital_extensions(tmp_path):
    root = voc(tmp_path, ["v1.2_a", "b"], listed=["v1.2_a", "B.JPG"])
    (root / "Annotations/b.xml").rename(root / "Annotations/b.XML")
    (root / "ImageSets/Main/train.txt").rename(root / "ImageSets/Main/Train.txt")
    assert sorted(greys(open_dataset(root, "train")).values()) == [1, 2]


def test_voc_splits_may_be_folders(tmp_path):
    for split, grey in (("train", 20), ("valid", 40)):
        paint(tmp_path / split / "a.jpg", grey)
        (tmp_path / split / "a.xml").write_text(xml([("bolt", CORNERS, 0)], filename="a.jpg"))
    assert find_splits(tmp_path) == ["train", "val"]
    assert list(greys(open_dataset(tmp_path, "train")).values()) == [1]
    assert list(greys(open_dataset(tmp_path, "val")).values()) == [2]
    with pytest.raises(InputError, match="splits of this data set: train, val"):
        open_dataset(tmp_path, "test")


def test_voc_boxes_in_shares_are_refused(tmp_path):
    root = voc(tmp_path, ["a"])
    (root / "Annotations/a.xml").write_text(xml([("bolt", (0.1, 0.2, 0.5, 0.6), 0)], filename="a.jpg"))
    with pytest.raises(InputError, match="normalised"):
        open_dataset(root, "train")


# YOLO


def test_yolo_boxes_polygons_and_lists_by_hand(tmp_path):
    paint_all(tmp_path, ["images/train/a.png", "images/train/b.png", "images/val/c.png"])
    (tmp_path / "data.yaml").write_text(
        "path: /home/x/set\ntrain: ../train.txt\nval: images/val\nnames: {0: cat, 1: dog}\n"
    )
    (tmp_path / "train.txt").write_text("./images/train/a.png\n/home/x/set/images/train/b.png\n")
    (tmp_path / "labels/train").mkdir(parents=True)
    lines = ["1 0.5 0.5 0.25 0.2", "0 0.1 0.1 0.6 0.1 0.6 0.5", "0 0.1 0.1", "7 .5 .5 .1 .1", "", "x"]
    (tmp_path / "labels/train/a.txt").write_text("\n".join(lines))
    dataset = open_dataset(tmp_path, "train")
    assert greys(dataset) == {1: 1, 2: 2}
    assert seen(dataset, 0) == [("cat", 4, 3, 20, 12, False), ("dog", 15, 12, 10, 6, False)]
    assert dataset.target(0).segmentations[1][0].tolist() == [[4, 3], [24, 3], [24, 15]]
    assert dataset.target(0).areas.tolist() == [60, 120]
    assert dataset.defects["defect"].tolist() == ["label is no box, polygon or pose"] * 2 + ["unknown category id"]
    assert seen(dataset, 1) == []
    assert find_splits(tmp_path) == ["train", "val"]
    with pytest.raises(InputError, match=r"no image of .* has a file of labels; expected .*labels/val/c\.txt"):
        open_dataset(tmp_path, "val")


@pytest.mark.parametrize(("dims", "numbers", "expected"), [(3, ".25 .5 2 0 0 0", 2), (2, ".25 .5 0 0", 2)])
def test_yolo_keypoints_by_hand(tmp_path, dims, numbers, expected):
    paint(tmp_path / "train/images/a.png", 20)
    (tmp_path / "data.yaml").write_text(f"train: ../train/images\nnames: [cat]\nkpt_shape: [2, {dims}]\n")
    (tmp_path / "train/labels").mkdir()
    (tmp_path / "train/labels/a.txt").write_text(f"0 0.5 0.5 0.5 0.5 {numbers}")
    target = open_dataset(tmp_path, "train").target(0)
    assert target.keypoints.tolist() == [[[10, 15, expected], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("order", "expected"), [("[0, 2, 1]", (("point 2", "point 3"),)), ("[0, 1, 2]", ()), (None, None)]
)
def test_yolo_says_which_points_swap_in_a_mirror(tmp_path, order, expected):
    paint(tmp_path / "train/images/a.png", 20)
    swap = "" if order is None else f"flip_idx: {order}\n"
    (tmp_path / "data.yaml").write_text(f"train: ../train/images\nnames: [cat]\nkpt_shape: [3, 2]\n{swap}")
    (tmp_path / "train/labels").mkdir()
    (tmp_path / "train/labels/a.txt").write_text("0 0.5 0.5 0.5 0.5 .25 .5 .5 .5 .75 .5")
    (category,) = open_dataset(tmp_path, "train").categories
    assert category.flip_pairs == expected


@pytest.mark.parametrize("order", ["[1, 2, 0]", "[0, 1]", "[0, 0, 1]", "swap", "[0, 2, x]"])
def test_yolo_points_that_cannot_swap_so_are_refused(tmp_path, order):
    paint(tmp_path / "train/images/a.png", 20)
    (tmp_path / "data.yaml").write_text(f"train: ../train/images\nnames: [cat]\nkpt_shape: [3, 2]\nflip_idx: {order}\n")
    (tmp_path / "train/labels").mkdir()
    (tmp_path / "train/labels/a.txt").write_text("0 0.5 0.5 0.5 0.5 .25 .5 .5 .5 .75 .5")
    with pytest.raises(InputError, match=r"flip_idx: .* such as"):
        open_dataset(tmp_path, "train")


# What the check says


def test_the_check_lists_what_training_would_use(tmp_path, capsys):
    paint_all(tmp_path, ["train/a.png", "train/b.png"])
    category = CATS[0] | {"keypoints": ["nose"]}
    annotations = [box(1, 1, [30, 20, 40, 40], keypoints=[31, 21, 2]), box(2, 1, A, iscrowd=1), box(3, 2)]
    write(tmp_path / f"{OBJECTS}train.json", [image(1, "a.png"), image(2, "b.png")], annotations, [category])
    (tmp_path / "train/b.png").write_bytes(b"junk")
    assert main(["data", "check", str(tmp_path), "--json", "--images"]) == 0
    (split,) = json.loads(capsys.readouterr().out)["splits"]
    assert (split["num_images"], split["num_objects"], split["objects_per_class"]) == (1, 2, {"cat": 2})
    assert split["classes"] == [{"name": "cat", "keypoints": ["nose"]}]
    objects = [
        {"class": "cat", "bbox": [30, 20, 10, 10], "crowd": False, "keypoints": [31, 21, 2]},
        {"class": "cat", "bbox": A, "crowd": True, "keypoints": [0, 0, 0]},
    ]
    about = {"id": 1, "file": "train/a.png", "width": 40, "height": 30, "captions": []}
    assert split["images"] == [about | {"objects": objects}]
    assert "0 images without objects" in check_dataset(tmp_path).text()
    assert main(["data", "check", str(tmp_path), "--images"]) == 2


@pytest.mark.parametrize(("annotations", "said"), [([], "no object and no"), ([box(1, 1, iscrowd=1)], "but 1 crowds")])
def test_the_check_refuses_where_there_is_nothing_to_learn(tmp_path, annotations, said, capsys):
    paint(tmp_path / "train/a.png", 20)
    write(tmp_path / f"{OBJECTS}train.json", [image(1, "a.png")], annotations)
    assert main(["data", "check", str(tmp_path)]) == 2
    assert said in capsys.readouterr().out
    write(tmp_path / f"{TEXTS}train.json", [image(5, "a.png")], [{"id": 1, "image_id": 5, "caption": "a cat"}])
    assert main(["data", "check", str(tmp_path)]) == 0
    (tmp_path / "train/a.png").write_bytes(b"junk")
    (report,) = check_dataset(tmp_path).splits
    assert "0 usable images" in report.refusal
    assert "train/a.png is not a readable image" in report.refusal


def test_the_check_refuses_a_validation_split_with_a_bad_image_and_names_unseen_classes(tmp_path):
    paint_all(tmp_path, ["train/a.png", "val/b.png", "val/c.png"])
    write_names(tmp_path, ["a.png"])
    write(tmp_path / f"{OBJECTS}val.json", [image(1, "b.png"), image(2, "c.png")], [box(1, 1, A, 2), box(2, 2)])
    report = check_dataset(tmp_path)
    assert report.usable
    assert report.notes == ["objects in val of classes that no object in train has: dog"]
    (tmp_path / "val/c.png").write_bytes(b"junk")
    report = check_dataset(tmp_path)
    assert not report.usable
    assert "1 images of split 'val' cannot be evaluated: " in report.text()
    assert "val/c.png" in report.splits[1].refusal
