"""Flat annotation arrays against their JSON files and against slow reference implementations."""

import gc
import importlib
import json
import multiprocessing
import pickle
from dataclasses import fields, replace
from multiprocessing.context import set_spawning_popen
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pycocotools import mask as mask_utils

from pix2seq.data.annotations import gather, offsets
from pix2seq.data.defects import BOX_DEFECTS, clip_boxes
from pix2seq.data.formats import json_stream
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.formats.json_stream import stream_json
from pix2seq.errors import InputError
from pix2seq.geometry.polygons import rle_to_mask, run_lengths
from pix2seq.types import ImageRecord, Target


@pytest.mark.parametrize("split", ["train", "val"])
def test_targets_of_coco_mini_equal_the_json(shared, split):
    root = shared / "data/coco_mini"
    files = {
        kind: json.loads((root / "annotations" / f"{kind}_{split}2017.json").read_text())
        for kind in ("instances", "person_keypoints", "captions")
    }
    people = {a["id"]: a["keypoints"] for a in files["person_keypoints"]["annotations"]}
    dataset = read_coco(root, split)
    assert [i.id for i in dataset.images] == [i["id"] for i in files["captions"]["images"]]
    assert [c.id for c in dataset.categories] == sorted(c["id"] for c in files["instances"]["categories"])
    seen = 0
    for index in range(len(dataset)):
        target = dataset.target(index)
        image = target.image
        theirs = [a for a in files["instances"]["annotations"] if a["image_id"] == image.id]
        assert target.annotation_ids.tolist() == [a["id"] for a in theirs]  # in the file's order
        assert target.labels.tolist() == [a["category_id"] for a in theirs]
        assert target.iscrowd.tolist() == [bool(a["iscrowd"]) for a in theirs]
        np.testing.assert_array_equal(target.areas, np.array([a["area"] for a in theirs], np.float32))
        x, y, w, h = np.array([a["bbox"] for a in theirs], np.float64).reshape(-1, 4).T
        corners = np.stack([x, y, np.minimum(x + w, image.width), np.minimum(y + h, image.height)], axis=1)
        np.testing.assert_array_equal(target.boxes_xyxy, corners.astype(np.float32))
        for annotation, segmentation in zip(theirs, target.segmentations, strict=True):
            if isinstance(annotation["segmentation"], dict):
                assert segmentation == annotation["segmentation"]
                continue
            for ring, numbers in zip(segmentation, annotation["segmentation"], strict=True):
                np.testing.assert_array_equal(ring, np.array(numbers, np.float32).reshape(-1, 2))
        points = np.array([people.get(a["id"], [0] * 51) for a in theirs], np.float32).reshape(-1, 17, 3)
        np.testing.assert_array_equal(target.keypoints, points)
        texts = [a["caption"] for a in files["captions"]["annotations"] if a["image_id"] == image.id]
        assert list(target.captions) == [" ".join(text.split()) for text in texts]
        seen += len(theirs)
    assert seen == len(dataset.objects) == len(files["instances"]["annotations"])
    assert dataset.objects["num_parts"].sum() == sum(
        len(a["segmentation"]) for a in files["instances"]["annotations"] if isinstance(a["segmentation"], list)
    )
    assert dataset.objects["num_keypoints"].sum() == sum(
        a["num_keypoints"] for a in files["person_keypoints"]["annotations"]
    )


def write_boxes(root, num_images, each):
    """Write a data set of empty image files and boxes."""
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "width": 640, "height": 480} for i in range(num_images)]
    for image in images:
        (root / "train" / image["file_name"]).touch()
    annotations = [
        {"id": i, "image_id": i % num_images, "category_id": 1 + i % 3, "bbox": [i % 600, i % 400, 9.5, 7.25]}
        for i in range(num_images * each)
    ]
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": i, "name": f"c{i}"} for i in (1, 2, 3)]
    (root / "annotations/instances_train.json").write_text(json.dumps(content))
    return root


