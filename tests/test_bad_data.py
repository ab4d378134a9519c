"""Bad data: each defect has its policy, and the check reports what the reader does."""

import json
import math
import shutil
import warnings
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pycocotools import mask as mask_utils

from pix2seq.data.check import check_dataset
from pix2seq.data.dataset import open_dataset
from pix2seq.data.formats.voc import read_voc
from pix2seq.data.image import image_size, read_image, read_record_image
from pix2seq.data.samples import TrainingSet
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError
from pix2seq.evaluation import evaluate
from pix2seq.geometry.polygons import rle_to_mask
from pix2seq.tasks.captioning import Captioning, CaptioningConfig
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.vocab import Vocab

NAN, INF, HUGE_INT = float("nan"), float("inf"), 10**400
IMAGE = {"id": 1, "file_name": "a.png", "width": 40, "height": 30}
CATEGORY = {"id": 7, "name": "cat", "keypoints": ["nose", "tail"]}
NOT_FOUR, NO_AREA, OUTSIDE = "box is not four numbers", "box has no area", "box lies outside the image"
SKIPPED = "skipped in training, refused in evaluation"
SHORT, UNUSABLE = "polygon of fewer than three points or odd length", "polygon with unusable numbers"
BAD_RLE = "bad run-length mask"


def write_coco(root, annotations, images=(IMAGE,), categories=(CATEGORY,), kind="instances"):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "train").mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(root / "train/a.png")
    content = {"images": list(images), "annotations": annotations, "categories": list(categories)}
    (root / "annotations" / f"{kind}_train.json").write_text(json.dumps(content))
    return root


