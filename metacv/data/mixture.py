"""Several data sets as one, as in Meta-Dataset (Triantafillou et al., 2020), https://arxiv.org/abs/1903.03096"""

from dataclasses import dataclass, field, replace
from itertools import product

import torch
from PIL import Image
from torch import Tensor

from metacv.bounds import Positive, Size
from metacv.data.bank import SPLITS, Dataset, ImageBank, Readable, fitted
from metacv.errors import UserError


@dataclass
class Mixture(Dataset):
    """All classes of a task come from one of the data sets, which is drawn at random.

    sets     the data sets by name
    weights  how often a task comes from each of them, relative to each other; None: equally often
    size     height and width to which images are resized; None: all have the same size. Grey images are repeated to
             three channels if images of another data set are in colour.
    """

    sets: dict[str, Dataset] = field(default_factory=dict)
    weights: list[Positive] | None = None
    size: Size | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and len(self.weights) != len(self.sets):
            raise ValueError(f"weights={self.weights}: must have a number for each of {', '.join(self.sets)}")
        for (name, own), split in product(self.sets.items(), ("train", "test")):
            if (rotation := own.rotation(split)) != "none":
                text = f"{split}_rotation={rotation}: tasks of all data sets are rotated in one way"
                raise ValueError(f"sets.{name}.{text}; set dataset.{split}_rotation")

    def splits(self) -> dict[str, list[str]] | None:
        """Return the classes of the sets whose settings do not determine them, such as image folders."""
        known = {name: own for name, data in self.sets.items() if (own := data.splits())}
        if not known:
            return None
        return {split: [f"{name}/{c}" for name, own in known.items() for c in own[split]] for split in SPLITS}

    def load(self, split: str) -> ImageBank:
        if not self.sets:
            raise UserError("dataset.sets is empty; choose data sets in data_dir, as in dataset=[cifar_fs,omniglot]")
        banks = {name: own.load(split) for name, own in self.sets.items()}
        shapes = [bank.image_shape for bank in banks.values()]
        sides = {shape[1:] for shape in shapes} if self.size is None else {(self.size, self.size)}
        if len(sides) > 1:
            sizes = ", ".join(f"{name} has {h}x{w}" for name, (_, h, w) in zip(banks, shapes, strict=True))
            raise UserError(f"images differ in size ({sizes}); set dataset.size")
        shape = max(channels for channels, _, _ in shapes), *sides.pop()
        weights = self.weights or [1.0] * len(banks)
        return ImageBank(
            f"{'+'.join(banks)} {split}",
            torch.cat([fitted(bank.images, shape) for bank in banks.values()]),
            torch.cat([torch.zeros(1, dtype=torch.long), *(bank.sizes for bank in banks.values())]).cumsum(0),
            tuple(f"{name}/{own}" for name, bank in banks.items() for own in bank.class_names),
            tuple(group for group, bank in enumerate(banks.values()) for _ in bank.class_names),
            tuple(weight / sum(weights) for weight in weights),
        )

    def identities(self, bank: ImageBank) -> list[set[str]]:
        found: list[set[str]] = []
        for c, whole in enumerate(bank.class_names):
            name, _, own = whole.partition("/")
            found += self.sets[name].identities(replace(bank.select(bank.name, [c]), class_names=(own,)))
        return found

    def read(self, path: Readable) -> Tensor:
        """Prepare an image like the first data set's."""
        first = next(iter(self.sets.values()))
        channels = max(own.read(Image.new("RGB", (84, 84))).shape[0] for own in self.sets.values())
        image = first.read(path)
        return fitted(image[None], (channels, self.size or image.shape[1], self.size or image.shape[2]))[0]
