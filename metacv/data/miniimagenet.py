"""miniImageNet (Vinyals et al., 2016), split of Ravi & Larochelle (2017): 64, 16 and 20 classes of 600 images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from metacv.bounds import Range
from metacv.data.bank import Dataset, ImageBank, Look, Readable, cached_bank
from metacv.data.image_files import as_tensor, open_exactly, open_image, to_square
from metacv.data.sources import Source, SplitSpec, integers, split_classes
from metacv.errors import UserError

SIZE, IMAGES = 84, 600
CLASSES = split_classes("miniimagenet")


@dataclass
class MiniImageNet(Dataset):
    """Images of 84x84 pixels in colour, from class folders, Ravi's CSV lists, pickles or archives (see Source)."""

    look: ClassVar[Look] = {
        "brightness": [0.12, 0.439, 0.823],
        "contrast": [0.094, 0.224, 0.376],
        "saturation": [0.001, 0.121, 0.53],
    }

    resize: bool  # accept files of another size, and resize them
    # smaller sizes (42, 28, 21, ...) average 2x2, 3x3, 4x4, ... pixels
    size: Annotated[int, Range(4, SIZE)] = SIZE

    def __post_init__(self) -> None:
        if SIZE % self.size:
            raise ValueError(f"size={self.size}: must be {SIZE}, or {SIZE} divided by a whole number")

    @property
    def namespace(self) -> str:
        return "imagenet"

    def load(self, split: str) -> ImageBank:
        source = Source(
            title="miniImageNet",
            folder="miniimagenet",
            download="it has no official download",
            spec=SplitSpec(CLASSES, IMAGES),
            read=self._read_own,
            shape=(3, SIZE, SIZE),
            pickle="mini-imagenet-cache-{}.pkl",
            from_pickle=read_content,
        )
        settings, name = {"resize": self.resize}, f"miniimagenet-{split}"
        bank = cached_bank(self.data_dir, name, settings, lambda: source.load(self.data_dir, split))
        return replace(bank, name=f"miniimagenet {split}", images=shrink(bank.images, SIZE // self.size))

    def read(self, path: Readable) -> Tensor:
        image = as_tensor(to_square(open_image(path, SIZE).convert("RGB"), SIZE, "crop"))
        return shrink(image[None], SIZE // self.size)[0]

    def _read_own(self, path: Path) -> Tensor:
        image = open_exactly(path, ("JPEG", "PNG"), "RGB")
        if image.size != (SIZE, SIZE) and not self.resize:
            size = "x".join(map(str, image.size))
            raise UserError(f"{path} is {size}, not {SIZE}x{SIZE}; set dataset.resize=true to resize it")
        return as_tensor(to_square(image, SIZE, "stretch"))


def shrink(images: Tensor, factor: int) -> Tensor:
    """Average factor x factor pixels and round: uint8 [M, C, H, W] -> [M, C, H / factor, W / factor]."""
    if factor == 1:
        return images
    parts = images.split(256)  # floats need four times the memory
    return torch.cat([avg_pool2d(part.float(), factor).round().to(torch.uint8) for part in parts])


def read_content(content: Any, path: Path, split: str) -> ImageBank:
    """Read `image_data`, uint8 [M, 84, 84, 3], and `class_dict`, which maps class names to rows of `image_data`."""
    class_dict = content["class_dict"]
    if len(class_dict) > 10 * len(CLASSES[split]) or any(len(values) > 10 * IMAGES for values in class_dict.values()):
        raise ValueError("its class_dict is too large")  # many classes of a small file may share one list
    rows = {str(name): integers(values) for name, values in class_dict.items()}
    pixels = content.pop("image_data").tensor(SIZE, SIZE, 3)  # pop frees up to 800 MB
    SplitSpec(CLASSES, IMAGES).check({name: len(set(own)) for name, own in rows.items()}, path, split)
    every = [row for own in rows.values() for row in own]
    if min(every) < 0 or len(set(every)) < len(every):
        raise ValueError("its class_dict has an image in two classes, or a negative row")
    images = torch.empty(len(every), 3, SIZE, SIZE, dtype=torch.uint8)
    for c, name in enumerate(sorted(rows)):
        images[c * IMAGES : (c + 1) * IMAGES] = pixels[rows[name]].permute(0, 3, 1, 2)
    return ImageBank("miniimagenet", images, torch.arange(0, len(images) + 1, IMAGES), tuple(sorted(rows)))
