"""miniImageNet (Vinyals et al., 2016) in the split of Ravi & Larochelle (2017): 64, 16 and 20 classes of 600 images."""

import csv
import operator
import os
import pickle
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor

from metacv import MetacvError
from metacv.data.bank import SPLITS, Dataset, ImageBank, Rotation, cached_bank, check_split, read_images
from metacv.data.image_files import as_tensor, open_picture, squared
from metacv.files import rename_unless_there

SIZE, IMAGES = 84, 600
CLASSES = {
    split: names.split()
    for split, names in {
        "train": """
            n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367 n02089867 n02091831
            n02101006 n02105505 n02108089 n02108551 n02108915 n02111277 n02113712 n02120079 n02165456 n02457408
            n02606052 n02687172 n02747177 n02795169 n02823428 n02966193 n03017168 n03047690 n03062245 n03207743
            n03220513 n03337140 n03347037 n03400231 n03476684 n03527444 n03676483 n03838899 n03854065 n03888605
            n03908618 n03924679 n03998194 n04067472 n04243546 n04251144 n04258138 n04275548 n04296562 n04389033
            n04435653 n04443257 n04509417 n04515003 n04596742 n04604644 n04612504 n06794110 n07584110 n07697537
            n07747607 n09246464 n13054560 n13133613
        """,
        "val": """
            n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792 n03075370 n03417042
            n03535780 n03584254 n03770439 n03773504 n03980874 n09256479
        """,
        "test": """
            n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486 n02443484 n02871525
            n03127925 n03146219 n03272010 n03544143 n03775546 n04146614 n04149813 n04418357 n04522168 n07613480
        """,
    }.items()
}
PICKLE = "mini-imagenet-cache-{}.pkl"
ARCHIVE = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)


class MiniImageNet(Dataset):
    """Read from whichever of these forms lies in a folder `miniimagenet` (or mini-imagenet, ...) of data_dir:

    - train/, val/ and test/ with a folder of images for each class
    - images/ with Ravi's train.csv, val.csv and test.csv
    - mini-imagenet-cache-train.pkl, -val.pkl and -test.pkl, which are read without running what they may contain
    - zip or tar archives of these, which are unpacked beside themselves

    Classes are in the order of their names, images in that of their files (of a pickle: of its class_dict).
    """

    def __init__(
        self, data_dir: Path, resize: bool, train_rotation: Rotation = "none", test_rotation: Rotation = "none"
    ) -> None:
        super().__init__(data_dir, train_rotation, test_rotation)
        self.resize = resize

    def load(self, split: str) -> ImageBank:
        check_split(split)
        bank = cached_bank(self.data_dir, f"miniimagenet-{split}", {"resize": self.resize}, lambda: self._decode(split))
        return replace(bank, name=f"miniimagenet {split}")

    def _decode(self, split: str) -> ImageBank:
        problem, near = None, []
        for place in _places(self.data_dir):
            if _holds(place, split):
                return self._from(place, split)
            near += _near(place, split)
        for archive in _archives(self.data_dir):
            try:
                inside = _unpack(archive)
            except MetacvError as error:
                problem = problem or error
                continue
            for place in _within(inside):
                if _holds(place, split):
                    return self._from(place, split)
                near += _near(place, split)
        folder = self.data_dir / "miniimagenet"
        raise problem or MetacvError(
            f"data_dir={self.data_dir}: miniImageNet's {split} split is not there, and has no official download. "
            f"Put into {folder} one of: train/, val/ and test/ with a folder of images for each class; images/ with "
            f"train.csv, val.csv and test.csv; {', '.join(map(PICKLE.format, SPLITS))}; or a zip or tar of these"
            + (f". What is there: {'; '.join(near)}" if near else "")
        )

    def _from(self, place: Path, split: str) -> ImageBank:
        if (pickled := place / PICKLE.format(split)).is_file():
            return _unpickled(pickled, split)
        files = _listed(place, split)
        _check({name: len(paths) for name, paths in files.items()}, place, split)
        paths = [path for name in sorted(files) for path in files[name]]
        images = read_images(f"miniimagenet {split}", paths, self._own, (3, SIZE, SIZE))
        return _bank(images, sorted(files))

    def read(self, path: Path) -> Tensor:
        return as_tensor(squared(open_picture(path, SIZE).convert("RGB"), SIZE, "crop"))

    def _own(self, path: Path) -> Tensor:
        try:
            with Image.open(path, formats=("JPEG", "PNG")) as opened:
                image = opened.convert("RGB")
        except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise MetacvError(f"{path} is not a readable image ({error})") from None
        if image.size != (SIZE, SIZE) and not self.resize:
            found = "x".join(map(str, image.size))
            raise MetacvError(f"{path} is {found}, not {SIZE}x{SIZE}; dataset.resize=true would resize it")
        return as_tensor(squared(image, SIZE, "stretch"))


