"""Glyphs: generated characters that look handwritten, for training without any data files.

A class is a random motor program: one to four pen strokes, each a curve through two to five knots of a 3 x 3 lattice.
Because of the lattice, strokes meet, are parallel and fill a box, as those of characters do. An image is the program
drawn once, with random errors at every knot, a smooth distortion, and random slant, size and position. It is drawn as
dots on a fine canvas, widened to the pen, and reduced with a Lanczos filter: faster than distances to the curves.
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from metacv.bounds import Count, Images, Range
from metacv.data.bank import SPLITS, Dataset, ImageBank, Look, Readable, cached_bank
from metacv.data.image_files import as_tensor, open_image
from metacv.text import in_bytes

SIZE = 28
STROKES, KNOTS, DOTS = 4, 5, 12  # most strokes of a glyph, most knots of a stroke, dots between two knots
BLOCK = 50  # number of classes that are drawn together, from one seed
MOST = 2**32  # bytes of all images
FINE = 3  # canvas pixels for each image pixel, in each direction


@dataclass
class Glyphs(Dataset):
    """Greyscale images of 28x28 pixels. Train, val and test are consecutive classes of one random stream."""

    look: ClassVar[Look] = {"brightness": [0.035, 0.089, 0.214], "contrast": [0.161, 0.251, 0.358]}

    classes: dict[str, Count]  # the number in each split
    images: Images  # of each class
    seed: Annotated[int, Range(0, 2**40)]  # times a million is a seed of torch

    def __post_init__(self) -> None:
        if self.classes.keys() != set(SPLITS):
            raise ValueError(f"classes={self.classes}: must have train, val and test")
        size = sum(self.classes.values()) * self.images * SIZE**2
        if size > MOST:
            drawn = f"classes={self.classes} of images={self.images}"
            raise ValueError(f"{drawn} take {in_bytes(size)}, above {in_bytes(MOST)}")

    @property
    def namespace(self) -> str:
        return f"glyphs{self.seed}"

    def load(self, split: str) -> ImageBank:
        total = sum(self.classes.values())
        program = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # changed code makes a new cache
        settings = {"program": program, "classes": total, "images": self.images, "seed": self.seed}
        everything = cached_bank(self.data_dir, "glyphs", settings, lambda: self._draw(total))
        start = sum(self.classes[earlier] for earlier in SPLITS[: SPLITS.index(split)])
        return everything.select(f"glyphs {split}", range(start, start + self.classes[split]))

    def read(self, path: Readable) -> Tensor:
        """Prepare an image file of dark ink on light paper: uint8 [1, 28, 28], inverted."""
        return 255 - as_tensor(open_image(path, SIZE).convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS))

    def _draw(self, total: int) -> ImageBank:
        images = draw_glyphs(total, self.images, self.seed).flatten(0, 1)
        names = tuple(f"glyph{c:05d}" for c in range(total))
        return ImageBank("glyphs", images, torch.arange(0, len(images) + 1, self.images), names)


def draw_glyphs(classes: int, images: int, seed: int = 0) -> Tensor:
    """Draw random characters in several versions: uint8 [classes, images, 1, 28, 28], ink 255 on background 0."""
    drawn = torch.empty(classes, images, 1, SIZE, SIZE, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster: the tensors are small, and threads would wait for each other
    try:
        for start in range(0, classes, BLOCK):
            rng = torch.Generator().manual_seed(seed * 1_000_003 + start)  # whatever the number of classes
            paths = draw_paths(random_programs(rng), images, rng)[: classes - start].flatten(0, 1)
            parts = [render(part) for part in torch.split(paths, 200)]  # so few fit the processor's cache
            drawn[start : start + BLOCK] = torch.cat(parts).view(-1, images, 1, SIZE, SIZE)
    finally:
        torch.set_num_threads(threads)
    return drawn


def random_programs(rng: torch.Generator) -> dict[str, Tensor]:
    """Motor programs of a block of classes: tensors [BLOCK, ...], lengths in lattice sides, bends in radians."""
    normal, uniform = (functools.partial(draw, BLOCK, generator=rng) for draw in (torch.randn, torch.rand))

    def pick(values: list[float], weights: list[float], *shape: int) -> Tensor:
        index = torch.multinomial(torch.tensor(weights), BLOCK * math.prod(shape), True, generator=rng)
        return torch.tensor(values)[index].view(BLOCK, *shape)

    strokes = pick([1, 2, 3, 4], [0.18, 0.33, 0.29, 0.20], 1)
    knots, lone = pick([2, 3, 4, 5], [0.5, 0.25, 0.15, 0.1], STROKES), pick([3, 4, 5], [0.35, 0.35, 0.3], 1)
    knots = torch.where(strokes == 1, lone, knots)  # a single straight line is hardly a character
    drawn = torch.arange(STROKES) < strokes

    # Knots move over the lattice, mostly along its rows and columns, and to places where the pen has not been.
    lattice = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    gap = (lattice[:, None] - lattice).abs()
    step = torch.tensor([[0, 1.0, 0.8], [1.0, 0.6, 0.25], [0.8, 0.25, 0.3]])[gap[..., 0], gap[..., 1]]
    node = torch.empty(BLOCK, STROKES, KNOTS, dtype=torch.long)
    fresh = torch.ones(BLOCK, 9)
    for s in range(STROKES):
        for k in range(KNOTS):
            likely = fresh * (step[node[:, s, k - 1]] if k else 1)
            node[:, s, k] = torch.multinomial(likely, 1, generator=rng)[:, 0]
            used = (node[:, s, k, None] == torch.arange(9)) & (k < knots[:, s, None])
            fresh = fresh * torch.where(used, 0.3, 1.0)
    places = lattice / 2 + 0.07 * normal(9, 2)  # every class has its own irregular lattice
    spots = places[torch.arange(BLOCK)[:, None, None], node] + 0.04 * normal(STROKES, KNOTS, 2)

    bend = pick([0, 0.5, 1.2, 1.9], [0.55, 0.15, 0.2, 0.1], STROKES, KNOTS - 1)
    bend = bend * (0.2 * normal(STROKES, KNOTS - 1)).exp() * pick([-1, 1], [0.5, 0.5], STROKES, KNOTS - 1)
    # An attached stroke starts on dot `host` of an earlier stroke, its parent. Strokes that are not drawn have length
    # 0 and are attached to the first dot of stroke 0, where they are invisible.
    parent = (uniform(STROKES) * torch.arange(STROKES)).long() * drawn
    host = torch.where(uniform(STROKES) < 0.5, pick([0, 0.5, 1], [0.3, 0.4, 0.3], STROKES), uniform(STROKES))
    length = pick([1, 0.15], [0.95, 0.05], STROKES) * drawn  # a few strokes are dots
    return {
        "spots": spots,
        "bend": bend,
        "length": length[..., None] * (torch.arange(KNOTS - 1) < knots[..., None] - 1),
        "smooth": (uniform(STROKES) < 0.45) & (knots > 2),
        "attached": (uniform(STROKES) < 0.35) | ~drawn,
        "parent": parent,
        "host": (host * (knots - 1).gather(1, parent) * DOTS).long() * drawn,
        "loose": 0.03 * drawn,
        "extent": (0.64 + 0.10 * normal()).clamp(0.25, 0.9),
        "centre": 0.02 * normal(2),
    }


def draw_paths(program: dict[str, Tensor], images: int, rng: torch.Generator) -> Tensor:
    """Dots (x, y) of every image, [BLOCK, images, STROKES * dots, 2], in canvas widths from the top left."""

    def noise(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(BLOCK, images, *shape, generator=rng)

    one = {name: value[:, None] for name, value in program.items()}
    spots = one["spots"] + noise(0.05, STROKES, KNOTS, 2)
    moves = (spots[..., 1:, :] - spots[..., :-1, :]) * one["length"][..., None]
    # Every move is a cubic from knot to knot. Its tangents at the ends either continue those of the neighbouring moves,
    # or are turned to opposite sides by the bend, which makes an arc and leaves corners at the knots.
    bend = (one["bend"] + noise(0.15, STROKES, KNOTS - 1))[..., None]
    aside = torch.stack((-moves[..., 1], moves[..., 0]), -1) * bend.sin() * (1 + bend**2 / 3)
    ahead = moves * bend.cos() * (1 + bend**2 / 3)
    before, after = functional.pad(moves, (0, 0, 1, -1)), functional.pad(moves, (0, 0, -1, 1))
    smooth = one["smooth"][..., None, None]
    leave = torch.where(smooth, 0.6 * (before + moves), ahead + aside)[..., None, :]
    arrive = torch.where(smooth, 0.6 * (moves + after), ahead - aside)[..., None, :]
    used = (one["length"] > 0)[..., None, None]
    t = torch.arange(1, DOTS + 1)[:, None] / DOTS
    lean = t * (1 - t) ** 2 * leave - t**2 * (1 - t) * arrive
    walked = (moves.cumsum(-2) - moves)[..., None, :] + (3 - 2 * t) * t**2 * moves[..., None, :]
    curves = functional.pad((walked + lean * used).flatten(-3, -2), (0, 0, 1, 0))

    padded = functional.pad(curves.flatten(0, 2).mT, (3, 3), "replicate")  # handwriting has rounded corners
    curves = functional.avg_pool1d(padded, 7, 1).mT.view_as(curves)  # [BLOCK, images, STROKES, dots, 2]

    loose = one["loose"][..., None] * noise(1, STROKES, 2)
    for s, (parent, host) in enumerate(zip(program["parent"].T, program["host"].T, strict=True)):
        joint = curves[torch.arange(BLOCK), :, parent, host] + loose[:, :, s]
        begin = torch.where(one["attached"][..., s, None] & (s > 0), joint, spots[:, :, s, 0])
        curves[:, :, s] += begin[:, :, None]

    # Variation between drawers: rotation and slant; then a smooth distortion of the box around the glyph, which
    # changes proportions while strokes that touch stay together; then size and position, close to the program's.
    turn, slant, squeeze = noise(0.09), noise(0.10), noise(0.06).exp()
    hand = torch.stack((turn.cos() * squeeze, turn.sin(), slant - turn.sin(), turn.cos() / squeeze), -1)
    dots = curves.flatten(2, 3) @ hand.view(BLOCK, images, 2, 2)
    low, high = dots.amin(2, keepdim=True), dots.amax(2, keepdim=True)
    dots = (dots - (low + high) / 2) / (high - low).amax(-1, keepdim=True)
    warp, where = noise(0.03, 2, 4, 4).flatten(0, 1), 2 * dots.flatten(0, 1)[:, None]
    warp = functional.grid_sample(warp, where, "bicubic", "border", align_corners=True)
    dots = (dots + warp[:, :, 0].mT.view_as(dots)) * (one["extent"] * noise(0.12).exp())[..., None, None]
    centre: Tensor = 0.5 + one["centre"] + noise(0.05, 2)
    return dots + centre[:, :, None]


def render(paths: Tensor) -> Tensor:
    """Draw paths [n, STROKES * dots, 2], in canvas widths, as images, uint8 [n, 28, 28]."""
    fine = FINE * SIZE
    # Add dots, so that the distance between two neighbours in a stroke is less than the width of the pen.
    dense = paths.mT.reshape(2 * len(paths), STROKES, -1)
    dense = functional.interpolate(dense, size=4 * DOTS * (KNOTS - 1) + 1, mode="linear", align_corners=True)
    x, y = (dense.view(len(paths), 2, -1) * fine).long().clamp(0, fine - 1).unbind(1)
    canvas = torch.zeros(len(paths), fine * fine).scatter_(1, y * fine + x, 1.0).view(-1, fine, fine)
    at = torch.arange(fine)
    reach, nib = 2 * (at[:, None] - at), max(1, fine // 21)  # Omniglot's pen is 5 of 105 pixels wide
    pen = ((reach > -nib) & (reach <= nib)).float()
    canvas = (pen @ canvas @ pen.T > 0).float()
    away = ((at + 0.5) / FINE - torch.arange(SIZE)[:, None] - 0.5).clamp(-3, 3)
    lanczos = torch.sinc(away) * torch.sinc(away / 3)
    lanczos = lanczos / lanczos.sum(1, keepdim=True)
    return (lanczos @ canvas @ lanczos.T * 255).round().clamp(0, 255).byte()