def test_a_box_takes_few_bytes_and_no_python_object(tmp_path):
    dataset = read_coco(write_boxes(tmp_path, 50, 100), "train")
    annotations = dataset.annotations
    assert len(annotations) == 5000
    assert annotations.num_bytes / len(annotations) < 34
    # Arrays hold no Python objects, so the collector tracks few, and workers change no reference counts in them.
    before = len(gc.get_objects())
    many = read_coco(write_boxes(tmp_path / "more", 500, 100), "train")
    assert len(gc.get_objects()) - before < 500
    assert len(many.annotations) == 50_000


def test_changing_a_target_does_not_change_the_data_set(shared):
    dataset = read_coco(shared / "data/coco_mini", "val")
    target = dataset.target(0)
    for array in (target.boxes_xyxy, target.labels, target.areas, target.keypoints, target.segmentations[0][0]):
        array[:] = -1
    again = dataset.target(0)
    assert (again.boxes_xyxy >= 0).all()
    assert (again.labels > 0).all()
    assert (again.segmentations[0][0] >= 0).all()
    with pytest.raises(ValueError, match="read-only"):
        dataset.annotations.boxes_xyxy[0] = 0


def test_the_table_of_images_is_a_sequence(tmp_path):
    images = read_coco(write_boxes(tmp_path, 5, 1), "train").images
    assert [i.id for i in images] == [0, 1, 2, 3, 4]
    assert images[-1] == images[4]
    assert images[1:3] == [images[1], images[2]]
    assert images[4].path == tmp_path / "train/4.png"
    with pytest.raises(IndexError):
        images[5]


def test_a_spawned_worker_maps_the_arrays_and_other_pickles_contain_them(tmp_path):
    dataset = read_coco(write_boxes(tmp_path, 20, 50), "train")
    whole = pickle.dumps(dataset)
    assert len(whole) > dataset.annotations.num_bytes
    np.testing.assert_array_equal(pickle.loads(whole).annotations.boxes_xyxy, dataset.annotations.boxes_xyxy)

    set_spawning_popen(object())
    try:
        small = [bytes(ForkingPickler.dumps(dataset)) for _ in range(2)]
    finally:
        set_spawning_popen(None)
    assert len(small[0]) < 5000
    copy = pickle.loads(small[1])
    mapped = copy.annotations.boxes_xyxy
    while not isinstance(mapped, np.memmap):
        mapped = mapped.base
    folder = Path(mapped.filename).parent
    assert copy.images[3] == dataset.images[3]
    np.testing.assert_array_equal(copy.target(7).boxes_xyxy, dataset.target(7).boxes_xyxy)
    assert folder.is_dir()
    del dataset
    gc.collect()
    assert not folder.exists()
    if multiprocessing.get_all_start_methods()[0] == "fork":  # on other systems, a file in use may not be removable
        assert len(copy.target(7).labels) == 50


def test_a_spawned_worker_reads_the_same_targets(tmp_path, monkeypatch):
    dataset = read_coco(write_boxes(tmp_path / "data", 4, 3), "train")
    (tmp_path / "worker_of_this_test.py").write_text(
        "def run(dataset, queue):\n    queue.put([dataset.target(i).boxes_xyxy.tolist() for i in range(4)])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=importlib.import_module("worker_of_this_test").run, args=(dataset, queue))
    worker.start()
    found = queue.get(timeout=600)
    worker.join(600)
    assert found == [dataset.target(i).boxes_xyxy.tolist() for i in range(4)]


@given(st.lists(st.integers(0, 5), max_size=30), st.data())
def test_gathered_pieces_are_concatenated(sizes, data):
    edges = offsets(np.array(sizes, np.int64))
    values = np.arange(edges[-1] * 2).reshape(-1, 2)
    order = np.array(data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=40)) if sizes else [], np.int64)
    pieces = [values[edges[i] : edges[i + 1]] for i in order]
    np.testing.assert_array_equal(gather(values, edges, order), np.concatenate([values[:0], *pieces]))


