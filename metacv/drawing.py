"""Pictures of episodes and of predictions."""

import unicodedata

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from metacv.data.image_files import as_tensor
from metacv.data.task import TaskBatch

Colour = tuple[int, int, int]
# A heading, which may be empty, and images [C, H, W] (uint8), all of one size, with the caption of each and the colour
# of caption and frame.
Section = tuple[str, list[tuple[Tensor, str, Colour]]]

PAPER, LINE, INK, RIGHT, WRONG = (255, 255, 255), (200, 200, 200), (60, 60, 60), (46, 139, 87), (200, 40, 40)
GAP, CAPTION, HEADING = 6, 14, 208  # pixels: between images, height of a caption, least width of a heading


def episode_picture(tasks: TaskBatch, logits: Tensor, columns: int = 8, rows: int = 20) -> Tensor:
    """The first of T tasks as a picture, uint8 [3, H, W]; logits: [T, Q, N].

    A row for each class, up to `rows`, with up to `columns` support images and then as many query images. Queries have
    a green frame if the prediction is correct, otherwise a red one, and the predicted class below.
    """
    support_x, query_x = ((x[0] * 255).byte() for x in (tasks.support_x, tasks.query_x))
    predicted = logits[0].argmax(dim=-1).tolist()
    sections = []
    for c in range(min(tasks.way, rows)):
        support, query = ((y[0] == c).nonzero()[:columns, 0].tolist() for y in (tasks.support_y, tasks.query_y))
        cells = [(support_x[i], f"class {c}", LINE) for i in support]
        cells += [(query_x[i], str(predicted[i]), RIGHT if predicted[i] == c else WRONG) for i in query]
        sections.append(("" if c else "support, and queries with the predicted class", cells))
    return as_tensor(captioned_picture(sections, 2 * columns, least_width=0))


def captioned_picture(sections: list[Section], columns: int = 8, least_width: int = 96) -> Image.Image:
    """Sections, one below the other, in columns of `least_width` pixels or of the images' width."""
    columns = min(columns, max(len(cells) for _, cells in sections))
    shown = [(heading, _thumbnails(torch.stack([c[0] for c in cells])), cells) for heading, cells in sections]
    width, height = shown[0][1][0].size
    pitch_x, pitch_y = max(width, least_width) + GAP, height + GAP + CAPTION
    lines = [-(-len(cells) // columns) for _, cells in sections]
    heights = [CAPTION + GAP if heading else 0 for heading, _ in sections]
    size = (max(columns * pitch_x, HEADING) + GAP, sum(lines) * pitch_y + sum(heights) + GAP)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    top = GAP
    for (heading, images, cells), own_lines, own_height in zip(shown, lines, heights, strict=True):
        draw.text((GAP, top), heading, INK)
        top += own_height
        for i, (image, (_, caption, colour)) in enumerate(zip(images, cells, strict=True)):
            x, y = GAP + i % columns * pitch_x, top + i // columns * pitch_y
            picture.paste(image, (x, y))
            draw.rectangle([(x - 2, y - 2), (x + width + 1, y + height + 1)], outline=colour, width=2)
            text = _fitted(draw, caption, pitch_x - GAP)
            draw.text((x, y + height + 2), text, INK if colour == LINE else colour)
        top += own_lines * pitch_y
    return picture


def legible(name: str, otherwise: str) -> str:
    """The name without accents if the font of the pictures, which has ASCII only, can show it; else `otherwise`."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return plain if plain.isascii() else otherwise


def _fitted(draw: ImageDraw.ImageDraw, caption: str, width: int) -> str:
    """The caption, without its middle if it is wider than `width` pixels."""
    text, kept = caption, len(caption)
    while draw.textlength(text) > width:
        kept -= 1
        text = f"{caption[: kept // 2]}..{caption[len(caption) - (kept - kept // 2) :]}"
    return text


def _thumbnails(images: Tensor) -> list[Image.Image]:
    """Images [B, C, H, W] (uint8) in RGB; small ones at twice their size."""
    if images.shape[-1] <= 42:
        images = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    pixels = images[:, :3].cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
    return [Image.fromarray(image.numpy()) for image in pixels]
