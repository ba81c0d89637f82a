"""Labelled images, all in memory: one uint8 tensor sorted by class, decoded once and cached."""

import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metacv import MetacvError
from metacv.data.image_files import on_threads
from metacv.files import read_checked, write_atomically

Rotation = Literal["none", "per_class", "per_episode", "as_classes"]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ImageBank:
    """Class c owns the rows offsets[c] to offsets[c + 1], so classes may differ in size."""

    name: str  # for messages, such as "omniglot test"
    images: Tensor  # uint8 [M, C, H, W]
    offsets: Tensor  # int64 [classes + 1]
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def sizes(self) -> Tensor:
        return self.offsets.diff()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the images and of where the classes begin."""
        digest = hashlib.sha256(self.offsets.numpy().tobytes())
        digest.update(self.images.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def select(self, name: str, classes: Sequence[int]) -> "ImageBank":
        """The bank of these classes alone, in this order."""
        rows = [torch.arange(int(self.offsets[c]), int(self.offsets[c + 1])) for c in classes]
        offsets = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0)
        images = self.images[torch.cat(rows)] if rows else self.images[:0]
        return ImageBank(name, images, offsets, tuple(self.class_names[c] for c in classes))


class Dataset(ABC):
    """What a dataset YAML builds: class-disjoint splits, and how each split's classes are rotated."""

    def __init__(self, data_dir: Path, train_rotation: Rotation = "none", test_rotation: Rotation = "none") -> None:
        self.data_dir = data_dir
        self.train_rotation = train_rotation
        self.test_rotation = test_rotation

    @abstractmethod
    def load(self, split: str) -> ImageBank:
        """The images of `train`, `val` or `test`."""

    def read(self, path: Path) -> Tensor:
        """Any picture as an image like the data set's own: uint8 [C, H, W]."""
        raise MetacvError(f"{type(self).__name__} does not say how a picture becomes one of its images")

    def splits(self) -> dict[str, list[str]] | None:
        """The class names of each split, of a data set that changes from user to user, to be kept beside a run."""
        return None

    def rotation(self, split: str) -> Rotation:
        return self.train_rotation if split == "train" else self.test_rotation


def cached_bank(data_dir: Path, name: str, settings: dict[str, Any], make: Callable[[], ImageBank]) -> ImageBank:
    """`make()`, kept in data_dir/cache under a key of `settings`, so that the next run loads it in about a second."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = data_dir / "cache" / f"{name}-{key}.pt"
    try:
        return _read(path, name)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:
        print(f"metacv: {path} cannot be read ({type(error).__name__}): making it again", file=sys.stderr)
    bank = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"images": bank.images, "offsets": bank.offsets, "class_names": list(bank.class_names)}
        write_atomically(path, content)
        return _read(path, name)
    except OSError as error:
        print(f"metacv: {path} cannot be written ({error.strerror}): going on without a cache", file=sys.stderr)
    return bank


def _read(path: Path, name: str) -> ImageBank:
    kept = read_checked(path, mmap=True)
    bank = ImageBank(name, kept["images"], kept["offsets"], tuple(kept["class_names"]))
    whole = len(bank.class_names) == len(bank.sizes) and int(bank.offsets[-1]) == len(bank.images)
    if not whole or bank.images.dtype != torch.uint8 or bank.images.dim() != 4:
        raise ValueError("not a bank of images")
    return bank


def read_images(label: str, files: list[Path], read: Callable[[Path], Tensor], shape: tuple[int, int, int]) -> Tensor:
    """uint8 [M, *shape]: what `read` makes of each file, on several threads; the first error ends it."""
    images = torch.empty(len(files), *shape, dtype=torch.uint8)
    for row, image in enumerate(on_threads(label, read, files)):
        images[row] = image
    return images


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise MetacvError(f"split={split}: one of {', '.join(SPLITS)}")
