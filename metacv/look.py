"""Brightness, contrast and saturation of images, to warn of images unlike those that a model was trained on."""

import torch
from torch import Tensor

from metacv.data.bank import Dataset, Look
from metacv.model import Checkpoint, target_class
from metacv.terminal import warn

QUANTILES = (0.01, 0.5, 0.99)
MOST = 1000  # images to measure
SPARE = 0.25, 0.02  # tolerance beyond the range in training: relative to its width, plus absolute
GREY, COLOURED = 0.01, 0.05  # saturation below the first counts as grey, above the second as colour


def statistics(images: Tensor) -> dict[str, Tensor]:
    """Return brightness, contrast and, in colour, saturation of up to MOST images [M, C, H, W] (uint8), from 0 to 1."""
    rows = torch.linspace(0, len(images) - 1, min(len(images), MOST)).long()
    values = images[rows].float().div(255)
    found = {"brightness": values.mean((1, 2, 3)), "contrast": values.std((1, 2, 3), correction=0)}
    if values.shape[1] == 3:
        found["saturation"] = (values.amax(1) - values.amin(1)).mean((1, 2))
    return found


def look_of(images: Tensor) -> Look:
    """Return quantiles of the statistics of training images [M, C, H, W] (uint8), before augmentation."""
    quantiles = torch.tensor(QUANTILES)
    return {
        name: [round(one, 4) for one in own.quantile(quantiles).tolist()] for name, own in statistics(images).items()
    }


def look_in_training(checkpoint: Checkpoint) -> Look:
    """Return the quantiles in the checkpoint; for an older one, those known for its data set, if any."""
    node = checkpoint.config.dataset
    known = target_class("dataset", node, Dataset).look if node.get("invert", True) else {}
    return checkpoint.training.look or known


def unlike(what: str, images: Tensor, checkpoint: Checkpoint, dataset: Dataset | None = None) -> str | None:
    """Describe in a line how images [M, C, H, W] (uint8) differ from those in training; None if they do not.

    `dataset` has prepared them: the line names its setting that would help. A single image may be an exception and
    is never reported.
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
        if now is not ...:  # the data set has this setting
            advice += f": try dataset.invert={str(not now).lower()}"
    return f"{what} are unlike those that the model was trained on: {', '.join(differences)}{advice}"


def warn_if_unlike(what: str, images: Tensor, checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Print the result of `unlike` as a warning, if there is one."""
    if text := unlike(what, images, checkpoint, dataset):
        warn(text)
