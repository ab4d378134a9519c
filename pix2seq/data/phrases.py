"""Phrases about annotated objects: `the striped red star on the left`, `people in blue`, and which objects they name.

A phrase is made of facts: class, colour, texture, which ninth of the image, and the relation to another object. Places
and relations mean what they mean in `pix2seq.data.shapes.captions`. Objects without attributes, as in most data sets,
are named by their class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np

from pix2seq.data.shapes.appearance import HSV_RANGES, TEXTURES
from pix2seq.data.shapes.captions import article, direction, noun, place
from pix2seq.types import Target

COLOURS = tuple(HSV_RANGES)
ADJECTIVES = {  # how a texture is said; others as they are annotated
    "stripes": "striped",
    "checks": "checked",
    "dots": "dotted",
    "gradient": "shaded",
    "noise": "grainy",
    "clouds": "cloudy",
    "plain": "plain",
}
PLACES = tuple(dict.fromkeys(place(x / 6, y / 6) for x in (1, 3, 5) for y in (1, 3, 5)))
RELATIONS = ("to the left of", "to the right of", "above", "below")
ARTICLES = ("the", "a", "an", "all")
THING = "thing"  # in place of a class that is not said
PERSONS = ("people", "persons")

# How often a phrase says a fact of its object
NAME_SHARE = 0.85
COLOUR_SHARE = 0.6
TEXTURE_SHARE = 0.4
PLACE_SHARE = 0.2
RELATION_SHARE = 0.15
PLURAL_SHARE = 0.3

TRIES = 8  # to draw a phrase of the kind that is asked for
NEAR_TRIES = 12  # phrases in which one word was changed, before more are
FAR_TRIES = 30


@dataclass(frozen=True)
class Thing:
    """What phrases can say of an object."""

    name: str
    colour: str  # empty: not annotated
    texture: str
    place: str
    x: float  # of the centre, pixels
    y: float
    is_crowd: bool = False  # several objects, or one that the data set does not count: not asked for
    seen: bool = True  # whether training has objects of its name

    @property
    def combination(self) -> tuple[str, str, str]:
        """Class, colour and texture."""
        return self.name, self.colour, self.texture


@dataclass(frozen=True)
class Scene:
    """The objects of an image."""

    things: tuple[Thing, ...]
    size: float  # longer side of the image, pixels

    @classmethod
    def of(cls, target: Target, names: Mapping[int, str], size: tuple[int, int] | None = None) -> Scene:
        """Return the objects of a target, named by their labels.

        `size` (height, width) is that of the input that the target was moved to; sides are those of the part of the
        image that it shows. None: the target is in pixels of its image.
        """
        ends = np.array([[0, 0], [target.image.width, target.image.height]]) * target.scale_xy + target.offset_xy
        low, high = ends.min(axis=0), ends.max(axis=0)
        if size is not None:
            low, high = np.clip(low, 0, size[::-1]), np.clip(high, 0, size[::-1])
        centres = (target.boxes_xyxy[:, :2] + target.boxes_xyxy[:, 2:]).astype(np.float64) / 2
        attributes = target.attributes or ({},) * len(target.labels)
        things = [
            Thing(
                names[label],
                each.get("colour", ""),
                each.get("texture", ""),
                place(*((centre - low) / (high - low)).tolist()),
                float(centre[0]),
                float(centre[1]),
                is_crowd=crowd,
                seen=each.get("seen") != "no",
            )
            for label, each, centre, crowd in zip(
                target.labels.tolist(), attributes, centres, target.iscrowd.tolist(), strict=True
            )
        ]
        return cls(tuple(things), float((high - low).max()))


@dataclass(frozen=True)
class Phrase:
    """Facts that an object must have to be named; None: nothing is said."""

    name: str | None = None
    colour: str | None = None
    texture: str | None = None
    place: str | None = None
    relation: str | None = None  # to any object that `other` names
    other: Phrase | None = None

    @property
    def num_features(self) -> int:
        """How many of class, colour and texture are said."""
        return sum(each is not None for each in (self.name, self.colour, self.texture))

    def text(self, *, plural: str | None = None) -> str:
        """Return the words: `striped red star on the left`; `plural` takes the place of the class's name."""
        is_person = self.name == "person"
        words = [] if self.texture is None else [ADJECTIVES.get(self.texture, self.texture)]
        words += [self.colour] if self.colour is not None and not is_person else []
        words.append(plural or self.name or THING)
        words += [f"in {self.colour}"] if self.colour is not None and is_person else []
        words += [self.place] if self.place is not None else []
        words += [f"{self.relation} the {self.other.text()}"] if self.other is not None else []
        return " ".join(words)

    def plurals(self) -> tuple[str, ...]:
        """Return the words for several objects of the class."""
        return PERSONS if self.name == "person" else (noun(self.name or THING, 2),)


