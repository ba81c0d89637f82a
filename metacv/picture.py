"""An episode as one picture: what the model was shown and what it said."""

from PIL import Image, ImageDraw
from torch import Tensor

from metacv.data.episodes import TaskBatch
from metacv.data.pictures import as_tensor

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


def prediction_picture(images: Tensor, labels: list[str], columns: int = 8, most: int = 200) -> Image.Image:
    """Images [B, C, H, W] (uint8) as the network saw them, the first of them, each with its label beneath."""
    shown = _thumbnails(images[:most] / 255)
    height, width = shown.shape[1:3]
    pitch_x, pitch_y = max(width, 96) + GAP, height + GAP + CAPTION
    columns = min(columns, len(shown))
    picture = Image.new("RGB", (columns * pitch_x + GAP, -(-len(shown) // columns) * pitch_y + GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (image, label) in enumerate(zip(shown, labels, strict=False)):
        x, y = GAP + i % columns * pitch_x, GAP + i // columns * pitch_y
        picture.paste(Image.fromarray(image.numpy()), (x, y))
        draw.rectangle([(x - 1, y - 1), (x + width, y + height)], outline=LINE)
        label = label.encode("latin1", "replace").decode("latin1")
        while draw.textlength(label) > pitch_x - GAP:
            label = label[1:]
        draw.text((x, y + height + 1), label, INK)
    return picture


def _thumbnails(images: Tensor) -> Tensor:
    """[B, C, H, W] from 0 to 1 -> uint8 [B, H', W', 3], small images at twice their size."""
    images = (images.cpu() * 255).byte()
    if images.shape[-1] <= 42:
        images = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return images[:, :3].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
