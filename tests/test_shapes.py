"""The generated data set: valid COCO, exact masks, true captions, the same bytes every time."""

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest
from pycocotools.coco import COCO

from pix2seq.data.formats.coco import read_coco
from pix2seq.data.shapes import contact_sheet, write_shapes
from pix2seq.data.shapes.captions import captions, location, noun, phrase
from pix2seq.data.shapes.figures import POLYGONS
from pix2seq.data.shapes.scene import CLASS_NAMES, COLOUR_NAMES, make_scene
from pix2seq.errors import InputError

NUM_SCENES = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "data"
    write_shapes(out, num_train=40, num_val=20, size=96, seed=3)
    return out


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(np.random.default_rng((7, i)), 128) for i in range(NUM_SCENES)]


def digest(folder):
    parts = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in parts]


def test_the_layout_is_cocos(folder):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.json")}
    assert names == {
        f"annotations/{kind}_{split}2017.json"
        for kind in ("instances", "person_keypoints", "captions")
        for split in ("train", "val")
    }
    instances = json.loads((folder / "annotations/instances_train2017.json").read_text())
    assert set(instances["annotations"][0]) == {
        "id",
        "image_id",
        "category_id",
        "bbox",
        "area",
        "iscrowd",
        "segmentation",
        "colour",
        "texture",
    }
    person = json.loads((folder / "annotations/person_keypoints_train2017.json").read_text())["categories"][0]
    assert (len(person["keypoints"]), len(person["skeleton"]), person["name"]) == (17, 19, "person")
    ids = sorted(category["id"] for category in instances["categories"])
    assert ids != list(range(1, len(ids) + 1))  # ids with gaps expose code that uses ids as indices
    val = json.loads((folder / "annotations/instances_val2017.json").read_text())
    assert not {i["id"] for i in instances["images"]} & {i["id"] for i in val["images"]}
    assert len(list((folder / "train2017").glob("0*.jpg"))) == 40


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_processes(folder, tmp_path):
    write_shapes(tmp_path / "again", num_train=40, num_val=20, size=96, seed=3, workers=2)
    assert digest(tmp_path / "again") == digest(folder)
    write_shapes(tmp_path / "other", num_train=4, num_val=0, size=96, seed=4)
    assert digest(tmp_path / "other")[-1] != digest(folder)[-1]


def test_the_default_world_is_what_it_was(tmp_path):
    """Scores of different releases are compared on it. Fields may be added; all else, images included, has this sum."""
    write_shapes(tmp_path / "world", num_train=16, num_val=8, seed=0)
    added = {"colour", "texture"}
    sums = hashlib.sha256()
    for path in sorted(path for path in (tmp_path / "world").rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".json":
            fields = json.loads(content)
            assert fields["info"].pop("command") == "pix2seq data shapes DIR --train 16 --val 8 --size 128 --seed 0"
            kept = [{k: v for k, v in entry.items() if k not in added} for entry in fields["annotations"]]
            content = json.dumps(fields | {"annotations": kept}).encode()
        sums.update(path.relative_to(tmp_path / "world").as_posix().encode() + b"\0" + content)
    assert sums.hexdigest() == "f2104a66126f0c665dfca73678dc18299035c006810b7f16494c1f8c19ea71c7"


def test_masks_boxes_and_areas_agree_by_pycocotools(folder, capsys):
    coco = COCO(folder / "annotations/instances_train2017.json")
    ratios, errors = [], []
    for annotation in coco.loadAnns(coco.getAnnIds()):
        mask = coco.annToMask(annotation)
        x, y, width, height = annotation["bbox"]
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        ends = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        # The tip of a thin figure may fall between pixel centres.
        errors.append(np.abs(np.subtract(ends, [x, y, x + width, y + height])))
        ratios.append(mask.sum() / annotation["area"])
    assert abs(np.mean(ratios) - 1) < 0.04
    assert np.mean(errors) < 0.6
    assert np.max(errors) < 3
    assert coco.getImgIds()


def independent_masks(seed, size):
    """Draw a scene, and find the owner of each fine pixel from the full figures; later ones cover earlier ones."""
    from pix2seq.data.shapes import scene as module

    placed = []
    original = module._paint
    module._paint = lambda rng, fine, candidate: (placed.append(candidate), original(rng, fine, candidate))[1]
    try:
        made = make_scene(np.random.default_rng(seed), size)
    finally:
        module._paint = original
    side = size * module.SUPERSAMPLING
    owner = np.zeros((side, side), int)
    for number, candidate in enumerate(placed, start=1):
        top, left, bottom, right = candidate.window
        owner[top:bottom, left:right][candidate.mask] = number
    return made, owner


def test_polygons_cover_the_visible_part():
    from pycocotools import mask as mask_utils

    from pix2seq.data.shapes.scene import SUPERSAMPLING

    ious = []
    for seed in range(40):
        made, owner = independent_masks((5, seed), 96)
        for number, figure in enumerate(made.figures, start=1):
            rings = [(ring * SUPERSAMPLING).ravel().tolist() for ring in figure.rings]
            drawn = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(rings, *owner.shape))).astype(bool)
            seen = owner == number
            ious.append((drawn & seen).sum() / (drawn | seen).sum())
    assert np.mean(ious) > 0.97
    assert np.min(ious) > 0.85


