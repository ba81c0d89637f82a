"""Open image files of any format safely, read many of them on several threads, and list folders."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from metacv.data.bank import ImageBank, Readable
from metacv.errors import UserError
from metacv.files import size_of
from metacv.terminal import progress_bar
from metacv.text import printable

DECODING = 2  # part of cache keys: increase it when `open_image` changes how a file is decoded
Fit = Literal["crop", "stretch"]
S = TypeVar("S")
T = TypeVar("T")
# Pillow warns of large files and damaged EXIF; unreadable files are reported by this module.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
HIDDEN = (".", "__")  # prefixes of hidden names; macOS adds folders with __ to archives
EXTERNAL = {"EPS", "WMF"}  # formats that Pillow opens with another program (Ghostscript), or on Windows alone
UPRIGHT = {  # EXIF orientation -> operation that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(image: Readable, side: int | None = None) -> Image.Image:
    """Open an image file, or convert an image, to mode L or RGB with 8 bits, upright, transparent pixels on white.

    `side`: the size at which the image is needed, to decode large ones faster. UserError if it is unreadable.
    """
    path = Path("the image") if isinstance(image, Image.Image) else image
    try:
        if isinstance(image, Image.Image):
            return _plain(image, side)
        Image.init()
        size_of(image)  # rejects pipes, which may be endless
        with Image.open(image, formats=[name for name in Image.OPEN if name not in EXTERNAL]) as opened:
            if side:  # decode a JPEG at a smaller scale
                opened.draft(None, (2 * side, 2 * side))
            return _plain(opened, side)
    except UserError:
        raise
    except OSError as error:
        heic = path.suffix.lower() in (".heic", ".heif")
        reason = "Pillow does not read HEIC: convert it to JPEG or PNG" if heic else "not an image, or damaged"
        raise UserError(f"{path} cannot be read ({error.strerror or reason})") from None
    except Exception as error:  # Pillow raises errors of many kinds for a damaged or oversized file
        raise UserError(f"{path} cannot be read ({str(error) or type(error).__name__})") from None


def _plain(image: Image.Image, side: int | None) -> Image.Image:
    """Convert an open image as `open_image` does."""
    factor = min(image.size) // (2 * side) if side else 1  # keep at least twice `side` pixels
    if factor > 1 and image.mode in ("L", "RGB", "RGBA", "CMYK"):
        image = image.reduce(factor)
    image.load()  # EXIF of a PNG may follow the pixels
    try:  # ImageOps.exif_transpose also rewrites the EXIF, and fails if a tag has a wrong type
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF: do not rotate
        turn = None
    pixels = _to_8_bits(image)
    return pixels if turn is None else pixels.transpose(turn)


def open_exactly(path: Path, formats: tuple[str, ...], mode: str) -> Image.Image:
    """Open a file of a published data set, in one of Pillow's `formats`, and convert it to `mode`."""
    try:
        size_of(path)
        with Image.open(path, formats=formats) as image:
            return image.convert(mode)
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a readable image ({error})") from None


