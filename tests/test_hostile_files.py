"""Files from strangers: manifests, TensorFlow indexes, shards and JSON end in one line, soon, and lead nowhere else."""

import io
import json
import os
import random
import tarfile
import time
from hashlib import sha256
from http.server import BaseHTTPRequestHandler

import numpy as np
import official_format
import pytest
import test_convert
from http_server import serving

from pix2seq.convert.official_config import model_config, read_official_config
from pix2seq.convert.tf_bundle import TensorBundle
from pix2seq.data.formats import shards
from pix2seq.data.formats.json_stream import stream_json
from pix2seq.data.formats.shards import CONTENTS, ShardIndex, read_shard
from pix2seq.errors import InputError
from pix2seq.files import find_damage, write_manifest
from pix2seq.training.config import config_file
from pix2seq.training.yaml_file import read_yaml


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "state").mkdir(parents=True)
    for name in ("a.json", "b.json", "state/c.json"):
        (folder / name).write_text(name)
    write_manifest(folder)
    return folder


def with_manifest(folder, change):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Manifests


@pytest.mark.parametrize("name", ["/dev/zero", "../secret", "state/../../secret", "..\\secret", "C:/secret"])
def test_a_manifest_names_only_files_inside_its_folder(folder, name, monkeypatch):
    (folder.parent / "secret").write_text("a")
    monkeypatch.setattr("pix2seq.files.sha256", lambda path: pytest.fail(f"{path} was read"))
    entry = {"bytes": 0, "mtime_ns": 0, "sha256": ""}
    with_manifest(folder, lambda content: content.update(files={name: entry}))
    assert find_damage(folder) == f"{name} lies outside the folder"


def test_devices_and_pipes_are_not_read(folder):
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    entry = {"bytes": 0, "mtime_ns": 0, "sha256": ""}
    with_manifest(folder, lambda content: content["files"].update({"pipe": entry, "zero": entry, "": entry}))
    assert find_damage(folder) == "pipe is not a file, zero is not a file,  is not a file"
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert "it is not a file" in find_damage(folder)
    os.mkfifo(folder / "manifest.json")
    assert "manifest.json cannot be read" in find_damage(folder)


def test_links_to_files_elsewhere_are_followed(folder, tmp_path):
    """A cache of models keeps the files of a checkpoint as links."""
    (folder / "a.json").rename(tmp_path / "blob")
    (folder / "a.json").symlink_to(tmp_path / "blob")
    assert find_damage(folder) is None


def test_all_damaged_files_are_named(folder):
    (folder / "a.json").unlink()
    (folder / "b.json").write_text("B.json")
    (folder / "state/c.json").write_text("c")
    found = find_damage(folder)
    assert found == (
        "a.json is missing, b.json has changed since it was written (sha256 differs), "
        "state/c.json has 1 bytes, expected 12"
    )
    assert find_damage(folder, ignore=("state", "b.json")) == "a.json is missing"
    for number in range(9):
        (folder / f"{number}").write_text("")
    write_manifest(folder)
    for number in range(9):
        (folder / f"{number}").unlink()
    assert find_damage(folder).endswith("4 is missing, and 5 more")


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"files": 3}', '{"files": {"a.json": 3}}', "9" * 5000, "\0"])
def test_a_manifest_that_is_none_is_damage(folder, content):
    (folder / "manifest.json").write_text(content)
    assert "manifest.json" in find_damage(folder)


# TensorFlow indexes with right checksums


INSERTED = (b"\xff" * 9 + b"\x01", b"\x0a\x00", b"\x10\xff\xff\x03", b"\x38\x01")  # a huge number, other fields