def _unpickled(path: Path, split: str) -> ImageBank:
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="latin1").load()
        rows = {str(name): _rows(found) for name, found in content["class_dict"].items()}
        array: _Array = content.pop("image_data")
        if array.code != "u1" or array.shape[1:] != (SIZE, SIZE, 3) or array.by_column:
            raise ValueError(f"image_data is {array.code} {array.shape}, not u1 (images, {SIZE}, {SIZE}, 3)")
        _check({name: len(set(own)) for name, own in rows.items()}, path, split)
        every = [row for own in rows.values() for row in own]
        if min(every) < 0 or len(set(every)) < len(every):
            raise ValueError("its class_dict has an image in two classes, or before the first")
        found = torch.frombuffer(bytearray(array.raw), dtype=torch.uint8).view(array.shape)
        del array, content
        images = torch.empty(len(every), 3, SIZE, SIZE, dtype=torch.uint8)
        for c, name in enumerate(sorted(rows)):
            images[c * IMAGES : (c + 1) * IMAGES] = found[rows[name]].permute(0, 3, 1, 2)
    except MetacvError:
        raise
    except Exception as error:  # a damaged or ill-meant pickle may raise anything
        raise MetacvError(f"{path} is not a pickle of miniImageNet ({str(error) or type(error).__name__})") from None
    return _bank(images, sorted(rows))


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles plain values, and arrays as bare bytes with a shape. Nothing that a pickle names is looked up: what an
    array is made with stands for itself here, and the rest is refused."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "dtype": lambda code, *_: _DType(code),
            "ndarray": lambda *_: _Array(),
            "_reconstruct": lambda *_: _Array(),
            "_frombuffer": lambda raw, dtype, shape, order: _Array(dtype, shape, raw, order == "F"),
            "scalar": lambda dtype, raw: _rows(_Array(dtype, (1,), raw))[0],
        }
        if module.split(".")[0] == "numpy" and name in known:
            return known[name]
        if (module, name) == ("_codecs", "encode"):  # of bytes, in pickles of protocol 2
            return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"it names {module}.{name}, which images do not need")


class _DType:
    def __init__(self, code: str) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|", "="):
            raise ValueError(f"its arrays have the byte order {state[1]}")


class _Array:
    """The content of a pickled numpy array: as many bytes as its shape and the code of its type (such as u1) say."""

    def __init__(self, dtype: Any = None, shape: Any = (), raw: Any = b"", by_column: Any = False) -> None:
        self.code = str(dtype.code) if dtype else ""
        self.shape, self.raw, self.by_column = tuple(shape), raw, by_column

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_column, raw = state
        self.__init__(dtype, shape, raw.encode("latin1") if isinstance(raw, str) else raw, by_column)  # type: ignore[misc]


def _rows(found: Any) -> list[int]:
    """Whole numbers, from a list of them or from an array."""
    if isinstance(found, _Array):
        width = {"i4": 4, "i8": 8, "u4": 4, "u8": 8}[found.code]
        parts = (found.raw[at : at + width] for at in range(0, len(found.raw), width))
        return [int.from_bytes(part, "little", signed=found.code[0] == "i") for part in parts]
    return [operator.index(row) for row in found]


def _places(data_dir: Path) -> Iterator[Path]:
    """Folders in which a form may lie: those named after miniImageNet, what is up to two deep in them, data_dir."""
    for folder in [path for path in _folders(data_dir) if _is_named(path.name)]:
        yield from _within(folder)
    yield data_dir


def _within(folder: Path) -> Iterator[Path]:
    """The folder and those up to two deep in it."""
    yield folder
    for inside in _folders(folder):
        yield inside
        yield from _folders(inside)


