"""Image banks: all images of a split in one uint8 tensor, sorted by class. Each data set is decoded once and cached."""

import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from metacv.errors import UserError
from metacv.files import read_checked, write_atomically
from metacv.terminal import warn

Rotation = Literal["none", "per_class", "per_episode", "as_classes"]  # explained in sampler.py
SPLITS = ("train", "val", "test")
Readable = Path | Image.Image  # an image file, or an image in memory
Look = dict[str, list[float]]  # see metacv/look.py


@dataclass(frozen=True)
class ImageBank:
    """Labelled images. Class c has the rows offsets[c] to offsets[c + 1], so classes may differ in size."""

    name: str  # used in messages, such as "omniglot test"
    images: Tensor  # uint8 [M, C, H, W]
    offsets: Tensor  # int64 [classes + 1]
    class_names: tuple[str, ...]
    groups: tuple[int, ...] = ()  # of each class; those of a task are in one group. Empty: there is one group
    chances: tuple[float, ...] = (1.0,)  # of a task to come from each group

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def sizes(self) -> Tensor:
        """The number of images of each class, int64 [classes]."""
        return self.offsets.diff()

    @property
    def classes_of_groups(self) -> list[int]:
        """The number of classes of each group."""
        return [self.groups.count(own) for own in range(len(self.chances))] if self.groups else [len(self.sizes)]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the images and of the class offsets."""
        digest = hashlib.sha256(self.offsets.numpy().tobytes())
        digest.update(self.images.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def select(self, name: str, classes: Sequence[int]) -> "ImageBank":
        """Return a bank named `name` of some classes, in the order of `classes`."""
        rows = [torch.arange(int(self.offsets[c]), int(self.offsets[c + 1])) for c in classes]
        offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
        images = self.images[torch.cat(rows)] if rows else self.images[:0]
        names = tuple(self.class_names[c] for c in classes)
        return ImageBank(
            name, images, offsets, names, tuple(self.groups[c] for c in classes if self.groups), self.chances
        )


@dataclass
class Dataset(ABC):
    """Base class of data sets: splits with disjoint classes, and how classes are rotated in each split."""

    look: ClassVar[Look] = {}  # statistics of its training images, for older checkpoints, which lack them

    data_dir: Path
    train_rotation: Rotation = field(default="none", kw_only=True)
    test_rotation: Rotation = field(default="none", kw_only=True)  # for val and test

    @abstractmethod
    def load(self, split: str) -> ImageBank:
        """Return the images of `train`, `val` or `test`; UserError if files or settings are invalid."""

    def read(self, path: Readable) -> Tensor:
        """Prepare any image like the data set's own images: uint8 [C, H, W]; UserError if it is unreadable."""
        raise UserError(f"{type(self).__name__} does not define how image files are read (method `read`)")

    def prepare_like(self, other: "Dataset") -> None:  # noqa: B027
        """Prepare images as `other` does, the data set that a model was trained on. Only ImageFolder does this."""

    @property
    def namespace(self) -> str:
        """Prefix of class identities. Data sets with the same namespace share classes, which have the same names."""
        return type(self).__name__.lower()

    def identities(self, bank: ImageBank) -> list[set[str]]:
        """Return the identities of each class of a bank. Classes of any data sets are the same if they share one."""
        return [{f"{self.namespace}:{name}"} for name in bank.class_names]

    def splits(self) -> dict[str, list[str]] | None:
        """Return the class names of each split, which a run saves; None if the settings alone determine them."""
        return None

    def rotation(self, split: str) -> Rotation:
        return self.train_rotation if split == "train" else self.test_rotation


def fitted(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Resize images, uint8 [M, C, H, W], to `shape` (bicubic); repeat grey to colour, or turn colour to grey."""
    channels, height, width = shape
    if images.shape[1] != channels:
        grey = images if images.shape[1] == 1 else to_grey(images)
        images = grey.expand(-1, channels, -1, -1)
    if images.shape[2:] == (height, width):
        return images
    resize = partial(F.interpolate, size=(height, width), mode="bicubic", antialias=True)
    return torch.cat([resize(some.float()).round_().clamp_(0, 255).byte() for some in images.split(1000)])


def to_grey(images: Tensor) -> Tensor:
    """Return the luma (ITU-R 601-2) of colour images, uint8 [M, 3, H, W] -> [M, 1, H, W]."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return torch.cat([(some * weights).sum(1, keepdim=True).round_().byte() for some in images.split(1000)])


def pictures(images: Tensor) -> list[bytes]:
    """Return the bytes of each image [M, C, H, W], to find equal images."""
    return [image.tobytes() for image in images.numpy()]


def digests(bank: ImageBank) -> ImageBank:
    """Replace each image by its SHA-256, which is faster to read and compare: uint8 [M, 1, 1, 32]."""
    content = b"".join(hashlib.sha256(image).digest() for image in bank.images.numpy())
    return replace(bank, images=torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 1, 1, 32))


def report_copies(label: str, classes: Iterable[Tensor], others: Mapping[str, Tensor]) -> None:
    """Print a warning if images of `classes` are copies of each other, or of the named images in `others`.

    An image in both support and query, or in both training and test, makes accuracies too high.
    """
    seen: dict[bytes, str | int] = {picture: name for name, images in others.items() for picture in pictures(images)}
    found: Counter[str] = Counter()
    total = 0
    for c, images in enumerate(classes):
        total += len(images)
        for picture in pictures(images):
            if picture in seen:
                place = seen[picture]
                found["the same class" if place == c else str(place) if place in others else "another class"] += 1
            else:
                seen[picture] = c
    if found:
        places = ", ".join(f"{count} of images in {place}" for place, count in found.items())
        text = f"{label}: {found.total()} of {total} images are copies: {places}; accuracies may be too high"
        warn(text)


def cached_bank(data_dir: Path, name: str, settings: dict[str, Any], make: Callable[[], ImageBank]) -> ImageBank:
    """Return `make()`, cached in data_dir/cache under a hash of `settings`. A damaged cache file is replaced."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = data_dir / "cache" / f"{name}-{key}.pt"
    try:
        return _load_cache(path, name)
    except Exception as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            print(f"metacv: {path} cannot be read ({type(error).__name__}); creating it again", file=sys.stderr)
    bank = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, {"images": bank.images, "offsets": bank.offsets, "class_names": list(bank.class_names)})
        return _load_cache(path, name)  # memory-mapped, so that processes share it
    except Exception as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        print(f"metacv: {path} cannot be written and read back ({reason}); continuing without a cache", file=sys.stderr)
    return bank


def _load_cache(path: Path, name: str) -> ImageBank:
    content = read_checked(path, mmap=True)
    bank = ImageBank(name, content["images"], content["offsets"], tuple(content["class_names"]))
    ends = bank.offsets.dtype == torch.int64 and (int(bank.offsets[0]), int(bank.offsets[-1]))
    complete = len(bank.class_names) == len(bank.sizes) and ends == (0, len(bank.images)) and bank.sizes.min() >= 0
    plain = bank.images.dtype == torch.uint8 and bank.images.dim() == 4
    if not complete or not plain or not all(isinstance(own, str) for own in bank.class_names):
        raise ValueError("not an image bank")
    return bank
