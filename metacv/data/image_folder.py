"""Images of your own, with a folder for each class."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metacv.bounds import NotNegative, Seed, Size
from metacv.data import image_files
from metacv.data.bank import SPLITS, Dataset, ImageBank, Readable, cached_bank, digests, pictures, report_copies
from metacv.data.sources import check_fractions, random_split
from metacv.errors import UserError
from metacv.files import read_text, user_path
from metacv.text import printable

PREPARATION = {"size": 84, "color": True, "fit": "crop", "invert": False}
ALIASES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


@dataclass
class ImageFolder(Dataset):
    """Images at any depth below root/{train,val,test}/CLASS, or below root/CLASS with the classes split at random."""

    root: str | None
    # How to prepare images. None: the value in PREPARATION, or as set by `prepare_like`.
    size: Size | None  # height and width in pixels
    color: bool | None
    fit: image_files.Fit | None  # the central square of an image (crop), or all of it (stretch)
    invert: bool | None
    fractions: dict[str, NotNegative]  # the share of the classes that each random split gets, in any unit
    split_seed: Seed  # classes are ordered by a hash of seed and name, so that adding a class moves few others
    split_file: str | None  # JSON with class names of train, val and test, like a run's split.json; overrides the above

    like: Dataset | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_fractions(self.fractions)

    def prepare_like(self, other: Dataset) -> None:
        if all(getattr(self, name) is None for name in PREPARATION):
            self.like = other

    def _prepared(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in PREPARATION}
        return {name: PREPARATION[name] if value is None else value for name, value in own.items()}

    @property
    def folder(self) -> Path:
        if self.root is None:
            raise UserError("dataset.root=null: must be a folder of images")
        return user_path(self.root)

    def load(self, split: str) -> ImageBank:
        name, files = f"{self.folder.resolve().name} {split}", self._files(split)
        bank = replace(self._cached(split, files, lambda: self._decode(name, files)), name=name)
        image_files.report_skipped(name, len(bank.images), sum(map(len, files.values())))
        own, others = self._cached(f"{split}-digests", files, lambda: digests(bank)), {}
        for other in SPLITS[: SPLITS.index(split)]:
            with suppress(UserError):  # compare with earlier splits if they have been decoded
                others[other] = self._cached(f"{other}-digests", self._files(other), _refuse).images
        report_copies(name, own.images.split(own.sizes.tolist()), others)
        return bank

    def _files(self, split: str) -> dict[Path, list[Path]]:
        """Return the files in the folder of each class of a split."""
        return {folder: image_files.files_below(folder) for folder in self._folders(split)}

    def _cached(self, kind: str, files: dict[Path, list[Path]], make: Callable[[], ImageBank]) -> ImageBank:
        stats = [(os.path.abspath(path), path.stat()) for path in chain(*files.values())]
        settings: dict[str, Any] = {"like": repr(self.like)} if self.like else self._prepared()
        settings["decoding"] = image_files.DECODING
        settings["files"] = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return cached_bank(self.data_dir, f"image_folder-{kind}", settings, make)

    def identities(self, bank: ImageBank) -> list[set[str]]:
        """Return the name of each class, and a hash of its images in any order, to recognize a renamed class."""
        classes = [sorted(pictures(own)) for own in digests(bank).images.split(bank.sizes.tolist())]
        hashes = [f"pixels:{hashlib.sha256(b''.join(own)).hexdigest()[:32]}" for own in classes]
        return [own | {digest} for own, digest in zip(super().identities(bank), hashes, strict=True)]

    def read(self, path: Readable) -> Tensor:
        if self.like:
            return self.like.read(path)
        size, color, fit, invert = self._prepared().values()
        image = image_files.open_image(path, size).convert("RGB" if color else "L")
        pixels = image_files.as_tensor(image_files.to_square(image, size, fit))
        return 255 - pixels if invert else pixels

    def splits(self) -> dict[str, list[str]]:
        folders = self._class_folders()
        if self.split_file:
            return self._read_split(user_path(self.split_file), folders.keys())
        if self._split_folders():
            return {split: [name for name in folders if folders[name].parent.name == split] for split in SPLITS}
        return random_split(folders, self.fractions, self.split_seed)

    def _split_folders(self) -> list[Path]:
        """Return the folders of the splits if root has train and at least one other; otherwise an empty list."""
        known = image_files.folders_in(self.folder)
        folders = [self.folder / split for split in SPLITS if self.folder / split in known]
        return folders if len(folders) > 1 and folders[0].name == "train" else []

    def _class_folders(self) -> dict[str, Path]:
        """Return the folder of each class of all splits."""
        if not self.folder.is_dir():
            raise UserError(f"dataset.root={self.folder}: there is no such folder")
        for folder in image_files.folders_in(self.folder):
            split = ALIASES.get(folder.name.lower(), folder.name.lower())
            if split in SPLITS and split != folder.name and image_files.has_only_folders(folder):
                raise UserError(f"dataset.root={self.folder}: rename its folder {folder.name} to {split}")
        classes: dict[str, Path] = {}
        for own in chain(*map(image_files.folders_in, self._split_folders() or [self.folder])):
            if (other := classes.setdefault(own.name, own)) != own:
                both = f"{other.parent.name} and {own.parent.name}"
                raise UserError(f"{self.folder}: the class {own.name} is in both {both}")
        return classes

    def _folders(self, split: str) -> list[Path]:
        """Return the class folders of a split; UserError if there are fewer than two."""
        folders, names = self._class_folders(), self.splits()[split]
        content = f"{self.folder} has {len(folders)} class folders, {len(names)} of them in the split {split}"
        advice = "" if self.split_file else "; dataset.fractions sets the share of each split"
        if (split_folders := self._split_folders()) and not self.split_file:
            content, advice = f"{self.folder / split} has {len(names)} class folders", ""
            if self.folder / split not in split_folders:
                raise UserError(f"dataset.root={self.folder} has no folder {split}")
        if len(names) < 2:
            raise UserError(f"{content}: a task needs 2 classes{advice}")
        return [folders[name] for name in names]

    def _read_split(self, path: Path, known: Collection[str]) -> dict[str, list[str]]:
        try:
            content = json.loads(read_text(path))
            classes = {split: [str(name) for name in content[split]] for split in SPLITS}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"needs the class names of train, val and test; {type(error).__name__}: {error}"
            raise UserError(f"dataset.split_file={path} is not a split file ({reason})") from None
        if missing := [name for name in chain(*classes.values()) if name not in known]:
            raise UserError(f"dataset.split_file={path}: {self.folder} has no class {missing[0]}")
        split_of: dict[str, str] = {}
        for split in SPLITS:
            for name in classes[split]:
                if name in split_of:
                    where = f"in {split_of[name]} and in {split}"
                    raise UserError(f"dataset.split_file={path}: the class {name} is {where}")
                split_of[name] = split
        return classes

    def _decode(self, label: str, files: dict[Path, list[Path]]) -> ImageBank:
        if nested := [folder.name for folder in files if image_files.has_only_folders(folder)]:
            message = f"{len(nested)} of {len(files)} classes have folders and no images ({nested[0]}, ...)"
            print(printable(f"metacv: {label}: {message}; all images below are one class"), file=sys.stderr)
        paths, images = image_files.read_readable(label, list(chain(*files.values())), self.read)
        readable = {*paths}
        sizes = {folder.name: len(readable.intersection(own)) for folder, own in files.items()}
        if empty := [name for name, size in sizes.items() if not size]:
            raise UserError(f"{label}: the class {empty[0]} has no readable image")
        return ImageBank(label, torch.stack(images), torch.tensor([0, *sizes.values()]).cumsum(0), tuple(sizes))


def _refuse() -> ImageBank:
    raise UserError("these images are not decoded yet")
