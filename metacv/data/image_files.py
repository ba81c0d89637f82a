"""Picture files of any kind as 8-bit images, upright and without transparency, and those as tensors."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from metacv import MetacvError, clean

DECODING = 1  # to be raised when a file becomes another tensor: older caches are made again
Fit = Literal["crop", "stretch"]
T = TypeVar("T")
# Of large files and damaged EXIF: what cannot be read is told in lines of our own.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
HIDDEN = (".", "__")  # the second of macOS, in archives
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
                image = _reduced(image, side)
            return _plain(_upright(image))
    except OSError as error:
        heic = path.suffix.lower() in (".heic", ".heif")
        said = "Pillow does not read HEIC: convert it to JPEG or PNG" if heic else "not a picture, or damaged"
        raise MetacvError(f"{path} cannot be read ({error.strerror or said})") from None
    except Exception as error:  # Pillow has many words for a damaged or oversized file
        raise MetacvError(f"{path} cannot be read ({str(error) or type(error).__name__})") from None


def _reduced(image: Image.Image, side: int) -> Image.Image:
    """By a whole factor, to no less than twice `side`, before copies of all pixels are made."""
    factor = min(image.size) // (2 * side)
    if factor < 2 or image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        return image
    small = image.reduce(factor)
    small.info = image.info
    return small


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF: as it is
        image.load()
        return image


def _plain(image: Image.Image) -> Image.Image:
    if ";16" in image.mode or image.mode in ("I", "F"):  # 16 or 32 bits, or fractions
        pixels = torch.frombuffer(bytearray(image.convert("F").tobytes()), dtype=torch.float32).nan_to_num(0, 0, 0)
        top = 65535 if ";16" in image.mode else float(pixels.max())
        if image.mode == "F" and top <= 2:  # 0 to 1, and what resampling may have added
            top = 1
        pixels = pixels * (255 / top if top > 255 or top == 1 else 1)
        return Image.frombytes("L", image.size, pixels.round().clamp(0, 255).byte().numpy().tobytes())
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


def read_or_tell(label: str, files: list[Path], read: Callable[[Path], Tensor]) -> tuple[list[Path], list[Tensor]]:
    """The files that `read` can read, on several threads, and what it makes of them; a line for each of the others."""

    def attempt(path: Path) -> Tensor | MetacvError:
        try:
            return read(path)
        except MetacvError as error:
            return error

    kept, found = [], []
    for path, one in zip(files, on_threads(label, attempt, files), strict=True):
        if isinstance(one, MetacvError):
            tqdm.write(clean(f"metacv: {one}"), file=sys.stderr)
        else:
            kept.append(path)
            found.append(one)
    return kept, found


def on_threads(label: str, read: Callable[[Path], T], files: list[Path]) -> Iterator[T]:
    """What `read` makes of each file, in order, under a progress bar.

    A thread takes several files at a time: of small ones that come one by one, two threads read fewer than one.
    """
    threads = min(32, os.cpu_count() or 1)
    at_once = max(1, min(8, len(files) // (4 * threads)))
    runs = [files[start : start + at_once] for start in range(0, len(files), at_once)]
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(desc=label, total=len(files), unit="image", leave=False, disable=None) as bar,
    ):
        try:
            for run in pool.map(lambda run: [read(path) for path in run], runs):
                yield from run
                bar.update(len(run))
        finally:
            pool.shutdown(cancel_futures=True)


def tell_left_out(label: str, kept: int, files: int) -> None:
    if kept < files:
        said = f"{files - kept} of {files} files left out, as no readable images"
        print(clean(f"metacv: {label}: {said}"), file=sys.stderr)


def folders_in(folder: Path) -> list[Path]:
    """By name, without hidden ones."""
    return sorted(p for p in folder.glob("*") if p.is_dir() and not p.name.startswith(HIDDEN))


def holds_folders_alone(folder: Path) -> bool:
    return bool(folders_in(folder)) and not any(p.is_file() and not p.name.startswith(HIDDEN) for p in folder.glob("*"))


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its folders, by name, without hidden ones."""
    below = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in below if not any(part.startswith(HIDDEN) for part in p.relative_to(folder).parts))
