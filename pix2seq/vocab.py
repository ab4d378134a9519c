"""Which id means what: one vocabulary for every task, in the official layout.

    0            padding and end of sequence
    10 .. 13     task prompts
    30           noise: the class of an invented object
    40, 41       separator of polygon parts, invisible keypoint
    100 ..       classes, label `l` at 100 + l (labels start at 1)
    1000 ..      coordinate bins
    3000 ..      text

Nobody else adds an offset. Reference: google-research/pix2seq, `vocab.py` and `utils.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

ArrayOrTensor = TypeVar("ArrayOrTensor", NDArray[Any], torch.Tensor)

PAD = 0
EOS = 0  # padding and the end of a sequence share an id
TASK_IDS = {"detection": 10, "segmentation": 11, "keypoint": 12, "captioning": 13}
NOISE = 30
SEPARATOR = 40
INVISIBLE = 41
CLASS_BASE = 100
MAX_LABEL = 899  # with the default `coord_base`


@dataclass(frozen=True)
class Vocab:
    """The sizes that may differ between models; the layout does not.

    Raises `ValueError` where two ranges would overlap or `size` would not hold them.
    """

    num_bins: int = 1000  # coordinate bins
    num_text: int = 0  # text tokens
    coord_base: int = 1000  # id of coordinate bin 0
    text_base: int = 3000  # id of text token 0
    size: int = 3000  # rows of the embedding

    def __post_init__(self) -> None:
        if self.num_bins < 2:
            raise ValueError(f"num_bins is {self.num_bins}; a coordinate needs at least 2 bins")
        if self.coord_base <= CLASS_BASE:
            raise ValueError(f"coord_base is {self.coord_base}; classes start at {CLASS_BASE} and must lie below it")
        if self.num_text and self.text_base < self.coord_base + self.num_bins:
            raise ValueError(
                f"text_base is {self.text_base}, inside the coordinates "
                f"{self.coord_base} to {self.coord_base + self.num_bins - 1}; raise text_base"
            )
        needed = self.text_base + self.num_text if self.num_text else self.coord_base + self.num_bins
        if self.size < needed:
            raise ValueError(f"vocab size is {self.size}, but its ranges need {needed}")

    @property
    def max_label(self) -> int:
        """The largest class label that has an id; the smallest is 1."""
        return self.coord_base - CLASS_BASE - 1

    @property
    def coord_end(self) -> int:
        """One past the id of the last coordinate bin."""
        return self.coord_base + self.num_bins

    def coord_ids(self, coords: NDArray[np.floating]) -> NDArray[np.int64]:
        """Coordinates in [0, 1], of any shape, to ids; values outside are clipped to the border bins."""
        return quantize(coords, self.num_bins) + self.coord_base

    def coords(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Ids back to coordinates in [0, 1]; ids that are no coordinates are clipped to the border bins."""
        return dequantize(np.clip(ids - self.coord_base, 0, self.num_bins - 1), self.num_bins)

    def class_ids(self, labels: NDArray[np.integer]) -> NDArray[np.int64]:
        """Labels 1 to `max_label` to ids. Raises `ValueError` for a label outside."""
        if labels.size and (labels.min() < 1 or labels.max() > self.max_label):
            raise ValueError(f"labels must lie in 1 to {self.max_label}, got {labels.min()} to {labels.max()}")
        return labels.astype(np.int64) + CLASS_BASE

    def meaning(self, token: int) -> str:
        """What an id stands for, in words, for people who look at sequences."""
        names = {PAD: "end", NOISE: "noise", SEPARATOR: "separator", INVISIBLE: "invisible"}
        names |= {token_id: f"task:{name}" for name, token_id in TASK_IDS.items()}
        if token in names:
            return names[token]
        if CLASS_BASE <= token < self.coord_base:
            return f"class:{token - CLASS_BASE}"
        if self.coord_base <= token < self.coord_end:
            return f"bin:{token - self.coord_base}"
        if self.text_base <= token < self.text_base + self.num_text:
            return f"text:{token - self.text_base}"
        return f"unused:{token}"


def quantize(coords: ArrayOrTensor, num_bins: int) -> ArrayOrTensor:
    """Coordinates in [0, 1] to bins 0 to num_bins - 1: round half to even, then clip.

    Arrays and tensors of any shape; the arithmetic is float32, as in the official code.
    """
    # Clipped before the arithmetic too: huge values would overflow, or wrap around as integers.
    if isinstance(coords, torch.Tensor):
        scaled = coords.float().clamp(0, 1) * (num_bins - 1)
        return scaled.round().long().clamp(0, num_bins - 1)
    scaled = np.clip(np.asarray(coords, np.float32), 0, 1) * np.float32(num_bins - 1)
    return np.clip(np.rint(scaled), 0, num_bins - 1).astype(np.int64)


def dequantize(bins: ArrayOrTensor, num_bins: int) -> ArrayOrTensor:
    """Bins to coordinates in [0, 1], the inverse of `quantize` to half a bin."""
    if isinstance(bins, torch.Tensor):
        return bins.float() / (num_bins - 1)
    return np.asarray(bins, np.float32) / np.float32(num_bins - 1)
