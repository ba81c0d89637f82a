"""Read a published data set in any common form: class folders, CSV lists, pickles and archives.

The module of a data set has a `SplitSpec`, a function that reads an image file, and optionally one for a pickle;
`Source` does the rest. For another layout, override `Source.files` (image files) or `Source.load_from` (anything).
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import math
import operator
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from metacv import limits
from metacv.data.bank import SPLITS, ImageBank
from metacv.data.image_files import folders_in, read_classes
from metacv.errors import UserError
from metacv.files import check_file, check_growth, rename_unless_there, size_of
from metacv.pickles import PlainUnpickler
from metacv.text import first_line

T = TypeVar("T")
BLOCK = 512  # bytes of a tar header, and about the size of a file's entry in a folder
OPENED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"": lambda path: path.open("rb"),
}
ARCHIVE = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)


def split_classes(name: str) -> dict[str, list[str]]:
    """Return the class names of train, val and test from the file splits/`name`.json."""
    content = json.loads((Path(__file__).parent / "splits" / f"{name}.json").read_text("utf-8"))
    return {split: content[split] for split in SPLITS}


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Raise ValueError unless these are valid shares of train, val and test for `random_split`."""
    shares = fractions.values()
    if fractions.keys() != set(SPLITS) or sum(shares) <= 0:
        raise ValueError(f"fractions={dict(fractions)}: must have train, val and test, not all 0")


def random_split(names: Iterable[str], fractions: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    """Split class names at random by a hash of name and seed, so that adding a class moves few others."""
    order = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(f"{seed} {name}")).digest())
    sums = [sum(fractions[earlier] for earlier in SPLITS[:i]) for i in range(4)]
    ends = [round(part / sums[-1] * len(order)) for part in sums]
    return {split: sorted(order[ends[i] : ends[i + 1]]) for i, split in enumerate(SPLITS)}


class Missing(UserError):
    """The data set was not found below data_dir in any form."""


