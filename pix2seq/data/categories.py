"""Classes of several data sets as one set of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pix2seq.data.target import Category
from pix2seq.errors import InputError


def same_name(name: str) -> str:
    """What two classes are compared by: case and outer spaces aside."""
    return name.strip().lower()


def unite_categories(groups: Sequence[Sequence[Category]]) -> tuple[Category, ...]:
    """Every class once, by name. The first group keeps its labels; classes that only others have follow.

    A skeleton comes from the first group that has one for the class; raises `InputError` where another
    group has other points for it.
    """
    united: dict[str, Category] = {}
    for group in groups:
        first = not united
        for category in group:
            name = same_name(category.name)
            if name not in united:
                label = category.label if first else max((c.label for c in united.values()), default=0) + 1
                united[name] = replace(category, label=label)
            elif category.keypoints and not united[name].keypoints:
                united[name] = replace(united[name], keypoints=category.keypoints, skeleton=category.skeleton)
            elif category.keypoints and category.keypoints != united[name].keypoints:
                ours, theirs = ", ".join(united[name].keypoints), ", ".join(category.keypoints)
                raise InputError(
                    f"two data sets have different keypoints for {category.name!r}: {ours}, and {theirs}; "
                    "give the class another name in one of them"
                )
    return tuple(united.values())
