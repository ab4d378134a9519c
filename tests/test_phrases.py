"""Phrases: which objects they name, against a slow reading of their words; how they are drawn, and what is left out."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pix2seq.data.phrases import (
    ADJECTIVES,
    PLACES,
    RELATIONS,
    Phrase,
    PhraseMaker,
    Scene,
    Thing,
    describe,
    is_held_out,
    is_unseen,
    miss,
    named,
    phrase_words,
    say,
)
from pix2seq.data.shapes.captions import location, noun, relation
from pix2seq.data.shapes.scene import Figure
from pix2seq.data.targets import transform_target
from pix2seq.geometry.affine import Affine
from pix2seq.tokenizers.text import UNK_ID, WordTokenizer
from pix2seq.types import ImageRecord, Target

NAMES = ("star", "cross", "person")
COLOURS = ("red", "blue")
TEXTURES = ("plain", "stripes")
SIDE = 100.0
WORLD = PhraseMaker(NAMES, lambda text: True, 0.0).world


@st.composite
def figures(draw, most=4):
    """Figures as the generator has them, with boxes anywhere."""
    found = []
    for _ in range(draw(st.integers(1, most))):
        x, y = (draw(st.integers(5, 95)) for _ in range(2))
        kind = [draw(st.sampled_from(values)) for values in (NAMES, COLOURS, TEXTURES)]
        found.append(Figure(*kind, (x - 5.0, y - 5.0, x + 5.0, y + 5.0)))
    return found


def scene_of(figures):
    things = [Thing(f.name, f.colour, f.texture, location(f, SIDE), *f.centre) for f in figures]
    return Scene(tuple(things), SIDE)


def target_of(figures, width=100, height=100, attributes=True):
    n = len(figures)
    return Target(
        ImageRecord(1, Path("a.png"), width, height),
        np.array([f.box_xyxy for f in figures], np.float32).reshape(-1, 4),
        np.array([1 + NAMES.index(f.name) for f in figures], np.int64),
        np.full(n, 100, np.float32),
        np.zeros(n, bool),
        np.arange(1, n + 1),
        (None,) * n,
        np.zeros((n, 0, 3), np.float32),
        attributes=tuple({"colour": f.colour, "texture": f.texture} for f in figures) if attributes else (),
    )


BY_LABEL = dict(enumerate(NAMES, start=1))


def read_slowly(text, figures):
    """Which figures a phrase names, read word by word, with the places and relations of captions."""
    text = re.sub("^(the|an?|all) ", "", text)
    for words in RELATIONS:
        head, found, tail = text.partition(f" {words} the ")
        if found:
            others = read_slowly(tail, figures)
            return [
                i
                for i in read_slowly(head, figures)
                if any(j != i and relation(figures[i], figures[j], SIDE) == words for j in others)
            ]
    place = next((each for each in sorted(PLACES, key=len, reverse=True) if text.endswith(f" {each}")), None)
    text = text if place is None else text.removesuffix(f" {place}")
    found = []
    for i, figure in enumerate(figures):
        adjective = ADJECTIVES[figure.texture]
        nouns = [figure.name, noun(figure.name, 2), "thing", "things"]
        nouns += ["persons"] if figure.name == "person" else []
        true = set()
        for kind, has_colour, has_texture in product(nouns, (0, 1), (0, 1)):
            before = [adjective] * has_texture
            if has_colour and figure.name == "person" and not kind.startswith("thing"):
                true.add(" ".join([*before, kind, "in", figure.colour]))
            else:
                true.add(" ".join([*before, *[figure.colour] * has_colour, kind]))
        if text in true and (place is None or place == location(figure, SIDE)):
            found.append(i)
    return found


@st.composite
def phrases(draw, depth=1):
    pick = lambda values: draw(st.none() | st.sampled_from(values))  # noqa: E731
    phrase = Phrase(pick(NAMES), pick(COLOURS), pick(TEXTURES), pick(PLACES))
    if depth and draw(st.booleans()):
        other = replace(draw(phrases(depth=0)), place=None)
        phrase = replace(phrase, relation=draw(st.sampled_from(RELATIONS)), other=other)
    return phrase


@given(phrases(), figures(), st.integers(0, 99))
@settings(max_examples=150)
def test_a_phrase_names_what_its_words_say(phrase, figures, seed):
    text = say(phrase, np.random.default_rng(seed))
    assert named(phrase, scene_of(figures)) == read_slowly(text, figures), text


@given(figures(), st.integers(0, 2**32))
@settings(max_examples=150)
def test_a_description_names_its_object_and_a_miss_names_nothing(figures, seed):
    rng, scene = np.random.default_rng(seed), scene_of(figures)
    i = int(rng.integers(len(figures)))
    phrase = describe(scene, i, rng)
    assert i in read_slowly(say(phrase, rng), figures)
    missed = miss(phrase, scene, WORLD, rng)
    if missed is not None:
        assert read_slowly(say(missed, rng), figures) == []


def num_different(one, other):
    facts = ("name", "colour", "texture", "place", "relation")
    count = sum(getattr(one, fact) != getattr(other, fact) for fact in facts)
    return count + (num_different(one.other, other.other) if one.other is not None else 0)


def test_a_miss_is_near():
    star, cross = Figure("star", "red", "stripes", (0, 0, 10, 10)), Figure("cross", "blue", "plain", (80, 0, 90, 9))
    scene = scene_of([star, cross])
    differences = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        phrase = describe(scene, int(rng.integers(2)), rng)
        differences.append(num_different(phrase, miss(phrase, scene, WORLD, rng)))
    assert set(differences) == {1}
    # All but the stars and the crosses in blue: one change that names nothing, among many that name something.
    others = [("star", "red"), ("cross", "red"), ("person", "red"), ("person", "blue")]
    scene = scene_of([Figure(*each, "plain", (0, 0, 9, 9)) for each in others])
    world = replace(WORLD, names=NAMES, colours=COLOURS)
    for seed in range(50):
        assert miss(Phrase("star", "red"), scene, world, np.random.default_rng(seed)) == Phrase("star", "blue")


def test_two_words_change_where_every_change_of_one_names_something():
    every = [Figure(name, colour, "plain", (0, 0, 9, 9)) for name in NAMES for colour in COLOURS]
    scene = scene_of(every[:-1])  # all but the person in blue
    world = replace(WORLD, names=NAMES, colours=COLOURS)
    assert miss(Phrase("star", "red"), scene, world, np.random.default_rng(0)) == Phrase("person", "blue")
    assert miss(Phrase("star", "red"), scene_of(every), world, np.random.default_rng(0)) is None


@given(figures(), st.integers(0, 2**32), st.booleans())
def test_mirroring_swaps_left_and_right(figures, seed, absent):
    """Phrases are drawn from the mirrored annotations; with the sides swapped, they name the same objects before."""
    assume(all(f.centre[0] % 33 for f in figures))  # on no border between ninths
    target = target_of(figures)
    moved = transform_target(target, Affine(1, 1).then_mirror(100), (100, 100))
    drawn = PhraseMaker(NAMES, lambda text: True, 0.0).draw(
        Scene.of(moved, BY_LABEL, (100, 100)), np.random.default_rng(seed), absent=absent
    )
    if drawn is None:
        assert absent
        return
    swapped = drawn.text.replace("left", "LEFT").replace("right", "left").replace("LEFT", "right")
    assert read_slowly(swapped, figures) == drawn.meant
    assert bool(drawn.meant) != absent


@given(figures())
def test_a_scene_of_a_target_is_that_of_its_figures(figures):
    assert Scene.of(target_of(figures), BY_LABEL) == scene_of(figures)


def test_sides_are_those_of_the_image_in_a_padded_or_cropped_input():
    wide = [Figure("star", "red", "plain", (150, 40, 170, 60)), Figure("cross", "red", "plain", (90, 40, 110, 60))]
    target = target_of(wide, width=200, height=100)
    # The image fills the upper half of a square input; then it is enlarged, and only its right half is in view.
    for affine, places in (
        (Affine(0.5, 0.5), ["on the right", "in the middle"]),
        (Affine(1, 1, -100, 0), ["in the middle", "on the left"]),
    ):
        moved = transform_target(target, affine, (100, 100))
        assert [thing.place for thing in Scene.of(moved, BY_LABEL, (100, 100)).things] == places
    assert Scene.of(target, BY_LABEL).size == 200


def test_data_without_attributes_is_named_by_class_place_and_relation():
    figures = [Figure("star", "", "", (0, 0, 10, 10)), Figure("cross", "", "", (80, 80, 90, 90))]
    scene = Scene.of(target_of(figures, attributes=False), BY_LABEL)
    maker = PhraseMaker(NAMES, lambda text: True, 0.5)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        drawn, absent = maker.draw(scene, rng, absent=False), maker.draw(scene, rng, absent=True)
        assert drawn.meant
        assert not absent.meant
        assert not {"red", "blue", "striped"} & {*drawn.text.split(), *absent.text.split()}


def test_crowds_are_never_asked_for():
    figures = [Figure("star", "red", "plain", (0, 0, 10, 10)), Figure("cross", "red", "plain", (80, 80, 90, 90))]
    target = replace(target_of(figures), iscrowd=np.array([True, False]))
    scene, maker = Scene.of(target, BY_LABEL), PhraseMaker(NAMES, lambda text: True, 0.0)
    meant = [maker.draw(scene, np.random.default_rng(seed), absent=False) for seed in range(60)]
    assert {tuple(each.meant) for each in meant if each is not None} == {(1,)}
    only_crowd = Scene.of(target.only(0), BY_LABEL)
    assert maker.draw(only_crowd, np.random.default_rng(0), absent=False) is None


def test_an_image_without_objects_is_asked_for_something():
    empty = Scene.of(target_of([]), BY_LABEL)
    maker = PhraseMaker(NAMES, lambda text: True, 0.0)
    assert maker.draw(empty, np.random.default_rng(0), absent=True).meant == []
    assert maker.draw(empty, np.random.default_rng(0), absent=False) is None


@given(figures(), st.integers(0, 2**32), st.booleans())
def test_left_out_combinations_are_not_drawn_in_training(figures, seed, absent):
    share = 0.5
    scene = scene_of(figures)
    drawn = PhraseMaker(NAMES, lambda text: True, share).draw(scene, np.random.default_rng(seed), absent=absent)
    if drawn is None:
        return
    words = re.split(" to the | above | below ", re.sub("^(the|an?|all) ", "", drawn.text))[0].split()
    facts = sum(any(word in words for word in kind) for kind in (COLOURS, ("plain", "striped")))
    facts += not {"thing", "things"} & set(words)
    left_out = [is_held_out((f.name, f.colour, f.texture), share) for f in figures]
    assert facts < 2 or not any(left_out[i] for i in drawn.meant)


def test_what_is_left_out_can_be_asked_for_alone():
    share = 0.5
    held = next(each for each in product(NAMES, COLOURS, TEXTURES) if is_held_out(each, share))
    scene = scene_of([Figure(*held, (0, 0, 10, 10))])
    drawn = PhraseMaker(NAMES, lambda text: True, share).draw(
        scene, np.random.default_rng(0), absent=False, unseen=True
    )
    assert drawn.is_unseen
    assert drawn.meant == [0]
    assert {held[1], ADJECTIVES[held[2]]} <= set(drawn.text.split())
    assert is_unseen(Phrase(*held), scene, share)
    assert not is_unseen(Phrase(held[0]), scene, share)
    assert is_unseen(Phrase(*held), scene_of([]), share)  # nor asked in vain
    new = Scene((replace(scene.things[0], seen=False),), SIDE)
    assert is_unseen(Phrase(held[0]), new, 0.0)


def test_the_share_of_combinations_is_about_what_was_asked():
    every = [(name, colour, texture) for name in map(str, range(30)) for colour in "abcdef" for texture in "xyz"]
    for share in (0.1, 0.5):
        assert np.mean([is_held_out(each, share) for each in every]) == pytest.approx(share, abs=0.07)
    assert not any(is_held_out(each, 0.0) for each in every)


@given(figures(), st.integers(0, 2**32), st.booleans())
def test_all_words_of_phrases_get_into_the_vocabulary(figures, seed, absent):
    attributes = [{"colour": c, "texture": t} for c in COLOURS for t in TEXTURES]
    tokenizer = WordTokenizer.build([], required=phrase_words(NAMES, attributes))
    maker = PhraseMaker(NAMES, lambda text: UNK_ID not in tokenizer.encode(text), 0.0)
    assert maker.world.colours == COLOURS
    drawn = maker.draw(scene_of(figures), np.random.default_rng(seed), absent=absent)
    assert drawn is None or UNK_ID not in tokenizer.encode(drawn.text)
    assert drawn is not None or absent


def test_plurals():
    pairs = {"star": "stars", "cross": "crosses", "person": "people", "berry": "berries", "key": "keys", "box": "boxes"}
    assert {name: noun(name, 2) for name in pairs} == pairs


def test_a_description_says_all_but_what_training_leaves_out():
    star = Thing("star", "red", "stripes", "", 0.0, 0.0)
    assert PhraseMaker(["star"], lambda text: True, 0.0).description(star) == "striped red star"
    assert PhraseMaker(["star"], lambda text: True, 0.999).description(star) == "star"
    assert PhraseMaker(["star"], lambda text: "red" not in text, 0.0).description(star) is None
    assert PhraseMaker(["star"], lambda text: True, 0.0).description(replace(star, seen=False)) is None
    assert PhraseMaker(["star"], lambda text: True, 0.0).description(replace(star, colour="", texture="")) == "star"
