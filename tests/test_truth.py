"""Whether a caption is true of a generated image: against the generator, a reading of its own, and by hand."""

import json
import pickle
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pix2seq.data.formats.coco import read_coco
from pix2seq.data.formats.shards import ShardIndex, ShardStream, write_shards
from pix2seq.data.shapes import write_shapes
from pix2seq.data.shapes.captions import captions
from pix2seq.data.shapes.scene import CLASS_NAMES, COLOUR_NAMES, Figure, make_scene
from pix2seq.data.shapes.truth import is_true, is_true_of
from pix2seq.data.targets import crop_to_object, transform_target
from pix2seq.geometry.affine import Affine
from pix2seq.tasks.captioning import Captioning, CaptioningConfig
from pix2seq.tokenizers.text import WordTokenizer
from pix2seq.types import Caption
from pix2seq.vocab import Vocab

SIZE = 64
SHAPES = [name for name in CLASS_NAMES if name != "person"]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight"]
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "above": "below", "below": "above"}
COLOURS = "|".join(COLOUR_NAMES)
OBJECT = rf"(?:(?P<colour>{COLOURS}) (?P<name>{'|'.join(SHAPES)})|person in (?P<worn>{COLOURS}))\b"
PLACE = r"(?:in the middle|in the (?:top|bottom) (?:left|right) corner|on the (?:left|right)|at the (?:top|bottom))"
RELATION = r"to the left of|to the right of|above|below"


def kind(match):
    return (match["worn"], "person") if match["worn"] else (match["colour"], match["name"])


def of_kind(figures, wanted):
    return [figure for figure in figures if (figure.colour, figure.name) == wanted]


def in_ninth(figure, place):
    """Whether a figure's centre is in the ninth that a place names; what it does not name is the middle."""
    (x, y), third = figure.centre, SIZE / 3
    across = x < third if "left" in place else x >= 2 * third if "right" in place else third <= x < 2 * third
    return across and (y < third if "top" in place else y >= 2 * third if "bottom" in place else third <= y < 2 * third)


def contradicted(text, figures):
    """Whether a caption names a kind that is not there, a figure where none is, or a relation that no pair has."""
    lower = text.lower()
    for match in re.finditer(OBJECT, lower):
        if not of_kind(figures, kind(match)):
            return True
        after = re.match(rf" ({PLACE})", lower[match.end() :])
        before = re.search(rf"({PLACE}) is an? $", lower[: match.start()])
        for place in (found[1] for found in (after, before) if found):
            if not any(in_ninth(figure, place) for figure in of_kind(figures, kind(match))):
                return True
    words = re.search(RELATION, lower)
    if words:
        a, b = (of_kind(figures, kind(match)) for match in re.finditer(OBJECT, lower))
        axis = 0 if "to the" in words[0] else 1
        sign = -1 if words[0] in ("to the right of", "below") else 1
        return not any(sign * (second.centre[axis] - first.centre[axis]) > 0 for first in a for second in b)
    return False


def one_word_changed(text, figures):
    """All captions with one word changed that the figures contradict."""
    present = {figure.name for figure in figures}
    words = text.lower().split(" ")
    for i, word in enumerate(words):
        bare = word.strip(",.")
        if bare in COLOUR_NAMES:
            options = [c for c in COLOUR_NAMES if c != bare]
        elif bare in SHAPES:
            options = [name for name in SHAPES if name not in present]
        elif bare in NUMBERS:
            options = [number for number in NUMBERS if number != bare]
        else:
            options = [OPPOSITE[bare]] if bare in OPPOSITE else []
        for option in options:
            changed = " ".join([*words[:i], word.replace(bare, option), *words[i + 1 :]])
            changed = re.sub(r"\ban? (?=(\w))", lambda m: "an " if m[1] in "aeiou" else "a ", changed)
            # Numbers are exact and stand alone, so another number is always wrong; so is a class that is not there.
            if bare in NUMBERS or bare in SHAPES or contradicted(changed, figures):
                yield bare, changed


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_captions_are_true_and_false_with_one_word_changed(seed, max_figures):
    rng = np.random.default_rng(seed)
    scene = make_scene(rng, SIZE, max_figures)
    for text in captions(scene, rng):
        assert is_true(text, scene.figures, SIZE), text
        for word, changed in one_word_changed(text, scene.figures):
            assert not is_true(changed, scene.figures, SIZE), (word, text, changed)