def annotation(**fields):
    return {"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 1, 5, 5]} | fields


def good(number):
    return annotation(id=100 + number, bbox=[1, 2, 3, 4])


def rle(counts, size=(30, 40)):
    return {"size": list(size), "counts": counts}


def read_and_check(root):
    """Open a data set for training, and assert that the check reports the same defects."""
    dataset = open_dataset(root, "train")
    (report,) = check_dataset(root, "train").splits
    of_check = report.defects.to_numpy().tolist()
    assert of_check[: len(dataset.defects)] == dataset.defects.to_numpy().tolist()
    assert len(report.dataset.objects) == len(dataset.objects)
    json.dumps(report.to_json())
    assert_usable(dataset)
    return dataset


def assert_usable(dataset):
    for index in range(len(dataset)):
        target = dataset.target(index)
        x0, y0, x1, y1 = target.boxes_xyxy.T
        assert (x0 >= 0).all()
        assert (y0 >= 0).all()
        assert (x1 > x0).all()
        assert (y1 > y0).all()
        assert (x1 <= target.image.width).all()
        assert (y1 <= target.image.height).all()
        assert (target.areas > 0).all()
        assert np.isfinite(target.areas).all()
        assert np.isfinite(target.keypoints).all()
        for segmentation in target.segmentations:
            if isinstance(segmentation, dict):
                assert rle_to_mask(segmentation).shape == (target.image.height, target.image.width)
            else:
                assert all(len(ring) >= 3 and np.isfinite(ring).all() for ring in segmentation or ())


CASES = [
    ({"id": value}, "no annotation id", "one was given")
    for value in (None, "", [1], {"a": 1}, True, 1.5, INF, NAN, HUGE_INT)
]
CASES += [
    ({"image_id": value}, "unknown image id", "dropped")
    for value in (9, None, "9", "a", [1], {"a": 1}, True, INF, HUGE_INT)
]
CASES += [
    ({"category_id": value}, "unknown category id", "dropped")
    for value in (9, None, "9", "cat", [1], True, INF, NAN, HUGE_INT)
]
CASES += [
    ({"bbox": value}, NOT_FOUR, "dropped")
    for value in ([], [1, 2, 3], [1, 2, 3, 4, 5], "abcd", 5, {"x": 1}, [[1], 2, 3, 4], [None] * 4)
]
CASES += [({"bbox": [1, 1, value, 5]}, NOT_FOUR, "dropped") for value in (NAN, INF, -INF, HUGE_INT)]
CASES += [({"bbox": value}, "box is absurdly large", "dropped") for value in ([1e9] * 4, [-1e9, 0, 2e9, 5])]
CASES += [
    # The last two have an area, but not in the single precision in which boxes are stored.
    ({"bbox": value}, NO_AREA, "dropped")
    for value in ([0] * 4, [1, 1, 0, 5], [1, 1, 5, -5], [35, 1, 1e-7, 5], [1, 29, 5, 1e-9])
]
CASES += [({"bbox": value}, OUTSIDE, "dropped") for value in ([40, 0, 5, 5], [-5, -5, 5, 5], [0, 30, 9, 9])]
CASES += [({"bbox": value}, "box reaches outside the image", "clipped") for value in ([-9, -9, 99, 99], [30, 1, 20, 5])]
CASES += [
    ({"segmentation": value}, SHORT, "part left out")
    for value in (
        [[]],
        [[1, 1]],
        [[1, 1, 5, 1]],
        [[1, 1, 5, 1, 5]],
        [[1, 1, 5, 1, 5, 5, 1]],
        [1, 1, 5, 1, 5, 5],
        [None],
    )
]
CASES += [
    ({"segmentation": [[value, 1, 5, 1, 5, 5]]}, UNUSABLE, "part left out") for value in (NAN, INF, 1e9, HUGE_INT, "a")
]
CASES += [
    ({"segmentation": rle(counts)}, BAD_RLE, "mask left out")
    # Too few, too many, none, negative, not numbers; compressed ones cut off, with other characters, too long.
    for counts in ([3, 4], [1300], [], [-1, 1201], ["a"], [600.0, 600.0], [HUGE_INT], None, 5)
    + ("", "T", "zzzz", "\x00\x01", "é", "0" * 50, "ooooooooo0", "PPPP")
]
CASES += [
    ({"segmentation": rle([600, 600], size)}, BAD_RLE, "mask left out")
    for size in ((40, 30), (30,), (30, 41), ("x", 40), (0, 0))
]
CASES += [({"segmentation": value}, BAD_RLE, "mask left out") for value in ({}, {"counts": [1200]}, {"size": [30, 40]})]
CASES += [
    ({"segmentation": value}, "segmentation is neither polygons nor run lengths", "mask left out") for value in ("x", 5)
]
CASES += [
    ({"keypoints": value}, "bad keypoints", "left out")
    for value in ([1], [1, 1, 2, 5, 5], "abc", {"a": 1}, [[1, 1, 2], [3, 3, 2]], [NAN] * 6, [1e9] * 6, [HUGE_INT] * 6)
]
CASES += [({"bbox": [0] * 4, "segmentation": [[2, 3, 9, 3, 9, 9]]}, "no box", "rebuilt from mask or keypoints")]
CASES += [({"bbox": None, "keypoints": [2, 3, 2, 9, 9, 1]}, "no box", "rebuilt from mask or keypoints")]


@pytest.mark.parametrize(("fields", "defect", "action"), CASES, ids=lambda value: str(value)[:50])
def test_each_defect_of_an_annotation_has_its_policy(tmp_path, fields, defect, action):
    dataset = read_and_check(write_coco(tmp_path, [good(0), annotation(**fields), good(1)]))
    assert dataset.defects[["defect", "action"]].to_numpy().tolist() == [[defect, action]]
    target = dataset.target(0)
    assert len(target.labels) == (2 if action == "dropped" else 3)
    if "left out" in action:
        assert target.segmentations[1] is None
        assert not target.keypoints[1].any()


CASES += [({"iscrowd": value}, "iscrowd is neither 0 nor 1", "read as 0") for value in (2, -1, "maybe", [0], NAN)]


@pytest.mark.parametrize("area", [0, -5, NAN, INF, HUGE_INT, "x", "nan", [1], None])
def test_an_unusable_area_is_replaced_by_that_of_the_box(tmp_path, area):
    target = read_and_check(write_coco(tmp_path, [annotation(area=area)])).target(0)
    assert target.areas.tolist() == [25]


def test_valid_rles_are_returned_as_written(tmp_path):
    compressed = mask_utils.encode(np.asfortranarray(np.eye(30, 40, dtype=np.uint8)))["counts"].decode()
    masks = [rle([600, 600]), rle(compressed)]
    annotations = [annotation(id=i, segmentation=mask) for i, mask in enumerate(masks)]
    assert list(read_and_check(write_coco(tmp_path, annotations)).target(0).segmentations) == masks


@pytest.mark.parametrize(
    ("image", "defect", "action"),
    [
        (5, "image without id or file_name", "dropped"),
        ({}, "image without id or file_name", "dropped"),
        (IMAGE | {"id": ""}, "image without id or file_name", "dropped"),
        (IMAGE | {"id": [2]}, "image without id or file_name", "dropped"),
        (IMAGE | {"id": HUGE_INT}, "image without id or file_name", "dropped"),
        (IMAGE | {"id": 2, "file_name": None}, "image without id or file_name", "dropped"),
        (IMAGE, "duplicate image id", "dropped"),
        (IMAGE | {"id": 2, "file_name": "gone.png"}, "missing image file", "dropped"),
        (IMAGE | {"id": 2, "file_name": ""}, "missing image file", "dropped"),
        (IMAGE | {"id": 2, "file_name": "folder.png"}, "missing image file", "dropped"),
        (IMAGE | {"id": 2, "file_name": "x/\0.png"}, "missing image file", "dropped"),
        (IMAGE | {"id": 2, "file_name": "\ud800/\ud800"}, "missing image file", "dropped"),
        (IMAGE | {"id": 2, "file_name": "../outside.png"}, "missing image file", "dropped"),
        (IMAGE | {"id": 2, "file_name": "junk.png", "width": None}, "unreadable image", "dropped"),
        *[
            (IMAGE | {"id": 2, "file_name": "b.png", "width": width}, "no width and height", "read from the file")
            for width in (0, -4, NAN, INF, HUGE_INT, 1e9, "x", None, 0.5)
        ],
    ],
    ids=lambda value: str(value)[:60],
)
def test_each_defect_of_an_image_has_its_policy(tmp_path, image, defect, action):
    root = write_coco(tmp_path / "data", [good(0), annotation(image_id=2)], [IMAGE, image])
    Image.new("RGB", (40, 30)).save(tmp_path / "outside.png")
    (root / "train/junk.png").write_bytes(b"junk")
    (root / "train/folder.png").mkdir()
    shutil.copy(root / "train/a.png", root / "train/b.png")
    dataset = read_and_check(root)
    of_images = dataset.defects[dataset.defects["annotation_id"].isna()]
    assert of_images[["defect", "action"]].to_numpy().tolist() == [[defect, action]]
    assert [(i.width, i.height) for i in dataset.images] == [(40, 30)] * (1 if action == "dropped" else 2)


def test_a_wrong_size_and_a_rotated_image_are_distinguished(tmp_path):
    sizes = {"same": (40, 30), "swapped": (30, 40), "other": (41, 30), "turned": (40, 30), "upright": (30, 40)}
    images = [
        {"id": number, "file_name": f"{name}.jpg", "width": width, "height": height}
        for number, (name, (width, height)) in enumerate(sizes.items())
    ]
    root = write_coco(tmp_path, [], images)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in sizes:
        turned = {"exif": exif} if name in ("turned", "upright") else {}
        Image.new("RGB", (40, 30)).save(root / "train" / f"{name}.jpg", **turned)
    read_and_check(root)
    found = check_dataset(root, "train").splits[0].defects
    assert found[["image", "defect", "action"]].to_numpy().tolist() == [
        [1, "size disagrees with the annotations", SKIPPED],
        [2, "size disagrees with the annotations", SKIPPED],
        [3, "sides swapped by EXIF orientation", "read as stored"],
    ]
    assert image_size(root / "train/turned.jpg") == (30, 40)
    assert image_size(root / "train/turned.jpg", upright=False) == (40, 30)


def test_the_check_names_the_images_that_cannot_be_decoded(shared, tmp_path):
    names = sorted(path.name for path in (shared / "data/odd/damaged").iterdir())
    images = [IMAGE | {"id": number, "file_name": name} for number, name in enumerate(names)]
    root = write_coco(tmp_path, [], [*images, IMAGE | {"id": 99}])
    for name in names:
        shutil.copy(shared / "data/odd/damaged" / name, root / "train" / name)
    refused = []
    for number, name in enumerate(names):
        try:
            read_image(root / "train" / name)
        except InputError:
            refused.append(number)
    assert 4 <= len(refused) < len(names)
    read_and_check(root)
    defects = check_dataset(root, "train").splits[0].defects
    unreadable = defects[defects["defect"] == "unreadable image"]
    assert unreadable["image"].tolist() == refused
    assert set(unreadable["action"]) == {SKIPPED}


def training_set(dataset, **options):
    task = Detection(DetectionConfig(max_objects=4), Vocab(num_bins=32, size=1040), dataset.categories)
    return TrainingSet(dataset, task, size=(32, 32), augment=AugmentConfig(enabled=False), seed=0, **options)


def write_images_some_bad(root, num_good):
    """Write images with one box each; the last four are bad, which only decoding shows."""
    images = [IMAGE | {"id": i, "file_name": f"{i}.png"} for i in range(num_good + 4)]
    write_coco(root, [annotation(id=100 + i, image_id=i) for i in range(len(images))], images)
    for i in range(num_good):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(root / f"train/{i}.png")
    cut = root / f"train/{num_good}.png"
    Image.effect_noise((40, 30), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:500])
    (root / f"train/{num_good + 1}.png").write_bytes(b"junk")
    Image.new("RGB", (80, 60)).save(root / f"train/{num_good + 2}.png")
    Image.new("RGB", (30, 40)).save(root / f"train/{num_good + 3}.png")
    return root