def mutated(items, rng):
    """Return the items of a block, often with one value changed: bits, field numbers, wire types, lengths."""
    items = list(items)
    if items and rng.random() < 0.4:
        index = rng.randrange(len(items))
        key, value = items[index]
        value = bytearray(value)
        for _ in range(rng.randint(1, 3)):
            kind = rng.randrange(4)
            position = rng.randrange(len(value)) if value else 0
            if kind == 0 and value:
                value[position] = rng.randrange(256)
            elif kind == 1 and value:
                value[position] ^= rng.choice([1, 2, 5, 7, 8, 0x80])  # other wire types and fields
            elif kind == 2:
                value[position:position] = rng.choice(
                    [b"\xff" * 9 + b"\x01", b"\x0a\x00", b"\x10\xff\xff\x03", b"\x38\x01"]
                )
            else:
                del value[position:]
        items[index] = (key, bytes(value))
    return items


def read_all(prefix):
    bundle = TensorBundle(prefix)
    for name in bundle.entries:
        bundle.verify(name)
        if bundle.entries[name].dtype != 7:
            bundle.read(name)


def check_mutations(folder, monkeypatch, seeds):
    rng = np.random.default_rng(0)
    tensors = {f"name {i}": rng.standard_normal((i, 2)).astype(np.float32) for i in range(1, 5)} | {"text": b"words"}
    original, refused = official_format.block, 0
    for seed in seeds:
        draws = random.Random(seed)
        monkeypatch.setattr(
            official_format,
            "block",
            lambda items, restart_every, draws=draws: original(mutated(items, draws), restart_every),
        )
        official_format.write_bundle(folder / "ckpt", tensors, num_shards=2)
        started = time.process_time()
        try:
            read_all(folder / "ckpt")
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017 -- most mutations are errors, and some are not
            refused += 1
        assert time.process_time() - started < 5
    return refused


def test_an_index_with_right_checksums_and_wrong_content_is_refused_in_one_line(tmp_path, monkeypatch):
    assert check_mutations(tmp_path, monkeypatch, range(300)) > 150


@pytest.mark.slow
def test_ten_thousand_mutations_of_an_index(tmp_path, monkeypatch):
    assert check_mutations(tmp_path, monkeypatch, range(1000, 11_000)) > 5000


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\x08" + official_format.varint(1 << 30), "its header names 1073741824 shards"),
        (b"\x0a\x01\x01", "field 1 holds bytes instead of a number"),
        (b"\x08\x01\x10\x01", "big-endian"),
        (b"\x0a\x7f", "a field ends beyond its message"),
    ],
)
def test_a_header_is_refused_at_once(tmp_path, monkeypatch, header, message):
    original = official_format.block
    monkeypatch.setattr(
        official_format,
        "block",
        lambda items, restart_every: original([(k, header if k == b"" else v) for k, v in items], restart_every),
    )
    official_format.write_bundle(tmp_path / "ckpt", {"a": np.zeros(2, np.float32)})
    started = time.process_time()
    with pytest.raises(InputError, match=message):
        TensorBundle(tmp_path / "ckpt")
    assert time.process_time() - started < 1


def test_all_missing_shards_are_named(tmp_path):
    official_format.write_bundle(tmp_path / "ckpt", {f"{i}": np.zeros(2, np.float32) for i in range(3)}, num_shards=3)
    (tmp_path / "ckpt.data-00000-of-00003").unlink()
    (tmp_path / "ckpt.data-00002-of-00003").write_bytes(b"")
    with pytest.raises(InputError, match=r"data-00000-of-00003 does not exist.*, .*data-00002-of-00003 has 0 bytes"):
        TensorBundle(tmp_path / "ckpt")