def test_pieces_are_gathered_in_several_chunks(monkeypatch):
    monkeypatch.setattr("pix2seq.data.annotations._GATHER_CHUNK", 7)
    test_gathered_pieces_are_concatenated()


# JSON, entry by entry

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=6))
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3))


@given(st.lists(VALUES, max_size=5), st.lists(VALUES, max_size=5), VALUES, st.sampled_from([None, 1]), st.booleans())
def test_a_stream_equals_json_loads(tmp_path_factory, images, annotations, info, indent, plain):
    content = {"info": info, "images": images, "annotations": annotations, "last": 12.5}
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=plain), encoding="utf-8", errors="replace")
    content = json.loads(path.read_text(encoding="utf-8"))
    for chunk in (1, 2, 7, 1 << 20):
        found = list(stream_json(path, ("images", "annotations"), chunk_chars=chunk))
        assert [v for name, v in found if name == "images"] == content["images"]
        assert [v for name, v in found if name == "annotations"] == content["annotations"]
        assert dict(found)["info"] == content["info"]
        assert dict(found)["last"] == 12.5


def test_numbers_and_words_cut_by_the_end_of_a_chunk_are_read_completely(tmp_path):
    path = tmp_path / "a.json"
    text = '\ufeff {"images" : [123456, -1.5e+10, NaN, -Infinity, true, "a\\u00e9\\n"] , "annotations":[ ] }\n '
    path.write_text(text, encoding="utf-8")
    for chunk in range(1, 40):
        values = [repr(v) for _, v in stream_json(path, ("images", "annotations"), chunk_chars=chunk)]
        assert values == ["123456", "-15000000000.0", "nan", "-inf", "True", repr("aé\n")]


def test_a_cut_file_is_refused_where_json_loads_refuses_it(tmp_path):
    text = '{"images": [{"id": 1,\n "b": [1, 2.5]}],\n\n"annotations": [ {"c": "d\\n"}, {}\n], "x": {"y": null}}'
    path = tmp_path / "a.json"
    for length in range(len(text)):
        path.write_text(text[:length])
        with pytest.raises(json.JSONDecodeError) as theirs:
            json.loads(text[:length])
        for chunk in (3, 1000):
            with pytest.raises(InputError) as ours:
                list(stream_json(path, ("images", "annotations"), chunk_chars=chunk))
            position = f"line {theirs.value.lineno}, column {theirs.value.colno} ("
            assert position in str(ours.value), (text[:length], str(theirs.value))