def test_training_skips_what_the_check_names_and_evaluation_refuses_it(tmp_path):
    root = write_images_some_bad(tmp_path, 8)
    dataset = read_and_check(root)
    defects = check_dataset(root, "train").splits[0].defects
    assert defects["image"].tolist() == [8, 9, 10, 11]
    assert set(defects["action"]) == {SKIPPED}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples = training_set(dataset)
        shown = [samples[epoch, index].image_id for epoch in range(2) for index in range(len(samples))]
    assert shown == [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0] * 2
    assert len(caught) == 4  # one per bad image
    assert all(f"{i}.png" in str(warning.message) for i, warning in zip((8, 9, 10, 11), caught, strict=True))
    for image in dataset.images[8:]:
        with pytest.raises(InputError, match=image.path.name):
            read_record_image(image)

    class Encoder:
        tasks = MappingProxyType({"captioning": Captioning(CaptioningConfig(), Vocab(), ())})
        model = SimpleNamespace(categories=())

        def require(self, name): ...

        def encode_batch(self, images):
            raise AssertionError("a bad image was accepted")

    with pytest.raises(InputError, match=r"8\.png cannot be decoded"):
        evaluate(Encoder(), dataset, ["captioning"])


def test_training_stops_after_too_many_bad_images(tmp_path):
    images = [IMAGE | {"id": i, "file_name": f"{i}.png"} for i in range(40)]
    root = write_coco(tmp_path, [annotation(id=100 + i, image_id=i) for i in range(40)], images)
    for i in range(40):
        Image.new("RGB", (40, 30) if i % 3 else (30, 30)).save(root / f"train/{i}.png")
    dataset = open_dataset(root, "train", max_bad_share=0.25)

    def run(max_bad_share):
        samples = training_set(dataset, max_bad_share=max_bad_share)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return [samples[0, index].image_id for index in range(40)]

    assert len(run(0.36)) == 40  # 14 of 40 are bad, and after ten bad ones their share is never above 0.36
    with pytest.raises(InputError, match=r"10 of 28 images .* The first ten: image 0: .*0\.png is 30x30") as caught:
        run(0.25)
    assert "\n" not in str(caught.value)
    assert check_dataset(root, max_bad_share=0.36).usable
    report = check_dataset(root, max_bad_share=0.25)
    assert not report.usable
    assert "14 of 40 images" in report.splits[0].refusal


