"""Your own images: a folder for each class."""

import hashlib
import json
import os
import sys
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path

import torch
from torch import Tensor

from metacv import MetacvError
from metacv.data.bank import SPLITS, Dataset, ImageBank, Rotation, cached_bank, check_split
from metacv.data.pictures import Fit, as_tensor, files_below, folders_in, open_picture, read_or_tell, squared


class ImageFolder(Dataset):
    """root/{train,val,test}/CLASS/*, or root/CLASS/* with the classes dealt out by `fractions` and `split_seed`.

    The classes lie in an order that depends on their names and the seed alone, so that one that is added moves few
    others. Images are of any format, size and mode that Pillow reads; a class owns those in its folder and below.
    """

    def __init__(
        self,
        data_dir: Path,
        root: str,
        size: int,
        color: bool,
        fit: Fit,
        invert: bool,
        fractions: dict[str, float],
        split_seed: int,
        split_file: str | None,
        train_rotation: Rotation = "none",
        test_rotation: Rotation = "none",
    ) -> None:
        super().__init__(data_dir, train_rotation, test_rotation)
        if not 4 <= size <= 4096:
            raise ValueError(f"size={size}: 4 to 4096")
        if fractions.keys() != set(SPLITS) or min(fractions.values()) < 0 or sum(fractions.values()) <= 0:
            raise ValueError(f"fractions={fractions}: train, val and test, none below 0, and not all 0")
        self.root = Path(root).expanduser()
        self.size, self.color, self.fit, self.invert = size, color, fit, invert
        self.fractions, self.split_seed, self.split_file = fractions, split_seed, split_file

    def load(self, split: str) -> ImageBank:
        check_split(split)
        files = {name: files_below(folder) for name, folder in self._folders(split).items()}
        seen = [(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for paths in files.values() for p in paths]
        settings = {"files": seen, "size": self.size, "color": self.color, "fit": self.fit, "invert": self.invert}
        name = f"{self.root.resolve().name} {split}"
        bank = cached_bank(self.data_dir, f"image_folder-{split}", settings, lambda: self._decode(name, files))
        if skipped := len(seen) - len(bank.images):
            print(f"metacv: {name}: {skipped} of {len(seen)} files left out, as no readable images", file=sys.stderr)
        return replace(bank, name=name)

    def read(self, path: Path) -> Tensor:
        picture = open_picture(path, self.size).convert("RGB" if self.color else "L")
        image = as_tensor(squared(picture, self.size, self.fit))
        return 255 - image if self.invert else image

    def splits(self) -> dict[str, list[str]]:
        """The class names of each split."""
        if not self.root.is_dir():
            raise MetacvError(f"dataset.root={self.root}: there is no such folder")
        if self._is_split():
            made = {split: [folder.name for folder in folders_in(self.root / split)] for split in SPLITS}
        elif self.split_file:
            made = self._read_split(Path(self.split_file).expanduser())
        else:
            names = [folder.name for folder in folders_in(self.root)]
            names.sort(key=lambda name: hashlib.sha256(os.fsencode(f"{self.split_seed} {name}")).digest())
            parts = [sum(self.fractions[earlier] for earlier in SPLITS[:i]) for i in range(4)]
            ends = [round(part / parts[-1] * len(names)) for part in parts]
            made = {split: sorted(names[ends[i] : ends[i + 1]]) for i, split in enumerate(SPLITS)}
        for one, other in combinations(SPLITS, 2):
            if both := sorted({*made[one]} & {*made[other]}):
                raise MetacvError(f"{self.root}: the class {both[0]} is in both {one} and {other}")
        return made

    def _is_split(self) -> bool:
        return (self.root / "train").is_dir() and any((self.root / split).is_dir() for split in ("val", "test"))

    def _folders(self, split: str) -> dict[str, Path]:
        """Of the classes of a split, by name."""
        names, place = self.splits()[split], self.root / split if self._is_split() else self.root
        if not place.is_dir():
            raise MetacvError(f"dataset.root={self.root} has no folder {split}")
        if len(names) < 2:
            of = "" if self._is_split() else f", of which {len(names)} are for {split}"
            raise MetacvError(f"{place} holds {len(folders_in(place))} folders of images{of}: a task needs 2 classes")
        return {name: place / name for name in names}

    def _read_split(self, path: Path) -> dict[str, list[str]]:
        try:
            made = json.loads(path.read_text())
            made = {split: [str(name) for name in made[split]] for split in SPLITS}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MetacvError(f"dataset.split_file={path} is not a split ({type(error).__name__}: {error})") from None
        there = {folder.name for folder in folders_in(self.root)}
        if missing := [name for names in made.values() for name in names if name not in there]:
            raise MetacvError(f"dataset.split_file={path}: {self.root} has no class {missing[0]}")
        return made

    def _decode(self, label: str, files: dict[str, list[Path]]) -> ImageBank:
        kept, images = read_or_tell(label, list(chain(*files.values())), self.read)
        readable = {*kept}
        sizes = [len(readable.intersection(own)) for own in files.values()]
        for name, size in zip(files, sizes, strict=True):
            if size == 0:
                raise MetacvError(f"{label}: the class {name} has no readable image")
        return ImageBank(label, torch.stack(images), torch.tensor([0, *sizes]).cumsum(0), tuple(files))
