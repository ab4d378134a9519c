"""Images and annotations, against Pillow, pycocotools and files written by hand."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pycocotools.coco import COCO

import pix2seq.data.image as image_module
from pix2seq.data.check import check_dataset
from pix2seq.data.dataset import find_splits, labels_by_name, open_dataset
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.formats.voc import read_voc
from pix2seq.data.image import _strict_loading, image_size, read_image
from pix2seq.errors import InputError
from pix2seq.types import Category

# Images


def manifest(shared):
    lines = (shared / "data/odd/manifest.tsv").read_text().splitlines()
    names = lines[0].split("\t")
    return [dict(zip(names, line.split("\t"), strict=False)) for line in lines[1:]]


def test_odd_images_are_read_upright_and_completely(shared):
    for row in manifest(shared):
        path = shared / "data/odd" / row["path"]
        if row["path"].startswith("damaged/") and "mpo" not in row["path"] and "junk" not in row["path"]:
            with pytest.raises(InputError, match=path.name):
                read_image(path)
            continue
        pixels = read_image(path)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        assert image_size(path) == (pixels.shape[1], pixels.shape[0])
        if row["mode"] == "RGB":
            reference = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            np.testing.assert_array_equal(pixels, np.asarray(reference), err_msg=row["path"])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_the_same(tmp_path, orientation):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0], upright[3, 5] = (255, 0, 0), (0, 0, 255)
    undo = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
            5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
            8: lambda a: np.rot90(a, -1)}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo(upright))).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), upright)
    assert image_size(tmp_path / "a.png") == (6, 4)


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.fixture
def turbo():
    pytest.importorskip("simplejpeg")
    decode = image_module._turbo()
    assert decode is not None  # its pixels equal Pillow's
    return decode


def both_ways(source, monkeypatch, turbo):
    """Read an image with simplejpeg and without: pixels or the error, and how often simplejpeg decoded."""
    found, decoded = [], []
    for decode in (lambda content: decoded.append(turbo(content)) or decoded[-1], None):
        monkeypatch.setattr(image_module, "_turbo", lambda decode=decode: decode)
        try:
            found.append(read_image(source))
        except InputError as error:
            found.append(str(error))
    return *found, len(decoded)


def test_the_turbo_decoder_changes_no_pixel_and_no_error(shared, monkeypatch, turbo):
    paths = sorted((shared / "data").glob("odd/*/*.jpg")) + sorted((shared / "data/coco_mini/val2017").iterdir())
    times = 0
    for path in paths:
        ours, theirs, decoded = both_ways(path, monkeypatch, turbo)
        np.testing.assert_array_equal(ours, theirs, err_msg=str(path))
        times += decoded
    assert len(paths) - 10 < times < len(paths)  # not the CMYK image and the damaged ones


@given(st.data())
def test_the_turbo_decoder_agrees_on_any_jpeg(data):
    turbo = image_module._turbo()
    if turbo is None:
        pytest.skip("simplejpeg is not installed")
    draw = data.draw
    width, height = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = (height, width, 3) if draw(st.booleans()) else (height, width)
    options = {"quality": draw(st.integers(1, 100)), "progressive": draw(st.booleans())}
    options |= draw(st.sampled_from([{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"keep_rgb": True}]))
    content = encoded(Image.fromarray(rng.integers(0, 256, shape, np.uint8)), "JPEG", **options)
    content = content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content
    with pytest.MonkeyPatch.context() as monkeypatch:
        ours, theirs, _ = both_ways(content, monkeypatch, turbo)
    np.testing.assert_array_equal(ours, theirs)


def test_wide_greys_alpha_and_palettes_become_8_bit_rgb():
    grey16 = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert read_image(encoded(grey16))[0, :, 0].tolist() == [0, 1, 255]
    clear = Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0]]], np.uint8))
    assert read_image(encoded(clear))[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert read_image(encoded(palette))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert read_image(encoded(palette, transparency=1))[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert read_image(np.array([[7]], np.uint8)).tolist() == [[[7, 7, 7]]]


def test_unusable_images_give_an_error_of_one_line(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.effect_noise((64, 64), 60).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    cases = {
        "nowhere.jpg": "does not exist",
        "text.jpg": "not a readable image",
        "empty.png": "not a readable image",
        "cut.jpg": "(?i)truncated",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
    with pytest.raises(InputError, match="folder"):
        read_image(tmp_path)
    with pytest.raises(InputError, match="limit is 100"):
        read_image(encoded(Image.new("RGB", (20, 20))), max_pixels=100)
    with pytest.raises(InputError, match="expected an array"):
        read_image(np.zeros((2, 2), np.float32))


def test_a_truncated_image_is_refused_even_if_pillow_would_accept_it(tmp_path, monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encoded(Image.effect_noise((64, 64), 50))
    with pytest.raises(InputError, match="damaged"):
        read_image(whole[: len(whole) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_flag_of_pillow_is_restored_whichever_thread_leaves_last(monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with _strict_loading:
        with _strict_loading:
            assert not ImageFile.LOAD_TRUNCATED_IMAGES
        assert not ImageFile.LOAD_TRUNCATED_IMAGES  # the first thread is still inside
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("format", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"])
def test_eight_formats_are_opened(tmp_path, format):
    path = tmp_path / "image"
    Image.new("RGB", (30, 20), (200, 100, 50)).save(path, format)
    pixels = read_image(path)
    assert pixels.shape == (20, 30, 3)
    assert np.abs(pixels.reshape(-1, 3).mean(0) - (200, 100, 50)).max() < 6
    assert image_size(path) == (30, 20)


@pytest.mark.parametrize(
    "format", ["PPM", "PCX", "TGA", "SGI", "IM", "DDS", "ICO", "ICNS", "JPEG2000", "SPIDER", "EPS"]
)
def test_no_other_format_is_opened(tmp_path, format):
    path = tmp_path / "holiday.jpg"
    mode = "F" if format == "SPIDER" else "RGB"
    Image.new(mode, (64, 64)).save(tmp_path / "image.odd", format)  # Pillow gives SPIDER the suffix of this file
    (tmp_path / "image.odd").rename(path)
    for read in (read_image, image_size):
        with pytest.raises(InputError, match="expected JPEG, MPO, PNG, WebP, TIFF, BMP, GIF or AVIF"):
            read(path)


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    path = tmp_path / "bomb.png"
    monkeypatch.setattr(Image.Image, "load", lambda *args: pytest.fail("it was decoded"))
    for side in (13_000, 40_000):  # the second is more than Pillow itself opens
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        rows = chunk(b"IDAT", zlib.compress(bytes(10**6)))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b""))
        with pytest.raises(InputError, match=r"limit (is|of) 134217728"):
            read_image(path)


def test_what_is_no_image_is_told_in_a_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for source in (
        tmp_path / "pipe.png",
        "/dev/zero",
        "x" * 5000,
        "nul\0",
        "",
        None,
        5,
        [1],
        {},
        np.zeros((2, 2, 5), np.uint8),
    ):
        with pytest.raises(InputError) as caught:
            read_image(source)
        assert "\n" not in str(caught.value)


def test_pixels_that_are_no_numbers_are_refused(tmp_path):
    values = np.full((4, 4), 0.5, np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").tolist() == [[[128] * 3] * 4] * 4
    for number in (NAN, float("inf")):
        values[1, 2] = number
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(InputError, match="no finite numbers"):
            read_image(tmp_path / "a.tif")


def test_an_image_that_a_user_opened_is_decoded_as_strictly(tmp_path):
    content = encoded(Image.effect_noise((64, 64), 50))
    with pytest.raises(InputError, match="cannot be decoded"):
        read_image(Image.open(io.BytesIO(content[: len(content) // 2])))


# COCO


def test_coco_mini_is_read_as_by_pycocotools(shared, capsys):
    root = shared / "data/coco_mini"
    dataset = read_coco(root, "val")
    coco = COCO(root / "annotations/instances_val2017.json")
    people = COCO(root / "annotations/person_keypoints_val2017.json")
    texts = COCO(root / "annotations/captions_val2017.json")
    assert len(dataset) == len(coco.imgs) == 40
    assert not len(dataset.defects)
    for index in range(len(dataset)):
        target = dataset.target(index)
        theirs = {a["id"]: a for a in coco.imgToAnns[target.image.id]}
        assert set(target.annotation_ids.tolist()) == set(theirs)
        for i, annotation_id in enumerate(target.annotation_ids.tolist()):
            annotation = theirs[annotation_id]
            x, y, w, h = annotation["bbox"]
            np.testing.assert_allclose(target.boxes_xyxy[i], [x, y, x + w, y + h], atol=0.51)
            assert target.labels[i] == annotation["category_id"]  # COCO's ids are the official labels
            assert target.areas[i] == pytest.approx(annotation["area"], rel=1e-5)
            assert target.iscrowd[i] == annotation["iscrowd"]
            segmentation = target.segmentations[i]
            if annotation["iscrowd"]:
                assert segmentation == annotation["segmentation"]
            else:
                assert [r.ravel().tolist() for r in segmentation] == [
                    pytest.approx(p) for p in annotation["segmentation"]
                ]
            expected = people.anns[annotation_id]["keypoints"] if annotation_id in people.anns else [0] * 51
            np.testing.assert_allclose(target.keypoints[i].ravel(), expected)
        assert list(target.captions) == [" ".join(a["caption"].split()) for a in texts.imgToAnns[target.image.id]]


def write_coco(root, annotations, images=None, categories=None, split="train", kind="instances"):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    images = images if images is not None else [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}]
    for image in images:
        Image.new("RGB", (40, 30)).save(root / split / str(image.get("file_name", "x.png")))
    content = {"images": images, "annotations": annotations}
    content["categories"] = categories or [{"id": 7, "name": "cat"}]
    (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))
    return root


def box(bbox, **more):
    return {"id": more.pop("id", 1), "image_id": 1, "category_id": 7, "bbox": bbox} | more


NAN = float("nan")
SHORT = "polygon of fewer than three points or odd length"


@pytest.mark.parametrize(
    ("annotation", "defect", "action"),
    [
        (box([NAN, 1, 5, 5]), "box is not four numbers", "dropped"),
        (box([1, 1, float("inf"), 5]), "box is not four numbers", "dropped"),
        (box([1, 1, 5]), "box is not four numbers", "dropped"),
        (box("large"), "box is not four numbers", "dropped"),
        (box([1e9, 1, 5, 5]), "box is absurdly large", "dropped"),
        (box([1, 1, 0, 5]), "box has no area", "dropped"),
        (box([1, 1, -3, 5]), "box has no area", "dropped"),
        (box([50, 1, 5, 5]), "box lies outside the image", "dropped"),
        (box([30, 20, 20, 20]), "box reaches outside the image", "clipped"),
        (box([1, 1, 5, 5], segmentation=[[1, 1, 5, 5]]), SHORT, "part left out"),
        (box([1, 1, 5, 5], segmentation=[[1, 1, 5, 5, 1, 5, 2]]), SHORT, "part left out"),
        (box([1, 1, 5, 5], segmentation=[[1, 1, 5, 5, 1, NAN]]), "polygon with unusable numbers", "part left out"),
        (box([1, 1, 5, 5], segmentation={"size": [30, 40], "counts": [3, 4]}), "bad run-length mask", "mask left out"),
        (box([1, 1, 5, 5], category_id=9), "unknown category id", "dropped"),
        (box([1, 1, 5, 5], image_id=9), "unknown image id", "dropped"),
        (box([0, 0, 0, 0], segmentation=[[2, 3, 12, 3, 12, 9]]), "no box", "rebuilt from mask or keypoints"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_each_defect_has_its_policy(tmp_path, annotation, defect, action):
    good = box([1, 2, 3, 4], id=2)
    dataset = read_coco(write_coco(tmp_path, [annotation, good]), "train")
    assert dataset.defects[["defect", "action"]].to_numpy().tolist() == [[defect, action]]
    ids = dataset.target(0).annotation_ids.tolist()
    assert ids == ([2] if action == "dropped" else [1, 2])
    boxes = dataset.target(0).boxes_xyxy
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes[-1].tolist() == [1, 2, 4, 6]
    if action.startswith("rebuilt"):
        assert boxes[0].tolist() == [2, 3, 12, 9]
    assert "1" in check_dataset(tmp_path).text()


def test_duplicates_missing_files_and_missing_sizes_are_defects(tmp_path):
    images = [
        {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 1, "file_name": "b.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "c.png"},
        {"id": 3, "file_name": "gone.png", "width": 4, "height": 3},
    ]
    root = write_coco(tmp_path, [box([1, 1, 5, 5]), box([1, 1, 5, 5]), box([1, 1, 5, 5], id=3, image_id=3)], images)
    (root / "train/gone.png").unlink()
    dataset = read_coco(root, "train")
    assert [(i.id, i.width, i.height) for i in dataset.images] == [(2, 40, 30)]
    assert len(dataset.objects) == 0  # nobody knows which of the two files image 1 is
    assert sorted(dataset.defects["defect"]) == [
        "duplicate annotation id", "image id of two files", "image id of two files", "missing image file",
        "no width and height",
    ]  # fmt: skip


def test_ids_beyond_the_vocabulary_get_labels_by_order_and_a_bom_is_read(tmp_path):
    categories = [{"id": 5000, "name": "b"}, {"id": 0, "name": "a"}]
    root = write_coco(tmp_path, [box([1, 1, 5, 5], category_id=5000)], categories=categories)
    path = root / "annotations/instances_train.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    dataset = read_coco(root, "train")
    assert [(c.label, c.id, c.name) for c in dataset.categories] == [(1, 0, "a"), (2, 5000, "b")]
    assert dataset.target(0).labels.tolist() == [2]


def test_unusable_folders_give_an_error_of_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    root = write_coco(tmp_path / "coco", [])
    cases = [(tmp_path / "empty", "has no annotations"), (tmp_path / "nowhere", "does not exist")]
    cut = write_coco(tmp_path / "cut", [box([1, 1, 5, 5])])
    text = (cut / "annotations/instances_train.json").read_text()
    (cut / "annotations/instances_train.json").write_text(text[:-20])
    cases.append((cut, "not valid JSON at line 1, column"))
    lost = write_coco(tmp_path / "lost", [])
    (lost / "train/a.png").unlink()
    cases.append((lost, "none of the 1 images"))
    for folder, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            open_dataset(folder, "train")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="split 'val'"):
        open_dataset(root, "val")
    (root / "annotations/instances_train.json").write_text("[1]")
    with pytest.raises(InputError, match="holds a list"):
        open_dataset(root, "train")


def test_missing_boxes_of_a_labelling_tool_are_rebuilt_from_keypoints(shared, tmp_path):
    source = json.loads((shared / "data/odd/annotations/keypoints_without_boxes.json").read_text())
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train").mkdir()
    for image in source["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / "train" / image["file_name"])
    (tmp_path / "annotations/person_keypoints_train.json").write_text(json.dumps(source))
    dataset = read_coco(tmp_path, "train")
    rebuilt = (dataset.defects["defect"] == "no box").sum()
    without = sum(a["bbox"] == [0, 0, 0, 0] for a in source["annotations"])
    assert rebuilt + (dataset.defects["defect"] == "box has no area").sum() == without == 89
    assert rebuilt > 80
    assert dataset.categories[0].name == "person"
    assert len(dataset.objects) == len(source["annotations"]) - (dataset.defects["action"] == "dropped").sum()


# Pascal VOC


def test_bccd_equals_its_xml(shared):
    import xml.dom.minidom

    root = shared / "data/bccd"
    dataset = read_voc(root, "val")
    assert [c.name for c in dataset.categories] == ["Platelets", "RBC", "WBC"]
    assert len(dataset) == 87
    for index in (0, 40, 86):
        target = dataset.target(index)
        document = xml.dom.minidom.parse(str(root / "Annotations" / f"{target.image.path.stem}.xml"))
        value = lambda node, tag: node.getElementsByTagName(tag)[0].firstChild.data  # noqa: E731
        expected = [
            [
                max(int(value(o, "xmin")) - 1, 0),
                max(int(value(o, "ymin")) - 1, 0),
                min(int(value(o, "xmax")), 640),
                min(int(value(o, "ymax")), 480),
            ]
            for o in document.getElementsByTagName("object")
        ]
        assert target.boxes_xyxy.tolist() == expected
    assert dataset.defects["detail"].str.contains("BloodImage_00338").any()
    assert find_splits(root) == ["test", "train", "trainval", "val"]


def test_difficult_objects_are_crowds_and_damaged_xml_is_named(tmp_path):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(tmp_path / "JPEGImages/a.jpg")
    (tmp_path / "ImageSets/Main/train.txt").write_text("a  1\n\n")
    corners = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>{}</ymax></bndbox>"
    entry = "<object><name>x</name><difficult>{}</difficult>" + corners + "</object>"
    path = tmp_path / "Annotations/a.xml"
    path.write_text(f"<annotation>{entry.format(0, 5)}{entry.format(1, 10)}</annotation>")
    target = read_voc(tmp_path, "train").target(0)
    assert target.boxes_xyxy.tolist() == [[0, 0, 20, 5], [0, 0, 20, 10]]
    assert target.iscrowd.tolist() == [False, True]
    with pytest.raises(InputError, match="splits of this data set: train"):
        read_voc(tmp_path, "val")
    path.write_text("<annotation><object>")
    with pytest.raises(InputError, match=r"a\.xml is not readable XML"):
        read_voc(tmp_path, "train")


def test_classes_are_matched_by_name():
    data = [Category(3, 3, " Cat"), Category(4, 4, "dog")]
    model = [Category(1, 9, "dog"), Category(2, 8, "cat")]
    assert labels_by_name(data, model) == {3: 2, 4: 1}
    with pytest.raises(InputError, match="bird"):
        labels_by_name([Category(1, 1, "bird")], model)


def test_the_check_reports_unreadable_and_mismatched_images(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (1, 2, 3)]
    root = write_coco(tmp_path, [box([1, 1, 5, 5])], images)
    Image.new("RGB", (10, 10)).save(root / "train/2.png")
    (root / "train/3.png").write_bytes(b"junk")
    report = check_dataset(root)
    assert report.usable
    kinds = [d["defect"] for d in report.to_json()["splits"][0]["defects"]]
    assert kinds == ["size disagrees with the annotations", "unreadable image"]
    assert "2.png is 10x10, the annotations say 40x30" in report.text()
