"""Omniglot (Lake et al., 2015), https://github.com/brendenlake/omniglot: 1623 characters x 20 drawers."""

import tempfile
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from metacv import MetacvError
from metacv.data.bank import Dataset, ImageBank, Rotation, cached_bank, check_split, read_images
from metacv.data.image_files import as_tensor, open_picture
from metacv.files import rename_unless_there

CHARACTERS = {"images_background": 964, "images_evaluation": 659}
DRAWERS = 20
RESAMPLE = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}


class Omniglot(Dataset):
    """Splits of the characters, after the papers:

    lake    train and val are the background alphabets, val those named in `val_alphabets`; test is the evaluation
            alphabets (Lake et al. 2015)
    random  a shuffle of all characters by `split_seed`: `counts` for train and val from its start, test from its
            end, so that the same seed has the same test characters whatever the other counts (MAML, Reptile)
    file    lists of `ALPHABET/characterNN` or `ALPHABET/characterNN/rotDDD` lines (Vinyals et al. 2016); the
            rotations in such a list are what `as_classes` says, and are not read
    """

    def __init__(
        self,
        data_dir: Path,
        size: int,
        resample: Literal["lanczos", "nearest"],
        invert: bool,
        split: Literal["lake", "random", "file"],
        val_alphabets: list[str],
        counts: dict[str, int],
        split_seed: int,
        split_dir: str,
        split_files: dict[str, str],
        train_rotation: Rotation = "none",
        test_rotation: Rotation = "none",
    ) -> None:
        super().__init__(data_dir, train_rotation, test_rotation)
        if not 4 <= size <= 105:
            raise ValueError(f"size={size}: the images are 105x105, so 4 to 105")
        for name, found in (("counts", counts), ("split_files", split_files)):
            if found.keys() != {"train", "val", "test"}:
                raise ValueError(f"{name} must name train, val and test")
        if min(counts.values()) < 1 or sum(counts.values()) > sum(CHARACTERS.values()):
            raise ValueError(f"counts={counts}: each at least 1, together at most {sum(CHARACTERS.values())}")
        self.size = size
        self.resample = resample
        self.invert = invert
        self.split = split
        self.val_alphabets = val_alphabets
        self.counts = counts
        self.split_seed = split_seed
        self.split_dir = split_dir
        self.split_files = split_files

    def load(self, split: str) -> ImageBank:
        check_split(split)
        settings = {"size": self.size, "resample": self.resample}
        everything = cached_bank(self.data_dir, f"omniglot-{self.size}-{self.resample}", settings, self._decode)
        bank = everything.select(f"omniglot {split}", self._classes(everything.class_names)[split])
        images = 255 - bank.images if self.invert else bank.images
        return ImageBank(bank.name, images, bank.offsets, bank.class_names)

    def _classes(self, names: tuple[str, ...]) -> dict[str, list[int]]:
        """Of the names `FOLDER/ALPHABET/characterNN`, the indices of each split."""
        if self.split == "random":
            order = torch.randperm(len(names), generator=torch.Generator().manual_seed(self.split_seed)).tolist()
            train, val, test = self.counts["train"], self.counts["val"], self.counts["test"]
            return {"train": order[:train], "val": order[train : train + val], "test": order[len(order) - test :]}
        if self.split == "file":
            return self._listed({name.split("/", 1)[1]: c for c, name in enumerate(names)})
        alphabets = {name.split("/")[1] for name in names if name.startswith("images_background")}
        if unknown := set(self.val_alphabets) - alphabets:
            raise MetacvError(
                f"dataset.val_alphabets: {min(unknown)} is not among the background alphabets of {self.data_dir}"
            )
        found: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        for c, name in enumerate(names):
            folder, alphabet, _ = name.split("/")
            background = "val" if alphabet in self.val_alphabets else "train"
            found["test" if folder == "images_evaluation" else background].append(c)
        if not found["train"] or not found["val"]:
            raise MetacvError("dataset.val_alphabets: name some of the background alphabets, not all or none")
        return found

    def _listed(self, index: dict[str, int]) -> dict[str, list[int]]:
        folder = Path(self.split_dir).expanduser()
        if not folder.is_absolute() and not folder.is_dir():
            folder = self.data_dir / "omniglot" / folder
        found = {}
        for split, name in self.split_files.items():
            try:
                lines = (folder / name).read_text().split()
            except (OSError, UnicodeDecodeError) as error:
                raise MetacvError(f"dataset.split=file: {folder / name} cannot be read ({error})") from None
            characters = dict.fromkeys("/".join(line.split("/")[:2]) for line in lines)
            if not characters:
                raise MetacvError(f"{folder / name} lists no characters")
            if unknown := [character for character in characters if character not in index]:
                raise MetacvError(f"{folder / name}: there is no character {unknown[0]} in Omniglot")
            found[split] = [index[character] for character in characters]
        if both := set(found["test"]) & set(found["train"] + found["val"]):
            raise MetacvError(f"{folder}: {len(both)} test characters are also listed for train or val")
        return found

    def _decode(self) -> ImageBank:
        files: list[Path] = []
        names: list[str] = []
        for part, folder in self._folders().items():
            characters = sorted(path for path in folder.glob("[!.]*/[!.]*") if path.is_dir())
            if len(characters) != CHARACTERS[part]:
                raise MetacvError(
                    f"{folder} holds {len(characters)} instead of {CHARACTERS[part]} characters: mend it, or delete it "
                    "to have it downloaded"
                )
            for character in characters:
                images = sorted(character.glob("[!.]*.png"))
                if len(images) != DRAWERS:
                    raise MetacvError(f"{character} holds {len(images)} instead of {DRAWERS} images: mend or delete "
                                      f"{folder} to have it downloaded")  # fmt: skip
                files += images
                names.append(f"{part}/{character.parent.name}/{character.name}")
        decoded = read_images("omniglot", files, self._own, (1, self.size, self.size))
        return ImageBank("omniglot", decoded, torch.arange(0, len(files) + 1, DRAWERS), tuple(names))

    def read(self, path: Path) -> Tensor:
        image = self._small(open_picture(path, self.size))
        return 255 - image if self.invert else image

    def _small(self, image: Image.Image) -> Tensor:
        return as_tensor(image.convert("L").resize((self.size, self.size), RESAMPLE[self.resample]))

    def _own(self, path: Path) -> Tensor:
        try:
            with Image.open(path, formats=("PNG",)) as image:
                if image.size != (105, 105):
                    raise ValueError(f"{image.size[0]}x{image.size[1]} instead of 105x105")
                return self._small(image)
        except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise MetacvError(f"{path} is not a readable image ({error})") from None

    def _folders(self) -> dict[str, Path]:
        """Both folders of images: where they are found, else downloaded."""
        places = [self.data_dir / "omniglot", self.data_dir, self.data_dir / "omniglot-py"]  # the last is torchvision's
        found = {}
        for part in CHARACTERS:
            at = [place / part for place in places if (place / part).is_dir()]
            found[part] = at[0] if at else self._download(part)
        return found

    def _download(self, part: str) -> Path:
        from torchvision.datasets import Omniglot as Official
        from torchvision.datasets.utils import download_url, extract_archive

        place = self.data_dir / "omniglot" / part
        url = f"{Official.download_url_prefix}/{part}.zip"
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            # In a folder of its own, then renamed: what is in its place is whole, also with two runs at once.
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{part}.") as own:
                download_url(url, own, md5=Official.zips_md5[part])
                extract_archive(str(Path(own) / f"{part}.zip"), own)
                rename_unless_there(Path(own) / part, place)
        except (OSError, RuntimeError) as error:
            raise MetacvError(
                f"data_dir={self.data_dir}: omniglot/{part} is not there and {url} could not be downloaded ({error})"
            ) from None
        return place