def test_an_early_error_in_a_long_file_is_reported_without_reading_the_rest(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text('{"images": [{"id" 1}, ' + "0, " * 10_000 + '0], "annotations": []}')
    held = []
    read_on = json_stream._Scanner._read_on
    monkeypatch.setattr(json_stream._Scanner, "_read_on", lambda self: held.append(len(self.window)) or read_on(self))
    with pytest.raises(InputError, match="line 1, column 19"):
        list(stream_json(path, ("images", "annotations"), chunk_chars=100))
    assert max(held) < 1000


# Run lengths


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_run_lengths_equal_those_of_pycocotools(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    compressed = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    columns = mask.T.ravel()
    edges = np.flatnonzero(np.diff(columns)) + 1
    expected = np.diff([0, *([0] if columns[0] else []), *edges, len(columns)])
    assert run_lengths(compressed).tolist() == expected.tolist()
    assert run_lengths(expected.tolist()).tolist() == expected.tolist()


@given(st.text(alphabet=[chr(c) for c in range(40, 120)], max_size=20))
def test_a_string_of_counts_is_valid_if_the_decoder_accepts_it(text):
    lengths = run_lengths(text)
    if lengths is None:
        assume(len(text))
        for total in (0, 1, 100):
            with pytest.raises(ValueError, match="RLE counts"):
                rle_to_mask({"size": [1, total], "counts": text})
    elif lengths.sum() < 10**6:
        mask = rle_to_mask({"size": [1, int(lengths.sum())], "counts": text})[0]
        np.testing.assert_array_equal(mask, np.repeat(np.arange(len(lengths)) % 2 == 1, lengths))


@pytest.mark.parametrize("counts", [None, 5, [1.0], [True], [-1], [2**31], "é", " ", "o", "ooooooo0", {"a": 1}])
def test_invalid_counts_give_none(counts):
    assert run_lengths(counts) is None


# Boxes

COORDINATES = st.one_of(st.floats(-60, 60), st.sampled_from([0.0, 1e9, 1e7, -1e7, np.nan, np.inf, -np.inf, 1e-9]))


@given(st.lists(st.tuples(*[COORDINATES] * 4), max_size=20))
def test_boxes_are_clipped_as_by_hand(boxes):
    width, height = 40, 30
    xywh = np.array(boxes, np.float64).reshape(-1, 4)
    found, codes = clip_boxes(xywh, np.full(len(xywh), width), np.full(len(xywh), height))
    for (x, y, w, h), corners, code in zip(xywh.tolist(), found.tolist(), codes.tolist(), strict=True):
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if not np.isfinite([x, y, w, h]).all():
            expected = "box is not four numbers"
        elif max(map(abs, (x, y, w, h))) > 1e7:
            expected = "box is absurdly large"
        elif w <= 0 or h <= 0:
            expected = "box has no area"
        elif x1 <= x0 or y1 <= y0:
            expected = "box lies outside the image"
        elif np.float32(x1) <= np.float32(x0) or np.float32(y1) <= np.float32(y0):
            expected = "box has no area"
        else:
            outside = max(x0 - x, y0 - y, x + w - x1, y + h - y1) > 0.5
            expected = "box reaches outside the image" if outside else None
            assert corners == [x0, y0, x1, y1]
        assert BOX_DEFECTS[code] == expected
        assert np.isnan(corners).any() == (expected not in (None, "box reaches outside the image"))


@pytest.mark.parametrize("indices", [[2, 0], [1], []])
def test_some_objects_of_a_target_keep_all_that_is_known_of_them(indices):
    image = ImageRecord(7, Path("7.png"), 40, 30)
    boxes = np.array([[0, 0, 4, 4], [5, 5, 9, 9], [10, 10, 20, 20]], np.float32)
    target = Target(
        image,
        boxes,
        labels=np.array([3, 1, 2]),
        areas=np.array([16, 15, 90], np.float32),
        iscrowd=np.array([False, True, False]),
        annotation_ids=np.array([11, 12, 13]),
        segmentations=(None, [[5.0, 5.0, 9.0, 5.0, 9.0, 9.0]], None),
        keypoints=np.arange(18, dtype=np.float32).reshape(3, 2, 3),
        captions=("three objects",),
        attributes=({"colour": "red"}, {"colour": "blue"}, {}),
        difficult=np.array([False, True, False]),
        scale_xy=(2.0, 2.0),
    )
    some = target.subset(indices)
    per_object = ("boxes_xyxy", "labels", "areas", "iscrowd", "annotation_ids", "segmentations", "keypoints",
                  "attributes", "difficult")  # fmt: skip
    for name in per_object:
        expected = [np.asarray(getattr(target, name)[i]).tolist() for i in indices]
        assert [np.asarray(each).tolist() for each in getattr(some, name)] == expected, name
    rest = {each.name for each in fields(Target)} - set(per_object)
    assert all(getattr(some, name) is getattr(target, name) for name in rest)
    bare = replace(target, attributes=(), difficult=None).subset(indices)
    assert bare.attributes == ()
    assert bare.difficult is None