def test_words_of_all_sorts_are_changed():
    sorts = Counter()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scene = make_scene(rng, SIZE)
        for text in captions(scene, rng):
            sorts.update(word for word, _ in one_word_changed(text, scene.figures))
    assert {"left", "right", "top", "bottom", "above", "below", "two", "three", "seven"} <= set(sorts)
    assert set(COLOUR_NAMES) | set(SHAPES) <= set(sorts)


def figure(colour, name, x, y, side=10.0):
    box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    return Figure(name, colour, "plain", box, area=side * side)


# In an image of 90 pixels: a red star top left, another right, a person in blue at the bottom, the largest figure.
FIGURES = [
    figure("red", "star", 15, 15),
    figure("red", "star", 75, 45),
    figure("blue", "person", 45, 75, side=20),
]


@pytest.mark.parametrize(
    "text",
    [
        "Two red stars and a person in blue.",
        "A picture of a person in blue and two red stars.",  # the order is free
        "There is a person in blue.",  # a list may be shorter
        "There are two stars and one person.",
        "i can see two stars , one person",
        "THE PICTURE CONTAINS one person.",
        "A red star in the top left corner and a person in blue at the bottom.",
        "A red star on the right and a red star in the top left corner.",
        "At the bottom is a person in blue, and on the right is a red star.",
        "On the right is a red star.",
        "A red star above a person in blue.",  # 30 across and 60 down: above; the other star is diagonal
        "A person in blue is below a red star.",
        "A person in blue at the bottom, with two other things around.",
        "The largest thing is a person in blue at the bottom, next to two other things.",
        "A red star on the right, with two other things around",
    ],
)
def test_true_sentences(text):
    assert is_true(text, FIGURES, 90)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "A red star.",  # there are two
        "Two red stars and two red stars.",
        "Two red star.",
        "Three stars.",
        "There is one star.",
        "A red star and a red star.",
        "Two red stars and a person in red.",
        "Two red stars, with a person in blue.",
        "A red star in the middle.",
        "A red star on the right and a red star on the right.",  # only one is there
        "A person in blue above a red star.",
        "A red star to the left of a red star.",  # the generator relates different kinds only
        "A red star to the left of a person in blue.",  # 30 across and 60 down is not to the left
        "A person in blue at the bottom and nothing else.",
        "Only a person in blue at the bottom.",
        "A person in blue at the bottom, with three other things around.",
        "The largest thing is a red star on the right, next to two other things.",
        "A person in blue at the bottom, next to two other things.",  # a mixture of two forms
        "The picture contains two red stars",  # neither form: counts of classes have no colours
        "A photo of two red stars.",
        "Two red stars and",
    ],
)
def test_false_sentences(text):
    assert not is_true(text, FIGURES, 90)


def test_a_single_figure_is_alone():
    alone = [figure("red", "star", 45, 45)]
    for text in ("Only a red star in the middle.", "A red star in the middle and nothing else.", "There is one star"):
        assert is_true(text, alone, 90)
    assert not is_true("A red star in the middle, with one other thing around.", alone, 90)


@pytest.mark.parametrize(("x", "on_the_left", "in_the_middle"), [(29.99, 1, 0), (30.001, 1, 1), (30.01, 0, 1)])
def test_a_thousandth_of_a_pixel_does_not_count_because_files_round(x, on_the_left, in_the_middle):
    alone = [figure("red", "star", x, 45)]
    assert is_true("A red star on the left.", alone, 90) == bool(on_the_left)
    assert is_true("A red star in the middle.", alone, 90) == bool(in_the_middle)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("truth") / "data"
    write_shapes(out, num_train=0, num_val=60, size=SIZE, seed=11)
    return out


@pytest.fixture(scope="module")
def dataset(folder):
    return read_coco(folder, "val")


def names_of(dataset):
    return {category.label: category.name for category in dataset.categories}


def metric_of(dataset):
    vocab, text = Vocab().with_text(20), WordTokenizer.build(["a word"])
    return Captioning(CaptioningConfig(), vocab, dataset.categories, text).metric(dataset.categories)