@dataclass(frozen=True)
class World:
    """What may be in images, so that phrases can name what is not."""

    names: tuple[str, ...]
    colours: tuple[str, ...] = ()
    textures: tuple[str, ...] = ()


def named(phrase: Phrase, scene: Scene) -> list[int]:
    """Return the numbers of the objects that a phrase names."""
    return [i for i, thing in enumerate(scene.things) if _fits(phrase, thing) and _is_related(phrase, i, scene)]


def _fits(phrase: Phrase, thing: Thing) -> bool:
    facts = ("name", "colour", "texture", "place")
    return all(getattr(phrase, fact) in (None, getattr(thing, fact)) for fact in facts)


def _is_related(phrase: Phrase, i: int, scene: Scene) -> bool:
    if phrase.other is None:
        return True
    return any(_relation(i, j, scene) == phrase.relation for j in named(phrase.other, scene))


def _relation(i: int, j: int, scene: Scene) -> str | None:
    one, other = scene.things[i], scene.things[j]
    return direction(other.x - one.x, other.y - one.y, scene.size)


def say(phrase: Phrase, rng: np.random.Generator) -> str:
    """Put a phrase into words: with or without an article, in singular or plural, however many objects it names."""
    plurals = phrase.plurals()
    plural = plurals[int(rng.integers(len(plurals)))] if rng.random() < PLURAL_SHARE else None
    words = phrase.text(plural=plural)
    return (words, f"the {words}", article(words) if plural is None else f"all {words}")[int(rng.integers(3))]


def describe(scene: Scene, i: int, rng: np.random.Generator, *, in_full: bool = False) -> Phrase:
    """Draw a phrase that names object `i`, and maybe others; `in_full` says class, colour and texture."""
    thing = scene.things[i]
    says_colour = bool(thing.colour) and (in_full or rng.random() < COLOUR_SHARE)
    says_texture = bool(thing.texture) and (in_full or rng.random() < TEXTURE_SHARE)
    says_name = in_full or not (says_colour or says_texture) or rng.random() < NAME_SHARE
    phrase = Phrase(
        thing.name if says_name else None,
        thing.colour if says_colour else None,
        thing.texture if says_texture else None,
        thing.place if rng.random() < PLACE_SHARE else None,
    )
    if rng.random() >= RELATION_SHARE:
        return phrase
    related = [(j, word) for j in range(len(scene.things)) if j != i and (word := _relation(i, j, scene)) is not None]
    if not related:
        return phrase
    j, word = related[int(rng.integers(len(related)))]
    other = scene.things[j]
    colour = other.colour if other.colour and rng.random() < COLOUR_SHARE else None
    return replace(phrase, relation=word, other=Phrase(other.name, colour))


def miss(phrase: Phrase, scene: Scene, world: World, rng: np.random.Generator) -> Phrase | None:
    """Change words of a phrase until it names nothing: one word if that is enough. None: every change names something.

    A word is changed to another of its kind, so the sentence could be true of another image.
    """
    changed: Phrase | None = phrase
    for number in range(NEAR_TRIES + FAR_TRIES):
        changed = _with_another_word(phrase if number < NEAR_TRIES or changed is None else changed, world, rng)
        if changed is not None and not named(changed, scene):
            return changed
    return None


def _with_another_word(phrase: Phrase, world: World, rng: np.random.Generator) -> Phrase | None:
    """Change one fact at random; None if the world has no other word of its kind."""
    kinds = {
        "name": world.names,
        "colour": world.colours,
        "texture": world.textures,
        "place": PLACES,
        "relation": RELATIONS,
    }
    said = [each.name for each in fields(Phrase) if getattr(phrase, each.name) is not None]
    fact = said[int(rng.integers(len(said)))]
    if phrase.other is not None and fact == "other":
        other = _with_another_word(phrase.other, world, rng)
        return None if other is None else replace(phrase, other=other)
    values = [value for value in kinds[fact] if value != getattr(phrase, fact)]
    changes: dict[str, Any] = {fact: values[int(rng.integers(len(values)))]} if values else {}
    return replace(phrase, **changes) if changes else None


