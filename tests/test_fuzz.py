"""Parsers of files from strangers: mutated input gives a result or an `InputError`, soon and in little memory.

Every parser gets `EXAMPLES` inputs. Each is a valid file with up to six mutations: pieces are cut, doubled or replaced
by awkward ones, entries of a JSON tree by other values, fields of a protocol buffer by others with right checksums.
"""

import copy
import itertools
import json
import resource
import shutil
import signal
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from official_format import index_table, varint, write_bundle
from PIL import Image

from pix2seq import Pix2Seq, Predictor
from pix2seq.convert.tf_bundle import TensorBundle
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.formats.voc import read_voc
from pix2seq.data.image import read_image
from pix2seq.errors import InputError
from pix2seq.files import find_damage
from pix2seq.infer.predict import read_boxes
from pix2seq.model.pretrained import read_weights
from pix2seq.tokenizers.text import load_text_tokenizer
from pix2seq.training.config import load_config, read_yaml

pytestmark = pytest.mark.slow

EXAMPLES = 10_000
MAX_SECONDS = 5  # of processor time
MAX_BYTES = 2**30  # beyond what the process has at the start
MODEL = Path(__file__).parent / "fixtures" / "checkpoint-0.1"

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**40, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", "a", "../a.png", "/dev/zero", "\0", "\ud800", "${oc.env:HOME}", "???", "vit", "x" * 5000]),
    st.text(max_size=4),
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
AWKWARD = [
    *(
        b"",
        b"\0",
        b"-",
        b"1",
        b"-1",
        b"1e999",
        b"0x",
        b"0b_",
        b"NaN",
        b"null",
        b"true",
        b'"',
        b"\\",
        b"\\ud800",
        b"\xff",
    ),
    *(b"[", b"]", b"{", b"}", b":", b",", b"<", b">", b"</object>", b"<object>", b"&amp;", b"&#0;", b"<!ENTITY a 'b'>"),
    *(b"&a ", b"*a", b"!!int x", b"!!python/object:os.system", b"2001-13-45", b"- ", b"\n  ", b"? ", b"|", b"<<: *a"),
    *(b"9" * 5000, b"[" * 20_000, b'{"a":' * 20_000, b"<a>" * 20_000, b"- " * 5000),
]


@st.composite
def mutated_bytes(draw, content):
    """Draw a mutation of some bytes."""
    for _ in range(draw(st.sampled_from([1, 1, 2, 3, 6]))):
        start, length = draw(st.integers(0, len(content))), draw(st.sampled_from([0, 1, 2, 4, 16, 100, 10_000]))
        piece = draw(
            st.one_of(st.sampled_from(AWKWARD), st.binary(max_size=8), st.just(content[start : start + length]))
        )
        content = content[:start] + piece + content[start + draw(st.sampled_from([0, 1, length])) :]
    return content


@st.composite
def mutated_tree(draw, tree):
    """Draw a mutation of a JSON value."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3, 6]))):
        entries = list(places(tree))
        container, key = draw(st.sampled_from(entries)) if entries else ([tree], 0)
        if draw(st.integers(0, 3)):
            container[key] = draw(TREES)
        else:
            del container[key]
    return tree


def places(value):
    """The containers and keys of all values within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def mutated_json(tree):
    """Mutations of a JSON file, as a tree and as bytes."""
    trees = mutated_tree(tree).map(lambda value: json.dumps(value).encode())
    return trees | mutated_bytes(json.dumps(tree, indent=1).encode())


class TooSlow(BaseException):
    """Not an `Exception`, so that no parser can take it for a defect of the file."""


@contextmanager
def limits():
    """Raise `TooSlow` within what takes too much time, and `MemoryError` within what takes too much memory."""

    def stop(signum, frame):
        raise TooSlow(f"more than {MAX_SECONDS} s of processor time, or 300 s of waiting")

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGVTALRM, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 300)  # a pipe that nobody writes to takes no processor time
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def limited_memory():
    """Limit the address space of this process to a little more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(contents, path, parse, examples=EXAMPLES):
    """Write each content to a path and parse it. Returns how many were refused."""
    count = refused = 0

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(contents)
    def run(content):
        nonlocal count, refused
        count += 1
        path.write_bytes(content)
        with limits():
            try:
                parse()
            except InputError:
                refused += 1

    run()
    assert count >= examples
    print(f"{path.name}: {count} inputs, {refused} refused")
    return refused


def test_the_limits_stop_what_takes_too_long_or_too_much(monkeypatch):
    monkeypatch.setitem(globals(), "MAX_SECONDS", 0.2)
    with pytest.raises(TooSlow), limits():
        any(i < 0 for i in itertools.count())
    with pytest.raises(MemoryError):
        bytearray(2 * MAX_BYTES)


COCO = {
    "images": [{"id": i, "file_name": "a.png", "width": 40, "height": 30} for i in (1, 2)],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 7,
            "bbox": [1, 2, 9, 8],
            "area": 72,
            "iscrowd": 0,
            "keypoints": [1, 2, 2] * 2,
        },
        {"id": 2, "image_id": 1, "category_id": 7, "bbox": [1, 2, 9, 8], "segmentation": [[1, 1, 9, 1, 9, 9]]},
        {
            "id": 3,
            "image_id": 2,
            "category_id": 8,
            "segmentation": {"size": [30, 40], "counts": [600, 600]},
            "iscrowd": 1,
        },
        {"id": 4, "image_id": 2, "category_id": 8, "bbox": [0, 0, 4, 4], "caption": "a cat"},
    ],
    "categories": [
        {"id": 7, "name": "cat", "keypoints": ["nose", "tail"], "skeleton": [[1, 2]]},
        {"id": 8, "name": "dog", "supercategory": "animal"},
    ],
}


def read_all(dataset):
    for index in range(len(dataset)):
        dataset.target(index)


def test_coco(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "train/a.png")
    path = tmp_path / "annotations/instances_train.json"
    assert fuzz(mutated_json(COCO), path, lambda: read_all(read_coco(tmp_path, "train"))) < EXAMPLES


def test_voc(tmp_path):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages/a.jpg")
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9.5</xmax><ymax>8</ymax></bndbox>"
    parts = "<truncated>0</truncated><difficult>1</difficult><part><name>head</name></part>"
    content = f"""<?xml version="1.0" encoding="utf-8"?><annotation><filename>a.jpg</filename>
    <size><width>40</width><height>30</height><depth>3</depth></size>
    <object><name>cat</name>{box}</object><object><name>dog</name>{parts}{box}</object></annotation>"""
    path = tmp_path / "Annotations/a.xml"
    parse = lambda: read_all(read_voc(tmp_path, "train"))  # noqa: E731
    assert fuzz(mutated_bytes(content.encode()), path, parse) < EXAMPLES


YAML = b"""data: shapes
tasks: [detection, segmentation]
lr: 1e-4
betas: &b [0.9, 0.95]
model: {image_size: [32, 32], encoder: {name: vit, dim: 8}}
detection:
  max_objects: 5
  top_p: 0.4
