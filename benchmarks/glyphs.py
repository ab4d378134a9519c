"""Render the coloured glyphs of a font as cut-outs for `pix2seq data things`.

python benchmarks/glyphs.py /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf glyphs

Each glyph of one character becomes FOLDER/NAME.png by the character's Unicode name. A font of bitmaps has one size:
109 for those of Google.
"""

from __future__ import annotations

import argparse
import re
import sys
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = 109  # of bitmap glyphs
SIDE = 160  # pixels of the canvas, with room around a glyph
MISSING = "\U0010fffe"  # a character that no font has


def main() -> None:
    """Write all glyphs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("font", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        font = ImageFont.truetype(str(args.font), SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        sys.exit(f"error: {args.font} cannot be used as a font of size {SIZE} ({error})")
    args.folder.mkdir(parents=True, exist_ok=True)
    missing = draw(MISSING, font).tobytes()
    count = 0
    for character in map(chr, range(0x80, sys.maxunicode)):
        name = unicodedata.name(character, "")
        if not name or unicodedata.category(character) == "Lo":  # letters, of which there are too many to try
            continue
        glyph = draw(character, font)
        if glyph.getbbox() is None or glyph.tobytes() == missing:
            continue
        glyph.save(args.folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png")
        count += 1
    print(f"{count} glyphs in {args.folder}")


def draw(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw a character in its own colours on a transparent canvas."""
    canvas = Image.new("RGBA", (SIDE, SIDE))
    ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
    return canvas


if __name__ == "__main__":
    main()
