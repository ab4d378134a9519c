"""Keypoints by their names: which side a name says, and the order of a skeleton's points after a mirror."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

SIDES = {"left": "left", "right": "right", "l": "left", "r": "right", "lt": "left", "rt": "right"}
OTHER_SIDE = {"left": "right", "right": "left"}
_WORD = re.compile(r"[^\W\d_]+|\d+")
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # between the words of LeftEye, of LEye
_JOINED = re.compile(r"(?P<side>left|right)(?P<rest>\w{3,})|(?P<rest_first>\w{3,})(?P<side_last>left|right)")


def point_key(name: str) -> tuple[str, str]:
    """Return the side that a keypoint's name says (`left`, `right` or nothing) and the rest of it.

    Spellings that mean the same give the same key: `left_eye`, `eye_left`, `LeftEye`, `l_eye`, `left-eye`, `Left Eye`,
    `lefteye`. A single letter says a side only beside another word.
    """
    words = [word.lower() for word in _WORD.findall(_CAPITAL.sub(" ", name))]
    for position, word in enumerate(words):
        if word in SIDES and (len(word) > 1 or len(words) > 1):
            return SIDES[word], " ".join(words[:position] + words[position + 1 :])
    for position, word in enumerate(words):
        if joined := _JOINED.fullmatch(word):
            rest = joined["rest"] or joined["rest_first"]
            return joined["side"] or joined["side_last"], " ".join([*words[:position], rest, *words[position + 1 :]])
    return "", " ".join(words)


def mirror_order(names: Sequence[str], pairs: Sequence[tuple[str, str]] | None = None) -> NDArray[np.int64] | None:
    """Return indices (K,) that put mirrored keypoints back under their names: left and right ones swap.

    The names say which ones swap, see `point_key`; those in the middle, such as `nose`, stay. `pairs` of names swap
    besides, whatever they say, and with them, even if there are none, everything is said. Without `pairs`, the result
    is None where names leave it open: the other side of a point is missing, several points are only numbered, no point
    of several names a side, or two names mean the same. Raises `ValueError` for a pair with one name that is no point,
    and if a point has two partners.
    """
    keys = [point_key(name) for name in names]
    index = {key: position for position, key in enumerate(keys)}
    given = {a: b for pair in pairs or () for a, b in _positions(pair, index, names)}
    order = [given.get(position, position) for position in range(len(names))]
    numbered, sided = 0, False
    for position, (side, rest) in enumerate(keys):
        other = index.get((OTHER_SIDE.get(side, ""), rest))
        if side and other is None and pairs is None:
            return None
        if side and other is not None and position not in given and other not in given:
            order[position], sided = other, True
        numbered += not side and any(character.isdigit() for character in rest)
    if pairs is None and (numbered > 1 or len(index) < len(names) or not (sided or len(names) == 1)):
        return None
    if sorted(order) != list(range(len(names))):
        raise ValueError(f"the points {', '.join(names)} do not have one partner each; pair each at most once")
    return np.array(order, np.int64)


def _positions(
    pair: tuple[str, str], index: Mapping[tuple[str, str], int], names: Sequence[str]
) -> list[tuple[int, int]]:
    """Return both directions of a pair of names, nothing if both are points of another skeleton."""
    first, second = (index.get(point_key(name)) for name in pair)
    if first is None and second is None:
        return []
    if first is None or second is None:
        raise ValueError(f"{pair[first is not None]!r} is not among the points {', '.join(names)}")
    return [(first, second), (second, first)]


def find_points(names: Sequence[str], among: Sequence[str]) -> NDArray[np.int64]:
    """Return the index (K,) of each of `names` in `among`, -1 if it is not there. Spellings as in `point_key`."""
    ours, theirs = [point_key(name) for name in names], [point_key(name) for name in among]
    if len(set(ours)) < len(ours) or len(set(theirs)) < len(theirs):  # then only the exact names tell points apart
        return _find(names, among)
    return _find(ours, theirs)


def _find(keys: Sequence[Hashable], among: Sequence[Hashable]) -> NDArray[np.int64]:
    index = {key: position for position, key in enumerate(among)}
    return np.array([index.get(key, -1) for key in keys], np.int64)
