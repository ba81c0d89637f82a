"""CIFAR-100 (Krizhevsky 2009) in two splits of its 100 classes of 600 images: CIFAR-FS and FC100.

The official files split the images of a class into train and test. Few-shot learning uses all 600 of them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from metacv.data.bank import SPLITS, Dataset, ImageBank, Look, Readable, cached_bank
from metacv.data.image_files import as_tensor, open_exactly, open_image, to_square
from metacv.data.sources import Missing, Source, SplitSpec, download, integers, read_as, split_classes
from metacv.errors import UserError

SIZE, IMAGES = 32, 600


@dataclass
class CIFAR100(Dataset):
    """Images of 32x32 pixels in colour, from the official pickles, their archive, or class folders (see Source)."""

    look: ClassVar[Look] = {
        "brightness": [0.147, 0.458, 0.867],
        "contrast": [0.096, 0.215, 0.349],
        "saturation": [0.007, 0.125, 0.538],
    }

    lists: ClassVar[str]  # name of the file in splits/
    title: ClassVar[str]  # used in messages

    @property
    def namespace(self) -> str:
        return "cifar100"

    def load(self, split: str) -> ImageBank:
        spec = SplitSpec(split_classes(self.lists), IMAGES)
        download = "cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, or its folder"
        source = Official(self.title, "cifar100", download, spec, read_file, (3, SIZE, SIZE))
        bank = cached_bank(self.data_dir, f"{self.lists}-{split}", {}, lambda: source.load(self.data_dir, split))
        return replace(bank, name=f"{self.lists} {split}")

    def read(self, path: Readable) -> Tensor:
        return as_tensor(to_square(open_image(path, SIZE).convert("RGB"), SIZE, "crop"))


class CIFARFS(CIFAR100):
    """Random classes for each split (Bertinetto et al., 2019), https://arxiv.org/abs/1805.08136"""

    lists, title = "cifar_fs", "CIFAR-FS"


class FC100(CIFAR100):
    """Whole superclasses for each split (Oreshkin et al., 2018), https://arxiv.org/abs/1805.10123"""

    lists, title = "fc100", "FC100"


class Official(Source):
    """The pickles train and test of the official Python version, downloaded if the data set is missing."""

    def load(self, data_dir: Path, split: str) -> ImageBank:
        try:
            return super().load(data_dir, split)
        except Missing as missing:
            from torchvision.datasets import CIFAR100 as Files  # importing torchvision takes a second

            try:
                download(Files.url, data_dir / Files.filename, Files.tgz_md5)
            except (OSError, RuntimeError) as error:
                raise UserError(f"{missing}. {Files.url} cannot be downloaded ({error})") from None
            return super().load(data_dir, split)

    def load_from(self, folder: Path, split: str) -> ImageBank | None:
        files = [folder / "train", folder / "test"]
        if not all(path.is_file() for path in files):
            return super().load_from(folder, split)
        parts = [read_as(self.title, path, read_content) for path in files]
        images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        names = sorted(name for own in SPLITS for name in self.spec.classes[own])  # in the order of the labels
        rows = {name: (labels == names.index(name)).nonzero()[:, 0] for name in sorted(self.spec.classes[split])}
        self.spec.check({name: len(own) for name, own in rows.items()}, folder, split)
        offsets = torch.tensor([0, *map(len, rows.values())]).cumsum(0)
        return ImageBank(folder.name, images[torch.cat([*rows.values()])], offsets, tuple(rows))


def read_content(content: Any) -> tuple[Tensor, Tensor]:
    """Return images [M, 3, 32, 32], labels [M] from `data`, uint8 [M, 3072], and `fine_labels`; any error otherwise."""
    content = {name.decode() if isinstance(name, bytes) else name: value for name, value in content.items()}
    images = content["data"].tensor(3 * SIZE * SIZE).view(-1, 3, SIZE, SIZE)
    labels = torch.tensor(integers(content["fine_labels"]))
    if len(images) != len(labels):
        raise ValueError(f"it has {len(images)} images and {len(labels)} labels")
    if (lowest := int(labels.min())) < 0 or int(labels.max()) > 99:
        raise ValueError(f"it has labels from {lowest} to {int(labels.max())}, not from 0 to 99")
    return images, labels


def read_file(path: Path) -> Tensor:
    image = open_exactly(path, ("PNG", "JPEG"), "RGB")
    if image.size != (SIZE, SIZE):
        raise UserError(f"{path} is {image.size[0]}x{image.size[1]}, not {SIZE}x{SIZE}")
    return as_tensor(image)
