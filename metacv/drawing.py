"""Pictures of episodes and of predictions."""

import unicodedata

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from metacv.data.image_files import as_tensor
from metacv.data.task import TaskBatch

Colour = tuple[int, int, int]

PAPER, LINE, INK, RIGHT, WRONG = (255, 255, 255), (200, 200, 200), (60, 60, 60), (46, 139, 87), (200, 40, 40)
GAP, CAPTION, MARGIN = 6, 14, 22  # pixels


def episode_picture(tasks: TaskBatch, logits: Tensor, columns: int = 8, rows: int = 20) -> Tensor:
    """The first of T tasks as a picture, uint8 [3, H, W]; logits: [T, Q, N].

    A row for each class, up to `rows`: its support images on the left and its query images on the right, up to
    `columns` of each. Queries have a green frame if the prediction is correct, otherwise a red one, and the predicted
    class below.
    """
    classes = range(min(tasks.way, rows))
    support = [(tasks.support_y[0] == c).nonzero()[:columns, 0].tolist() for c in classes]
    query = [(tasks.query_y[0] == c).nonzero()[:columns, 0].tolist() for c in classes]
    support_images, query_images = _thumbnails(tasks.support_x[0]), _thumbnails(tasks.query_x[0])
    predicted = logits[0].argmax(dim=-1).tolist()
    width, height = support_images[0].size
    pitch_x, pitch_y = width + GAP, height + GAP + CAPTION
    middle = MARGIN + max(map(len, support)) * pitch_x + 2 * GAP
    size = (middle + max(map(len, query)) * pitch_x, CAPTION + len(classes) * pitch_y + GAP)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, 1), "support", INK)
    draw.text((middle, 1), "query: predicted class", INK)
    draw.line([(middle - GAP - 2, 0), (middle - GAP - 2, size[1])], LINE)
    for c in classes:
        y = CAPTION + GAP // 2 + c * pitch_y
        draw.text((6, y + height // 2 - 6), str(c), INK)
        for column, i in enumerate(support[c]):
            _paste(picture, support_images[i], MARGIN + column * pitch_x, y, LINE, frame=1)
        for column, i in enumerate(query[c]):
            x, colour = middle + column * pitch_x, RIGHT if predicted[i] == c else WRONG
            _paste(picture, query_images[i], x, y, colour, frame=2)
            draw.text((x + width // 2 - 3, y + height + 2), str(predicted[i]), colour)
    return as_tensor(picture)


def captioned_picture(sections: list[tuple[str, list[tuple[Tensor, str, Colour]]]], columns: int = 8) -> Image.Image:
    """Sections with a heading, one below the other.

    Each holds images [C, H, W] (uint8), all of one size, with the caption of each and the colour of caption and frame.
    """
    columns = min(columns, max(len(cells) for _, cells in sections))
    shown = [(heading, _thumbnails(torch.stack([c[0] for c in cells]) / 255), cells) for heading, cells in sections]
    width, height = shown[0][1][0].size
    pitch_x, pitch_y = max(width, 96) + GAP, height + GAP + CAPTION
    lines = [-(-len(cells) // columns) for _, cells in sections]
    size = (max(columns, 2) * pitch_x + GAP, sum(lines) * pitch_y + len(sections) * (CAPTION + GAP) + GAP)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    top = GAP
    for (heading, images, cells), own_lines in zip(shown, lines, strict=True):
        draw.text((GAP, top), heading, INK)
        top += CAPTION + GAP
        for i, (image, (_, caption, colour)) in enumerate(zip(images, cells, strict=True)):
            x, y = GAP + i % columns * pitch_x, top + i // columns * pitch_y
            _paste(picture, image, x, y, colour, frame=2)
            text = _fitted(draw, caption, pitch_x - GAP)
            draw.text((x, y + height + 2), text, INK if colour == LINE else colour)
        top += own_lines * pitch_y
    return picture


def legible(name: str, otherwise: str) -> str:
    """The name without accents if the font of the pictures, which has ASCII only, can show it; else `otherwise`."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return plain if plain.isascii() else otherwise


def _paste(picture: Image.Image, image: Image.Image, x: int, y: int, colour: Colour, frame: int) -> None:
    """Put `image` at (x, y), with a frame of so many pixels around it."""
    picture.paste(image, (x, y))
    corners = [(x - frame, y - frame), (x + image.width + frame - 1, y + image.height + frame - 1)]
    ImageDraw.Draw(picture).rectangle(corners, outline=colour, width=frame)


def _fitted(draw: ImageDraw.ImageDraw, caption: str, width: int) -> str:
    """The caption, without its middle if it is wider than `width` pixels."""
    text, kept = caption, len(caption)
    while draw.textlength(text) > width:
        kept -= 1
        text = f"{caption[: kept // 2]}..{caption[len(caption) - (kept - kept // 2) :]}"
    return text


def _thumbnails(images: Tensor) -> list[Image.Image]:
    """Images [B, C, H, W] from 0 to 1 in RGB; small ones at twice their size."""
    images = (images.cpu() * 255).byte()
    if images.shape[-1] <= 42:
        images = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    pixels = images[:, :3].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
    return [Image.fromarray(image.numpy()) for image in pixels]
