"""Picture files of any kind as 8-bit images, upright and without transparency, and those as tensors."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from metacv import MetacvError

Fit = Literal["crop", "stretch"]
RUNS_A_PROGRAM = {"EPS", "WMF"}  # Ghostscript, or Windows


def open_picture(path: Path, side: int | None = None) -> Image.Image:
    """Mode L or RGB, turned as its EXIF says, on white where it is transparent; of an animation the first frame.

    A JPEG may come smaller than it is, but not below twice `side` pixels, which reads large photographs faster.
    """
    Image.init()
    try:
        with Image.open(path, formats=[name for name in Image.OPEN if name not in RUNS_A_PROGRAM]) as image:
            if side:
                image.draft(None, (2 * side, 2 * side))
            return _plain(ImageOps.exif_transpose(image))
    except OSError as error:
        raise MetacvError(f"{path} cannot be read ({error.strerror or 'not a picture, or damaged'})") from None
    except Exception as error:  # Pillow has many words for a damaged or oversized file
        raise MetacvError(f"{path} cannot be read ({str(error) or type(error).__name__})") from None


def _plain(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits, or fractions
        top: float = 65535 if ";16" in image.mode else max(image.getextrema())  # type: ignore[assignment]
        scale = 255 if top <= 1 else 1 if top <= 255 else 255 / 65535
        return image.convert("F").point(lambda value: value * scale + 0).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def squared(picture: Image.Image, size: int, fit: Fit) -> Image.Image:
    """size x size pixels: the middle of the picture, or all of it stretched."""
    if picture.size == (size, size):
        return picture
    if fit == "crop":
        return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def as_tensor(picture: Image.Image) -> Tensor:
    """uint8 [C, H, W]"""
    width, height = picture.size
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, -1).permute(2, 0, 1)


def read_or_tell(label: str, files: list[Path], read: Callable[[Path], Tensor]) -> list[Tensor | None]:
    """What `read` makes of each file, on several threads; None, and a line on stderr, for one that it cannot read."""

    def attempt(path: Path) -> Tensor | MetacvError:
        try:
            return read(path)
        except MetacvError as error:
            return error

    found: list[Tensor | None] = []
    with ThreadPoolExecutor() as pool:
        for one in tqdm(pool.map(attempt, files), label, len(files), unit="image", leave=False, disable=None):
            if isinstance(one, MetacvError):
                tqdm.write(f"metacv: {one}", file=sys.stderr)
            found.append(None if isinstance(one, MetacvError) else one)
    return found


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its folders, by name, without hidden ones."""
    below = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in below if not any(part.startswith((".", "__")) for part in p.relative_to(folder).parts))
