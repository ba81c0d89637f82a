"""CUB-200-2011 (Wah et al., 2011): 200 species of birds, 11,788 images. Split of Chen et al. (2019): 100, 50 and 50."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from metacv.bounds import Size
from metacv.data.bank import Dataset, ImageBank, Readable, cached_bank
from metacv.data.image_files import as_tensor, open_exactly, open_image, read_classes, to_square
from metacv.data.sources import Source, SplitSpec, split_classes
from metacv.errors import UserError
from metacv.files import read_text

IMAGES = 11_788
CLASSES = split_classes("cub")


@dataclass
class CUB(Dataset):
    """The central square of each image in colour, from the official folder or its archive, or from class folders."""

    size: Size  # height and width in pixels
    crop: bool  # first crop each image to the bounding box of its bird

    def load(self, split: str) -> ImageBank:
        source = Official(
            title="CUB-200-2011",
            folder="cub",
            download="put CUB_200_2011.tgz of https://data.caltech.edu/records/65de6-vp158 or its folder into data_dir",
            spec=SplitSpec(CLASSES),
            read=lambda path: self.square(open_own(path)),
            shape=(3, self.size, self.size),
            square=self.square,
            crop=self.crop,
        )
        settings, name = {"size": self.size, "crop": self.crop}, f"cub-{split}"
        bank = cached_bank(self.data_dir, name, settings, lambda: source.load(self.data_dir, split))
        return replace(bank, name=f"cub {split}")

    def read(self, path: Readable) -> Tensor:
        """Use the whole image, because it has no bounding box."""
        return self.square(open_image(path).convert("RGB"))

    def square(self, image: Image.Image) -> Tensor:
        return as_tensor(to_square(image, self.size, "crop"))


@dataclass(frozen=True)
class Official(Source):
    """The folder CUB_200_2011, with images.txt, image_class_labels.txt, bounding_boxes.txt and images/NNN.Name/*."""

    square: Callable[[Image.Image], Tensor] = field(kw_only=True)
    crop: bool = field(kw_only=True)

    def load_from(self, folder: Path, split: str) -> ImageBank | None:
        if not (folder / "images.txt").is_file():
            if self.crop and self.files(folder, split) is not None:
                advice = "dataset.crop=false uses whole images"
                raise UserError(f"dataset.crop=true: {folder} has no images.txt and no bounding_boxes.txt; {advice}")
            return super().load_from(folder, split)
        labels = table(folder, "image_class_labels.txt", "CLASS")
        boxes = table(folder, "bounding_boxes.txt", "X Y WIDTH HEIGHT") if self.crop else {}
        files: dict[str, list[Path]] = {name: [] for name in sorted(self.spec.classes[split])}
        box_of = {}
        for number, (place,) in table(folder, "images.txt", "CLASS/FILE").items():
            name, file = ("", *Path(place).parts)[-2:]
            if name.split(".")[0] != labels[number][0].zfill(3):
                raise UserError(f"{folder}: image {number} is {place}, but has the class {labels[number][0]}")
            if name in files:
                files[name].append(path := folder / "images" / name / file)
                box_of[path] = boxes.get(number)
        self.spec.check({name: len(paths) for name, paths in files.items()}, folder, split)

        def read(path: Path) -> Tensor:
            return self.square(open_own(path, box_of[path]))

        return read_classes(f"{folder.name} {split}", files, read, self.shape)

    def _hints(self, folder: Path, split: str) -> Iterator[str]:
        if (folder / "image_class_labels.txt").is_file():
            yield f"{folder} without images.txt"
        yield from super()._hints(folder, split)


def open_own(path: Path, box: Sequence[str] | None = None) -> Image.Image:
    """Open an image of the data set, cropped to a bounding box: left, top, width and height in pixels."""
    image = open_exactly(path, ("JPEG", "PNG"), "RGB")
    if box is None:
        return image
    try:
        x, y, width, height = map(float, box)
        left, top, right, bottom = round(x), round(y), round(x + width), round(y + height)
    except (ValueError, OverflowError):
        left = right = top = bottom = 0
    corners = max(0, left), max(0, top), min(image.width, right), min(image.height, bottom)
    if corners[0] >= corners[2] or corners[1] >= corners[3]:
        raise UserError(f"dataset.crop=true: the bounding box {' '.join(box)} of {path} is not in the image")
    return image.crop(corners)


def table(folder: Path, name: str, columns: str) -> dict[str, list[str]]:
    """Read a file of the official folder with lines NUMBER and `columns`; return the values of each image."""
    path = folder / name
    try:
        lines = [line.split() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); unpack CUB_200_2011.tgz again") from None
    values = {line[0]: line[1:] for line in lines if len(line) == 1 + len(columns.split())}
    if values.keys() != {str(number) for number in range(1, IMAGES + 1)}:
        expected = f"a line NUMBER {columns} for each of the images 1 to {IMAGES}"
        raise UserError(f"{path} does not have {expected}; unpack CUB_200_2011.tgz again")
    return values
