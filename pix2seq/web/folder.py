"""The folder of images that a server searches: thumbnails of what was found, and the images themselves."""

from __future__ import annotations

import base64
import io
import mimetypes
from pathlib import Path
from typing import Any

from PIL import Image

from pix2seq.data.image import image_size
from pix2seq.data.image_index import ImageIndex
from pix2seq.errors import InputError
from pix2seq.search import Hit, thumbnail

SIDE = 192  # pixels, of the longer side of a thumbnail
JPEG_QUALITY = 85


class NoSuchImageError(InputError):
    """The folder has no such image, or it must not be shown."""


class ImageFolder:
    """The images of an index, by numbers. Only images are given out, and only those that lie in the folder."""

    def __init__(self, index: ImageIndex, *, max_pixels: int) -> None:
        self.index, self.max_pixels = index, max_pixels
        self._names = sorted(index.stamps)
        self._numbers = {name: number for number, name in enumerate(self._names)}

    def describe(self) -> dict[str, Any]:
        """Return what the page says about the folder."""
        return {"folder": self.index.root.name, "num_images": len(self.index)}

    def path(self, number: int) -> Path:
        """Return the path of an image. Raises `InputError` if it is gone, no image any more, or lies elsewhere."""
        if not 0 <= number < len(self._names):
            raise NoSuchImageError(f"the folder has no image {number}; its {len(self._names)} images count from 0")
        path = self.index.root / self._names[number]
        if not path.resolve().is_relative_to(self.index.root.resolve()):
            raise NoSuchImageError(f"image {number} is a link out of the folder; it is not shown")
        image_size(path)
        return path

    def to_json(self, hit: Hit) -> dict[str, Any]:
        """Return what the page shows of a hit; `thumbnail` is None if the image cannot be shown."""
        number = self._numbers[hit.name]
        return hit.to_json() | {"url": f"/indexed/{number}", "thumbnail": self._thumbnail(number)}

    def _thumbnail(self, number: int) -> str | None:
        """Return a JPEG as a data URL, so that the images of a search are answered, and limited, by one request."""
        try:
            pixels = thumbnail(self.path(number), SIDE, max_pixels=self.max_pixels)
        except InputError:
            return None
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=JPEG_QUALITY)
        return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def media_type(path: Path) -> str:
    """Return the type of an image by its name."""
    return mimetypes.guess_type(path.name)[0] or "application/octet-stream"
