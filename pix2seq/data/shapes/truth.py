"""Whether a sentence is true of a generated image, by the grammar of `pix2seq.data.shapes.captions`.

A sentence is true if it has one of the generator's forms and the generator could say each of its statements of these
figures. It may leave figures out, but a number must be exact: `a red star` in a list says that there is one. The order
in which figures are named, upper case, spaces and the full stop do not count. All other sentences are false, among them
those that have no such form, and the empty one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations

from pix2seq.data.shapes.captions import (
    ALONE,
    AMONG,
    COUNTING_LEADS,
    LISTING_LEADS,
    LOCATED,
    RELATION_VERBS,
    article,
    counted,
    counted_classes,
    location,
    other_things,
    phrase,
    relation,
)
from pix2seq.data.shapes.scene import CLASS_NAMES, COLOUR_NAMES, MAX_FIGURES, STUFF, Figure
from pix2seq.types import Target

SLACK = 0.002  # pixels that rounding in a file may move a centre


def is_true(text: str, figures: Sequence[Figure], size: int) -> bool:
    """Return whether a sentence is true of the figures of an image of `size` pixels a side."""
    return Facts(figures, size).say(text)


def is_true_of(text: str, target: Target, *, names: Mapping[int, str]) -> bool | None:
    """Return whether a sentence is true of an annotated image; None if the image is not one of the generated world.

    `names` are those of the classes by the labels of `target`.
    """
    facts = facts_of(target, names=names)
    return None if facts is None else facts.say(text)


def facts_of(target: Target, *, names: Mapping[int, str]) -> Facts | None:
    """Return what is true of an annotated image, for many sentences; see `is_true_of`."""
    figures = figures_of(target, names)
    return None if figures is None else Facts(figures, target.image.width)


@dataclass(frozen=True)
class Facts:
    """All that is true of the figures of an image of `size` pixels a side."""

    figures: Sequence[Figure]
    size: int

    def say(self, text: str) -> bool:
        """Return whether a sentence is true."""
        sentence = re.sub(r"\s+(?=[,.])", "", " ".join(text.lower().split())).removesuffix(".")
        return (
            _is_list(sentence, LISTING_LEADS, self._counted)
            or _is_list(sentence, COUNTING_LEADS, self._counted_classes)
            or sentence in self._statements
        )

    @cached_property
    def _counted(self) -> list[str]:
        return counted(self.figures)

    @cached_property
    def _counted_classes(self) -> list[str]:
        return counted_classes(self.figures)

    @cached_property
    def _statements(self) -> set[str]:
        return _statements(self.figures, self.size)


def figures_of(target: Target, names: Mapping[int, str]) -> list[Figure] | None:
    """Return the figures of a generated image, without masks; None if its annotations are not of that world."""
    if not target.attributes or target.image.width != target.image.height:
        return None
    figures = []
    for box, label, area, attributes in zip(
        target.boxes_xyxy.tolist(), target.labels.tolist(), target.areas.tolist(), target.attributes, strict=True
    ):
        name, colour = names.get(label, ""), attributes.get("colour", "")
        if name in STUFF:
            continue
        if name not in CLASS_NAMES or colour not in COLOUR_NAMES:
            return None
        figures.append(Figure(name, colour, attributes.get("texture", ""), tuple(box), area=area))
    return figures if 0 < len(figures) <= MAX_FIGURES else None


def _is_list(sentence: str, leads: Sequence[str], facts: Sequence[str]) -> bool:
    """Return whether a sentence is one of the leads and a list of different facts."""
    for lead in (text.format(be=be) for text in leads for be in ("is", "are")):
        parts = re.split(r",? and |, ", sentence.removeprefix(lead))
        if sentence.startswith(lead) and set(parts) <= set(facts) and len(set(parts)) == len(parts):
            return True
    return False


def _statements(figures: Sequence[Figure], size: int) -> set[str]:
    """Return all true sentences about where figures are."""
    what = [article(phrase(figure)) for figure in figures]
    where = [{location(near, size) for near in _near(figure)} for figure in figures]
    found: set[str] = set()
    for form, joint in LOCATED:
        parts = [{form.format(what=a, where=place) for place in places} for a, places in zip(what, where, strict=True)]
        found.update(*parts)
        found.update(f"{first}{joint}{second}" for a, b in permutations(parts, 2) for first in a for second in b)
    for (a, first), (b, second) in permutations(zip(figures, what, strict=True), 2):
        if first != second:
            relations = {words for near in _near(a) if (words := relation(near, b, size)) is not None}
            found.update(f"{first}{verb}{words} {second}" for verb in RELATION_VERBS for words in relations)
    largest = max((figure.area for figure in figures), default=0.0)
    more = other_things(len(figures) - 1)
    for figure, named, places in zip(figures, what, where, strict=True):
        located = [f"{named} {place}" for place in places]
        if len(figures) == 1:
            found.update(form.format(each) for form in ALONE for each in located)
        else:
            forms = AMONG if figure.area == largest else AMONG[:1]
            found.update(form.format(each, more) for form in forms for each in located)
    return found


def _near(figure: Figure) -> Iterator[Figure]:
    """Yield a figure moved by `SLACK` in each diagonal direction."""
    x0, y0, x1, y1 = figure.box_xyxy
    for dx, dy in ((-SLACK, -SLACK), (-SLACK, SLACK), (SLACK, -SLACK), (SLACK, SLACK)):
        yield replace(figure, box_xyxy=(x0 + dx, y0 + dy, x1 + dx, y1 + dy))