def test_files_keep_what_captions_need(folder, dataset):
    entries = json.loads((folder / "annotations/instances_val2017.json").read_text())["annotations"]
    written = {entry["id"]: {"colour": entry["colour"], "texture": entry["texture"]} for entry in entries}
    assert len({entry["colour"] for entry in entries}) == len(COLOUR_NAMES)
    for index in range(len(dataset)):
        target = dataset.target(index)
        assert list(target.attributes) == [written[i] for i in target.annotation_ids.tolist()]
        assert all(is_true_of(text, target, names=names_of(dataset)) for text in target.captions)


def test_attributes_follow_their_objects_through_crops_shards_and_pickles(dataset, tmp_path):
    target = next(t for t in map(dataset.target, range(60)) if len({str(a) for a in t.attributes}) > 3)
    moved = transform_target(target, Affine(1, 1, -SIZE / 2, 0), (SIZE, SIZE))
    described = dict(zip(target.annotation_ids.tolist(), target.attributes, strict=True))
    assert 0 < len(moved.labels) < len(target.labels)
    assert list(moved.attributes) == [described[i] for i in moved.annotation_ids.tolist()]
    cropped, _ = crop_to_object(target, np.zeros((SIZE, SIZE, 3), np.uint8), 2, 0.1)
    assert cropped.attributes == target.attributes[2:3]
    write_shards(dataset, tmp_path)
    stream = ShardStream(ShardIndex.read(tmp_path, "val"), seed=0)
    for _, sample in zip(range(60), stream, strict=False):
        assert sample.target.attributes == dataset.target(sample.number).attributes
    assert pickle.loads(pickle.dumps(dataset.annotations)).target(3, dataset.images[3]).attributes == (
        dataset.target(3).attributes
    )


def test_the_metric_is_the_share_of_true_captions(dataset):
    first, second = metric_of(dataset), metric_of(dataset)
    for index in range(10):
        target = dataset.target(index)
        answers = [[Caption(target.captions[index % 5], 0)], [Caption("", 0)], []][min(max(index - 5, 0), 2)]
        (first if index < 4 else second).add(target, answers)  # true for 0 to 5, empty for 6, none for 7 to 9
    pickle.loads(pickle.dumps(second))  # it comes from another process
    first.merge(second)
    scores = first.result()
    assert scores.metrics["true"] == 0.6
    assert "true 0.600" in scores.summary()
    assert Captioning.metric_name("true") == "captioning/true"


@pytest.mark.parametrize("change", ["without", "other colour", "other class", "not square", "too many"])
def test_other_data_has_no_such_metric(dataset, change):
    metric, names = metric_of(dataset), names_of(dataset)
    target = dataset.target(0)
    if change == "without":
        target = replace(target, attributes=())
    elif change == "other colour":
        target = replace(target, attributes=tuple({"colour": "beige"} for _ in target.attributes))
    elif change == "other class":
        names = dict.fromkeys(names, "cat")
    elif change == "not square":
        target = replace(target, image=replace(target.image, width=SIZE + 1))
    else:
        parts = {name: np.concatenate([getattr(target, name)] * 9) for name in ("boxes_xyxy", "labels", "areas")}
        target = replace(target, **parts, attributes=target.attributes * 9)
    assert is_true_of(target.captions[0], target, names=names) is None
    if change != "other class":
        metric.add(target, [Caption(target.captions[0], 0)])
        assert "true" not in metric.result().metrics


def test_attributes_that_are_no_words_are_ignored(folder, tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").symlink_to(folder / "val2017")
    content = json.loads((folder / "annotations/instances_val2017.json").read_text())
    for entry in content["annotations"]:
        entry["colour"] = ["red"]
        del entry["texture"]
    content["annotations"][-1]["texture"] = "dots"
    (tmp_path / "annotations/instances_val.json").write_text(json.dumps(content))
    found = read_coco(tmp_path, "val")
    assert not found.target(0).attributes
    assert found.target(len(found) - 1).attributes[-1] == {"texture": "dots"}
    assert all(each == {} for each in found.target(len(found) - 1).attributes[:-1])
    assert len(found.annotations.attribute_owner) == 1  # one object pays, others do not
