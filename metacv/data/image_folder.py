"""Your own images: a folder for each class."""

import hashlib
import json
import os
import sys
from collections.abc import Collection
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path

import torch
from torch import Tensor

from metacv import MetacvError, clean
from metacv.data.bank import SPLITS, Dataset, ImageBank, Rotation, cached_bank, check_split
from metacv.data.image_files import (
    DECODING,
    Fit,
    as_tensor,
    files_below,
    folders_in,
    holds_folders_alone,
    open_picture,
    read_or_tell,
    squared,
    tell_left_out,
)

ALIASES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


class ImageFolder(Dataset):
    """root/{train,val,test}/CLASS/*, or root/CLASS/* with the classes dealt out by `fractions` and `split_seed`;
    either as `split_file` says, where there is one.

    The classes lie in an order that depends on their names and the seed alone, so that one that is added moves few
    others. Images are of any format, size and mode that Pillow reads; a class owns those in its folder and below.
    """

    def __init__(
        self,
        data_dir: Path,
        root: str | None,
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
        self._root = root
        self.size, self.color, self.fit, self.invert = size, color, fit, invert
        self.fractions, self.split_seed, self.split_file = fractions, split_seed, split_file

    @property
    def root(self) -> Path:
        if self._root is None:
            raise MetacvError("dataset.root=null: it must name a folder of images")
        return Path(self._root).expanduser()

    def load(self, split: str) -> ImageBank:
        check_split(split)
        files = {folder: files_below(folder) for folder in self._folders(split)}
        seen = [(os.path.abspath(p), (s := p.stat()).st_size, s.st_mtime_ns) for paths in files.values() for p in paths]
        settings = {"files": seen, "size": self.size, "color": self.color, "fit": self.fit, "invert": self.invert}
        settings |= {"decoding": DECODING}
        name = f"{self.root.resolve().name} {split}"
        bank = cached_bank(self.data_dir, f"image_folder-{split}", settings, lambda: self._decode(name, files))
        tell_left_out(name, len(bank.images), len(seen))
        return replace(bank, name=name)

    def read(self, path: Path) -> Tensor:
        picture = open_picture(path, self.size).convert("RGB" if self.color else "L")
        image = as_tensor(squared(picture, self.size, self.fit))
        return 255 - image if self.invert else image

    def splits(self) -> dict[str, list[str]]:
        """The class names of each split."""
        there = self._classes()
        if self.split_file:
            return self._read_split(Path(self.split_file).expanduser(), there.keys())
        if self._is_split():
            return {split: [name for name in there if there[name].parent.name == split] for split in SPLITS}
        names = sorted(there, key=lambda name: hashlib.sha256(os.fsencode(f"{self.split_seed} {name}")).digest())
        parts = [sum(self.fractions[earlier] for earlier in SPLITS[:i]) for i in range(4)]
        ends = [round(part / parts[-1] * len(names)) for part in parts]
        return {split: sorted(names[ends[i] : ends[i + 1]]) for i, split in enumerate(SPLITS)}

    def _is_split(self) -> bool:
        return (self.root / "train").is_dir() and any((self.root / split).is_dir() for split in ("val", "test"))

    def _classes(self) -> dict[str, Path]:
        """The folder of each class, in whichever split it lies."""
        if not self.root.is_dir():
            raise MetacvError(f"dataset.root={self.root}: there is no such folder")
        for folder in folders_in(self.root):
            split = ALIASES.get(folder.name.lower(), folder.name.lower())
            if split in SPLITS and split != folder.name and holds_folders_alone(folder):
                raise MetacvError(f"dataset.root={self.root}: rename its folder {folder.name} to {split}")
        found: dict[str, Path] = {}
        places = [self.root / split for split in SPLITS] if self._is_split() else [self.root]
        for folder in chain(*map(folders_in, places)):
            if other := found.get(folder.name):
                both = f"{other.parent.name} and {folder.parent.name}"
                raise MetacvError(f"{self.root}: the class {folder.name} is in both {both}")
            found[folder.name] = folder
        return found

    def _folders(self, split: str) -> list[Path]:
        """Of the classes of a split."""
        there, names = self._classes(), self.splits()[split]
        if self._is_split() and not self.split_file:
            place, of = self.root / split, ""
            there = {name: there[name] for name in names}
        else:
            place, of = self.root, f", of which {len(names)} are for {split}"
        if not place.is_dir():
            raise MetacvError(f"dataset.root={self.root} has no folder {split}")
        if len(names) < 2:
            dealt = "" if self.split_file or self._is_split() else "; dataset.fractions says how many each split gets"
            raise MetacvError(f"{place} holds {len(there)} folders of images{of}: a task needs 2 classes{dealt}")
        return [there[name] for name in names]

    def _read_split(self, path: Path, there: Collection[str]) -> dict[str, list[str]]:
        try:
            made = json.loads(path.read_text())
            made = {split: [str(name) for name in made[split]] for split in SPLITS}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MetacvError(f"dataset.split_file={path} is not a split ({type(error).__name__}: {error})") from None
        if missing := [name for names in made.values() for name in names if name not in there]:
            raise MetacvError(f"dataset.split_file={path}: {self.root} has no class {missing[0]}")
        for one, other in combinations(SPLITS, 2):
            if both := sorted({*made[one]} & {*made[other]}):
                raise MetacvError(f"dataset.split_file={path}: the class {both[0]} is in both {one} and {other}")
        return made

    def _decode(self, label: str, files: dict[Path, list[Path]]) -> ImageBank:
        if nested := [folder.name for folder in files if holds_folders_alone(folder)]:
            said = f"{len(nested)} of its {len(files)} classes hold folders and no image of their own"
            print(clean(f"metacv: {label}: {said} ({nested[0]}, ...); all below is one class"), file=sys.stderr)
        kept, images = read_or_tell(label, list(chain(*files.values())), self.read)
        readable = {*kept}
        sizes = [len(readable.intersection(own)) for own in files.values()]
        names = tuple(folder.name for folder in files)
        for name, size in zip(names, sizes, strict=True):
            if size == 0:
                raise MetacvError(f"{label}: the class {name} has no readable image")
        return ImageBank(label, torch.stack(images), torch.tensor([0, *sizes]).cumsum(0), names)
