"""The page of `metacv predict`: each image with its label and the most similar examples, the most doubtful first."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from metacv import __version__
from metacv.files import write_bytes_atomically, written_or_refused
from metacv.predictor import Answers, Support
from metacv.reliability import Calibration
from metacv.text import printable

PICTURES = "predictions"  # folder of the page's pictures
SIDE = 160  # pixels, maximum of a picture
BEST = 3  # classes shown with their probability


@dataclass(frozen=True)
class Card:
    """An image on the page."""

    picture: str
    link: str  # to the image file
    name: str
    label: str
    truth: str
    probabilities: list[tuple[str, float]]  # of the best classes
    label_set: list[str] | None
    examples: list[tuple[str, str]]  # picture and class


def write_page(
    folder: Path,
    place: Path,
    queries: Sequence[Path],
    images: Tensor,
    predictions: list[dict[str, Any]],
    support: Support,
    answers: Answers,
    truth: list[str],
    calibration: Calibration | None,
) -> None:
    """Write predictions.html, and its pictures into the folder PICTURES beside it. `place`: folder of `queries`."""
    labels = support.labels.tolist()
    near = [[]] * len(queries) if answers.nearest is None else answers.nearest.tolist()
    (folder / PICTURES).mkdir(exist_ok=True)
    for i, image in enumerate(images):
        write_picture(folder / PICTURES / f"{i}.jpg", image)
    for row in {row for rows in near for row in rows}:
        write_picture(folder / PICTURES / f"example{row}.jpg", support.images[row])
    cards = []
    for i in by_doubt(predictions, answers):
        one = predictions[i]
        best = sorted(one["probabilities"].items(), key=lambda pair: -pair[1])[:BEST]
        cards.append(
            Card(
                picture=f"{PICTURES}/{i}.jpg",
                link=quote(os.fsencode(os.path.relpath(queries[i], folder))),
                name=printable(os.path.relpath(queries[i], place) if place.is_dir() else queries[i].name),
                label=one["label"],
                truth=truth[i] if truth else "",
                probabilities=best,
                label_set=one.get("label_set"),
                examples=[(f"{PICTURES}/example{row}.jpg", str(labels[row])) for row in near[i]],
            )
        )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html.j2").render(
        version=__version__,
        cards=cards,
        classes=support.classes,
        small=images.shape[-1] < SIDE // 2,
        calibration=calibration,
        wrong=sum(own.truth not in ("", own.label) for own in cards),
    )
    write_bytes_atomically(folder / "predictions.html", text.encode())


def by_doubt(predictions: list[dict[str, Any]], answers: Answers) -> list[int]:
    """Return the order of the page: first images of no known class, the least familiar first, then the least likely."""

    def doubt(i: int) -> tuple[bool, float]:
        unknown = predictions[i]["label"] not in predictions[i]["probabilities"]
        familiar = float(answers.familiarity[i]) if unknown and answers.familiarity is not None else 0.0
        return not unknown, familiar if unknown else predictions[i]["probability"]

    return sorted(range(len(predictions)), key=doubt)


def write_picture(path: Path, image: Tensor) -> None:
    """Write an image [C, H, W] (uint8) as a small JPEG file."""
    picture = Image.fromarray(image[:3].expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((SIDE, SIDE))
    with written_or_refused(path):
        picture.save(path, "jpeg", quality=85)
