"""Sentences with one word changed for another of its kind: a colour, a class, a number or a side.

`A red star left of a person` becomes `A blue star left of a person`. The words are English.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np

COLOURS = (
    *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "gray", "tan"),
    *("beige", "gold", "silver", "turquoise"),
)
# `one` would change the noun and the verb too.
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SIDES = (("left", "right"), ("top", "bottom"), ("above", "below"), ("upper", "lower"))
KINDS = ("class", "colour", "number", "side")
SAME = {"grey": "gray", "gray": "grey"}
# People are described in other words than things: `a person in red`, not `a red person`.
PEOPLE = ("person", "people")


class WordChanges:
    """Changes of one word, among the words that the model knows."""

    def __init__(self, class_names: Iterable[str], knows: Callable[[str], bool]) -> None:
        """`class_names` are those of the data, in the singular."""
        names = [name.lower() for name in class_names if name.lower() not in (*COLOURS, *PEOPLE)]
        groups = [
            *(("class", group) for group in (names, [plural(name) for name in names])),
            ("colour", COLOURS),
            ("number", NUMBERS),
            *(("side", pair) for pair in SIDES),
        ]
        self._others: dict[str, tuple[str, list[str]]] = {}  # kind and other words of its kind, by word
        for kind, group in groups:
            known = [word for word in group if knows(word)]
            for word in known:
                others = [other for other in known if other not in (word, SAME.get(word))]
                self._others.setdefault(word, (kind, others))
        longest_first = sorted(self._others, key=len, reverse=True)
        words = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._pattern = re.compile(rf"(\ban? )?\b({words})\b", re.IGNORECASE)

    def kinds(self, sentence: str) -> list[str]:
        """Return the kinds of which a sentence has a word that can be changed, each once, in the order of `KINDS`."""
        found = {kind for _, kind, others in self._places(sentence) if others}
        return [kind for kind in KINDS if kind in found]

    def draw(self, sentence: str, kind: str, rng: np.random.Generator, *, avoid: Collection[str] = ()) -> str | None:
        """Return a sentence with a word of a kind changed, but not for one to `avoid`; None if there is none."""
        changes = [
            (place, other)
            for place, its_kind, others in self._places(sentence)
            for other in others
            if its_kind == kind and other not in avoid
        ]
        if not changes:
            return None
        place, other = changes[int(rng.integers(len(changes)))]
        article, word = place.groups()
        if article:
            other = f"{article[0]}{'n' if other[0] in 'aeiou' else ''} {other}"
        elif word[0].isupper():
            other = f"{other[0].upper()}{other[1:]}"
        return f"{sentence[: place.start()]}{other}{sentence[place.end() :]}"

    def _places(self, sentence: str) -> Iterator[tuple[re.Match[str], str, Sequence[str]]]:
        """Yield the words that have a kind, each with it and with the other words of it."""
        for place in self._pattern.finditer(sentence):
            yield place, *self._others[place[2].lower()]


def plural(noun: str) -> str:
    """Return the regular English plural."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if re.search("[^aeiou]y$", noun) else f"{noun}s"
