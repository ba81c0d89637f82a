"""Pictures of episodes and of predictions."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from metacv.data.image_files import as_tensor
from metacv.data.task import TaskBatch
from metacv.text import without_middle

Colour = tuple[int, int, int]
# A heading, which may be empty, and for each image: uint8 [C, H, W], all of one size, its caption, and the colour of
# its frame and caption.
Section = tuple[str, list[tuple[Tensor, str, Colour]]]

PAPER, LINE, INK, RIGHT, WRONG = (255, 255, 255), (200, 200, 200), (60, 60, 60), (46, 139, 87), (200, 40, 40)
# In pixels: gap between images, height of a caption, minimum width of a heading, height of letters.
GAP, CAPTION, HEADING, FONT_SIZE = 6, 14, 250, 10


def episode_picture(tasks: TaskBatch, logits: Tensor, columns: int = 8, rows: int = 20) -> Tensor:
    """Draw the first of T tasks, with logits [T, Q, N]: uint8 [3, H, W].

    A row for each class, up to `rows`, with up to `columns` support images and then as many query images, which have a
    green frame if the prediction is correct, otherwise a red one, and the predicted class below.
    """
    support_x, query_x = ((x[0] * 255).byte().cpu() for x in (tasks.support_x, tasks.query_x))
    predicted = logits[0].argmax(dim=-1).tolist()
    sections = []
    for c in range(min(tasks.way, rows)):
        support, query = ((y[0] == c).nonzero()[:columns, 0].tolist() for y in (tasks.support_y, tasks.query_y))
        cells = [(support_x[i], f"class {c}", LINE) for i in support]
        cells += [(query_x[i], str(predicted[i]), RIGHT if predicted[i] == c else WRONG) for i in query]
        sections.append(("" if c else "support, and queries with the predicted class", cells))
    return as_tensor(captioned_picture(sections, 2 * columns, least_width=0))


def captioned_picture(sections: list[Section], columns: int = 8, least_width: int = 96) -> Image.Image:
    """Draw sections below each other, in columns as wide as the images, but at least `least_width` pixels."""
    columns = min(columns, max(len(cells) for _, cells in sections))
    width, height = _thumbnail(sections[0][1][0][0], least_width).size
    pitch_x, pitch_y = max(width, least_width) + GAP, height + GAP + CAPTION
    above = [CAPTION + GAP if heading else 0 for heading, _ in sections]
    heights = [-(-len(cells) // columns) * pitch_y for _, cells in sections]
    picture = Image.new("RGB", (max(columns * pitch_x, HEADING) + GAP, sum(above) + sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    top = GAP
    for (heading, cells), space, height_of_cells in zip(sections, above, heights, strict=True):
        draw.text((GAP, top), heading, INK, _font(heading))
        top += space
        for i, (image, caption, colour) in enumerate(cells):
            x, y = GAP + i % columns * pitch_x, top + i // columns * pitch_y
            picture.paste(ImageOps.expand(_thumbnail(image, least_width), border=2, fill=colour), (x - 2, y - 2))
            text, colour_of_text = _fitted(draw, caption, pitch_x - GAP), INK if colour == LINE else colour
            draw.text((x, y + height + 2), text, colour_of_text, _font(caption))
        top += height_of_cells
    return picture


@cache
def letters(font: str) -> frozenset[str]:
    """Return the letters that a font file has; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(font).get_charmap()))
    except (RuntimeError, OSError):
        return frozenset()


def fonts() -> Iterator[str]:
    """Yield font files: matplotlib's own (Latin, Greek, Cyrillic and Arabic letters), then those of this machine."""
    from matplotlib import get_data_path

    yield str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    from matplotlib.font_manager import fontManager  # searches all fonts at import, which can take seconds

    yield from (font.fname for font in fontManager.ttflist if "LastResort" not in font.fname)  # has boxes only


@cache
def font_for(text: str) -> str:
    """Return the first font with all letters of a text, or matplotlib's own if there is none."""
    return next((font for font in fonts() if letters(font) >= {*text} - {" "}), next(fonts()))


def legible(name: str, otherwise: str) -> str:
    """Return the name if a font on this machine can show it, else `otherwise`."""
    return name if letters(font_for(name)) >= {*name} - {" "} else otherwise


def _font(caption: str) -> ImageFont.FreeTypeFont:
    return _opened(font_for(caption))


@cache
def _opened(font: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font, FONT_SIZE)


def _fitted(draw: ImageDraw.ImageDraw, caption: str, width: int) -> str:
    """Drop the middle of a caption that is wider than `width` pixels."""
    font = _font(caption)
    return without_middle(caption, lambda text: draw.textlength(text, font) <= width, "..")


def _thumbnail(image: Tensor, width: int) -> Image.Image:
    """Convert an image [C, H, W] (uint8) to RGB; a small one is doubled, or enlarged as often as fits into `width`."""
    pixels = image[:3].expand(3, -1, -1).permute(1, 2, 0)  # grey images have one channel
    thumbnail = Image.fromarray(pixels.contiguous().cpu().numpy())
    times = max(2 if thumbnail.width <= 42 else 1, width // thumbnail.width)
    return ImageOps.scale(thumbnail, times, Image.Resampling.NEAREST)