@dataclass(frozen=True)
class SplitSpec:
    """The class names of each split, and the number of images of every class (None: any number)."""

    classes: Mapping[str, Sequence[str]]
    images: int | None = None

    def check(self, sizes: Mapping[str, int], place: Path, split: str) -> None:
        """Raise UserError unless `sizes`, the images of each class in `place`, match the split."""
        expected = self.classes[split]
        if missing := sorted(set(expected) - sizes.keys()):
            lacks = f"lacks {len(missing)} of {len(expected)} classes"
            raise UserError(f"{place}: the {split} split {lacks}: {_first(missing)}")
        if others := sorted(sizes.keys() - set(expected)):
            raise UserError(f"{place}: the {split} split has classes that do not belong to it: {_first(others)}")
        for name in expected:
            if sizes[name] != self.images and (self.images or not sizes[name]):
                number = f"{sizes[name]} images, not {self.images or 'at least 1'}"
                raise UserError(f"{place}: {name} of the {split} split has {number}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


@dataclass(frozen=True)
class Source:
    """The files of a data set. `load` searches folders with its name (miniimagenet matches Mini-ImageNet and
    mini_imagenet_data) down to two levels, then data_dir, then archives in these folders or with such a name."""

    title: str  # used in messages, such as "miniImageNet"
    folder: str  # name in data_dir, in lower-case letters and digits
    download: str  # where to get the files, used in the message that they are missing
    spec: SplitSpec
    read: Callable[[Path], Tensor]  # one image file -> uint8 `shape`
    shape: tuple[int, int, int]
    pickle: str = ""  # name of a split's pickle, with {} for the split
    from_pickle: Callable[[Any, Path, str], ImageBank] | None = None  # of content, path and split; may raise any error

    def load(self, data_dir: Path, split: str) -> ImageBank:
        """Load a split, classes sorted by name; UserError with the damaged file, or with which files to put where."""
        hints: list[str] = []
        for folder in self._folders(data_dir):
            if bank := self.load_from(folder, split):
                return bank
            hints += self._hints(folder, split)
        pickles = f"{', '.join(dict.fromkeys(map(self.pickle.format, SPLITS)))}; " if self.pickle else ""
        raise Missing(
            f"data_dir={data_dir}: the {split} split of {self.title} is missing ({self.download}). Put into "
            f"{data_dir / self.folder} one of: {pickles}train/, val/ and test/ with a folder of images for each class; "
            "images/ with train.csv, val.csv and test.csv; or a zip or tar archive of these"
            + (f". Found: {'; '.join(hints)}" if hints else "")
        )

    def load_from(self, folder: Path, split: str) -> ImageBank | None:
        """Load a split from one folder; None if the folder does not have it."""
        path = folder / self.pickle.format(split)
        if self.from_pickle and path.is_file():
            from_pickle = self.from_pickle
            return read_as(self.title, path, lambda content: from_pickle(content, path, split))
        if (files := self.files(folder, split)) is None:
            return None
        self.spec.check({name: len(paths) for name, paths in files.items()}, folder, split)
        return read_classes(f"{folder.name} {split}", dict(sorted(files.items())), self.read, self.shape)

    def files(self, folder: Path, split: str) -> dict[str, list[Path]] | None:
        """Find the image files of each class: SPLIT/CLASS/*, or SPLIT.csv and images/*; None without these."""
        if any((folder / split / name).is_dir() for name in self.spec.classes[split]):  # of this data set
            return {path.name: sorted(path.glob("[!.]*")) for path in (folder / split).glob("[!.]*") if path.is_dir()}
        table, images = folder / f"{split}.csv", folder / "images"
        return listed_files(table, images) if table.is_file() and images.is_dir() else None

    def _hints(self, folder: Path, split: str) -> Iterator[str]:
        """Yield descriptions of incomplete forms of the data set in a folder."""
        table, images = folder / f"{split}.csv", folder / "images"
        if (folder / split).is_dir() and (self._is_named(folder) or self._is_named(folder.parent)):
            yield f"{folder / split} without a folder named {', '.join(self.spec.classes[split][:2])}, ..."
        found, lacking = (images, table.name) if images.is_dir() else (table, "images/")
        if images.is_dir() != table.is_file():
            yield f"{found} without {lacking} beside it"

    def _is_named(self, path: Path) -> bool:
        return self.folder in re.sub("[^a-z0-9]", "", path.name.lower())

    def _folders(self, data_dir: Path) -> Iterator[Path]:
        """Yield the folders to search. Archives come last and are unpacked only then; UserError if one is damaged."""
        own = [folder for folder in folders_in(data_dir) if self._is_named(folder)]
        for folder in own:
            yield from _two_levels(folder)
        yield data_dir
        inside = [path for folder in own for path in folder.glob("[!.]*")]
        beside = [path for path in data_dir.glob("[!.]*") if self._is_named(path)]
        problems = []
        for archive in sorted(path for path in inside + beside if ARCHIVE.search(path.name) and path.is_file()):
            try:
                yield from _two_levels(unpack(archive))
            except UserError as error:  # the data may still be in another archive
                problems.append(error)
        if problems:
            raise problems[0]


def listed_files(table: Path, images: Path) -> dict[str, list[Path]]:
    """Return the files in `images` of each class, from a CSV file with columns `filename` and `label`."""
    files: dict[str, list[Path]] = {}
    check_file(table, limits.LIST)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                files.setdefault(row["label"] or "", []).append(images / Path(row["filename"]).name)
    except (OSError, KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{table} is not a CSV file with columns filename and label ({reason})") from None
    if repeated := [path.name for path, times in Counter(chain(*files.values())).items() if times > 1]:
        raise UserError(f"{table} lists {repeated[0]} more than once")
    return {name: sorted(paths) for name, paths in files.items()}


def _two_levels(folder: Path) -> Iterator[Path]:
    """Yield the folder and those up to two levels below it, except inside images/, which has many files."""
    yield folder
    for child in folders_in(folder):
        yield child
        yield from folders_in(child) if child.name != "images" else ()


def unpack(archive: Path) -> Path:
    """Unpack an archive into ARCHIVE.unpacked beside it, unless that exists; UserError if it cannot be unpacked."""
    target = archive.with_name(f"{archive.name}.unpacked")
    if not target.exists():
        print(f"metacv: unpacking {archive} into {target}", file=sys.stderr)
        try:
            # Renamed at the end, so that `target` is always complete.
            with tempfile.TemporaryDirectory(dir=archive.parent, prefix=f".{target.name}.") as temporary:
                (content := Path(temporary) / "content").mkdir()
                extract(archive, content)
                rename_unless_there(content, target)
        except Exception as error:  # a damaged archive may raise any error
            raise UserError(f"{archive} cannot be unpacked ({first_line(error)})") from None
    return target


def extract(archive: Path, folder: Path) -> None:
    """Extract a zip or tar archive into `folder`; any error if it is damaged, or has links or unsafe names."""

    def write(name: str, content: IO[bytes]) -> None:
        path = folder / name
        if ".." in path.parts or not path.is_relative_to(folder):
            raise ValueError(f"{name} would be written outside of the folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            shutil.copyfileobj(content, file)

    size_of(archive)  # rejects devices
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            check_growth(archive, sum(BLOCK + info.file_size for info in zipped.infolist()))
            for info in zipped.infolist():
                if not info.is_dir():
                    write(info.filename, zipped.open(info))
        return
    with _Bounded(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        written = 0
        for member in tar:
            written += member.size  # a sparse file is larger than its part of the archive
            check_growth(archive, written)
            if content := tar.extractfile(member) if member.isreg() else None:
                write(member.name, content)
            elif not member.isdir():
                raise ValueError(f"{member.name} is neither a file nor a folder")
        # tarfile stops without an error at a damaged header, but a complete archive ends with a block of zeros.
        # Reading to the end makes gzip, bzip2 and xz verify their checksums.
        stream.seek(tar.offset)
        if stream.read(BLOCK) != bytes(BLOCK):
            raise ValueError("it is damaged or cut short")
        while stream.read(2**20):
            pass


class _Bounded(io.BufferedIOBase):
    """The decompressed stream of a tar archive; ValueError if it grows to far more than the size of the file."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        with archive.open("rb") as file:
            start = file.read(6)
        self.stream: IO[bytes] = next((opened(archive) for magic, opened in OPENED.items() if start.startswith(magic)))

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        check_growth(self.archive, self.stream.tell() + size)
        return self.stream.read(size)

    def seek(self, place: int, whence: int = 0) -> int:
        check_growth(self.archive, place)
        return self.stream.seek(place, whence)

    def tell(self) -> int:
        return self.stream.tell()

    def close(self) -> None:
        self.stream.close()


def download(url: str, target: Path, md5: str) -> None:
    """Download a file via a temporary folder, so that `target` is always complete.

    Raises OSError or RuntimeError if the download fails or the checksum is wrong.
    """
    from torchvision.datasets.utils import download_url  # importing torchvision takes a second

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        download_url(url, temporary, target.name, md5)
        (Path(temporary) / target.name).replace(target)


def read_as(title: str, path: Path, read: Callable[[Any], T]) -> T:
    """Return `read(content)` of a pickle; UserError if the file is not a pickle of the data set `title`."""
    try:
        return read(read_pickle(path))
    except UserError:
        raise
    except Exception as error:  # a damaged or malicious pickle may raise any error
        raise UserError(f"{path} is not a pickle of {title} ({first_line(error)})") from None


def read_pickle(path: Path) -> Any:
    """Read plain values and a `PickledArray` for each array, without running code; raises errors of any type."""
    size_of(path)  # rejects devices
    with path.open("rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()  # latin1: for pickles of Python 2


@dataclass
class PickledArray:
    """A pickled numpy array as raw bytes. numpy itself could interpret the bytes as addresses of objects."""

    code: str = ""  # numpy type code, such as u1 for uint8
    shape: tuple[int, ...] = ()
    content: Any = b""  # bytes, text in pickles of Python 2, or a list for an array of objects
    by_column: bool = False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.code, self.by_column, self.content = state
        if not isinstance(self.code, str) or not all(type(side) is int for side in self.shape) or len(self.shape) > 8:
            raise ValueError("an array has no type or no shape")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def raw(self) -> bytes:
        """The bytes. Text is encoded only on demand, because the unpickler keeps the text in memory anyway."""
        content: bytes = self.content.encode("latin1") if isinstance(self.content, str) else self.content
        return content

    def tensor(self, *shape: int) -> Tensor:
        """Copy a uint8 array to a tensor [M, *shape]; ValueError or RuntimeError for another type or shape."""
        if self.code != "u1" or self.shape[1:] != shape or self.by_column:
            raise ValueError(f"an array is {self.code} {self.shape}, not u1 (images, {', '.join(map(str, shape))})")
        return torch.frombuffer(bytearray(self.raw), dtype=torch.uint8).view(self.shape)


def integers(values: Any) -> list[int]:
    """Return integers from a list, or from an array of 32 or 64 bits; KeyError or TypeError for other types."""
    if isinstance(values, PickledArray):
        width = {"i4": 4, "i8": 8, "u4": 4, "u8": 8}[values.code]
        raw = values.raw
        if len(raw) != width * math.prod(values.shape):
            raise ValueError(f"an array of shape {values.shape} has {len(raw)} bytes")
        parts = (raw[start : start + width] for start in range(0, len(raw), width))
        return [int.from_bytes(part, "little", signed=values.code[0] == "i") for part in parts]
    return [operator.index(value) for value in values]


class _PickledDtype(str):
    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|", "="):
            raise ValueError(f"its arrays have the byte order {state[1]}")


def _dtype(code: Any, *_: Any) -> _PickledDtype:
    if not isinstance(code, str):
        raise TypeError(f"a dtype has the name {type(code).__name__}")
    return _PickledDtype(code)


def _from_buffer(content: Any, code: Any, shape: Any, order: Any) -> PickledArray:
    array = PickledArray()
    array.__setstate__((None, shape, code, order == "F", content))
    return array


_MODULES = ("", ".core.multiarray", "._core.multiarray", ".core.numeric", "._core.numeric")
_STAND_INS: dict[str, Callable[..., Any]] = {  # numpy's name -> replacement
    "dtype": _dtype,
    "ndarray": lambda *_: PickledArray(),
    "_reconstruct": lambda *_: PickledArray(),
    "_frombuffer": _from_buffer,
    "scalar": lambda dtype, raw: integers(PickledArray(dtype, (1,), raw))[0],
}


class _ArrayUnpickler(PlainUnpickler):
    """Unpickler for plain values and numpy arrays."""

    title = "images"
    stand_ins: ClassVar = {
        **{(f"numpy{module}", name): stand_in for module in _MODULES for name, stand_in in _STAND_INS.items()},
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how protocol 2 stores bytes
    }
