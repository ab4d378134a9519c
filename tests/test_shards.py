"""Data sets as tar files: what they hold, in which order it is read, and errors for damaged files."""

import json
import shutil
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler
from itertools import islice

import numpy as np
import pytest
from http_server import serving
from PIL import Image

from pix2seq.data.dataset import open_dataset
from pix2seq.data.formats import shards
from pix2seq.data.formats.shards import CONTENTS, ShardIndex, ShardStream, write_shards
from pix2seq.data.shapes import write_shapes
from pix2seq.errors import InputError

pytest.importorskip("webdataset")
NUM, EACH = 23, 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_shapes(folder, num_train=NUM, num_val=1, size=64)
    return open_dataset(folder, "train")


@pytest.fixture
def folder(dataset, tmp_path):
    write_shards(dataset, tmp_path, samples_per_shard=EACH)
    return tmp_path


def ids(stream, count):
    return [(sample.epoch, sample.target.image.id) for sample in islice(stream, count)]


def assert_same_target(ours, theirs):
    for name in ("boxes_xyxy", "labels", "areas", "iscrowd", "annotation_ids", "keypoints"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    assert ours.captions == theirs.captions
    for mask, other in zip(ours.segmentations, theirs.segmentations, strict=True):
        if isinstance(mask, list):
            for ring, other_ring in zip(mask, other, strict=True):
                np.testing.assert_array_equal(ring, other_ring)
        else:
            assert mask == other


def test_the_shards_hold_the_data_set(dataset, folder):
    index = ShardIndex.read(folder, "train")
    assert len(index) == NUM
    assert index.categories == dataset.categories
    assert [shard.num_samples for shard in index.shards] == [5, 5, 5, 5, 3]
    position = {image.id: i for i, image in enumerate(dataset.images)}
    for sample in islice(ShardStream(index, seed=0), NUM):
        theirs = dataset.target(position[sample.target.image.id])
        assert sample.image == theirs.image.path.read_bytes()
        assert (sample.target.image.width, sample.target.image.height) == (theirs.image.width, theirs.image.height)
        assert sample.target.image.path.as_posix() == theirs.image.path.relative_to(dataset.root).as_posix()
        assert_same_target(sample.target, theirs)


def test_rle_masks_are_kept(shared, tmp_path):
    coco = open_dataset(shared / "data/coco_mini", "train")
    write_shards(coco, tmp_path, samples_per_shard=40)
    position = {image.id: i for i, image in enumerate(coco.images)}
    crowds = 0
    for sample in islice(ShardStream(ShardIndex.read(tmp_path, "train"), seed=0), len(coco)):
        assert_same_target(sample.target, coco.target(position[sample.target.image.id]))
        crowds += sum(isinstance(mask, dict) for mask in sample.target.segmentations)
    assert crowds


def test_all_captions_are_kept_and_damage_is_reported(dataset, folder):
    index = ShardIndex.read(folder, "train")
    assert index.captions() == [text for i in range(NUM) for text in dataset.target(i).captions]
    (folder / "train-captions.json").write_text("[]")
    with pytest.raises(InputError, match=r"train-captions\.json is damaged"):
        index.captions()


@pytest.mark.parametrize("learns_from", CONTENTS)
def test_samples_without_what_is_learned_are_left_out(shared, tmp_path, learns_from):
    coco = open_dataset(shared / "data/coco_mini", "train")
    index = write_shards(coco, tmp_path, samples_per_shard=20)
    expected = {
        "object": lambda t: not t.iscrowd.all(),
        "mask": lambda t: any(s and not c for s, c in zip(t.segmentations, t.iscrowd, strict=True)),
        "labelled keypoint": lambda t: (t.keypoints[~t.iscrowd][..., 2] > 0).any(),
        "caption": lambda t: len(t.captions) > 0,
    }
    wanted = sorted(coco.images[i].id for i in range(len(coco)) if expected[learns_from](coco.target(i)))
    assert index.num_with(learns_from) == len(wanted)
    options = {"seed": 1, "mix": 2, "learns_from": learns_from}
    whole = ids(ShardStream(index, **options), 2 * len(wanted))
    for epoch in (0, 1):
        assert sorted(i for e, i in whole if e == epoch) == wanted
    for start in (1, len(wanted) - 1, len(wanted) + 3):
        assert ids(ShardStream(index, **options, start=start), 5) == whole[start : start + 5]


def test_bad_images_are_left_out_and_too_many_are_refused(dataset, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(dataset.root, data)
    ours = open_dataset(data, "train")
    paths = [image.path for image in ours.images]
    Image.new("RGB", (65, 64)).save(paths[3])
    paths[7].write_bytes(paths[7].read_bytes()[:200])
    with pytest.warns(UserWarning, match="left out") as caught:
        index = write_shards(ours, tmp_path / "shards", samples_per_shard=EACH)
    assert [paths[i].name in str(w.message) for i, w in zip((3, 7), caught, strict=True)] == [True, True]
    assert len(index) == NUM - 2
    samples = list(islice(ShardStream(index, seed=0), NUM - 2))
    assert {s.number for s in samples} == set(range(NUM)) - {3, 7}
    for path in paths[8:16]:
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(InputError, match=r"10 of 23 images"):
        write_shards(ours, tmp_path / "more", samples_per_shard=EACH, max_bad_share=0.4)
    assert not (tmp_path / "more/train.json").exists()


def test_the_same_data_give_the_same_bytes_in_plain_tar_files(dataset, folder, tmp_path):
    again = write_shards(dataset, tmp_path / "again", samples_per_shard=EACH)
    assert again.shards == ShardIndex.read(folder, "train").shards
    with tarfile.open(folder / "train-000004.tar") as tar:
        assert [name.split(".")[0] for name in tar.getnames()] == [f"{n:09d}" for n in (20, 20, 21, 21, 22, 22)]
    assert not list(folder.glob(".partial-*"))


@pytest.mark.parametrize("num_readers", [1, 2, 5])
def test_each_epoch_holds_every_image_once_over_all_readers(folder, num_readers):
    index = ShardIndex.read(folder, "train")
    seen = []
    for reader in range(num_readers):
        stream = iter(ShardStream(index, seed=3, reader=reader, num_readers=num_readers, mix=2))
        for sample in stream:
            if sample.epoch == 2:
                break
            seen.append((sample.epoch, sample.target.image.id))
    assert len(seen) == len(set(seen)) == 2 * NUM


def test_a_stream_resumes_where_another_stopped(folder):
    index = ShardIndex.read(folder, "train")
    options = {"seed": 5, "reader": 1, "num_readers": 2, "mix": 2}
    whole = ids(ShardStream(index, **options), 40)
    assert whole != ids(ShardStream(index, **options | {"seed": 6}), 40)
    for start in range(30):
        assert ids(ShardStream(index, **options, start=start), 10) == whole[start : start + 10]


def test_a_late_start_reads_only_the_shards_it_needs(folder, monkeypatch):
    index = ShardIndex.read(folder, "train")
    read = []
    monkeypatch.setattr(
        shards, "read_shard", lambda where, shard, f=shards.read_shard: read.append(shard) or f(where, shard)
    )
    assert ids(ShardStream(index, seed=0, mix=2, start=NUM * 1000), 1)[0][0] == 1000
    assert len(read) == 2


@pytest.fixture
def server(folder):
    with serving(partial(SimpleHTTPRequestHandler, directory=folder)) as address:
        yield address


def test_http_gives_the_same_samples_as_the_folder(folder, server):
    here = ids(ShardStream(ShardIndex.read(folder, "train"), seed=1), 2 * NUM)
    there = ShardIndex.read(server, "train")
    assert ids(ShardStream(there, seed=1), 2 * NUM) == here
    assert ids(ShardStream(there, seed=1, start=30), 10) == here[30:40]
    with pytest.raises(InputError, match="404"):
        ShardIndex.read(server, "val")


class FailsTwice(SimpleHTTPRequestHandler):
    """Serves an error, then half of the file, then all of it."""

    asked = 0

    def do_GET(self):
        FailsTwice.asked += 1
        if FailsTwice.asked == 1:
            self.send_error(503)
        elif FailsTwice.asked == 2:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")
        else:
            super().do_GET()


def test_requests_to_a_failing_server_are_repeated(folder, monkeypatch):
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    with serving(partial(FailsTwice, directory=folder)) as address:
        index = ShardIndex.read(address, "train")
    assert len(index) == NUM
    assert FailsTwice.asked == 3
    with pytest.raises(InputError, match="cannot be read"):
        list(ShardStream(index, seed=0))


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_shard_is_named(folder, damage):
    path = folder / "train-000002.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[:-600])
    with pytest.raises(InputError, match=r"train-000002\.tar"):
        list(islice(ShardStream(ShardIndex.read(folder, "train"), seed=0), NUM))


PART = {"name": "a.tar", "num_samples": 1, "num_bytes": 1024, "sha256": "", "num_with": dict.fromkeys(CONTENTS, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "format 9, expected 2"),
        ({"shards": 5}, "not an index of shards"),
        ({"shards": [PART | {"name": "pipe:ls.tar"}]}, "cannot be read"),
        ({"shards": [PART | {"name": "../a.tar"}]}, "invalid entry"),
        ({"shards": [PART | {"num_samples": 0}]}, "invalid entry"),
        ({"shards": [PART | {"num_with": {"object": 1}}]}, "invalid entry"),
        ({"captions_file": PART | {"name": "../../a.json"}}, "invalid entry"),
        ({"captions_file": None}, "not an index of shards"),
    ],
)
def test_an_invalid_index_is_refused(folder, change, message):
    path = folder / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        next(iter(ShardStream(ShardIndex.read(folder, "train"), seed=0)))


def test_existing_splits_and_too_many_readers_are_refused(dataset, folder, tmp_path):
    with pytest.raises(InputError, match="exists"):
        write_shards(dataset, folder)
    index = ShardIndex.read(folder, "train")
    with pytest.raises(InputError, match="5 shards of split 'train', too few for 6 readers"):
        ShardStream(index, seed=0, num_readers=6)
    with pytest.raises(InputError, match=r"val\.json cannot be read"):
        ShardIndex.read(folder, "val")


def test_an_incomplete_data_set_has_no_index(dataset, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(InputError, match=r"disk full at .*train-000000\.tar while writing shards"):
        write_shards(dataset, tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.tar"))
    with pytest.raises(InputError, match="expected shards there"):
        ShardIndex.read(tmp_path / "new", "train")