def test_training_ends_without_a_readable_image(tmp_path):
    dataset = open_dataset(write_coco(tmp_path, [annotation()]), "train")
    (tmp_path / "train/a.png").write_bytes(b"junk")
    samples = training_set(dataset)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(InputError, match="no readable image"):
        samples[0, 0]


def test_boxes_of_a_tool_that_ignored_exif_fit_the_pixels_as_stored(tmp_path):
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[5:10, 20:40] = 200
    exif = Image.Exif()
    exif[0x0112] = 6
    root = write_coco(tmp_path, [annotation(bbox=[20, 5, 20, 5])])
    Image.fromarray(pixels).save(root / "train/a.png", exif=exif)
    dataset = read_and_check(root)
    np.testing.assert_array_equal(read_record_image(dataset.images[0]), pixels)
    np.testing.assert_array_equal(training_set(dataset)[0, 0].image[5:7, 18:30], 200)  # at 0.8 of the size
    upright = Image.open(root / "train/a.png")
    assert ImageOps.exif_transpose(upright).size == (30, 40)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([1], "category without an id and a name"),
        ([{"id": 7}], "category without an id and a name"),
        ([{"id": [7], "name": "cat"}], "category without an id and a name"),
        (
            [{"id": 7, "name": "cat"}, {"id": 7, "name": "dog"}],
            "category id 7 to 'dog', but 'cat' has it already",
        ),
        ([{"id": 7, "name": "cat", "keypoints": 5}], "unreadable keypoints, skeleton or flip_pairs"),
        ([{"id": 7, "name": "cat", "skeleton": [1]}], "unreadable keypoints, skeleton or flip_pairs"),
        ([], "has no categories"),
    ],
)
def test_ambiguous_categories_are_refused(tmp_path, categories, message):
    root = write_coco(tmp_path, [good(0)], categories=categories)
    with pytest.raises(InputError, match=message):
        open_dataset(root, "train")
    with pytest.raises(InputError, match=message):
        check_dataset(root)