def test_scenes_have_one_to_eight_figures_of_all_classes_some_in_several_parts(scenes):
    counts = [len(scene.figures) for scene in scenes]
    assert (min(counts), max(counts)) == (1, 8)
    assert {figure.name for scene in scenes for figure in scene.figures} == set(CLASS_NAMES)
    assert len(CLASS_NAMES) == len(POLYGONS) + 1 >= 6
    assert any(len(figure.rings) > 1 for scene in scenes for figure in scene.figures)


def test_keypoints_are_visible_hidden_and_missing(scenes):
    people = np.stack([f.keypoints for scene in scenes for f in scene.figures if f.keypoints is not None])
    assert people.shape[1:] == (17, 3)
    for index in range(17):
        assert {1, 2} <= set(people[:, index, 2].astype(int))
    assert (people[people[..., 2] == 0] == 0).all()
    inside = people[people[..., 2] > 0][:, :2]
    assert ((inside >= 0) & (inside <= 128)).all()


WORDS = {
    "no": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "a": 1,
    "an": 1,
}
KINDS = "|".join(sorted({noun(n, c) for n in CLASS_NAMES for c in (1, 2)}, key=len, reverse=True))
COLOURS = "|".join(COLOUR_NAMES)
OBJECT = rf"(?:(?P<colour>{COLOURS}) )?(?P<kind>{KINDS})(?: in (?P<worn>{COLOURS}))?"
SINGULAR = {noun(name, count): name for name in CLASS_NAMES for count in (1, 2)}


def mentions(text):
    for match in re.finditer(rf"\b(?P<count>{'|'.join(WORDS)}) {OBJECT}", text):
        yield WORDS[match["count"]], match["colour"] or match["worn"], SINGULAR[match["kind"]]


def test_captions_tell_the_truth(scenes):
    relations = 0
    for index, scene in enumerate(scenes):
        texts = captions(scene, np.random.default_rng(index))
        assert len(set(texts)) == 5
        present = Counter((figure.colour, figure.name) for figure in scene.figures)
        kinds = Counter(figure.name for figure in scene.figures)
        for text in texts:
            assert text[0].isupper()
            assert text.endswith(".")
            assert not re.search(r"\ba [aeio]|\ban [^aeio]", text.lower()), text
            lower = text.lower()
            found = list(mentions(lower))
            assert found, text
            for count, colour, name in found:
                have = kinds[name] if colour is None else present[(colour, name)]
                assert 1 <= count <= have, (text, present)
            relation = re.search(rf"{OBJECT} (?:is )?(to the left of|to the right of|above|below) an? (.+)\.", lower)
            if relation:
                relations += 1
                words = relation[4]
                first, second = (next(mentions(f"a {part}")) for part in (relation[0].split(words)[0], relation[5]))
                assert any(holds(words, a, b) for a in of(scene, first) for b in of(scene, second)), text
    assert relations > NUM_SCENES / 2


def of(scene, mention):
    return [f for f in scene.figures if (f.colour, f.name) == mention[1:]]


def holds(words, a, b):
    (ax, ay), (bx, by) = a.centre, b.centre
    return {"to the left of": bx - ax, "to the right of": ax - bx, "above": by - ay, "below": ay - by}[
        words
    ] > 128 * 0.1


def test_easy_scenes_are_plain_and_few():
    made = [make_scene(np.random.default_rng((9, i)), 64, 3, easy=True) for i in range(40)]
    assert {len(scene.figures) for scene in made} == {1, 2, 3}
    assert len({figure.name for scene in made for figure in scene.figures}) == 5
    assert {figure.texture for scene in made for figure in scene.figures} == {"plain"}


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 0.4, 0.6), (1.0, 1, 1)])
def test_persons_are_drawn_as_often_as_asked(share, low, high):
    made = [make_scene(np.random.default_rng((9, i)), 64, 4, person_share=share) for i in range(60)]
    names = [figure.name for scene in made for figure in scene.figures]
    assert low <= names.count("person") / len(names) <= high
    assert share == 1 or len(set(names) - {"person"}) == 10


def test_a_world_says_the_command_that_writes_it(tmp_path):
    from pix2seq.cli import main

    write_shapes(tmp_path / "a", num_train=3, num_val=0, size=48, seed=5, max_objects=2, easy=True, person_share=0.25)
    command = json.loads((tmp_path / "a/annotations/instances_train2017.json").read_text())["info"]["command"]
    assert main(command.replace("DIR", str(tmp_path / "b")).split()[1:]) == 0
    assert digest(tmp_path / "b") == digest(tmp_path / "a")


def test_locations_are_ninths_of_the_image(scenes):
    for figure in scenes[0].figures:
        x, y = figure.centre
        words = location(figure, 128)
        assert ("left" in words) == (x < 128 / 3)
        assert ("bottom" in words) == (y >= 256 / 3)
        assert phrase(figure)


def test_existing_folders_are_kept_and_numbers_are_checked(folder, tmp_path):
    with pytest.raises(InputError, match="not an empty folder"):
        write_shapes(folder, num_train=1, num_val=1)
    for wrong in ({"size": 8}, {"num_train": -1}, {"seed": -1}, {"person_share": 1.5}):
        with pytest.raises(InputError):
            write_shapes(tmp_path / "x", **({"num_train": 1, "num_val": 1} | wrong))
    assert not (tmp_path / "x").exists()


def test_a_contact_sheet_has_the_given_width(folder):
    sheet = contact_sheet(folder, rows=2, columns=3, width=600)
    assert sheet.width == 600
    assert len(read_coco(folder, "val")) == 20
