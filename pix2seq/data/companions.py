"""Other images that are shown beside one: examples of its classes, or of classes that it lacks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pix2seq.data.annotations import Annotations
from pix2seq.data.formats.builder import Dataset


class Companion(NamedTuple):
    """An object of a data set."""

    image: int  # its number in the data set
    object: int  # its number in the image


class ObjectsByClass:
    """The objects of a data set by class, to draw from. Crowds are left out."""

    def __init__(self, dataset: Dataset) -> None:
        annotations: Annotations = dataset.annotations
        usable = np.flatnonzero(~annotations.iscrowd)
        order = usable[np.argsort(annotations.labels[usable], kind="stable")]
        self._images = annotations.first.searchsorted(order, side="right") - 1
        self._objects = order - annotations.first[self._images]
        self._image_ids: NDArray[np.int64] = np.asarray(dataset.images.ids)
        self.labels: NDArray[np.int64]  # that some object has, ascending
        self.labels, first = np.unique(annotations.labels[order].astype(np.int64), return_index=True)
        self._borders = np.append(first, len(order))

    def draw(self, label: int, rng: np.random.Generator, *, but_image_id: int) -> Companion | None:
        """Draw an object of a class in any image but one; None if there is none."""
        position = int(self.labels.searchsorted(label))
        if position == len(self.labels) or self.labels[position] != label:
            return None
        low, high = self._borders[position : position + 2].tolist()
        elsewhere = low + np.flatnonzero(self._image_ids[self._images[low:high]] != but_image_id)
        if not len(elsewhere):
            return None
        row = int(rng.choice(elsewhere))
        return Companion(int(self._images[row]), int(self._objects[row]))
