"""Label images with a trained model and a support set, for `metacv predict` and the Python API."""

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metacv import limits
from metacv.algorithms.base import Algorithm
from metacv.algorithms.heads.base import WithHead
from metacv.config import PredictConfig, TrainConfig, to_dict, with_paths
from metacv.data.bank import Dataset
from metacv.data.task import TaskBatch
from metacv.errors import UserError
from metacv.evaluate import with_changes
from metacv.model import (
    OPTIONAL,
    WEIGHTS,
    Checkpoint,
    build_dataset,
    load_checkpoint,
    pick_device,
    save_checkpoint,
    with_head,
)
from metacv.pretrained import checkpoint_or_pretrained
from metacv.text import first_line, printable, short

QUERIES_AT_ONCE = 100
Label = str | int | bool


@dataclass(frozen=True)
class Support:
    """Labelled images [S, C, H, W] (uint8), grouped by class: `shots[i]` images of `classes[i]`."""

    images: Tensor
    shots: tuple[int, ...]
    classes: tuple[Label, ...]

    def task(self, queries: Tensor, device: torch.device) -> TaskBatch:
        """Return one task with images [B, C, H, W] (uint8) as queries."""
        way = len(self.classes)
        labels = torch.arange(way).repeat_interleave(torch.tensor(self.shots))
        return TaskBatch(
            support_x=self.images.to(device).float().div(255).unsqueeze(0),
            support_y=labels.to(device).unsqueeze(0),
            query_x=queries.to(device).float().div(255).unsqueeze(0),
            query_y=torch.zeros(1, len(queries), dtype=torch.long, device=device),  # unknown
            way=way,
            classes=torch.arange(way, device=device).unsqueeze(0),
        )


@dataclass(frozen=True)
class Predictor:
    """A trained model and the settings for prediction."""

    checkpoint: Checkpoint
    config: TrainConfig  # of the checkpoint, with changes
    device: torch.device

    @classmethod
    def load(cls, place: str | None, given: PredictConfig) -> "Predictor":
        """Load the model at `place`, with the settings of `given` that are not null; UserError if one is invalid."""
        checkpoint = checkpoint_or_pretrained(given, place)
        config = with_changes(checkpoint, given, ("batch_norm",))  # query is a path here
        return cls(checkpoint, config, pick_device(given.device))

    @cached_property
    def dataset(self) -> Dataset:
        """The data set of training, which prepares images in the same way."""
        return build_dataset(self.config.dataset, ".")

    @cached_property
    def algorithm(self) -> Algorithm:
        algorithm = with_head(self.checkpoint.build(self.config), self.config, self.checkpoint.centre).to(self.device)
        if isinstance(algorithm, WithHead) and algorithm.needs_centre:
            path = self.checkpoint.path
            raise UserError(f"head: {path} has no mean feature of training images; choose another head")
        return algorithm

    def check_shape(self, kind: str, images: Tensor) -> None:
        """Raise UserError unless images [B, C, H, W] have the shape of those in training."""
        path, trained = self.checkpoint.path, self.checkpoint.image_shape
        if (shape := tuple(images.shape[1:])) != trained:
            raise UserError(f"{kind}: prepared images have shape {shape}, but {path} was trained on {trained}")

    def probabilities(self, support: Support, images: Tensor) -> Tensor:
        """Return class probabilities [B, N] of images [B, C, H, W] (uint8); UserError if one is not finite."""
        logits = label(self.algorithm, support, images, self.config.batch_norm, self.device)
        probabilities = self.algorithm.probabilities(logits).cpu()
        if not probabilities.isfinite().all():
            what = "the probabilities are not finite: adaptation diverged, or the weights are not finite"
            raise UserError(f"{self.checkpoint.path}: {what}")
        return probabilities

    def save(self, path: Path, support: Support) -> None:
        """Write one file with the model and its support set, without paths of this machine."""
        # The name of a weights file stays: normalization may depend on whether there was one.
        names = with_paths(to_dict(self.config), lambda name, path: Path(path).name if "weights" in name else None)
        portable = names | {"init": None}
        kept = {"images": support.images, "shots": list(support.shots), "classes": list(support.classes)}
        content = self.checkpoint.content
        content = {name: content[name] for name in (*WEIGHTS, *OPTIONAL) if name in content}
        save_checkpoint(path, content | {"config": portable, "support": kept})


def label(algorithm: Algorithm, support: Support, images: Tensor, batch_norm: str, device: torch.device) -> Tensor:
    """Return logits [B, N] of query images [B, C, H, W] (uint8). If they depend on the other images, through batch norm
    or the head, all are queries of one task."""
    alone = batch_norm == "inductive" and not algorithm.uses_query_set
    groups = images.split(QUERIES_AT_ONCE if alone else len(images))
    try:
        return torch.cat([algorithm.predict(support.task(group, device), batch_norm)[0] for group in groups])
    except (RuntimeError, ValueError) as error:  # out of memory, or batch statistics of a single query
        if alone:
            raise
        cause, other = "batch_norm=transductive", "batch_norm=inductive"
        if algorithm.uses_query_set:
            cause, other = "the head, which labels all images together,", "another head, or fewer images at a time"
        raise UserError(f"{cause} with {len(images)} query images: {first_line(error)}; try {other}") from error


def kept_support(checkpoint: Checkpoint) -> Support:
    """Read the support set from a file that `save` wrote; UserError if it has none or is damaged."""
    try:
        kept = checkpoint.content["support"]
        images, shots, classes = kept["images"], tuple(map(int, kept["shots"])), tuple(kept["classes"])
        plain = images.dtype == torch.uint8 and images.layout == torch.strided and images.is_contiguous()
        if len(classes) > limits.CLASSES:
            raise UserError(f"adapted={checkpoint.path} has {len(classes)} classes, above {limits.CLASSES}")
        check_labels(classes)
        named = len({*classes}) == len(classes) == len(shots) >= 2
        if not plain or not named or min(shots) < 1 or sum(shots) != len(images):
            raise ValueError
        return Support(images, shots, classes)
    except KeyError:
        text = "has no support set; save=FILE together with support=FOLDER makes one"
        raise UserError(f"adapted={checkpoint.path}: {text}") from None
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError):
        raise UserError(f"adapted={checkpoint.path} is damaged") from None


def check_labels(labels: tuple[Any, ...]) -> None:
    """Raise ValueError unless labels are all text or all integers, and fit into a file."""
    if {*map(type, labels)} not in ({str}, {int}, {bool}):
        raise ValueError("must be all text or all whole numbers")
    for one in labels:
        if isinstance(one, str) and not (one.isprintable() and len(one) <= limits.NAME):
            raise ValueError(f"{short(printable(one))}: must be printable, with {limits.NAME} letters at most")
        if isinstance(one, int) and abs(one) >= 2**63:
            raise ValueError(f"{one}: must fit into 64 bits")


def check_place_to_save(path: Path) -> None:
    """Raise UserError if the file exists and is not an earlier kept model."""
    with suppress(UserError):
        if not path.exists() or "support" in load_checkpoint(path).content:
            return
    raise UserError(f"save={path}: already exists and is not a file of `save`; choose another name")
