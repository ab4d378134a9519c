"""Draw boxes, masks, keypoints and text on images, with Pillow."""

from __future__ import annotations

import colorsys
import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pix2seq.types import Category, Instance, Target

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Chip:
    """A token as a small labelled box."""

    token: int
    meaning: str
    color: Color
    counts: bool  # whether the loss counts it; others are hollow
    is_prompt: bool = False  # given rather than said; these have a dark border
    ends_line: bool = False


MIN_SIDE = 512  # the longer side of what is drawn on: labels on a thumbnail could not be read


class Canvas:
    """An image to draw answers on, with text below it.

    Small images are enlarged to a longer side of 512 pixels first. Line widths and letters grow with the image, and a
    class has the same colour in every image.
    """

    def __init__(
        self, image: NDArray[np.uint8], *, min_score: float = 0.0, scores: bool = True, mask_opacity: float = 0.35
    ) -> None:
        """Start with an image (H, W, 3); `scores` writes them beside class names, `min_score` leaves objects out."""
        self.image, self.scale = _enlarged(image)
        self.min_score, self.scores, self.mask_opacity = min_score, scores, mask_opacity
        self._lines: list[str] = []

    def instances(self, instances: Sequence[Instance]) -> None:
        """Draw masks, boxes, skeletons and class names of objects, the best on top; coordinates are the image's."""
        shown = sorted((i for i in instances if i.score >= self.min_score), key=lambda i: i.score)
        colors = [category_color(instance.category.name) for instance in shown]
        boxes = [np.array(instance.box_xyxy) * self.scale for instance in shown]
        for instance, color in zip(shown, colors, strict=True):
            _mask(self.image, [ring * self.scale for ring in instance.polygons], color, self.mask_opacity)
        draw = ImageDraw.Draw(self.image)
        for instance, color, box in zip(shown, colors, boxes, strict=True):
            _box(draw, box, color, self.image.size, width=_line_width(self.image.size))
            if instance.keypoints is not None:
                _skeleton(draw, instance.keypoints * [self.scale, self.scale, 1], instance.category, self.image.size)
        for instance, color, box in zip(shown, colors, boxes, strict=True):  # labels last, so that no box crosses them
            name = instance.category.name
            _label(draw, f"{name} {instance.score:.2f}" if self.scores else name, box, color, self.image.size)

    def thin_box(self, box_xyxy: Sequence[float], color: Color = (255, 255, 255)) -> None:
        """Draw a box one pixel wide, without a name."""
        _box(ImageDraw.Draw(self.image), np.array(box_xyxy) * self.scale, color, self.image.size, width=1)

    def text(self, line: str) -> None:
        """Add a line of text below the image; long lines wrap."""
        self._lines.append(line)

    def finish(self) -> Image.Image:
        """Return the image with all that was drawn and written."""
        return _with_text(self.image, self._lines) if self._lines else self.image


def draw_instances(
    image: NDArray[np.uint8],
    instances: Sequence[Instance],
    *,
    min_score: float = 0.0,
    caption: str | None = None,
    scores: bool = True,
    mask_opacity: float = 0.35,
) -> Image.Image:
    """Draw instances of at least `min_score` on an image (H, W, 3), with a caption below; see `Canvas`."""
    canvas = Canvas(image, min_score=min_score, scores=scores, mask_opacity=mask_opacity)
    canvas.instances(instances)
    if caption is not None:
        canvas.text(caption)
    return canvas.finish()


