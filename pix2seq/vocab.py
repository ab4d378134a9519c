"""Token ids: one vocabulary for all tasks, in the official layout.

    0            padding and end of sequence
    10 .. 17     task prompts
    18 .. 29     prompts of tasks registered from elsewhere
    30           noise: the class of a noise object
    40, 41       separator of polygon parts, invisible keypoint
    42, 43       positive click, negative click
    44, 45       no, yes
    46 .. 56     quality: an IoU of 0 to 1 in tenths
    57 .. 72     slots: classes that the prompt says the meaning of
    100 ..       classes, label `l` at 100 + l (labels start at 1)
    1000 ..      coordinate bins
    3000 ..      text

Only this module adds offsets. Reference: google-research/pix2seq, `vocab.py` and `utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from pix2seq.errors import InputError, unknown_name
from pix2seq.settings import PositiveInt, Range, Settings

PAD = 0
EOS = 0  # padding and the end of a sequence share an id
TASK_IDS = {
    "detection": 10,
    "segmentation": 11,
    "keypoint": 12,
    "captioning": 13,
    "prompted": 14,
    "by_example": 15,
    "by_words": 16,
    "matching": 17,
}
OTHER_TASK_IDS = range(18, 30)
NOISE = 30
SEPARATOR = 40
INVISIBLE = 41
POSITIVE, NEGATIVE = 42, 43
NO, YES = 44, 45
QUALITY = range(46, 57)
SLOTS = range(57, 73)
CLASS_BASE = 100
MAX_SIZE = 2**20


@dataclass(frozen=True)
class Vocab(Settings):
    """Sizes of the vocabulary; models may differ in these, but not in the layout.

    Raises `ValueError` if two ranges overlap, if `size` is too small, or if the ids of `other_tasks` are not valid.
    """

    section = "model.vocab"

    num_bins: Annotated[int, Range(least=2, most=MAX_SIZE)] = 1000  # coordinate bins
    num_text: Annotated[int, Range(least=0, most=MAX_SIZE)] = 0  # text tokens
    coord_base: Annotated[int, Range(above=CLASS_BASE, most=MAX_SIZE)] = 1000  # id of coordinate bin 0
    text_base: Annotated[int, Range(above=CLASS_BASE, most=MAX_SIZE)] = 3000  # id of text token 0
    size: Annotated[int, Range(least=1, most=MAX_SIZE)] = 3000  # rows of the embedding
    other_tasks: dict[str, PositiveInt] = field(default_factory=dict)  # ids of tasks registered from elsewhere, by name

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_text and self.text_base < self.coord_end:
            raise ValueError(
                f"text_base is {self.text_base}, inside the coordinates {self.coord_base} to {self.coord_end - 1}; "
                "raise text_base"
            )
        needed = self.text_base + self.num_text if self.num_text else self.coord_end
        if self.size < needed:
            raise ValueError(f"vocab size is {self.size}, but its ranges need {needed}")
        ids = self.other_tasks.values()
        if len(set(ids)) < len(ids) or not set(ids) <= set(OTHER_TASK_IDS):
            raise ValueError(
                f"other_tasks is {self.other_tasks}; expected distinct ids from {OTHER_TASK_IDS[0]} "
                f"to {OTHER_TASK_IDS[-1]}"
            )

    @property
    def max_label(self) -> int:
        """The largest class label that has an id; the smallest is 1."""
        return self.coord_base - CLASS_BASE - 1

    @property
    def coord_end(self) -> int:
        """One past the id of the last coordinate bin."""
        return self.coord_base + self.num_bins

    def with_text(self, num_text: int) -> Vocab:
        """Make room for `num_text` text tokens. Raises `InputError` if `num_text` is set already and too small."""
        if not self.num_text:
            return replace(self, num_text=num_text, size=max(self.size, self.text_base + num_text))
        if num_text > self.num_text:
            raise InputError(
                f"{num_text} text ids are needed, but model.vocab.num_text is {self.num_text}; raise it, "
                "or lower captioning.text_size"
            )
        return self

    def with_tasks(self, names: Iterable[str]) -> Vocab:
        """Give the first free id to each name that has none, in order. Raises `InputError` if none is left."""
        other_tasks = dict(self.other_tasks)
        for name in names:
            if name in TASK_IDS or name in other_tasks:
                continue
            free = next((task_id for task_id in OTHER_TASK_IDS if task_id not in other_tasks.values()), None)
            if free is None:
                raise InputError(
                    f"no id is left for task {name!r}: this vocabulary already has {len(OTHER_TASK_IDS)} "
                    f"registered tasks ({', '.join(other_tasks)}); use fewer tasks"
                )
            other_tasks[name] = free
        return replace(self, other_tasks=other_tasks)

    def task_id(self, name: str) -> int:
        """Return the prompt id of a task. Raises `ValueError` for an unknown one."""
        ids = self.other_tasks | TASK_IDS
        if name not in ids:
            raise unknown_name("task", name, ids)
        return ids[name]

    def coord_ids(self, coords: NDArray[np.floating]) -> NDArray[np.int64]:
        """Map coordinates in [0, 1], of any shape, to ids; values outside are clipped to the border bins."""
        return quantize(coords, self.num_bins) + self.coord_base

    def coords(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Map ids to coordinates in [0, 1]; ids outside the coordinate range are clipped to the border bins."""
        return dequantize(np.clip(ids - self.coord_base, 0, self.num_bins - 1), self.num_bins)

    def class_ids(self, labels: NDArray[np.integer]) -> NDArray[np.int64]:
        """Map labels 1 to `max_label` to ids. Raises `ValueError` for a label outside."""
        if labels.size and (labels.min() < 1 or labels.max() > self.max_label):
            raise ValueError(f"labels must lie in 1 to {self.max_label}, got {labels.min()} to {labels.max()}")
        return labels.astype(np.int64) + CLASS_BASE

    def meaning(self, token: int) -> str:
        """Describe an id in a word, for people who look at sequences."""
        names = {PAD: "end", NOISE: "noise", SEPARATOR: "separator", INVISIBLE: "invisible"}
        names |= {POSITIVE: "positive", NEGATIVE: "negative"}
        names |= {NO: "no", YES: "yes"}
        names |= {token: f"quality:{step}" for step, token in enumerate(QUALITY)}
        names |= {token: f"slot:{number}" for number, token in enumerate(SLOTS, start=1)}
        names |= {token_id: f"task:{name}" for name, token_id in (self.other_tasks | TASK_IDS).items()}
        if token in names:
            return names[token]
        if CLASS_BASE <= token < self.coord_base:
            return f"class:{token - CLASS_BASE}"
        if self.coord_base <= token < self.coord_end:
            return f"bin:{token - self.coord_base}"
        if self.text_base <= token < self.text_base + self.num_text:
            return f"text:{token - self.text_base}"
        return f"unused:{token}"


def quantize(coords: NDArray[np.floating], num_bins: int) -> NDArray[np.int64]:
    """Map coordinates in [0, 1], of any shape, to bins 0 to num_bins - 1: round half to even, then clip.

    The arithmetic is float32, as in the official code.
    """
    # Clip before the arithmetic too: huge values would overflow, or wrap around as integers.
    scaled = np.clip(np.asarray(coords, np.float32), 0, 1) * np.float32(num_bins - 1)
    return np.clip(np.rint(scaled), 0, num_bins - 1).astype(np.int64)


def dequantize(bins: NDArray[np.integer], num_bins: int) -> NDArray[np.float32]:
    """Map bins to coordinates in [0, 1], the inverse of `quantize` to half a bin."""
    return np.asarray(bins, np.float32) / np.float32(num_bins - 1)
