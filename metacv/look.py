"""How images look, in three numbers each, to notice images unlike those that a model was trained on."""

import torch
from torch import Tensor

from metacv.data.bank import Dataset, Look
from metacv.model import Checkpoint, target_class
from metacv.terminal import warn

QUANTILES = (0.01, 0.5, 0.99)
MOST = 1000  # images that are looked at
SPARE = 0.25, 0.02  # beyond the range in training: a share of its width, and a number
GREY, COLOURED = 0.01, 0.05  # a saturation below the first is grey, above the second is not


def statistics(images: Tensor) -> dict[str, Tensor]:
    """Numbers of each image [M, C, H, W] (uint8), from 0 to 1: brightness, contrast, and in colour saturation."""
    rows = torch.linspace(0, len(images) - 1, min(len(images), MOST)).long()
    values = images[rows].float().div(255)
    found = {"brightness": values.mean((1, 2, 3)), "contrast": values.std((1, 2, 3), correction=0)}
    if values.shape[1] == 3:
        found["saturation"] = (values.amax(1) - values.amin(1)).mean((1, 2))
    return found


def look_of(images: Tensor) -> Look:
    """What a checkpoint keeps of its training images [M, C, H, W] (uint8), as they are before augmentation."""
    quantiles = torch.tensor(QUANTILES)
    return {
        name: [round(one, 4) for one in own.quantile(quantiles).tolist()] for name, own in statistics(images).items()
    }


def look_in_training(checkpoint: Checkpoint) -> Look:
    """As the checkpoint has it; for an older one, that of its data set, if it is known."""
    node = checkpoint.config.dataset
    known = target_class("dataset", node, Dataset).look if node.get("invert", True) else {}
    return checkpoint.training.look or known


def unlike(what: str, images: Tensor, checkpoint: Checkpoint, dataset: Dataset | None = None) -> str | None:
    """A line that says in what way most of the images [M, C, H, W] (uint8) are unlike those in training; None if alike.

    `dataset` has prepared them; its setting that would help is named. A single image is never unlike: it may be an
    exception.
    """
    if len(images) < 2:
        return None
    trained = look_in_training(checkpoint)
    own = {name: float(values.quantile(0.5)) for name, values in statistics(images).items() if name in trained}

    def fits(name: str, value: float) -> bool:
        low, _, high = trained[name]
        spare = SPARE[0] * (high - low) + SPARE[1]
        return low - spare <= value <= high + spare

    odd = [name for name, value in own.items() if not fits(name, value)]
    ranges = {name: f"{own[name]:.2f}, in training {trained[name][0]:.2f} to {trained[name][2]:.2f}" for name in odd}
    differences = [f"{name} {text}" for name, text in ranges.items()]
    if own.get("saturation", 1) < GREY and trained["saturation"][1] > COLOURED:
        differences.append("grey, in training in colour")
    if not differences:
        return None
    advice = ""
    if odd == ["brightness"] and fits("brightness", 1 - own["brightness"]):
        advice = "; inverted they would fit"
        now = ... if getattr(dataset, "like", None) else getattr(dataset, "invert", ...)
        if now is not ...:  # there is such a setting
            advice += f": try dataset.invert={str(not now).lower()}"
    return f"{what} are unlike those that the model was trained on: {', '.join(differences)}{advice}"


def warn_if_unlike(what: str, images: Tensor, checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Print the line of `unlike`, if there is one."""
    if text := unlike(what, images, checkpoint, dataset):
        warn(text)
