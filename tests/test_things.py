"""Scenes of cut-outs: which files are cut-outs, what scenes hold, names that training never sees, and bad input."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pix2seq.cli import main
from pix2seq.data.check import check_dataset
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.image import read_image
from pix2seq.data.things import write_things
from pix2seq.data.things.cutouts import find_cutouts, name_of, read_cutout, split_names
from pix2seq.data.things.scene import compose
from pix2seq.errors import InputError
from pix2seq.geometry.polygons import rasterize


def draw_cutout(path, colour, *, mode="RGBA", side=40, alpha=255):
    """A disc with a hole, in the middle of a transparent canvas."""
    image = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(image)
    pen.ellipse((4, 4, side - 5, side - 5), fill=(*colour, alpha))
    pen.ellipse((side // 2 - 5, side // 2 - 5, side // 2 + 4, side // 2 + 4), fill=(0, 0, 0, 0))
    image.convert(mode).save(path)


@pytest.fixture(scope="module")
def cutouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("things") / "cutouts"
    folder.mkdir()
    for i in range(12):
        colour = tuple(np.random.default_rng(i).integers(0, 256, 3).tolist())
        draw_cutout(folder / f"kind-{'abcdefghijkl'[i]}_01.png", colour)
    draw_cutout(folder / "kind-a_02.png", (255, 255, 255))
    return folder


@pytest.fixture(scope="module")
def written(cutouts):
    out = cutouts.parent / "out"
    assert write_things(out, cutouts, num_train=14, num_val=12, size=64, seed=2, unseen_share=0.25) == (9, 3)
    return out


def contents(folder, split):
    return json.loads((folder / f"annotations/instances_{split}2017.json").read_text())


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("red-car_01.png", "red car"),
        ("Red Car.png", "red car"),
        ("bolt__m8.webp", "bolt m8"),
        ("clock-3-7.png", "clock"),
        ("007.png", ""),
        ("_-.png", ""),
        ("Größe 2.png", "größe"),
    ],
)
def test_a_name_is_the_words_of_its_file(tmp_path, file, name):
    assert name_of(tmp_path / file) == name


def test_what_is_no_cutout_is_left_out_with_a_line(cutouts, tmp_path, capsys):
    draw_cutout(tmp_path / "good.png", (200, 0, 0))
    draw_cutout(tmp_path / "palette.png", (0, 200, 0), mode="P")
    draw_cutout(tmp_path / "grey.png", (0, 0, 200), mode="LA")
    draw_cutout(tmp_path / "opaque.png", (0, 0, 200), mode="RGB")
    draw_cutout(tmp_path / "faint.png", (0, 0, 200), alpha=90)
    draw_cutout(tmp_path / "12.png", (0, 0, 200))
    Image.new("RGBA", (30, 30)).save(tmp_path / "empty.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image either, and not expected to be one")
    palette = {each.name for each in find_cutouts(tmp_path)} - {"good", "grey"}
    lines = capsys.readouterr().err.splitlines()
    assert palette <= {"palette"}  # Pillow may drop the transparency of a palette when it saves
    for file, reason in (
        ("opaque.png", "has no alpha channel"),
        ("faint.png", "is transparent"),
        ("12.png", "its name has no word"),
        ("empty.png", "is transparent"),
        ("broken.png", "cannot be read"),
        ("text.png", "cannot be read"),
    ):
        (line,) = (line for line in lines if file in line)
        assert line.startswith("warning: left out: ")
        assert reason in line
    assert not any("notes.txt" in line for line in lines)


def test_a_cutout_is_cropped_to_what_is_not_transparent(cutouts):
    pixels = read_cutout(cutouts / "kind-a_02.png")
    assert pixels.shape == (32, 32, 4)
    assert pixels[16, 16, 3] == 0
    assert pixels[16, 3].tolist() == [255, 255, 255, 255]


def test_names_are_split_by_the_seed():
    names = [f"n{i}" for i in range(20)]
    seen, unseen = split_names(names, 0.3, 1)
    assert sorted([*seen, *unseen]) == sorted(names)
    assert len(unseen) == 6
    assert split_names(names[::-1], 0.3, 1) == (seen, unseen)
    assert split_names(names, 0.3, 2) != (seen, unseen)
    assert split_names(names, 0.0, 1) == (sorted(names), [])
    assert [len(part) for part in split_names(["a", "b"], 0.99, 0)] == [1, 1]


def test_a_data_set_has_no_defects_and_is_a_function_of_its_seed(written, cutouts):
    assert check_dataset(written, None).usable
    for split in ("train", "val"):
        assert not len(read_coco(written, split).defects)
    again = written.parent / "again"
    write_things(again, cutouts, num_train=14, num_val=12, size=64, seed=2, unseen_share=0.25)
    for path in (path for path in written.rglob("*") if path.is_file()):
        assert path.read_bytes() == (again / path.relative_to(written)).read_bytes()


def test_training_never_sees_the_names_that_validation_asks_for(written):
    train, val = contents(written, "train"), contents(written, "val")
    names = {each["id"]: each["name"] for each in val["categories"]}
    unseen = {each["name"] for each in val["categories"] if not each["seen"]}
    assert len(unseen) == 3
    shown = {names[each["category_id"]] for each in train["annotations"]}
    assert not shown & unseen
    assert not {each["name"] for each in train["categories"]} & unseen
    asked = [names[each["category_id"]] for each in val["annotations"]]
    assert all((each["seen"] == "no") == (name in unseen) for each, name in zip(val["annotations"], asked, strict=True))
    assert 0.25 < np.mean([name in unseen for name in asked]) < 0.75
    target = read_coco(written, "val").target(0)
    assert {each["seen"] for each in target.attributes} <= {"yes", "no"}


def test_masks_are_the_visible_pixels(tmp_path):
    """Things of one pure colour each, on a background without it: colours say which pixels they own."""
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))):
        draw_cutout(tmp_path / f"{name}.png", colour, side=80)
    files = {name: [tmp_path / f"{name}.png"] for name in ("red", "green", "blue")}
    compared = 0
    for seed in range(24):
        pixels, things = compose(np.random.default_rng(seed), 96, [tuple(files)], files, 4, backgrounds=[])
        names = [thing.name for thing in things]
        for thing in things:
            x0, y0, x1, y1 = thing.box_xyxy
            assert 0 <= x0 < x1 <= 96
            assert 0 <= y0 < y1 <= 96
            mask = rasterize(thing.rings, 96, 96)
            assert abs(mask.sum() - thing.area) < 0.15 * thing.area + 8
            if names.count(thing.name) > 1 or thing.area < 150:
                continue
            channel = ("red", "green", "blue").index(thing.name)
            others = np.delete(pixels.astype(int), channel, axis=2).max(axis=2)
            own = (pixels[..., channel] > 110) & (others < 60)
            union = (own | mask).sum()
            assert (own & mask).sum() / union > 0.8, (seed, thing.name)
            compared += 1
    assert compared >= 8


def test_nothing_is_hidden_but_for_a_part(cutouts):
    files = {"kind a": [cutouts / "kind-a_02.png"], "kind b": [cutouts / "kind-b_01.png"]}
    for seed in range(10):
        _, things = compose(np.random.default_rng(seed), 64, [tuple(files)], files, 30)
        masks = [rasterize(thing.rings, 64, 64) for thing in things]
        assert all(mask.sum() >= 5 for mask in masks)
        assert np.sum(masks, axis=0).max() <= 2  # neighbours may share the pixels of their border


def test_given_backgrounds_are_seen(cutouts, tmp_path):
    (tmp_path / "behind").mkdir()
    Image.new("RGB", (90, 50), (10, 220, 10)).save(tmp_path / "behind" / "a.png")
    write_things(
        tmp_path / "out", cutouts, num_train=2, num_val=0, size=48, max_objects=1, backgrounds=tmp_path / "behind"
    )
    for path in (tmp_path / "out" / "train2017").glob("*.jpg"):
        greenish = np.abs(read_image(path).astype(int) - (10, 220, 10)).max(axis=2) < 60
        assert greenish.mean() > 0.5


def test_the_number_of_processes_changes_nothing(written, cutouts, tmp_path):
    write_things(tmp_path / "two", cutouts, num_train=14, num_val=12, size=64, seed=2, unseen_share=0.25, workers=2)
    assert contents(tmp_path / "two", "val") == contents(written, "val")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"size": 8}, "size is 8; expected 32 to 2048"),
        ({"unseen_share": 1.0}, "unseen is 1.0; expected a share"),
        ({"max_objects": 0}, "max-objects is 0; expected 1 to"),
        ({"num_train": -1}, "train is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"cutouts": "nowhere"}, "is no folder"),
        ({"cutouts": "."}, "has cut-outs of 0 things"),
        ({"backgrounds": "."}, "has no image to use as a background"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(cutouts, tmp_path, options, reason):
    values = {"cutouts": cutouts, "num_train": 1, "num_val": 1} | options
    values |= {key: tmp_path / value for key, value in values.items() if isinstance(value, str)}
    with pytest.raises(InputError, match=reason):
        write_things(tmp_path / "out", **values)
    assert not list(tmp_path.iterdir())


def test_the_command_says_how_many_names_are_seen(cutouts, tmp_path, capsys):
    command = ["data", "things", str(tmp_path / "out"), "--cutouts", str(cutouts), "--train", "1", "--val", "1"]
    assert main([*command, "--size", "32", "--unseen", "0.5", "--workers", "1"]) == 0
    assert "of 6 names that training sees and 6 that it does not" in capsys.readouterr().out
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err
