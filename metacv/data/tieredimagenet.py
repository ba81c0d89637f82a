"""tieredImageNet (Ren et al., 2018), https://arxiv.org/abs/1803.00676: 351, 97 and 160 classes of up to 1300 images."""

import ctypes
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metacv.data.bank import SPLITS, ImageBank, cached_bank
from metacv.data.image_files import as_tensor
from metacv.data.miniimagenet import SIZE, MiniImageNet
from metacv.data.sources import PickledArray, Source, SplitSpec, integers, read_as, split_classes
from metacv.errors import UserError
from metacv.terminal import progress_bar

TITLE = "tieredImageNet"
CLASSES = split_classes("tieredimagenet")


class TieredImageNet(MiniImageNet):
    """Images of 84x84 pixels in colour, from class folders, CSV lists, the authors' pickles or archives (see Source).

    Classes have WordNet IDs such as n01530575 in folders and lists, and words in the pickles.
    """

    def load(self, split: str) -> ImageBank:
        source = Source(
            title=TITLE,
            folder="tieredimagenet",
            download="get tiered-imagenet.tar, with SPLIT_images_png.pkl and SPLIT_labels.pkl, from https://github.com/renmengye/few-shot-ssl-public",
            spec=SplitSpec(CLASSES),
            read=self._read_own,
            shape=(3, SIZE, SIZE),
            pickle="{}_images_png.pkl",
            from_pickle=read_content,
        )
        settings, name = {"resize": self.resize}, f"tieredimagenet-{split}"
        bank = cached_bank(self.data_dir, name, settings, lambda: source.load(self.data_dir, split))
        return replace(bank, name=f"tieredimagenet {split}")


def read_content(content: Any, path: Path, split: str) -> ImageBank:
    """Decode a list or an array of PNG files, with the classes in SPLIT_labels.pkl beside it. Empties the list.

    For train, the files need 7 GB and the images 9.5 GB, so each file is removed from memory once it is decoded.
    """
    files = content.content if isinstance(content, PickledArray) else content
    if not isinstance(files, list):
        raise ValueError(f"it contains {type(files).__name__}, not a list of images")
    labels, names = read_labels(path, split)
    if len(files) != len(labels):
        raise UserError(f"{path} has {len(files)} images, but {labels_path(path, split)} has {len(labels)} labels")
    order = sorted(range(len(names)), key=lambda c: names[c])
    sizes = torch.tensor(labels).bincount(minlength=len(names))[order]
    if not sizes.all():
        raise UserError(f"{labels_path(path, split)}: {names[order[int(sizes.argmin())]]} has no image")
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    free = dict(zip(order, offsets[:-1].tolist(), strict=True))  # the next row of each class
    images = torch.empty(len(files), 3, SIZE, SIZE, dtype=torch.uint8)
    with progress_bar(len(labels), "image", f"{TITLE} {split}") as bar:
        for i, c in enumerate(labels):
            images[free[c]] = decode(files[i], i)
            files[i] = None
            free[c] += 1
            bar.update()
            if i % 10_000 == 0:
                return_memory()
    return ImageBank(TITLE, images, offsets, tuple(names[c] for c in order))


def decode(array: Any, number: int) -> Tensor:
    try:
        image = Image.open(io.BytesIO(array.raw), formats=("PNG",)).convert("RGB")
    except Exception:  # Pillow raises errors of many types, which do not name the image
        raise ValueError(f"its image {number} is not a readable PNG file") from None
    if image.size != (SIZE, SIZE):
        raise ValueError(f"its image {number} is {image.width}x{image.height}, not {SIZE}x{SIZE}")
    return as_tensor(image)


def labels_path(path: Path, split: str) -> Path:
    return path.with_name(f"{split}_labels.pkl")


def read_labels(path: Path, split: str) -> tuple[list[int], list[str]]:
    """Return the class of each image, and the class names; UserError if another split beside it shares a class."""
    if not (own := labels_path(path, split)).is_file():
        raise UserError(f"{path}: {own.name} is missing in the same folder")
    labels, names = read_as(TITLE, own, check_labels)
    if len(names) != len(CLASSES[split]):
        raise UserError(f"{own}: the {split} split has {len(names)} classes, not {len(CLASSES[split])}")
    for beside in (labels_path(path, other) for other in SPLITS if other != split):
        others = read_as(TITLE, beside, check_labels)[1] if beside.is_file() else []
        if shared := {*names} & {*others}:
            raise UserError(f"{own} and {beside} share the class {min(shared)}: a class must be in one split only")
    return labels, names


def check_labels(content: Any) -> tuple[list[int], list[str]]:
    """Return labels and names from `label_specific` and `label_specific_str`; an error of any type if invalid."""
    labels, names = integers(content["label_specific"]), content["label_specific_str"]
    if not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise ValueError("its label_specific_str is not a list of different names")
    if not labels or not 0 <= min(labels) <= max(labels) < len(names):
        raise ValueError(f"its labels must be from 0 to {len(names) - 1}")
    return labels, list(names)


def return_memory() -> None:
    """Return freed memory to the system: on Linux, the C library otherwise keeps blocks as small as these files."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
