"""Read images strictly, as upright 8-bit RGB with every pixel intact, and resample them by an affine map."""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from pix2seq.errors import InputError
from pix2seq.geometry.affine import Affine
from pix2seq.types import ImageRecord

MAX_PIXELS = 2**27  # 134 megapixels, 384 MiB as RGB; more than cameras take
# What Pillow may open. Left out are formats that start other programs (EPS) or that nobody means by an image file.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")  # JPEG includes MPO
FORMAT_NAMES = "JPEG, MPO, PNG, WebP, TIFF, BMP, GIF or AVIF"
BACKGROUND = (255, 255, 255)  # behind transparent pixels, as in most viewers and browsers
PAD_VALUE = 0.3  # grey level around images that do not fill the output, as published

ImageSource = str | Path | bytes | Image.Image | NDArray[np.uint8]
_ORIENTATION_TAG = 0x0112


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, upright: bool = True) -> NDArray[np.uint8]:
    """Read pixels (H, W, 3) from a path, encoded bytes, PIL image or uint8 array.

    Files are of one of the `FORMATS`, arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4). EXIF orientation is
    applied unless `upright` is false, transparent pixels are blended with white, 16-bit and float greys are scaled
    to 8 bits, and an animation gives its first frame. Raises `InputError` for a missing file, anything that is not
    an image, a truncated image, or one of more than `max_pixels` (checked in the header, before decoding).
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        _check_size(source.size, "the image", max_pixels)
        return _decode(source, None, "the image", upright)
    if not isinstance(source, str | Path | bytes):
        raise InputError(f"expected an image as a path, bytes, PIL image or uint8 array, got {type(source).__name__}")
    name = "the image" if isinstance(source, bytes) else str(source)
    with _open(source, name, max_pixels) as image:
        return _decode(image, source, name, upright)


class NotAnImageError(InputError):
    """A file is of none of the `FORMATS`."""


class TooManyPixelsError(InputError):
    """An image is larger than allowed; nothing of it was decoded."""


class SizeMismatchError(InputError):
    """The size of an image differs from its annotations."""


def read_record_image(record: ImageRecord, content: bytes | None = None) -> NDArray[np.uint8]:
    """Read pixels (height, width, 3) of exactly the size in `record`, from its path or from encoded bytes.

    The image is upright by its EXIF orientation. If only its stored sides match the annotations, their
    tool ignored EXIF, and the pixels are returned as stored. Any other size is refused, because
    the boxes could lie anywhere. Raises `InputError` as `read_image`.
    """
    source = record.path if content is None else content
    pixels = read_image(source)
    if pixels.shape[:2] != (record.height, record.width):
        upright, pixels = pixels, read_image(source, upright=False)
        if pixels.shape[:2] != (record.height, record.width):
            raise SizeMismatchError(
                f"{record.path} is {upright.shape[1]}x{upright.shape[0]}, the annotations say "
                f"{record.width}x{record.height}; replace it by the image that was annotated"
            )
    return pixels


def image_size(path: str | Path, *, upright: bool = True) -> tuple[int, int]:
    """Read width and height from the header, after EXIF orientation if `upright`.

    Raises `InputError` as `read_image`.
    """
    with _open(path, str(path), None) as image:
        width, height = image.size
        return (height, width) if upright and _orientation(image) in (5, 6, 7, 8) else (width, height)


def batch_by_pixels(
    sizes: Sequence[tuple[int, int]], batch_size: int, *, max_pixels: int = MAX_PIXELS
) -> Iterator[range]:
    """Split images of these sizes (width, height) into ranges of indices, to be held in memory side by side.

    A range has at most `batch_size` images, and several images only if they have at most `max_pixels` together.
    """
    start = pixels = 0
    for index, (width, height) in enumerate(sizes):
        pixels += width * height
        if index > start and (index - start == batch_size or pixels > max_pixels):
            yield range(start, index)
            start, pixels = index, width * height
    if sizes:
        yield range(start, len(sizes))


def warp_image(image: NDArray[np.uint8], affine: Affine, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resample an image (H, W, 3) into an output of `size` (height, width); what it does not cover is grey."""
    return pad_image(*visible_part(image, affine, size), size)


