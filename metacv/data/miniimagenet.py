"""miniImageNet (Vinyals et al., 2016), split of Ravi & Larochelle (2017): 64, 16 and 20 classes of 600 images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metacv.data.bank import Dataset, ImageBank, cached_bank, check_split
from metacv.data.image_files import as_tensor, open_exactly, open_image, to_square
from metacv.data.sources import Source, SplitSpec, integers
from metacv.errors import UserError

SIZE, IMAGES = 84, 600
NAMES = {
    "train": """
        n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367 n02089867 n02091831 n02101006
        n02105505 n02108089 n02108551 n02108915 n02111277 n02113712 n02120079 n02165456 n02457408 n02606052 n02687172
        n02747177 n02795169 n02823428 n02966193 n03017168 n03047690 n03062245 n03207743 n03220513 n03337140 n03347037
        n03400231 n03476684 n03527444 n03676483 n03838899 n03854065 n03888605 n03908618 n03924679 n03998194 n04067472
        n04243546 n04251144 n04258138 n04275548 n04296562 n04389033 n04435653 n04443257 n04509417 n04515003 n04596742
        n04604644 n04612504 n06794110 n07584110 n07697537 n07747607 n09246464 n13054560 n13133613
    """,
    "val": """
        n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792 n03075370 n03417042 n03535780
        n03584254 n03770439 n03773504 n03980874 n09256479
    """,
    "test": """
        n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486 n02443484 n02871525 n03127925
        n03146219 n03272010 n03544143 n03775546 n04146614 n04149813 n04418357 n04522168 n07613480
    """,
}
CLASSES = {split: names.split() for split, names in NAMES.items()}


@dataclass
class MiniImageNet(Dataset):
    """Images of 84x84 pixels in colour, from class folders, Ravi's CSV lists, pickles or archives (see Source)."""

    resize: bool  # accept files of another size, and resize them

    def load(self, split: str) -> ImageBank:
        check_split(split)
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
        return replace(bank, name=f"miniimagenet {split}")

    def read(self, path: Path) -> Tensor:
        return as_tensor(to_square(open_image(path, SIZE).convert("RGB"), SIZE, "crop"))

    def _read_own(self, path: Path) -> Tensor:
        image = open_exactly(path, ("JPEG", "PNG"), "RGB")
        if image.size != (SIZE, SIZE) and not self.resize:
            size = "x".join(map(str, image.size))
            raise UserError(f"{path} is {size}, not {SIZE}x{SIZE}; dataset.resize=true would resize it")
        return as_tensor(to_square(image, SIZE, "stretch"))


def read_content(content: Any, path: Path, split: str) -> ImageBank:
    """Read `image_data`, uint8 [M, 84, 84, 3], and `class_dict`, from class names to rows of it, in their order."""
    rows = {str(name): integers(values) for name, values in content["class_dict"].items()}
    pixels = content.pop("image_data").tensor(SIZE, SIZE, 3)  # pop: up to 800 MB that are not needed twice
    SplitSpec(CLASSES, IMAGES).check({name: len(set(own)) for name, own in rows.items()}, path, split)
    every = [row for own in rows.values() for row in own]
    if min(every) < 0 or len(set(every)) < len(every):
        raise ValueError("its class_dict has an image in two classes, or a negative row")
    images = torch.empty(len(every), 3, SIZE, SIZE, dtype=torch.uint8)
    for c, name in enumerate(sorted(rows)):
        images[c * IMAGES : (c + 1) * IMAGES] = pixels[rows[name]].permute(0, 3, 1, 2)
    return ImageBank("miniimagenet", images, torch.arange(0, len(images) + 1, IMAGES), tuple(sorted(rows)))
