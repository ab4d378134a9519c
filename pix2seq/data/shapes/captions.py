"""Five different English captions of a scene, all true.

Captions state facts: how many figures of a colour and class there are, where a figure is in the image, and
how two figures are related. A relation is stated only if the boxes leave no doubt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from numpy.random import Generator

from pix2seq.data.shapes.scene import Figure, Scene

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
PLURALS = {"person": "people", "mouse": "mice", "knife": "knives"} | {
    same: same for same in ("sheep", "skis", "scissors")
}
LISTING_LEADS = ("", "a picture of ", "there {be} ", "this image shows ")
COUNTING_LEADS = ("there {be} ", "i can see ", "the picture contains ")
LOCATED = (("{what} {where}", " and "), ("{where} is {what}", ", and "))  # a statement, and what joins two of them
RELATION_VERBS = (" is ", " ")
ALONE = ("{} and nothing else", "only {}")  # of the only figure
AMONG = ("{}, with {} around", "the largest thing is {}, next to {}")  # of the largest figure and the number of others
MARGIN = 0.12  # least distance between centres to state a relation, as a share of the image's side


def captions(scene: Scene, rng: Generator) -> list[str]:
    """Write five different captions."""
    size = scene.image.shape[0]
    texts: list[str] = []
    for maker in (_listing, _counting, _locations, _relation, _summary):
        text = maker(scene.figures, size, rng)
        while text in texts:  # a scene of one figure has few facts; draw another wording
            text = (_listing, _locations, _summary)[int(rng.integers(3))](scene.figures, size, rng)
        texts.append(text)
    return texts


def noun(name: str, count: int = 1) -> str:
    """Return a class name in singular or plural."""
    if count == 1 or name in PLURALS:
        return name if count == 1 else PLURALS[name]
    if re.search("[^aeiou]y$", name):
        return f"{name[:-1]}ies"
    return f"{name}es" if re.search("(s|x|z|ch|sh)$", name) else f"{name}s"


def phrase(figure: Figure) -> str:
    """Return colour and class; a person's colour is that of the clothes."""
    return f"person in {figure.colour}" if figure.name == "person" else f"{figure.colour} {figure.name}"


def location(figure: Figure, size: int) -> str:
    """Describe which ninth of the image holds the centre of a figure's box."""
    x, y = figure.centre
    return place(x / size, y / size)


def place(x: float, y: float) -> str:
    """Describe which ninth of an image holds a point, x and y in [0, 1] of its width and height."""
    column, row = (min(int(value * 3), 2) for value in (x, y))
    if (column, row) == (1, 1):
        return "in the middle"
    across, down = ("left", "", "right")[column], ("top", "", "bottom")[row]
    if across and down:
        return f"in the {down} {across} corner"
    return f"on the {across}" if across else f"at the {down}"


def relation(a: Figure, b: Figure, size: int) -> str | None:
    """Describe the position of `a` relative to `b` by the centres of their boxes; None if it is not clear."""
    return direction(b.centre[0] - a.centre[0], b.centre[1] - a.centre[1], size)


def direction(dx: float, dy: float, size: float) -> str | None:
    """Describe where something is from which it is `dx` to the right and `dy` down to something else; see `relation`.

    `size` is the longer side of the image, in the unit of the distances.
    """
    if max(abs(dx), abs(dy)) < MARGIN * size or 0.6 < abs(dx) / max(abs(dy), 1e-9) < 1.7:
        return None
    if abs(dx) > abs(dy):
        return "to the left of" if dx > 0 else "to the right of"
    return "above" if dy > 0 else "below"


def article(words: str) -> str:
    """Put `a` or `an` before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def counted(figures: Sequence[Figure]) -> list[str]:
    """Count each kind of figure in words, in order of appearance: `two red stars`, `a person in blue`."""
    parts = []
    for words, count in Counter(phrase(figure) for figure in figures).items():
        if count == 1:
            parts.append(article(words))
        elif words.startswith("person in "):
            parts.append(f"{NUMBERS[count]} people in {words.removeprefix('person in ')}")
        else:
            colour, name = words.split(" ", 1)
            parts.append(f"{NUMBERS[count]} {colour} {noun(name, count)}")
    return parts


def counted_classes(figures: Sequence[Figure]) -> list[str]:
    """Count the figures of each class in words, in order of appearance: `three stars`, `one person`."""
    counts = Counter(figure.name for figure in figures)
    return [f"{NUMBERS[count]} {noun(name, count)}" for name, count in counts.items()]


def other_things(count: int) -> str:
    """Count figures that are not named: `one other thing`, `two other things`."""
    return f"{NUMBERS[count]} other {'thing' if count == 1 else 'things'}"


def join(parts: list[str]) -> str:
    """Join parts to an English list."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _listing(figures: list[Figure], size: int, rng: Generator) -> str:
    lead = LISTING_LEADS[int(rng.integers(4))]
    parts = counted(figures)
    first_is_one = parts[0].startswith(("a ", "an "))
    return _sentence(lead.replace("{be}", "is" if first_is_one else "are") + join(parts))


def _counting(figures: list[Figure], size: int, rng: Generator) -> str:
    parts = counted_classes(figures)
    lead = COUNTING_LEADS[int(rng.integers(3))]
    be = "is" if parts[0].startswith("one ") else "are"
    return _sentence(lead.replace("{be}", be) + join(parts))


def _locations(figures: list[Figure], size: int, rng: Generator) -> str:
    order = rng.permutation(len(figures))[:2]
    chosen = [figures[i] for i in sorted(order)]
    form, joint = LOCATED[int(rng.integers(2))]
    parts = [form.format(what=article(phrase(figure)), where=location(figure, size)) for figure in chosen]
    return _sentence(joint.join(parts))


def _relation(figures: list[Figure], size: int, rng: Generator) -> str:
    pairs = [
        (a, b, words)
        for a in figures
        for b in figures
        if a is not b and phrase(a) != phrase(b) and (words := relation(a, b, size)) is not None
    ]
    if not pairs:
        return _locations(figures, size, rng)
    a, b, words = pairs[int(rng.integers(len(pairs)))]
    verb = RELATION_VERBS[0 if rng.random() < 0.5 else 1]
    return _sentence(f"{article(phrase(a))}{verb}{words} {article(phrase(b))}")


def _summary(figures: list[Figure], size: int, rng: Generator) -> str:
    largest = max(figures, key=lambda figure: figure.area)
    others = len(figures) - 1
    words = f"{article(phrase(largest))} {location(largest, size)}"
    if others == 0:
        return _sentence(ALONE[0 if rng.random() < 0.5 else 1].format(words))
    return _sentence(AMONG[int(rng.integers(2))].format(words, other_things(others)))
