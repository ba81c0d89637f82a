"""Omniglot (Lake et al., 2015), https://github.com/brendenlake/omniglot: 1623 characters, each from 20 drawers."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from metacv.bounds import Count, Range, Seed
from metacv.data.bank import SPLITS, Dataset, ImageBank, Look, Readable, cached_bank
from metacv.data.image_files import as_tensor, open_exactly, open_image, read_classes
from metacv.data.sources import extract
from metacv.errors import UserError
from metacv.files import read_text, rename_unless_there, user_path
from metacv.text import first_line

CHARACTERS = {"images_background": 964, "images_evaluation": 659}
DRAWERS = 20


@dataclass
class Omniglot(Dataset):
    """Greyscale images of characters, with the splits of the papers:

    lake    background alphabets for train, or for val if in `val_alphabets`; evaluation alphabets for test (Lake 2015)
    random  all characters shuffled with `split_seed`, `counts` for each split: train and val from the start, test from
            the end, so that one seed gives the same test characters whatever the other counts (MAML, Reptile)
    file    lists of `ALPHABET/characterNN[/rotDDD]` (Vinyals 2016); rotDDD is ignored, use the rotation `as_classes`
    """

    look: ClassVar[Look] = {"brightness": [0.008, 0.079, 0.153], "contrast": [0.068, 0.233, 0.309]}

    size: Annotated[int, Range(4, 105)]  # height and width in pixels
    resample: Literal["lanczos", "nearest"]
    invert: bool  # ink is 255 and paper 0
    split: Literal["lake", "random", "file"]
    val_alphabets: list[str]
    counts: dict[str, Count]
    split_seed: Seed
    split_dir: str  # the folder of `split_files`, in data_dir/omniglot unless absolute
    split_files: dict[str, str]

    def __post_init__(self) -> None:
        for name in ("counts", "split_files"):
            if getattr(self, name).keys() != set(SPLITS):
                raise ValueError(f"{name} must have train, val and test")
        most = sum(CHARACTERS.values())
        if sum(self.counts.values()) > most:
            raise ValueError(f"counts={self.counts}: the sum must be at most {most}")

    def load(self, split: str) -> ImageBank:
        settings = {"size": self.size, "resample": self.resample}
        everything = cached_bank(self.data_dir, f"omniglot-{self.size}-{self.resample}", settings, self._decode)
        bank = everything.select(f"omniglot {split}", self._split_classes(everything.class_names)[split])
        return replace(bank, images=255 - bank.images) if self.invert else bank

    def read(self, path: Readable) -> Tensor:
        image = self._resized(open_image(path, self.size))
        return 255 - image if self.invert else image

    def _resized(self, image: Image.Image) -> Tensor:
        return as_tensor(image.convert("L").resize((self.size, self.size), Image.Resampling[self.resample.upper()]))

    def _split_classes(self, names: tuple[str, ...]) -> dict[str, list[int]]:
        """Return the classes of each split as indices into `names`, which are FOLDER/ALPHABET/characterNN."""
        if self.split == "lake":
            return self._lake_classes(names)
        if self.split == "file":
            return self._listed_classes({name.split("/", 1)[1]: c for c, name in enumerate(names)})
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(self.split_seed)).tolist()
        train, val, test = (self.counts[split] for split in SPLITS)
        return {"train": order[:train], "val": order[train : train + val], "test": order[len(order) - test :]}

    def _lake_classes(self, names: tuple[str, ...]) -> dict[str, list[int]]:
        background = {name.split("/")[1] for name in names if name.startswith("images_background")}
        if unknown := set(self.val_alphabets) - background:
            allowed = ", ".join(sorted(background))
            raise UserError(f"dataset.val_alphabets: {min(unknown)} is not one of the background alphabets, {allowed}")
        if not self.val_alphabets or background == set(self.val_alphabets):
            raise UserError("dataset.val_alphabets: must have some of the background alphabets, but not all")
        classes: dict[str, list[int]] = {split: [] for split in SPLITS}
        for c, name in enumerate(names):
            folder, alphabet, _ = name.split("/")
            split = "val" if alphabet in self.val_alphabets else "train"
            classes["test" if folder == "images_evaluation" else split].append(c)
        return classes

    def _listed_classes(self, index: dict[str, int]) -> dict[str, list[int]]:
        classes, folder = {}, self.data_dir / "omniglot" / user_path(self.split_dir)
        for split, name in self.split_files.items():
            path = folder / name
            try:
                lines = read_text(path).split()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"dataset.split=file: {path} cannot be read ({error})") from None
            characters = dict.fromkeys("/".join(line.split("/")[:2]) for line in lines)
            if not characters:
                raise UserError(f"{path} lists no characters")
            if unknown := [character for character in characters if character not in index]:
                raise UserError(f"{path}: there is no character {unknown[0]} in Omniglot")
            classes[split] = [index[character] for character in characters]
        if shared := set(classes["test"]) & set(classes["train"] + classes["val"]):
            raise UserError(f"{folder}: {len(shared)} test characters are also listed for train or val")
        return classes

    def _decode(self) -> ImageBank:
        """Decode all characters, sorted by folder, alphabet and number."""
        files: dict[str, list[Path]] = {}
        for part, count in CHARACTERS.items():
            folder = self._folder(part)
            advice = f"delete {folder} to download it again"
            characters = sorted(path for path in folder.glob("[!.]*/[!.]*") if path.is_dir())
            if len(characters) != count:
                raise UserError(f"{folder} has {len(characters)} instead of {count} characters: {advice}")
            for character in characters:
                images = sorted(character.glob("[!.]*.png"))
                if len(images) != DRAWERS:
                    raise UserError(f"{character} has {len(images)} instead of {DRAWERS} images: {advice}")
                files[f"{part}/{character.parent.name}/{character.name}"] = images
        return read_classes("omniglot", files, self._read_own, (1, self.size, self.size))

    def _read_own(self, path: Path) -> Tensor:
        image = open_exactly(path, ("PNG",), "L")
        if image.size != (105, 105):
            raise UserError(f"{path} is {image.size[0]}x{image.size[1]} instead of 105x105")
        return self._resized(image)

    def _folder(self, part: str) -> Path:
        """Return the folder of images_background or images_evaluation, downloaded if it is missing."""
        for place in ("omniglot", ".", "omniglot-py"):  # torchvision unpacks into omniglot-py
            if (folder := self.data_dir / place / part).is_dir():
                return folder
        from torchvision.datasets import Omniglot as Official  # importing torchvision takes a second
        from torchvision.datasets.utils import download_url

        url, target = f"{Official.download_url_prefix}/{part}.zip", self.data_dir / "omniglot" / part
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Unpack to a temporary folder and rename it, so that `target` is always complete.
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{part}.") as temporary:
                download_url(url, temporary, md5=Official.zips_md5[part])
                extract(Path(temporary) / f"{part}.zip", Path(temporary))
                rename_unless_there(Path(temporary) / part, target)
        except (OSError, RuntimeError) as error:
            missing = f"{target} is missing, and {url} cannot be downloaded ({first_line(error)})"
            raise UserError(f"data_dir: {missing}; download it elsewhere, and unpack it into {target.parent}") from None
        return target
