"""The commands of docs/your-data.md on small exports of each tool's form, and the split that a run makes for itself."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pix2seq.cli import main
from pix2seq.data.annotations import contents
from pix2seq.data.dataset import open_dataset
from pix2seq.errors import InputError
from pix2seq.training.config import load_config
from pix2seq.training.recipe import prepare

PAGE = Path(__file__).resolve().parent.parent / "docs/your-data.md"
TINY = [
    *(
        "steps=1",
        "batch_size=2",
        "num_workers=0",
        "device=cpu",
        "bf16=false",
        "trackers=[]",
        "model.image_size=[32,32]",
    ),
    *("model.encoder.name=vit", "model.encoder.mlp_dim=16", "model.decoder.mlp_dim=16", "model.decoder.max_seq_len=64"),
    *(f"model.{part}.{name}" for part in ("encoder", "decoder") for name in ("dim=16", "num_layers=1", "num_heads=2")),
    *("model.vocab.num_bins=32", "model.vocab.size=1040", "detection.max_objects=4", "segmentation.max_points=8"),
]
BOX = [8, 6, 20, 12]


def paint(path, shade=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (48, 32), (shade,) * 3)
    image.paste((250, 40, 40), (8, 6, 28, 18))
    image.save(path)


def coco(path, names, categories, category, **fields):
    """A COCO file with one object in each image."""
    images = [{"id": i, "file_name": name, "width": 48, "height": 32} for i, name in enumerate(names)]
    entry = {"bbox": BOX, "area": 240, "iscrowd": 0, "category_id": category} | fields
    content = {"images": images, "categories": categories, "annotations": []}
    content["annotations"] = [entry | {"id": i, "image_id": i} for i in range(len(names))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def cvat(root):
    for number in range(3):
        paint(root / f"images/default/frame_{number}.png")
    names = [f"frame_{number}.png" for number in range(3)]
    coco(root / "annotations/instances_default.json", names, [{"id": 1, "name": "bolt", "supercategory": ""}], 1)


def label_studio(root):
    names = [f"images/4c7c8e85-photo {number}.jpg" for number in range(3)]
    for name in names:
        paint(root / name)
    coco(root / "result.json", [name.replace("/", "\\") for name in names], [{"id": 0, "name": "bolt"}], 0, ignore=0)


def roboflow(root):
    categories = [
        {"id": 0, "name": "parts", "supercategory": "none"},
        {"id": 1, "name": "bolt", "supercategory": "parts"},
    ]
    for split in ("train", "valid", "test"):
        name = f"img_{split}_jpg.rf.0a1b2c.jpg"
        paint(root / split / name)
        coco(root / split / "_annotations.coco.json", [name], categories, 1)


def labelme(root):
    names = [f"JPEGImages/{number}.jpg" for number in range(3)]
    for name in names:
        paint(root / name)
    ring = [8, 6, 28, 6, 28, 18, 8, 18]
    coco(root / "annotations.json", names, [{"id": 0, "name": "bolt"}], 0, segmentation=[ring])


def yolo(root):
    for split in ("train", "val"):
        paint(root / f"images/{split}/a.jpg")
        (root / f"labels/{split}").mkdir(parents=True)
        (root / f"labels/{split}/a.txt").write_text("0 0.375 0.375 0.416667 0.375\n")
    (root / "data.yaml").write_text(
        "path: ../datasets/bolts\ntrain: images/train\nval: images/val\nnames:\n  0: bolt\n"
    )


EXPORTS = {"cvat": cvat, "label_studio": label_studio, "roboflow": roboflow, "labelme": labelme, "yolo": yolo}
COMMANDS = [line.split()[1:] for line in re.findall(r"^pix2seq .*$", PAGE.read_text("utf-8"), re.MULTILINE)]


@pytest.mark.parametrize("tool", EXPORTS)
def test_the_commands_of_the_page_train_on_an_export(tmp_path, monkeypatch, capsys, tool):
    monkeypatch.chdir(tmp_path)
    EXPORTS[tool](tmp_path / tool)
    commands = [words for words in COMMANDS if any(tool in word for word in words)]
    assert [words[0] for words in commands][:2] in (["data", "train"], ["data", "train", "eval"])
    for words in commands:
        small = {"train": TINY, "eval": ["--device", "cpu"]}.get(words[0], [])
        assert main([*shlex.split(" ".join(words)), *small]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "sound: no defects" in said
    assert ("held out" in said) == (tool in ("cvat", "label_studio", "labelme"))
    target = open_dataset(tool, "train").target(0)
    np.testing.assert_allclose(target.boxes_xyxy, [[8, 6, 28, 18]], atol=1e-3)
    assert contents(target) >= {"object"}


def test_every_command_of_the_page_is_of_a_tool_that_is_tested():
    assert all(any(tool in word for tool in EXPORTS for word in words) for words in COMMANDS)


# A split of one's own


def write_images(root, split, count, category=1):
    names = [f"{split}{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        paint(root / split / name, shade=10 * number)
    categories = [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut"}]
    coco(root / f"annotations/instances_{split}.json", names, categories, category)
    return root


def held_out(root, *settings):
    """The image ids of training and validation, and the notes of a run."""
    recipe = prepare(load_config(None, [f"data={root}", *TINY, *settings]))
    (samples,) = recipe.samples
    (val,) = recipe.val_data.values()
    return [image.id for image in samples.dataset.images], [image.id for image in val.images], recipe.notes


def test_without_a_validation_split_a_share_is_held_out_by_the_seed(tmp_path):
    root = write_images(tmp_path, "train", 20)
    train, val, (note,) = held_out(root, "val_fraction=0.3")
    assert sorted(train + val) == list(range(20))
    assert len(val) == 6
    assert "6 of the 20 training images are held out for it (val_fraction=0.3, seed=0)" in note
    assert held_out(root, "val_fraction=0.3")[:2] == (train, val)
    assert held_out(root, "val_fraction=0.3", "seed=1")[1] != val
    assert len(held_out(root)[1]) == 2
    with pytest.raises(InputError, match="val_fraction=0 of its 20 images leaves nothing"):
        held_out(root, "val_fraction=0")
    with pytest.raises(InputError, match="no annotations of split 'other'"):
        held_out(root, "val_split=other")
    write_images(root, "valid", 3)
    train, val, notes = held_out(root)
    assert (len(train), len(val), notes) == (20, 3, ())


def test_classes_that_only_validation_has_are_said_before_the_first_step(tmp_path):
    root = write_images(write_images(tmp_path, "train", 2), "val", 2, category=2)
    _, _, (note,) = held_out(root)
    assert note == "warning: split 'val' has objects of classes that training has none of: nut"
    coco(root / "annotations/instances_val.json", ["val0.png"], [{"id": 1, "name": "screw"}], 1)
    with pytest.raises(InputError, match="classes that the training data of detection does not have: screw"):
        held_out(root)


def test_a_bad_validation_image_ends_a_run_before_its_first_step(tmp_path, capsys):
    root = write_images(write_images(tmp_path / "data", "train", 2), "val", 3)
    (root / "val/val2.png").write_bytes(b"junk")
    command = ["train", "--task", "detection", f"data={root}", f"out={tmp_path / 'run'}", *TINY]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 1 images of split 'val' cannot be evaluated: ")
    assert "val2.png" in error
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert main([*command, "eval_images=2"]) == 0


@pytest.mark.parametrize("split", ["train", "val"])
def test_selected_images_keep_their_annotations(shared, split):
    dataset = open_dataset(shared / "data/coco_mini", split)
    chosen = np.flatnonzero(np.random.default_rng(0).random(len(dataset)) < 0.5)
    part = dataset.select("part", chosen)
    assert len(part) == len(chosen)
    for index, original in enumerate(chosen.tolist()):
        ours, theirs = part.target(index), dataset.target(original)
        assert ours.image == theirs.image
        assert ours.captions == theirs.captions
        for name in ("boxes_xyxy", "labels", "areas", "iscrowd", "annotation_ids", "keypoints", "difficult"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        for a, b in zip(ours.segmentations, theirs.segmentations, strict=True):
            assert a == b if isinstance(b, dict) else all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