def is_held_out(combination: tuple[str, str, str], share: float) -> bool:
    """Return whether class, colour and texture are one of the combinations that a share of all leaves out of training.

    It depends on the words alone, so training and evaluation agree about it without a list.
    """
    digest = hashlib.sha256("|".join(combination).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def is_unseen(phrase: Phrase, scene: Scene, share: float) -> bool:
    """Return whether a phrase asks for what training left out: a combination, or a name of which it has no object.

    Of a combination, that are phrases that say two or more of its class, colour and texture.
    """
    things = [scene.things[i] for i in named(phrase, scene)]
    if any(not thing.seen for thing in things):
        return True
    if phrase.num_features < 2:
        return False
    combinations = [thing.combination for thing in things]
    if phrase.name is not None and phrase.colour is not None and phrase.texture is not None:
        combinations.append((phrase.name, phrase.colour, phrase.texture))
    return any(is_held_out(each, share) for each in combinations)


def phrase_words(names: Iterable[str], attributes: Iterable[Mapping[str, str]]) -> list[str]:
    """Return texts that hold all words of phrases about objects of these classes and attributes."""
    values = {each.get(kind, "") for each in attributes for kind in ("colour", "texture")}
    adjectives = [ADJECTIVES.get(value, value) for value in sorted(values - {""})]
    nouns = chain.from_iterable((name, *Phrase(name).plurals()) for name in (*names, THING))
    return [*nouns, *adjectives, *PLACES, *RELATIONS, *ARTICLES, "in"]


@dataclass(frozen=True)
class Drawn:
    """A phrase that was drawn for an image."""

    text: str
    meant: list[int]  # numbers of the objects that it names
    is_unseen: bool  # see the function of that name


class PhraseMaker:
    """Draws phrases that can be read, about objects of some classes."""

    def __init__(self, names: Iterable[str], is_readable: Callable[[str], bool], unseen_share: float) -> None:
        """`is_readable` says whether a model knows the words of a text; for `unseen_share`, see `is_held_out`."""
        self.is_readable = is_readable
        self.unseen_share = unseen_share
        self.world = World(
            tuple(name for name in names if is_readable(name)),
            tuple(filter(is_readable, COLOURS)),
            tuple(kind for kind in ("plain", *TEXTURES) if is_readable(ADJECTIVES[kind])),
        )

    def draw(self, scene: Scene, rng: np.random.Generator, *, absent: bool, unseen: bool = False) -> Drawn | None:
        """Draw a phrase that names nothing (`absent`) or something, of what training sees or not; None: no luck."""
        things = [(i, thing) for i, thing in enumerate(scene.things) if not thing.is_crowd]
        askable = [i for i, thing in things if not (unseen and self._is_seen(thing))]
        for _ in range(TRIES):
            phrase: Phrase | None = None
            if askable:
                i = askable[int(rng.integers(len(askable)))]
                phrase = describe(scene, i, rng, in_full=unseen and scene.things[i].seen)
            elif absent and not unseen and self.world.names:  # of an image without objects
                phrase = Phrase(self.world.names[int(rng.integers(len(self.world.names)))])
            if phrase is not None and absent:
                phrase = miss(phrase, scene, self.world, rng)
            if phrase is None or is_unseen(phrase, scene, self.unseen_share) != unseen:
                continue
            meant, text = named(phrase, scene), say(phrase, rng)
            if self.is_readable(text) and not any(scene.things[j].is_crowd for j in meant):
                return Drawn(text, meant, unseen)
        return None

    def description(self, thing: Thing) -> str | None:
        """Say class, colour and texture of an object, or its class alone if training leaves out their combination.

        None: training leaves out its name, or the words cannot be read.
        """
        if not thing.seen:
            return None
        phrase = Phrase(thing.name, thing.colour or None, thing.texture or None)
        text = (phrase if self._is_seen(thing) else Phrase(thing.name)).text()
        return text if self.is_readable(text) else None

    def _is_seen(self, thing: Thing) -> bool:
        described = bool(thing.colour and thing.texture)
        return thing.seen and not (described and is_held_out(thing.combination, self.unseen_share))
