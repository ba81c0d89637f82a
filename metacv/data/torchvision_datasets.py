"""Data sets of torchvision with one class per image, https://pytorch.org/vision/stable/datasets.html"""

import operator
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from metacv.bounds import NotNegative, Seed, Size
from metacv.data.bank import SPLITS, Dataset, ImageBank, Readable, cached_bank
from metacv.data.image_files import as_tensor, map_on_threads, open_image, to_square
from metacv.data.sources import check_fractions, random_split
from metacv.errors import UserError
from metacv.text import first_line

# The official splits of each data set, as values of `split` or `train`; together they have each image once.
NAMES: dict[str, tuple[str | bool, ...]] = {
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SUN397"), ()),
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS"), (True, False)),
    **dict.fromkeys(("Food101", "GTSRB", "StanfordCars", "STL10", "SVHN"), ("train", "test")),
    **dict.fromkeys(("FGVCAircraft", "OxfordIIITPet"), ("trainval", "test")),
    **dict.fromkeys(("DTD", "Flowers102"), ("train", "val", "test")),
    "Country211": ("train", "valid", "test"),
}
KNOWN = f"must be a data set of torchvision with one class for each image: {', '.join(sorted(NAMES, key=str.lower))}"


@dataclass
class Torchvision(Dataset):
    """All official splits of a data set merged, downloaded to data_dir/torchvision, with classes split at random.

    The split depends only on `fractions`, `split_seed` and the class numbers.
    """

    name: str  # name of a class in torchvision.datasets
    size: Size  # height and width in pixels
    fractions: dict[str, NotNegative]  # the share of the classes that each split gets, in any unit
    split_seed: Seed

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(f"dataset.name={self.name}: {KNOWN}")
        check_fractions(self.fractions)

    @property
    def namespace(self) -> str:
        return self.name.lower()

    def load(self, split: str) -> ImageBank:
        label = f"torchvision-{self.name}-{self.size}"
        everything = cached_bank(self.data_dir, label, {"size": self.size}, self._decode)
        numbers = map(str, range(len(everything.class_names)))
        own = sorted(map(int, random_split(numbers, self.fractions, self.split_seed)[split]))
        if len(own) < 2:
            content = f"{len(everything.class_names)} classes, {len(own)} of them in the split {split}"
            advice = "dataset.fractions sets the share of each split"
            raise UserError(f"dataset.name={self.name} has {content}: a task needs 2 classes; {advice}")
        return everything.select(f"{self.name} {split}", own)

    def read(self, path: Readable) -> Tensor:
        return self._square(open_image(path))

    def splits(self) -> dict[str, list[str]]:
        return {split: list(self.load(split).class_names) for split in SPLITS}

    def _square(self, image: Image.Image) -> Tensor:
        return as_tensor(to_square(image.convert("RGB"), self.size, "crop"))

    def _decode(self) -> ImageBank:
        """Decode all images, sorted by class."""
        parts = self._parts(self.data_dir / "torchvision")
        items: list[Any] = [(part, i) for part in parts for i in range(len(part))]
        images = torch.empty(len(items), 3, self.size, self.size, dtype=torch.uint8)
        labels = torch.empty(len(items), dtype=torch.long)
        for row, (image, label) in enumerate(map_on_threads(self.name, self._item, items)):
            images[row], labels[row] = image, label
        present, labels = labels.unique(return_inverse=True)
        names = [*getattr(parts[0], "classes", getattr(parts[0], "categories", []))]
        if len({*names}) != len(names) or len(names) <= int(present[-1]):
            names = [f"{number:03}" for number in range(int(present[-1]) + 1)]
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), labels.bincount().cumsum(0)])
        order = labels.argsort(stable=True)
        return ImageBank(self.name, images[order], offsets, tuple(str(names[number]) for number in present.tolist()))

    def _parts(self, root: Path) -> list[Any]:
        """Open the official splits from the files in `root`, or download them."""
        from torchvision import datasets  # importing torchvision takes a second

        splits = [{"train" if isinstance(value, bool) else "split": value} for value in NAMES[self.name]]
        parts, make = [], getattr(datasets, self.name)
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{self.name}.lock"), redirect_stdout(sys.stderr):
                for split in splits or [{}]:
                    try:
                        parts.append(make(root, **split))
                    except Exception:  # errors for missing files differ between classes
                        parts.append(make(root, **split, download=True))
            if not all(map(len, parts)):
                raise ValueError("it has no images")
        except Exception as error:
            reason = f"{self.name} is not in {root} and cannot be downloaded ({first_line(error)})"
            advice = f"put its files there as torchvision.datasets.{self.name} expects them, and delete damaged ones"
            raise UserError(f"data_dir={self.data_dir}: {reason}; {advice}") from None
        return parts

    def _item(self, item: Any) -> tuple[Tensor, int]:
        """Return an image and its class; UserError if the file is damaged, or the item is anything else."""
        part, i = item
        try:
            image, label = part[i]
        except Exception as error:
            advice = f"delete the files of {self.name} in {self.data_dir / 'torchvision'} to download them again"
            raise UserError(f"image {i} of {self.name} cannot be read ({first_line(error)}); {advice}") from None
        if not isinstance(image, Image.Image) or not hasattr(label, "__index__"):
            given = f"{type(image).__name__} and {type(label).__name__}"
            raise UserError(f"dataset.name={self.name}: its items are {given}, not an image and the number of a class")
        return self._square(image), operator.index(label)