def test_pipes_are_no_checkpoints_and_no_configs(tmp_path):
    os.mkfifo(tmp_path / "ckpt.index")
    with pytest.raises(InputError, match="device or a pipe"):
        TensorBundle(tmp_path / "ckpt")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="no regular file"):
        read_official_config(tmp_path / "config.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"deep\.json"):
        read_official_config(tmp_path / "deep.json")


# Shards


LABEL = {
    "image_id": 7, "file_name": "a.jpg", "width": 8, "height": 6, "boxes_xyxy": [[1, 1, 4, 5]], "labels": [1],
    "areas": [12.0], "iscrowd": [False], "annotation_ids": [3], "segmentations": [[[1, 1, 4, 1, 4, 5]]],
    "keypoints": [[[1, 2, 2]]], "num_keypoints": 1, "captions": ["words"],
}  # fmt: skip
CATEGORY = {"label": 1, "id": 1, "name": "cat", "keypoints": ["nose"], "skeleton": []}


def tar_of(members, *, mode="w:", kinds=None):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in (kinds or {}).items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def write_split(folder, content, *, captions=b"[]", change=lambda index: None):
    """Write one shard of one sample, with an index whose sizes and checksums are right."""

    def part(name, data, num_samples, num_with):
        (folder / name).write_bytes(data)
        entry = {"name": name, "num_samples": num_samples, "num_bytes": len(data), "sha256": sha256(data).hexdigest()}
        return entry | {"num_with": num_with}

    index = {
        "format": shards.FORMAT,
        "categories": [CATEGORY],
        "shards": [part("train-000000.tar", content, 1, dict.fromkeys(CONTENTS, 1))],
        "captions_file": part("train-captions.json", captions, 0, {}),
    }
    change(index)
    (folder / "train.json").write_text(json.dumps(index))
    return folder


def intact(label=LABEL):
    return [("000000000.jpg", b"image"), ("000000000.json", json.dumps(label).encode())]


def test_an_intact_shard_is_read(tmp_path):
    index = ShardIndex.read(write_split(tmp_path, tar_of(intact())), "train")
    ((number, image, target),) = read_shard(str(tmp_path), index.shards[0])
    assert (number, image) == (0, b"image")
    assert target.boxes_xyxy.tolist() == [[1, 1, 4, 5]]
    rle = LABEL | {"segmentations": [{"size": [6, 8], "counts": [6, 42]}]}
    index = ShardIndex.read(write_split(tmp_path, tar_of(intact(rle))), "train")
    assert read_shard(str(tmp_path), index.shards[0])[0][2].segmentations == ({"size": [6, 8], "counts": [6, 42]},)


SPARSE = {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no tar at all" * 100,
        tar_of(intact(), mode="w:gz"),  # a few bytes may unpack to any number
        tar_of(intact())[:700],
        tar_of(intact()[:1]),
        tar_of(intact()[1:]),
        tar_of([("x.jpg", b""), ("x.json", b"{}")]),
        tar_of([("../../0.jpg", b""), ("../../0.json", b"{}")]),
        tar_of([*intact(), ("000000001.jpg", b""), ("000000001.json", json.dumps(LABEL).encode())]),
        tar_of(intact(), kinds={"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        tar_of(intact(), kinds={"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}),
        tar_of(intact(), kinds={"type": tarfile.CHRTYPE}),
        tar_of(intact(), kinds=SPARSE),
        tar_of([intact()[0], ("000000000.json", b"[" * 100_000)]),
        tar_of([intact()[0], ("000000000.json", b"\xff")]),
        tar_of([intact()[0], ("000000000.json", b"[]")]),
    ],
    ids=range(16),
)
def test_a_hostile_tar_is_refused_in_one_line(tmp_path, content):
    # The index asks for at least a block a sample; padding keeps a short file a candidate.
    content += bytes(max(0, 1024 - len(content)))
    index = ShardIndex.read(write_split(tmp_path, content), "train")
    with pytest.raises(InputError, match=r"train-000000\.tar is not a shard") as caught:
        read_shard(str(tmp_path), index.shards[0])
    assert "\n" not in str(caught.value)


NAN, INF = float("nan"), float("inf")
WRONG_LABELS = {
    "image_id": [None],
    "file_name": [3],
    "width": [0, "8"],
    "height": [2.5],
    "labels": [[0], [1, 1], ["cat"], [1 << 70], 1],
    "boxes_xyxy": [[[1, 1, 4, NAN]], [[4, 1, 1, 5]], [[1, 1, 9, 5]], [[1, 1, 4]]],
    "areas": [[INF], []],
    "iscrowd": [[[]]],
    "annotation_ids": [["a"]],
    "segmentations": [[], [[[1, 1]]], [[[1, 1, 2, 2, 3, NAN]]], ["x"], [{"size": [6, 8]}]]
    + [
        [{"size": [6, 8], "counts": [6, 41]}],
        [{"size": [6, 8], "counts": [6, 1 << 40]}],
        [{"size": [6, 9], "counts": [54]}],
    ],
    "keypoints": [[[[1, 2, 7]]], [[[1, NAN, 1]]]],
    "num_keypoints": [2, "1"],
    "captions": [[3], 3],
}