def test_a_bone_to_an_unknown_keypoint_is_left_out(tmp_path):
    bones = [[1, 2], [0, 1], [2, 3]]
    dataset = read_and_check(write_coco(tmp_path, [good(0)], categories=[CATEGORY | {"skeleton": bones}]))
    assert dataset.categories[0].skeleton == ((0, 1),)
    assert dataset.defects["defect"].tolist() == ["skeleton names an unknown keypoint"]


def test_empty_captions_are_dropped_and_counted(tmp_path):
    texts = [" a  cat\n", "", " \n", None, 5, "half a pair \ud800"]
    entries = [{"id": i, "image_id": 1, "caption": text} for i, text in enumerate(texts)]
    entries += [{"id": 8, "image_id": 2, "caption": "x"}, {"id": 9, "image_id": [1], "caption": "x"}, 5]
    dataset = read_and_check(write_coco(tmp_path, entries, kind="captions"))
    assert dataset.target(0).captions == ("a cat", "half a pair ?")
    assert dataset.defects[["annotation_id", "defect"]].to_numpy().tolist() == [
        *[[number, "empty caption"] for number in (1, 2, 3, 4)],
        *[[number, "unknown image id"] for number in (8, 9, None)],
    ]


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[1]", b"\0" * 50, b"<html>", b"version https://git-lfs", b"[" * 99999]
)
def test_a_file_that_is_not_coco_json_is_refused_in_one_line(tmp_path, content):
    root = write_coco(tmp_path, [])
    (root / "annotations/instances_train.json").write_bytes(content)
    for open_it in (lambda: open_dataset(root, "train"), lambda: check_dataset(root)):
        with pytest.raises(InputError, match=r"instances_train\.json") as caught:
            open_it()
        assert "\n" not in str(caught.value)


def test_a_file_in_another_encoding_is_refused_and_a_byte_order_mark_is_not(tmp_path):
    root = write_coco(tmp_path, [good(0)])
    path = root / "annotations/instances_train.json"
    text = path.read_text()
    path.write_bytes(text.encode("utf-8-sig"))
    assert len(read_and_check(root).objects) == 1
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(InputError, match="cannot be read as JSON"):
        open_dataset(root, "train")


# Too many defects


def test_mostly_bad_annotations_are_refused_with_the_first_ten_named(tmp_path):
    bad = [annotation(id=i, bbox=[1, 1, 0, 0]) for i in range(12)]
    root = write_coco(tmp_path, bad + [good(i) for i in range(11)])
    with pytest.raises(InputError, match=r"12 of 23 annotations .* cannot be used") as caught:
        open_dataset(root, "train")
    message = str(caught.value)
    assert "\n" not in message
    assert "annotation 9: box has no area" in message
    assert "annotation 10" not in message
    assert len(open_dataset(root, "train", max_bad_share=0.6).objects) == 11

    report = check_dataset(root)
    assert not report.usable
    assert len(report.splits[0].defects) == 12
    assert message in report.text()
    assert report.to_json()["splits"][0]["refused"] == message


