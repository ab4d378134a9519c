"""Read an image, strictly: every pixel of it, upright, as 8-bit RGB, or not at all."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from pix2seq.errors import InputError
from pix2seq.types import ImageRecord

MAX_PIXELS = 178_956_970  # Pillow's own limit; 512 MiB as RGB
BACKGROUND = (255, 255, 255)  # beneath transparent pixels: what viewers and browsers mostly show

ImageSource = str | Path | bytes | Image.Image | NDArray[np.uint8]
_ORIENTATION_TAG = 0x0112


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, upright: bool = True) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) of a path, encoded bytes, PIL image or uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).

    EXIF orientation is applied unless `upright` is false, transparency is laid on white, 16-bit and
    float greys are scaled to 8 bits, and of an animation the first frame is taken. Raises `InputError`
    for what is missing, no image, truncated, or of more than `max_pixels` (told from the header,
    before decoding).
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        _check_size(source, "the image", max_pixels)
        return _to_rgb(source, upright)
    name = "the image" if isinstance(source, bytes) else str(source)
    with _open(source, name, max_pixels) as image:
        try:
            pixels = _decode_jpeg(image, source)
            if pixels is not None:
                return _upright(pixels, _orientation(image) if upright else 1)
            _load_whole(image)
            return _to_rgb(image, upright)
        except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{name} cannot be decoded: {reason}; the file is damaged, replace it") from error


def image_size(path: str | Path, *, upright: bool = True) -> tuple[int, int]:
    """Width and height, after EXIF orientation if `upright`, from the header alone.

    Raises `InputError` as `read_image`.
    """
    with _open(path, str(path), None) as image:
        width, height = image.size
        return (height, width) if upright and _orientation(image) in (5, 6, 7, 8) else (width, height)


def _open(source: str | Path | bytes, name: str, max_pixels: int | None) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes, which we check below, and of broken metadata beside sound pixels.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a folder; name an image file") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is no image that can be read; expected JPEG, PNG, WebP, TIFF, BMP or GIF") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name} has more pixels than the limit of {max_pixels or MAX_PIXELS}; resize it") from None
    except (OSError, ValueError, SyntaxError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} cannot be opened: {reason}; expected a readable image file") from error
    if max_pixels is not None:
        try:
            _check_size(image, name, max_pixels)
        except InputError:
            image.close()
            raise
    return image


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(f"{name} has {width}x{height} pixels, the limit is {max_pixels} in all; resize it")
    if width * height == 0:
        raise InputError(f"{name} has no pixels ({width}x{height}); replace it")


def _decode_jpeg(image: Image.Image, source: str | Path | bytes) -> NDArray[np.uint8] | None:
    """Pixels (H, W, 3) as stored of a JPEG, or None for Pillow to decode it, or to say what is wrong with it."""
    decode = _turbo() if image.format == "JPEG" and image.mode in ("RGB", "L") else None
    if decode is None:
        return None
    try:
        return decode(source if isinstance(source, bytes) else Path(source).read_bytes())
    except ValueError:
        return None


@lru_cache(maxsize=1)
def _turbo() -> Callable[[bytes], NDArray[np.uint8]] | None:
    """simplejpeg's decoder, which is Pillow's without its copies, if it is installed and gives Pillow's very pixels.

    Each brings its own libjpeg-turbo; what a model learns must not depend on which of them decodes.
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


def _load_whole(image: Image.Image) -> None:
    # Other libraries switch this flag on for the whole process, and then half an image passes for one.
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, size and pixels
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
    """Undo an EXIF orientation (1 to 8, others mean none) on pixels (H, W, 3)."""
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
    """Wide greys by their own range: 16 bits by 257, others from their least to their largest value."""
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if image.mode.startswith("I") and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0 if image.mode.startswith("I;16") or high > 255 else 255.0
    elif image.mode == "F" and low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
    return Image.fromarray(np.rint(scaled * 255).clip(0, 255).astype(np.uint8))


def _from_array(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(
            f"expected an array of uint8 shaped (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"got {array.dtype} {array.shape}"
        )
    if 0 in array.shape:
        raise InputError(f"an array shaped {array.shape} has no pixels")
    if array.ndim == 3 and array.shape[2] == 3:
        return np.ascontiguousarray(array)
    return _to_rgb(Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))


class SizeMismatchError(InputError):
    """An image is not of the size that its annotations were made for."""


def read_record_image(record: ImageRecord, content: bytes | None = None) -> NDArray[np.uint8]:
    """Pixels (height, width, 3) of exactly the size that `record` says, from its path or from encoded bytes.

    An image that its EXIF orientation turns is upright; where only its stored sides are those of
    the annotations, their tool paid EXIF no heed, and the pixels come as they are stored. Any
    other size is refused, since nobody knows where the boxes lie then. Raises `InputError` as `read_image`.
    """
    source = record.path if content is None else content
    pixels = read_image(source)
    if pixels.shape[:2] != (record.height, record.width):
        upright, pixels = pixels, read_image(source, upright=False)
        if pixels.shape[:2] != (record.height, record.width):
            raise SizeMismatchError(
                f"{record.path} is {upright.shape[1]}x{upright.shape[0]}, the annotations say "
                f"{record.width}x{record.height}; put in the image that was annotated"
            )
    return pixels
