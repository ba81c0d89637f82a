"""An episode as one picture: what the model was shown and what it said."""

import unicodedata

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from metacv.data.image_files import as_tensor
from metacv.data.sampler import TaskBatch

PAPER, LINE, INK, RIGHT, WRONG = (255, 255, 255), (200, 200, 200), (60, 60, 60), (46, 139, 87), (200, 40, 40)
GAP, CAPTION = 6, 14


def episode_picture(tasks: TaskBatch, logits: Tensor, columns: int = 8, rows: int = 20) -> Tensor:
    """The first task as uint8 [3, H, W]: a row for each class, its support images, then up to `columns` queries,
    each framed in green or red with the predicted class beneath."""
    way = tasks.way
    support = _thumbnails(tasks.support_x[0]).unflatten(0, (way, -1))[:rows, :columns]
    query = _thumbnails(tasks.query_x[0]).unflatten(0, (way, -1))[:rows, :columns]
    predicted = logits[0].argmax(dim=-1).unflatten(0, (way, -1))
    side_y, side_x = query.shape[2:4]
    pitch_x, pitch_y = side_x + GAP, side_y + GAP + CAPTION
    left = 22
    middle = left + support.shape[1] * pitch_x + 2 * GAP
    size = (middle + query.shape[1] * pitch_x, CAPTION + len(query) * pitch_y + GAP)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((left, 1), "support", INK)
    draw.text((middle, 1), "query: predicted class", INK)
    draw.line([(middle - GAP - 2, 0), (middle - GAP - 2, size[1])], LINE)
    for row in range(len(query)):
        y = CAPTION + GAP // 2 + row * pitch_y
        draw.text((6, y + side_y // 2 - 6), str(row), INK)
        for column, image in enumerate(support[row]):
            x = left + column * pitch_x
            picture.paste(Image.fromarray(image.numpy()), (x, y))
            draw.rectangle([(x - 1, y - 1), (x + side_x, y + side_y)], outline=LINE)
        for column, image in enumerate(query[row]):
            x, said = middle + column * pitch_x, int(predicted[row, column])
            colour = RIGHT if said == row else WRONG
            picture.paste(Image.fromarray(image.numpy()), (x, y))
            draw.rectangle([(x - 2, y - 2), (x + side_x + 1, y + side_y + 1)], outline=colour, width=2)
            draw.text((x + side_x // 2 - 3, y + side_y + 2), str(said), colour)
    return as_tensor(picture)


def captioned_picture(
    parts: list[tuple[str, list[tuple[Tensor, str, tuple[int, int, int]]]]], columns: int = 8
) -> Image.Image:
    """Parts, one under the other, each with a heading: images [C, H, W] (uint8) as the network saw them, with a caption
    and the colour of both."""
    shown = [(heading, _thumbnails(torch.stack([c[0] for c in cells]) / 255), cells) for heading, cells in parts]
    height, width = shown[0][1].shape[1:3]
    pitch_x, pitch_y = max(width, 96) + GAP, height + GAP + CAPTION
    rows = [-(-len(cells) // columns) for _, cells in parts]
    columns = min(columns, max(len(cells) for _, cells in parts))
    size = (max(columns, 2) * pitch_x + GAP, sum(rows) * pitch_y + len(parts) * (CAPTION + GAP) + GAP)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    top = GAP
    for (heading, thumbnails, cells), lines in zip(shown, rows, strict=True):
        draw.text((GAP, top), heading, INK)
        top += CAPTION + GAP
        for i, (image, (_, caption, colour)) in enumerate(zip(thumbnails, cells, strict=True)):
            x, y = GAP + i % columns * pitch_x, top + i // columns * pitch_y
            picture.paste(Image.fromarray(image.numpy()), (x, y))
            draw.rectangle([(x - 2, y - 2), (x + width + 1, y + height + 1)], outline=colour, width=2)
            text, kept = caption, len(caption)
            while draw.textlength(text) > pitch_x - GAP:  # what is too long loses its middle
                kept -= 1
                text = f"{caption[: kept // 2]}..{caption[len(caption) - (kept - kept // 2) :]}"
            draw.text((x, y + height + 2), text, INK if colour == LINE else colour)
        top += lines * pitch_y
    return picture


def legible(name: str, otherwise: str) -> str:
    """The name without accents, if the picture's font, which has the letters of ASCII alone, can then show it."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return plain if plain.isascii() else otherwise


def _thumbnails(images: Tensor) -> Tensor:
    """[B, C, H, W] from 0 to 1 -> uint8 [B, H', W', 3], small images at twice their size."""
    images = (images.cpu() * 255).byte()
    if images.shape[-1] <= 42:
        images = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return images[:, :3].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