def test_half_of_a_data_set_or_a_few_entries_may_be_bad(tmp_path):
    bad = [annotation(id=i, image_id=99) for i in range(12)]
    assert len(read_and_check(write_coco(tmp_path, bad + [good(i) for i in range(12)])).objects) == 12
    assert len(read_and_check(write_coco(tmp_path, bad[:9])).objects) == 0


def test_mostly_missing_images_are_refused_and_their_annotations_are_not_counted_twice(tmp_path):
    lost = [IMAGE | {"id": i, "file_name": f"{i}.png"} for i in range(10, 30)]
    here = [IMAGE | {"id": i, "file_name": f"{i}.png"} for i in range(30, 50)]
    (tmp_path / "train").mkdir()
    for image in here:
        Image.new("RGB", (40, 30)).save(tmp_path / "train" / image["file_name"])
    annotations = [annotation(id=i, image_id=10 + i % 20) for i in range(100)]
    dataset = read_and_check(write_coco(tmp_path, annotations, lost + here))
    assert len(dataset) == 20
    root = write_coco(tmp_path, annotations, lost + here[:19])
    with pytest.raises(InputError, match=r"20 of 39 images .* image 19: missing image file$"):
        open_dataset(root, "train")
    assert not check_dataset(root).usable


def test_a_data_set_of_only_unusable_images_is_refused(tmp_path):
    root = write_coco(tmp_path, [], [IMAGE | {"id": [1]}])
    with pytest.raises(InputError, match=r"none of the 1 images .* image \[1\]: image without id or file_name"):
        open_dataset(root, "train")


def test_mostly_bad_captions_are_refused(tmp_path):
    entries = [{"id": i, "image_id": 1, "caption": "" if i < 11 else "a cat"} for i in range(20)]
    with pytest.raises(InputError, match="11 of 20 captions"):
        open_dataset(write_coco(tmp_path, entries, kind="captions"), "train")


# Random data

NUMBERS = st.one_of(st.integers(-50, 50), st.floats(), st.sampled_from([HUGE_INT, 1e9, 2**63, 0.0]))
MASKS = st.dictionaries(
    st.sampled_from(["size", "counts"]), st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3), st.text(max_size=4))
)
ANYTHING = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=4), st.lists(NUMBERS, max_size=7), MASKS)
FIELDS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints", "caption")
ENTRIES = st.one_of(
    ANYTHING,
    st.dictionaries(st.sampled_from(FIELDS), st.one_of(ANYTHING, st.lists(ANYTHING, max_size=3))).map(
        lambda f: annotation() | f
    ),
)
IMAGES = st.one_of(
    ANYTHING, st.dictionaries(st.sampled_from(sorted(IMAGE)), ANYTHING).map(lambda fields: IMAGE | {"id": 2} | fields)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(ENTRIES, max_size=6),
    st.lists(ENTRIES, max_size=3),
    st.lists(ENTRIES, max_size=3),
    st.lists(IMAGES, max_size=3),
)
def test_any_data_set_is_usable_or_refused(tmp_path, objects, people, captions, images):
    try:
        for kind, entries in (("instances", objects), ("person_keypoints", people), ("captions", captions)):
            write_coco(tmp_path, entries, [IMAGE, *images], kind=kind)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            dataset = open_dataset(tmp_path, "train")
    except InputError:
        return
    assert_usable(dataset)
    dropped = (dataset.defects["action"] == "dropped").sum()
    assert len(dataset.objects) + dropped <= len(objects) + len(people) + len(captions) + 3 * len(images)


# Pascal VOC


def voc_object(corners, name="cat"):
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"


def write_voc(root, objects, size=(40, 30), names="a\n"):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(root / "JPEGImages/a.jpg")
    (root / "ImageSets/Main/train.txt").write_text(names)
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    (root / "Annotations/a.xml").write_text(f"<annotation>{sides}{''.join(objects)}</annotation>")
    return root