def _folders(folder: Path) -> list[Path]:
    if folder.name == "images" or not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(Path(entry) for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__")))


def _is_named(name: str) -> bool:
    return "miniimagenet" in re.sub("[^a-z]", "", name.lower())


def _holds(place: Path, split: str) -> bool:
    """Whether a place has one of the forms of a split; another data set's train/ is none."""
    return (
        any((place / split / name).is_dir() for name in CLASSES[split])
        or ((place / f"{split}.csv").is_file() and (place / "images").is_dir())
        or (place / PICKLE.format(split)).is_file()
    )


def _near(place: Path, split: str) -> list[str]:
    """What a place has that is almost a form of a split."""
    table, images, folder = place / f"{split}.csv", place / "images", place / split
    found = []
    if images.is_dir():
        found.append(f"{images} without {table.name} beside it")
    if table.is_file():
        found.append(f"{table} without images/ beside it")
    if folder.is_dir() and (_is_named(place.name) or _is_named(place.parent.name)):
        found.append(f"{folder} without a folder named {CLASSES[split][0]}, {CLASSES[split][1]}, ...")
    return found


def _listed(place: Path, split: str) -> dict[str, list[Path]]:
    """The files of each class."""
    if (place / split).is_dir():
        classes = [path for path in (place / split).glob("[!.]*") if path.is_dir()]
        return {path.name: sorted(path.glob("[!.]*")) for path in classes}
    table = place / f"{split}.csv"
    found: dict[str, list[Path]] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["label"] or "", []).append(place / "images" / Path(row["filename"]).name)
    except (OSError, KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise MetacvError(f"{table} is not a table of filename,label ({type(error).__name__}: {error})") from None
    if twice := [path for path, times in Counter(chain(*found.values())).items() if times > 1]:
        raise MetacvError(f"{table} lists {twice[0].name} more than once")
    return {name: sorted(paths) for name, paths in found.items()}


def _check(sizes: dict[str, int], where: Path, split: str) -> None:
    """Refuses anything but the classes of the split, each with all its images."""
    expected = CLASSES[split]
    if missing := sorted(set(expected) - sizes.keys()):
        raise MetacvError(
            f"{where}: the {split} split lacks {len(missing)} of {len(expected)} classes: {_few(missing)}"
        )
    if others := sorted(sizes.keys() - set(expected)):
        raise MetacvError(f"{where}: the {split} split holds what is not among its classes: {_few(others)}")
    if odd := [name for name in expected if sizes[name] != IMAGES]:
        raise MetacvError(f"{where}: {odd[0]} of the {split} split has {sizes[odd[0]]} images, not {IMAGES}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _bank(images: Tensor, names: list[str]) -> ImageBank:
    return ImageBank("miniimagenet", images, torch.arange(0, len(images) + 1, IMAGES), tuple(names))


def _archives(data_dir: Path) -> list[Path]:
    inside = [path for folder in _folders(data_dir) if _is_named(folder.name) for path in folder.glob("[!.]*")]
    beside = [path for path in data_dir.glob("[!.]*") if _is_named(path.name)]
    return sorted(path for path in [*inside, *beside] if path.is_file() and ARCHIVE.search(path.name))


def _unpack(archive: Path) -> Path:
    """Unpacks an archive beside itself, if that has not been done, and gives the folder."""
    target = archive.with_name(f"{archive.name}.unpacked")
    if not target.exists():
        print(f"metacv: unpacking {archive} into {target}", file=sys.stderr)
        try:
            # In a folder of its own, then renamed: what is in its place is whole, also with two runs at once.
            with tempfile.TemporaryDirectory(dir=archive.parent, prefix=f".{target.name}.") as own:
                (everything := Path(own) / "all").mkdir()
                _extract(archive, everything)
                rename_unless_there(everything, target)
        except Exception as error:  # a damaged archive may raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise MetacvError(f"{archive} cannot be unpacked ({reason})") from None
    return target


def _extract(archive: Path, to: Path) -> None:
    """Writes the files of an archive, and nothing else that it may hold, below the folder `to`."""

    def write(name: str, content: IO[bytes]) -> None:
        path = to / name
        if ".." in path.parts or not path.is_relative_to(to):
            raise ValueError(f"{name} would lie outside its folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            shutil.copyfileobj(content, file)

    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if not info.is_dir():
                    write(info.filename, zipped.open(info))
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if content := tar.extractfile(member) if member.isreg() else None:
                write(member.name, content)
            elif not member.isdir():
                raise ValueError(f"{member.name} is neither a file nor a folder")
        # A damaged header ends the loop without a word, and a checksum of the whole comes after the last file.
        assert tar.fileobj
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):
            raise ValueError("it is damaged, or not whole")
        while tar.fileobj.read(2**20):
            pass