@pytest.mark.parametrize(
    "change", [{name: value} for name, values in WRONG_LABELS.items() for value in values], ids=str
)
def test_a_label_that_is_no_annotation_is_refused_in_one_line(tmp_path, change):
    index = ShardIndex.read(write_split(tmp_path, tar_of(intact(LABEL | change))), "train")
    with pytest.raises(InputError, match=r"train-000000\.tar is not a shard") as caught:
        read_shard(str(tmp_path), index.shards[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 1 << 40}, {"num_samples": -1}, {"num_samples": "1"}, {"num_samples": True}, {"num_bytes": 10.5},
        {"num_bytes": -1}, {"name": ""}, {"name": ".."}, {"name": 3}, {"name": "a/b.tar"}, {"name": "..\\b.tar"},
        {"name": "b.zip"}, {"sha256": None}, {"num_with": 3}, {"num_with": dict.fromkeys(CONTENTS, 2)},
        {"num_with": dict.fromkeys(CONTENTS, -1)}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_entry_of_an_index_is_refused_in_one_line(tmp_path, change):
    write_split(tmp_path, tar_of(intact()), change=lambda index: index["shards"][0].update(change))
    with pytest.raises(InputError, match=r"train\.json") as caught:
        ShardIndex.read(tmp_path, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "2"}, {"format": None}, {"shards": [3]}, {"shards": "a"}, {"categories": 3}, {"captions_file": []},
        {"categories": [CATEGORY, CATEGORY]}, {"shards": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_index_is_refused_in_one_line(tmp_path, change):
    write_split(tmp_path, tar_of(intact()), change=lambda index: index.update(change))
    with pytest.raises(InputError, match=r"train\.json"):
        ShardIndex.read(tmp_path, "train")
    for content in ("[" * 100_000, "3", "9" * 5000, "\0"):
        (tmp_path / "train.json").write_text(content)
        with pytest.raises(InputError, match=r"train\.json is not an index of shards"):
            ShardIndex.read(tmp_path, "train")


@pytest.mark.parametrize("captions", [b"[3]", b"{}", b"[", b"\xff", b"[" * 100_000])
def test_captions_that_are_none_are_refused_in_one_line(tmp_path, captions):
    index = ShardIndex.read(write_split(tmp_path, tar_of(intact()), captions=captions), "train")
    with pytest.raises(InputError, match=r"train-captions\.json holds no"):
        index.captions()


def test_a_pipe_is_no_shard(tmp_path):
    index = ShardIndex.read(write_split(tmp_path, tar_of(intact())), "train")
    (tmp_path / "train-000000.tar").unlink()
    os.mkfifo(tmp_path / "train-000000.tar")
    with pytest.raises(InputError, match="device or a pipe"):
        read_shard(str(tmp_path), index.shards[0])


class Redirects(BaseHTTPRequestHandler):
    """Redirects to where `target` says, or sends bytes without an end."""

    target = ""

    def do_GET(self):
        self.send_response(302 if self.target else 200)
        if self.target:
            self.send_header("Location", self.target)
        self.end_headers()
        try:
            while not self.target:
                self.wfile.write(b"[" * 65536)
        except OSError:
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with serving(Redirects) as address:
        yield address


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/train.json", "file:///etc/passwd", "data:,x"])
def test_redirects_lead_to_http_only(server, monkeypatch, target):
    monkeypatch.setattr(Redirects, "target", target)
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: pytest.fail("it was tried again"))
    with pytest.raises(InputError, match=r"which is not read|cannot be read"):
        ShardIndex.read(server, "train")


def test_https_is_not_left():
    request = shards.Request("https://host/train.json")
    follow = shards._Redirect().redirect_request
    with pytest.raises(InputError, match=r"leads to http://host/train\.json"):
        follow(request, None, 302, "", {}, "http://host/train.json")
    assert follow(request, None, 302, "", {}, "https://other/train.json").full_url == "https://other/train.json"


def test_a_server_without_an_end_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(shards, "MAX_INDEX_BYTES", 1 << 20)
    with pytest.raises(InputError, match=r"train\.json is not an index of shards"):
        ShardIndex.read(server, "train")


# Large JSON


def test_a_number_of_thousands_of_digits_and_a_pipe_are_one_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"images": [{"id": ' + "1" * 5000 + "}]}")
    with pytest.raises(InputError, match=r"a\.json is not valid JSON at line 1, column 1\d"):
        list(stream_json(path, ["images"]))
    path.write_text('{"images": [' + "[" * 100_000)
    with pytest.raises(InputError, match=r"a\.json"):
        list(stream_json(path, ["images"]))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a device or a pipe"):
        list(stream_json(tmp_path / "pipe", ["images"]))


# Mutations of whole files

SEPARATORS = (
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b":",
    b"-",
    b"\0",
    b"\xff",
    b"null",
    b"NaN",
    b"1e999",
    b"9" * 30,
    b"true",
)


def mutate(content, rng):
    """Change, insert, remove or repeat some bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        stop = min(start + rng.choice([0, 1, 4, 20]), len(content))
        new = rng.choice([b"", bytes([rng.randrange(256)]), rng.choice(SEPARATORS), bytes(content[start:stop]) * 2])
        content[start:stop] = new
    return bytes(content)


def parsers(folder):
    """Return by name an intact file and a function that reads its mutations."""
    path = folder / "file.json"

    def written(read):
        def call(content):
            path.write_bytes(content)
            read()

        return call

    def manifest_of(content):
        (folder / "manifest.json").write_bytes(content)
        damage = find_damage(folder)
        if damage is not None:
            raise InputError(damage)

    def shard_of(content):
        entry = shards.Shard("file.tar", 1, len(content), sha256(content).hexdigest())
        (folder / "file.tar").write_bytes(content)
        read_shard(str(folder), entry)

    write_split(folder, tar_of(intact()))
    index = (folder / "train.json").read_bytes()
    write_manifest(folder)
    coco = json.dumps({"images": [{"id": 1, "width": 4}], "annotations": [{"bbox": [1, 2.5, 3, 4], "a": "\u00e9"}]})

    def index_of(content):
        (folder / "train.json").write_bytes(content)
        ShardIndex.read(folder, "train")

    def official():
        model_config(read_official_config(path))

    return {
        "manifest": ((folder / "manifest.json").read_bytes(), manifest_of),
        "index": (index, index_of),
        "label": (json.dumps(LABEL).encode(), lambda label: shard_of(tar_of([intact()[0], ("000000000.json", label)]))),
        "tar": (tar_of(intact()), shard_of),
        "coco": (coco.encode(), written(lambda: list(stream_json(path, ["images", "annotations"], chunk_chars=16)))),
        "official": (json.dumps({"model": test_convert.MODEL}).encode(), written(official)),
        "yaml": (config_file("demo.yaml").read_bytes(), written(lambda: read_yaml(path))),
    }


def check_parser(folder, name, seeds):
    content, read = parsers(folder)[name]
    read(content)
    refused = 0
    for seed in seeds:
        started = time.process_time()
        try:
            read(mutate(content, random.Random(seed)))
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
        assert time.process_time() - started < 5
    return refused


PARSERS = ("manifest", "index", "label", "tar", "coco", "official", "yaml")


@pytest.mark.parametrize("name", PARSERS)
def test_mutations_of_a_file_are_read_or_refused_in_one_line(tmp_path, name):
    assert check_parser(tmp_path, name, range(100)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_ten_thousand_mutations_of_a_file(tmp_path, name):
    assert check_parser(tmp_path, name, range(1000, 11_000)) > 1000
