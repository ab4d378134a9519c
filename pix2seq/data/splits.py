"""The names of splits, in files and folders: which of them mean the same split, and which another one."""

from __future__ import annotations

import re
from functools import lru_cache

WORDS = (("train", "training"), ("val", "valid", "validation", "dev"), ("test", "testing"))
_ADDED = ("", "images", "image", "imgs", "img", "data", "set")  # `train_images`, `images-train`, `TrainSet`


def words_for(split: str) -> tuple[str, ...]:
    """Return the words that mean a split, its own first: `val`, `valid`, ... for `val`; only itself for `train2017`."""
    split = split.lower()
    return next(((split, *(word for word in group if word != split)) for group in WORDS if split in group), (split,))


def is_known(split: str) -> bool:
    """Return whether a split is the one for training, validation or testing, maybe of a year."""
    return any(_without_number(split)[0].lower() in group for group in WORDS)


@lru_cache
def folder_rank(folder: str, split: str) -> int | None:
    """Return how well a folder's name fits the images of a split: 0 is best, None is not at all.

    `val2017` may lie in `val2017`, `valid2017`, ... or `val`, `valid`, ..., and each may have `images` or the like
    before or after it. Case, spaces, `-` and `_` do not count.
    """
    word, number = _without_number(split)
    words = words_for(word)
    names = dict.fromkeys([split, *(other + number for other in words), *words])
    fitting = [_bare(text) for name in names for added in _ADDED for text in (name + added, added + name)]
    return fitting.index(_bare(folder)) if _bare(folder) in fitting else None


@lru_cache
def is_of_other_split(folder: str, split: str) -> bool:
    """Return whether a folder begins with the word for some split, but is not a folder of this one.

    For `train` these are `valid`, `val2017` and `test-images`, and also `train_masks` and `train_old`.
    """
    starts = any(re.match(rf"{word}(?![a-z])", folder.lower()) for group in WORDS for word in group)
    return starts and folder_rank(folder, split) is None


def _without_number(split: str) -> tuple[str, str]:
    word = re.sub(r"[-_]?\d+$", "", split)
    return word, split[len(word) :].lstrip("-_")


def _bare(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())