def visible_part(
    image: NDArray[np.uint8], affine: Affine, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Resample the part of an image (H, W, 3) that an output of `size` (height, width) shows, maybe nothing of it.

    It is resampled bilinearly with antialiasing. Returns pixels (h, w, 3), and their top and left in the output.
    """
    height, width = size
    x0, y0, x1, y1 = affine.boxes(np.array([0.0, 0.0, image.shape[1], image.shape[0]]))
    left, top = max(round(float(x0)), 0), max(round(float(y0)), 0)
    right, bottom = min(round(float(x1)), width), min(round(float(y1)), height)
    if right <= left or bottom <= top:
        return np.zeros((0, 0, 3), np.uint8), (0, 0)
    region = affine.inverse().boxes(np.array([left, top, right, bottom], np.float64))
    limits = np.array([image.shape[1], image.shape[0]] * 2, np.float32)
    part = Image.fromarray(image).resize(
        (right - left, bottom - top), Image.Resampling.BILINEAR, box=tuple(np.clip(region, 0, limits).tolist())
    )
    pixels = np.asarray(part)
    # NumPy takes ten times as long to copy three-byte pixels in reverse.
    mirrored: NDArray[Any] = cv2.flip(pixels, 1) if affine.scale_x < 0 else pixels
    return mirrored, (top, left)


def pad_image(pixels: NDArray[np.uint8], corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Put pixels (h, w, 3) at `corner` (top, left) of a grey output of `size` (height, width)."""
    (top, left), (height, width) = corner, pixels.shape[:2]
    out = np.full((*size, 3), round(PAD_VALUE * 255), np.uint8)
    out[top : top + height, left : left + width] = pixels
    return out


def _open(source: str | Path | bytes, name: str, max_pixels: int | None) -> Image.Image:
    """Open an image file; its size is read and, with `max_pixels`, checked, its pixels are not read yet."""
    try:
        if not isinstance(source, bytes) and not stat.S_ISREG(mode := os.stat(source).st_mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"  # reading from a pipe could wait forever
            raise InputError(f"{name} is {kind}; name an image file")
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; check the path") from None
    except UnidentifiedImageError:
        raise NotAnImageError(f"{name} is not a readable image; expected {FORMAT_NAMES}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = max_pixels or MAX_PIXELS
        raise TooManyPixelsError(f"{name} has more pixels than the limit of {limit}; resize it") from None
    except Exception as error:  # what Pillow raises on damaged headers has no common type
        raise InputError(f"{name} cannot be opened: {_reason(error)}; expected a readable image file") from error
    if max_pixels is not None:
        try:
            _check_size(image.size, name, max_pixels)
        except InputError:
            image.close()
            raise
    return image


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that the installed Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise TooManyPixelsError(f"{name} has {width}x{height} pixels, the limit is {max_pixels} in total; resize it")
    if width * height == 0:
        raise InputError(f"{name} has no pixels ({width}x{height}); replace it")


def _decode(image: Image.Image, source: str | Path | bytes | None, name: str, upright: bool) -> NDArray[np.uint8]:
    """Decode an open image, which came from `source`, to pixels (H, W, 3)."""
    try:
        pixels = None if source is None else _decode_jpeg(image, source)
        if pixels is not None:
            return _upright(pixels, _orientation(image) if upright else 1)
        with _strict_loading:
            image.load()
        return _to_rgb(image, upright)
    except Exception as error:  # what Pillow's decoders raise on damaged content has no common type
        raise InputError(f"{name} cannot be decoded: {_reason(error)}; the file is damaged, replace it") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _decode_jpeg(image: Image.Image, source: str | Path | bytes) -> NDArray[np.uint8] | None:
    """Decode a JPEG to pixels (H, W, 3) as stored; None leaves it to Pillow to decode it or to report its defect."""
    decode = _turbo() if image.format == "JPEG" and image.mode in ("RGB", "L") else None
    if decode is None:
        return None
    try:
        return decode(source if isinstance(source, bytes) else Path(source).read_bytes())
    except ValueError:
        return None


@lru_cache(maxsize=1)
def _turbo() -> Callable[[bytes], NDArray[np.uint8]] | None:
    """Return simplejpeg's decoder if it is installed and gives exactly Pillow's pixels; it makes fewer copies.

    Each package brings its own libjpeg-turbo; what a model learns must not depend on which one decodes.
    """
    try:
        import simplejpeg
    except ImportError:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    for subsampling in (0, 2):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, "JPEG", quality=90, subsampling=subsampling)
        if not np.array_equal(simplejpeg.decode_jpeg(stream.getvalue()), np.asarray(Image.open(stream))):
            return None
    return simplejpeg.decode_jpeg


class _StrictLoading:
    """While a thread is inside, Pillow refuses truncated images, even if another library made it accept them.

    Pillow's flag belongs to the whole process: the first thread in turns it off, the last one out restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._tolerant = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._tolerant


_strict_loading = _StrictLoading()


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # Pillow rotates these itself, size and pixels
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1


def _to_rgb(image: Image.Image, upright: bool = True) -> NDArray[np.uint8]:
    orientation = _orientation(image) if upright else 1
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        image = _grey_to_8_bits(image)
    if image.mode != "RGB":
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            layer = image.convert("RGBA")
            canvas = Image.new("RGBA", layer.size, (*BACKGROUND, 255))
            image = Image.alpha_composite(canvas, layer)
        image = image.convert("RGB")
    pixels = np.asarray(image)
    return _upright(pixels, orientation)


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation (1 to 8; other values mean none) on pixels (H, W, 3)."""
    turns: dict[int, Any] = {
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: p[::-1].transpose(1, 0, 2),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: p[:, ::-1].transpose(1, 0, 2),
    }
    return np.ascontiguousarray(turns[orientation](pixels)) if orientation in turns else pixels


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale greys of more than 8 bits: 16 bits by 257, others from their minimum to their maximum."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("some of its pixels are no finite numbers")
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I") and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0 if image.mode.startswith("I;16") or high > 255 else 255.0
    elif image.mode == "F" and low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    scaled = (values - low) / max(high - low, 1e-12)
    return Image.fromarray(np.rint(scaled * 255).clip(0, 255).astype(np.uint8))


def _from_array(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(
            "expected an array of uint8 shaped (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"got {array.dtype} {array.shape}"
        )
    if 0 in array.shape:
        raise InputError(f"an array of shape {array.shape} has no pixels; expected at least one")
    if array.ndim == 3 and array.shape[2] == 3:
        return np.ascontiguousarray(array)
    return _to_rgb(Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))