segmentation: {num_samples: 2}
"""


def test_yaml(tmp_path):
    path = tmp_path / "a.yaml"
    assert fuzz(mutated_bytes(YAML), path, lambda: read_yaml(path)) < EXAMPLES
    assert fuzz(mutated_bytes(YAML), path, lambda: load_config(path), examples=EXAMPLES // 10) < EXAMPLES // 10


@st.composite
def mutated_index(draw, entries):
    """Draw a TensorFlow index with right checksums and mutated messages."""
    entries = dict(entries)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(entries)))
        start = draw(st.integers(0, len(entries[key])))
        field = varint(draw(st.integers(0, 10)) << 3 | draw(st.integers(0, 5)))
        number = varint(draw(st.sampled_from([0, 1, 2, 7, 100, 2**30, 2**40, 2**63 - 1])))
        piece = draw(st.sampled_from([field, number, field + number, b""]) | st.binary(max_size=6))
        entries[key] = entries[key][:start] + piece + entries[key][start + draw(st.integers(0, 4)) :]
    return index_table(entries)


def test_tensorflow_index(tmp_path):
    tensors = {f"layer/{i}": np.arange(i, dtype=np.float32).reshape(i, 1) for i in range(1, 5)} | {"text": b"words"}
    entries = write_bundle(tmp_path / "ckpt", tensors)
    whole = (tmp_path / "ckpt.index").read_bytes()

    def read():
        bundle = TensorBundle(tmp_path / "ckpt")
        for name in bundle.entries:
            bundle.verify(name)
            if name != "text":
                bundle.read(name)

    assert fuzz(mutated_index(entries) | mutated_bytes(whole), tmp_path / "ckpt.index", read) < EXAMPLES


def test_safetensors(tmp_path):
    content = (MODEL / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    small = dict(list(header.items())[:6])
    data = content[8 + length :][: max(e["data_offsets"][1] for k, e in small.items() if k != "__metadata__")]

    def joined(text):
        return struct.pack("<Q", len(text)) + text + data

    path = tmp_path / "model.safetensors"

    def read():
        find_damage(tmp_path)
        read_weights(path)

    contents = mutated_json(small).map(joined) | mutated_bytes(joined(json.dumps(small).encode()))
    fuzz(contents, path, read)


def copied_model(folder):
    shutil.copytree(MODEL, folder)
    (folder / "manifest.json").unlink()
    return folder


def test_manifest(tmp_path):
    folder = copied_model(tmp_path / "model")
    manifest = json.loads((MODEL / "manifest.json").read_text())
    damaged = 0

    def read():
        nonlocal damaged
        damaged += find_damage(folder) is not None

    assert not fuzz(mutated_json(manifest), folder / "manifest.json", read)
    assert EXAMPLES // 2 < damaged < EXAMPLES * 1.1


def test_config_of_a_checkpoint(tmp_path):
    folder = copied_model(tmp_path / "model")
    config = json.loads((MODEL / "config.json").read_text())
    config["categories"] = config["categories"][:3]
    path = folder / "config.json"
    assert fuzz(mutated_json(config), path, lambda: Predictor(Pix2Seq.from_pretrained(folder))) < EXAMPLES


def test_words(tmp_path):
    words = {"tokens": ["<pad>", "</s>", "<unk>", "cat", " , ", "dog"]}
    path = tmp_path / "text_vocab.json"
    assert fuzz(mutated_json(words), path, lambda: load_text_tokenizer(tmp_path).encode("a cat, a dog")) < EXAMPLES


def test_boxes(tmp_path):
    boxes = {"instances": [{"bbox": [1, 2, 3, 4.5], "category": "cat", "score": 0.5, "segmentation": [[1, 2]]}] * 2}
    path = tmp_path / "a.json"
    assert fuzz(mutated_json(boxes), path, lambda: read_boxes(path)) < EXAMPLES


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "MPO"])
def test_images(tmp_path, format):
    path = tmp_path / "image"
    image = Image.effect_noise((24, 20), 60).convert("RGB")
    image.save(path, format, **({"save_all": True, "append_images": [image]} if format == "MPO" else {}))
    fuzz(mutated_bytes(path.read_bytes()), path, lambda: read_image(path), examples=EXAMPLES // 8)