@pytest.mark.parametrize(
    ("corners", "defect", "action"),
    [
        (("nan", 1, 5, 5), NOT_FOUR, "dropped"),
        ((1, 1, "inf", "inf"), NOT_FOUR, "dropped"),
        (("", "", "", ""), NOT_FOUR, "dropped"),
        (("1,5", 1, 5, 5), NOT_FOUR, "dropped"),
        ((1e9, 1, 2e9, 5), "box is absurdly large", "dropped"),
        ((5, 5, 5, 9), NO_AREA, "dropped"),
        ((9, 9, 5, 5), NO_AREA, "dropped"),
        ((50, 1, 60, 5), OUTSIDE, "dropped"),
        ((-10, 1, 60, 5), "box reaches outside the image", "clipped"),
    ],
)
def test_each_defect_of_a_voc_box_has_its_policy(tmp_path, corners, defect, action):
    dataset = read_and_check(write_voc(tmp_path, [voc_object((1, 1, 20, 10)), voc_object(corners)]))
    assert dataset.defects[["defect", "action"]].to_numpy().tolist() == [[defect, action]]
    assert len(dataset.target(0).labels) == (1 if action == "dropped" else 2)


@pytest.mark.parametrize(
    "size", [("inf", 30), ("nan", 30), (0, 30), (0.5, 30), (-1, 30), (1e9, 30), ("", ""), ("x", 30)]
)
def test_an_unusable_voc_size_is_read_from_the_image(tmp_path, size):
    dataset = read_and_check(write_voc(tmp_path, [voc_object((1, 1, 20, 10))], size))
    assert (dataset.images[0].width, dataset.images[0].height) == (40, 30)
    assert dataset.defects["defect"].tolist() == ["no width and height"]


def test_voc_names_listed_twice_or_without_files_are_dropped(tmp_path):
    root = write_voc(tmp_path, [voc_object((1, 1, 20, 10))], names="a 1\nb -1\na 1\nc\n")
    shutil.copy(root / "Annotations/a.xml", root / "Annotations/c.xml")
    (root / "JPEGImages/a.txt").touch()  # not an image by its suffix
    dataset = read_and_check(root)
    assert [image.path.name for image in dataset.images] == ["a.jpg"]
    found = dataset.defects[["defect", "action"]].to_numpy().tolist()
    kinds = ("missing annotation file", "duplicate image id", "missing image file")
    assert found == [[kind, "dropped"] for kind in kinds]


def test_voc_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    root = write_voc(tmp_path, [voc_object((1, 1, 20, 10))])
    path = root / "Annotations/a.xml"
    text = path.read_text()
    path.write_bytes(text.encode("utf-8-sig"))
    assert len(read_and_check(root).objects) == 1
    bomb = '<!DOCTYPE a [<!ENTITY b "cc">]>'
    for content, message in (
        (text[:80].encode(), "not readable XML"),
        (b"", "not readable XML"),
        (b'<?xml version="1.0" encoding="nonsense"?>' + text.encode(), "unknown encoding"),
        (b'<?xml version="1.0" encoding="ascii"?>' + text.replace("cat", "\u00e4").encode(), "not in the encoding"),
        (text.replace("cat", "\u00e4").encode("latin-1"), "not in UTF-8"),
        (b'<?xml version="1.0" encoding="utf-7"?>' + (bomb + text).encode("utf-7"), "XML entities"),
        ((bomb + text).encode(), "XML entities"),
        ((bomb + text).encode("utf-16"), "XML entities"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            open_dataset(root, "train")
        assert "a.xml" in str(caught.value)
    path.write_text(text)
    (root / "ImageSets/Main/train.txt").write_bytes("a\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"train\.txt cannot be read"):
        open_dataset(root, "train")


def test_a_voc_object_without_a_name_is_dropped(tmp_path):
    dataset = read_and_check(write_voc(tmp_path, [voc_object((1, 1, 20, 10)), voc_object((1, 1, 9, 9), name=" ")]))
    assert dataset.defects[["defect", "action"]].to_numpy().tolist() == [["object without a name", "dropped"]]
    assert len(dataset.target(0).labels) == 1


def test_mostly_bad_voc_objects_are_refused(tmp_path):
    objects = [voc_object((5, 5, 5, 9))] * 11 + [voc_object((1, 1, 20, 10))] * 10
    root = write_voc(tmp_path, objects)
    with pytest.raises(InputError, match=r"11 of 21 annotations"):
        open_dataset(root, "train")
    assert not check_dataset(root).usable
    assert len(read_voc(root, "train", max_bad_share=1).objects) == 10
    assert math.isclose(read_voc(root, "train", max_bad_share=1).objects["area"].sum(), 2000)