def _to_8_bits(image: Image.Image) -> Image.Image:
    if ";16" in image.mode or image.mode in ("I", "F"):  # 16-bit or 32-bit integers, or floats
        pixels = torch.frombuffer(bytearray(image.convert("F").tobytes()), dtype=torch.float32).nan_to_num(0, 0, 0)
        pgm = image.mode == "I" and image.format == "PPM"  # of 16 bits
        top = 65535 if pgm or ";16" in image.mode else float(pixels.max())
        if image.mode == "F" and top <= 2:  # values from 0 to 1, slightly exceeded by resampling
            top = 1
        pixels = pixels * (255 / top if top > 255 or top == 1 else 1)
        return Image.frombytes("L", image.size, pixels.round().clamp(0, 255).byte().numpy().tobytes())
    if "A" in image.getbands() or "transparency" in image.info:
        transparent = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def to_square(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    """Resize to size x size pixels (Lanczos): the central square of the image (crop), or all of it (stretch)."""
    resize = ImageOps.fit if fit == "crop" else Image.Image.resize
    return resize(image, (size, size), Image.Resampling.LANCZOS)


def as_tensor(image: Image.Image) -> Tensor:
    """Copy an image of mode L or RGB to a tensor, uint8 [C, H, W]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)


def read_classes(
    name: str, files: dict[str, list[Path]], read: Callable[[Path], Tensor], shape: tuple[int, int, int]
) -> ImageBank:
    """Read the files of each class on several threads, each to uint8 `shape`. Raises the first error of `read`."""
    paths = list(chain(*files.values()))
    images = torch.empty(len(paths), *shape, dtype=torch.uint8)
    for row, image in enumerate(map_on_threads(name, read, paths)):
        images[row] = image
    return ImageBank(name, images, torch.tensor([0, *map(len, files.values())]).cumsum(0), tuple(files))


def read_readable(label: str, files: list[Path], read: Callable[[Path], Tensor]) -> tuple[list[Path], list[Tensor]]:
    """Read files on several threads; return the readable files and their images. Prints a line for each other file."""

    def attempt(path: Path) -> Tensor | UserError:
        try:
            return read(path)
        except UserError as error:
            return error

    images = {}
    for path, image in zip(files, map_on_threads(label, attempt, files), strict=True):
        if isinstance(image, UserError):
            tqdm.write(printable(f"metacv: {image}"), file=sys.stderr)
        else:
            images[path] = image
    return list(images), list(images.values())


def map_on_threads(label: str, function: Callable[[S], T], files: list[S]) -> Iterator[T]:
    """Yield `function(file)` for each file in order, computed on several threads, with a progress bar."""
    threads = min(32, os.cpu_count() or 1)
    # Chunks of files, because with small files one by one two threads are slower than one.
    size = max(1, min(8, len(files) // (4 * threads)))
    chunks = [files[start : start + size] for start in range(0, len(files), size)]
    with ThreadPoolExecutor(threads) as pool, progress_bar(len(files), "image", label) as bar:
        for results in pool.map(lambda chunk: [function(path) for path in chunk], chunks):  # an error cancels the rest
            yield from results
            bar.update(len(results))


def report_skipped(label: str, readable: int, files: int) -> None:
    """Print how many files were skipped, if any."""
    if skipped := files - readable:
        text = printable(f"metacv: {label}: {skipped} of {files} files skipped: not readable as images")
        print(text, file=sys.stderr)


def folders_in(folder: Path) -> list[Path]:
    """Return the visible folders in a folder, sorted by name; empty if it cannot be listed."""
    place, names, _ = next(_walk(folder), (folder, [], []))  # faster than glob where there are many files
    return sorted(Path(place, name) for name in names)


def has_only_folders(folder: Path) -> bool:
    """Whether a folder contains folders and no files, not counting hidden ones."""
    _, folders, files = next(_walk(folder), (folder, [], []))
    return bool(folders) and not files


def files_below(folder: Path) -> list[Path]:
    """Return all visible files at any depth in a folder, sorted by path."""
    return sorted(Path(place, name) for place, _, names in _walk(folder) for name in names)


def _walk(folder: Path) -> Iterator[tuple[str | Path, list[str], list[str]]]:
    """Walk a folder and follow links; skip hidden names silently, and anything else unusable with a message."""

    def visible(place: str, names: list[str]) -> list[str]:
        shown = [name for name in names if not name.startswith(HIDDEN)]
        return [name for name in shown if not _left_out(os.path.join(place, name))]

    def report(error: OSError) -> None:
        if Path(error.filename).exists():
            _report_left_out(Path(error.filename), f"it cannot be listed ({error.strerror})")

    for place, folders, files in os.walk(folder, followlinks=True, onerror=report):
        folders[:] = visible(place, folders)
        yield place, folders, visible(place, files)


def _left_out(place: str) -> bool:
    """Whether a path is neither a file nor a folder, or a link to a folder that contains it (an endless loop)."""
    if os.path.isfile(place):  # faster than with a Path
        return False
    path = Path(place)
    if not path.is_dir():
        _report_left_out(path, "a broken link" if path.is_symlink() else "neither a file nor a folder")
        return True
    if not path.is_symlink():
        return False
    target = path.resolve()
    loop = any(above.resolve().is_relative_to(target) for above in Path(os.path.abspath(path)).parents)
    if loop:
        _report_left_out(path, "a link to a folder that contains it")
    return loop


@cache  # report each path once, although folders are listed several times
def _report_left_out(path: Path, reason: str) -> None:
    print(printable(f"metacv: {path} is left out: {reason}"), file=sys.stderr)
