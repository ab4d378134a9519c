"""A contact sheet of a data set: images with everything that is annotated."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from pix2seq.data.formats.coco import CocoDataset
from pix2seq.data.image import read_image
from pix2seq.drawing import draw_target, tile


def contact_sheet(
    folder: str | Path, *, rows: int = 2, columns: int = 4, split: str = "val", first: int = 0, width: int = 1200
) -> Image.Image:
    """A sheet, `width` pixels wide, of a COCO-layout split from image `first` on, with all that is annotated."""
    dataset = CocoDataset.read(folder, split)
    drawn = []
    for index in range(first, min(first + rows * columns, len(dataset))):
        target = dataset.target(index)
        drawn.append(draw_target(read_image(target.image.path), target, dataset.categories))
    sheet = tile(drawn, columns=columns)
    return sheet.resize((width, round(sheet.height * width / sheet.width)), Image.Resampling.LANCZOS)