def draw_target(image: NDArray[np.uint8], target: Target, categories: Sequence[Category]) -> Image.Image:
    """Draw the annotations of an image, with the first caption below."""
    by_label = {category.label: category for category in categories}
    instances = [
        Instance(
            (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
            by_label[int(label)],
            1.0,
            rings if isinstance(rings, list) else [],
            points if len(points) else None,
        )
        for box, label, rings, points in zip(
            target.boxes_xyxy, target.labels, target.segmentations, target.keypoints, strict=True
        )
    ]
    caption = target.captions[0] if target.captions else None
    # Without a tint, which would hide the colours that captions name.
    return draw_instances(image, instances, caption=caption, scores=False, mask_opacity=0)


def tile(images: Sequence[Image.Image], *, columns: int, gap: int = 8) -> Image.Image:
    """Put images side by side and row by row on white; each row is as high as its tallest image."""
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    cell = max(image.width for image in images)
    heights = [max(image.height for image in row) for row in rows]
    sheet = Image.new("RGB", (columns * (cell + gap) - gap, sum(heights) + gap * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            sheet.paste(image, (column * (cell + gap), top))
        top += height + gap
    return sheet


def draw_chips(parts: Sequence[str | Chip], *, width: int = 512) -> Image.Image:
    """Draw chips from left to right and line by line on white; each text stands on lines of its own.

    A chip that `ends_line` is the last of its line.
    """
    font, small, height, pad = ImageFont.load_default(15), ImageFont.load_default(12), 42, 5
    wrapped = [line for part in parts for line in (textwrap.wrap(part, 64) if isinstance(part, str) else [part])]
    sheet = Image.new("RGB", (width, (height + 10) * (len(wrapped) + 1)), "white")  # room for a line each
    draw = ImageDraw.Draw(sheet)
    left, top = 0, 0
    for part in wrapped:
        if isinstance(part, str):
            top += height + 10 if left else 0
            draw.text((0, top), part, font=font, fill="black")
            left, top = 0, top + 24
            continue
        number = str(part.token)
        wide = round(max(draw.textlength(number, font), draw.textlength(part.meaning, small))) + 2 * pad
        if left and left + wide >= width:
            left, top = 0, top + height + 4
        border = "black" if part.is_prompt else part.color
        fill = part.color if part.counts or part.is_prompt else "white"
        draw.rounded_rectangle((left, top, left + wide, top + height), 4, fill=fill, outline=border, width=2)
        ink = _ink(part.color) if fill != "white" else "black"
        draw.text((left + wide / 2, top + 12), number, font=font, fill=ink, anchor="mm")
        draw.text((left + wide / 2, top + 30), part.meaning, font=small, fill=ink, anchor="mm")
        left, top = (0, top + height + 4) if part.ends_line else (left + wide + 4, top)
    return sheet.crop((0, 0, width, top + (height if left else 0) + 2))


def category_color(name: str) -> Color:
    """Return a strong colour that depends on the name alone."""
    digest = zlib.crc32(name.encode("utf-8"))
    hue, value = digest % 360 / 360, 0.75 + 0.25 * (digest >> 12 & 1)
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _enlarged(image: NDArray[np.uint8]) -> tuple[Image.Image, float]:
    height, width = image.shape[:2]
    scale = max(MIN_SIDE / max(height, width), 1.0)
    canvas = Image.fromarray(image).convert("RGB")
    if scale > 1:
        canvas = canvas.resize((max(round(width * scale), 1), max(round(height * scale), 1)), Image.Resampling.BICUBIC)
    return canvas, scale


def _line_width(size: tuple[int, int]) -> int:
    return max(round(max(size) / 320), 2)


def _font(size: tuple[int, int]) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(max(size) / 42, 11))


def _mask(canvas: Image.Image, rings: Sequence[NDArray[np.floating]], color: Color, opacity: float) -> None:
    """Draw the rings of a mask, and tint what they enclose."""
    usable = [[tuple(point) for point in ring.tolist()] for ring in rings if len(ring) >= 3 and np.isfinite(ring).all()]
    if opacity and usable:
        tint = Image.new("L", canvas.size, 0)
        for ring in usable:
            ImageDraw.Draw(tint).polygon(ring, fill=round(opacity * 255))
        canvas.paste(color, mask=tint)
    for ring in usable:
        ImageDraw.Draw(canvas).line([*ring, ring[0]], fill=color, width=max(_line_width(canvas.size) // 2, 1))


def _box(
    draw: ImageDraw.ImageDraw, xyxy: NDArray[np.floating], color: Color, size: tuple[int, int], *, width: int
) -> None:
    draw.rectangle(_inside(xyxy, size), outline=color, width=width)


def _label(
    draw: ImageDraw.ImageDraw, text: str, xyxy: NDArray[np.floating], color: Color, size: tuple[int, int]
) -> None:
    font = _font(size)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = _line_width(size)
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x0, y0, _, _ = _inside(xyxy, size)
    # Above the box where there is room, else just inside; never beyond the image.
    x = min(max(x0, 0), max(size[0] - width, 0))
    y = y0 - height if y0 >= height else min(y0, max(size[1] - height, 0))
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + pad - left, y + pad - top), text, font=font, fill=_ink(color))


def _ink(color: Color) -> str:
    """Return the colour of letters that can be read on a colour."""
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return "black" if luminance > 140 else "white"


def _skeleton(
    draw: ImageDraw.ImageDraw, points: NDArray[np.floating], category: Category, size: tuple[int, int]
) -> None:
    color, width = category_color(category.name), _line_width(size)
    seen = (points[:, 2] > 0) & np.isfinite(points).all(axis=1)
    for a, b in category.skeleton:
        if seen[a] and seen[b]:
            draw.line([tuple(points[a, :2]), tuple(points[b, :2])], fill=color, width=width)
    for (x, y, visibility), is_seen in zip(points.tolist(), seen, strict=True):
        if is_seen:
            fill = "white" if visibility == 2 else color  # hollow: hidden
            draw.ellipse((x - width, y - width, x + width, y + width), fill=fill, outline=color)


def _with_text(canvas: Image.Image, texts: Sequence[str]) -> Image.Image:
    font = _font(canvas.size)
    draw = ImageDraw.Draw(canvas)
    lines = []
    for text in texts:
        line = ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if line and draw.textlength(longer, font=font) > canvas.width - 16:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    block = "\n".join(lines)
    _, _, _, bottom = draw.multiline_textbbox((0, 0), block, font=font)
    sheet = Image.new("RGB", (canvas.width, canvas.height + round(bottom) + 16), "white")
    sheet.paste(canvas)
    ImageDraw.Draw(sheet).multiline_text((8, canvas.height + 6), block, font=font, fill="black")
    return sheet


def _inside(xyxy: NDArray[np.floating], size: tuple[int, int]) -> tuple[float, float, float, float]:
    limits = np.array([size[0] - 1, size[1] - 1] * 2)
    x0, y0, x1, y1 = np.clip(np.nan_to_num(xyxy), 0, limits).tolist()
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
