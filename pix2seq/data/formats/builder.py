"""What readers of all formats share: the data set that they return, and the builder that joins and checks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pix2seq.data.annotations import Annotations, ImageTable, select_images
from pix2seq.data.defects import MAX_COORD, Defects, defect_frame, label_categories, refuse_bad_share
from pix2seq.data.formats.coco_columns import (
    LEFT_OUT,
    CaptionColumns,
    Ids,
    ObjectColumns,
    check_captions,
    check_objects,
    whole_number,
)
from pix2seq.data.image import image_size
from pix2seq.errors import InputError
from pix2seq.types import Category, Target, category_key


@dataclass(frozen=True)
class Dataset:
    """A split of a data set: images with their targets, in flat arrays that workers share."""

    root: Path
    split: str
    categories: tuple[Category, ...]
    images: ImageTable
    defects: pd.DataFrame  # one row per defect, with `data.defects.DEFECT_COLUMNS`
    annotations: Annotations

    def __len__(self) -> int:
        return len(self.images)

    @property
    def objects(self) -> pd.DataFrame:
        """One row per used annotation, with `OBJECT_COLUMNS`; rebuilt on each access."""
        return self.annotations.table(self.images, self.categories)

    def target(self, index: int) -> Target:
        """Return the annotations of image `index`, in the data set's own labels."""
        return self.annotations.target(index, self.images[index])

    def select(self, split: str, indices: ArrayLike) -> Dataset:
        """Return a split of some images, given in ascending order, under a name of its own."""
        images, annotations = select_images(self.images, self.annotations, np.asarray(indices, np.int64))
        return replace(self, split=split, images=images, annotations=annotations)


NEW = -1  # in place of the number of a class that has none: it gets the next one


class DatasetBuilder:
    """Collects images, classes and annotations, joins what is the same, and checks all at once.

    An image is known by its file and a class by its name, so the files of a split may number them as they like:
    a reader adds the images and classes of a file, and links its annotations by the indices that it got for them.
    """

    def __init__(self, root: Path, split: str, *, where: Path, max_bad_share: float) -> None:
        """`where` names the annotations in messages."""
        self.root, self.split, self.where, self.max_bad_share = root, split, where, max_bad_share
        self.defects = Defects()  # of images and classes
        self.num_listed = 0  # images in the files
        self.num_left_out = 0  # annotations that a reader could not put into columns
        self.number = Ids()
        self.objects, self.captions = ObjectColumns(self.number), CaptionColumns(self.number)
        self._images: dict[str, tuple[int, int, int, int]] = {}  # index, id, width and height by path below the root
        self._image_ids: set[int] = set()
        self._categories: list[_Class] = []
        self._category_index: dict[str, int] = {}

    def add_image(self, image_id: int, path: str, width: Any, height: Any) -> int:
        """Add an image by its path below the root, and return its index, LEFT_OUT if it cannot be used.

        A size that is no positive number is read from the file.
        """
        if path in self._images:
            return self._images[path][0]
        size = self._size(image_id, path, whole_number(width), whole_number(height))
        if size is None:
            return LEFT_OUT
        if image_id < 0 or image_id in self._image_ids:  # text, or another file's id
            image_id = max(self._image_ids, default=0) + 1
        self._image_ids.add(image_id)
        self._images[path] = (len(self._images), image_id, *size)
        return len(self._images) - 1

    def add_category(
        self,
        number: int,
        name: str,
        keypoints: tuple[str, ...] = (),
        bones: tuple[tuple[int, int], ...] = (),
        flip_pairs: tuple[tuple[str, str], ...] | None = None,
        *,
        is_stuff: bool = False,
    ) -> int:
        """Add a class, or join it with the one of its name, and return its index.

        Raises `InputError` if the class has other keypoints already.
        """
        key = category_key(name)
        if key not in self._category_index:
            taken = {known.number for known in self._categories}
            number = max(taken, default=0) + 1 if number in taken or number < 0 else number
            self._category_index[key] = len(self._categories)
            self._categories.append(_Class(number, name.strip(), keypoints, bones, flip_pairs, is_stuff, [name]))
            return len(self._categories) - 1
        index = self._category_index[key]
        known = self._categories[index]
        if name not in known.spellings:
            known.spellings.append(name)
        if keypoints and known.keypoints and keypoints != known.keypoints:
            raise InputError(
                f"{self.where} has two classes {name.strip()!r} with different keypoints: "
                f"{', '.join(known.keypoints)}, and {', '.join(keypoints)}; give one of them another name"
            )
        if keypoints and not known.keypoints:
            known.keypoints, known.bones, known.flip_pairs = keypoints, bones, flip_pairs
        return index

    def link(self, images: Mapping[int, int], categories: Mapping[int, int] | None = None) -> None:
        """Link the objects since the last call by the ids of their images and classes.

        Without `categories`, the objects have the indices of their classes in place of ids.
        """
        indices = {index: index for index in range(len(self._categories))}
        self.objects.link(images, indices if categories is None else categories)

    def build(self) -> Dataset:
        """Check everything and return the split.

        Raises `InputError` if no image can be used, or if ten or more images, objects or captions, and
        more than `max_bad_share` (0 to 1) of them, had to be dropped.
        """
        limit: dict[str, Any] = {"where": self.where, "max_bad_share": self.max_bad_share}
        if not self._images and self.num_listed:
            image, _, defect, _, detail = self.defects.rows[0]
            raise InputError(
                f"none of the {self.num_listed} images listed in {self.where} can be used; "
                f"the first: image {image}: {defect} ({detail})"
            )
        refuse_bad_share("images", self.defects.rows, self.num_listed, **limit)
        for known in self._categories:
            if len(known.spellings) > 1:
                listed = ", ".join(map(repr, known.spellings))
                self.defects.add(None, None, "class name spelled in several ways", "joined", listed)
        categories = label_categories([known.category() for known in self._categories])
        ids = [category.id for category in categories]
        by_index = [categories[ids.index(known.number)] for known in self._categories]
        entries = ((image_id, path, width, height) for path, (_, image_id, width, height) in self._images.items())
        images = ImageTable.build(self.root, entries)
        annotations, of_objects, num_objects = check_objects(self.objects, images, by_index, where=self.where)
        refuse_bad_share("annotations", of_objects, num_objects + self.num_left_out, **limit)
        captions, of_captions = check_captions(self.captions, images)
        refuse_bad_share("captions", of_captions, len(self.captions), **limit)
        return Dataset(
            root=self.root,
            split=self.split,
            categories=categories,
            images=images,
            defects=defect_frame([*self.defects.rows, *of_objects, *of_captions]),
            annotations=replace(annotations, **captions),
        )

    def _size(self, image_id: int, path: str, width: int | None, height: int | None) -> tuple[int, int] | None:
        if width is not None and height is not None and 0 < width <= MAX_COORD and 0 < height <= MAX_COORD:
            return width, height
        try:
            size = image_size(self.root / path)
        except InputError as error:
            self.defects.add(image_id, None, "unreadable image", "dropped", str(error))
            return None
        self.defects.add(image_id, None, "no width and height", "read from the file", path)
        return size


@dataclass
class _Class:
    number: int
    name: str
    keypoints: tuple[str, ...]
    bones: tuple[tuple[int, int], ...]
    flip_pairs: tuple[tuple[str, str], ...] | None
    is_stuff: bool
    spellings: list[str]

    def category(self) -> Category:
        """Return the class, still without a label of its own."""
        return Category(self.number, self.number, self.name, self.keypoints, self.bones, self.flip_pairs, self.is_stuff)
