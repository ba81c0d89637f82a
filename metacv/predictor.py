"""Label images with a trained model and a support set, for `metacv predict` and the Python API."""

import zlib
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metacv import limits
from metacv.algorithms.base import Algorithm, MetricMethod, evaluating
from metacv.algorithms.heads.base import WithHead
from metacv.algorithms.heads.finetune import Tuned
from metacv.calibration import familiarity, scores, vectors
from metacv.config import PredictConfig, TrainConfig, to_dict, with_paths
from metacv.data.bank import Dataset, pictures
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
from metacv.progress import Progress
from metacv.reliability import Calibration, alone, classified, leave_one_out, with_own_copies
from metacv.text import first_line, printable, short
from metacv.words import nearest

QUERIES_AT_ONCE = 100
NEAREST = 3
Label = str | int | bool


@dataclass(frozen=True)
class Support:
    """Labelled images [S, C, H, W] (uint8), grouped by class: `shots[i]` images of `classes[i]`."""

    images: Tensor
    shots: tuple[int, ...]
    classes: tuple[Label, ...]
    features: Tensor | None = None  # [S, 1 + V, ...], of the images and of their V augmented copies

    @classmethod
    def of(cls, images: Tensor, labels: np.ndarray, features: Tensor | None = None) -> "Support":
        """Group images by their labels, in sorted order."""
        classes, rows, shots = np.unique(labels, return_inverse=True, return_counts=True)
        order = torch.from_numpy(rows.argsort(kind="stable"))
        kept = None if features is None else features[order]
        return cls(images[order], tuple(shots.tolist()), tuple(classes.tolist()), kept)

    @property
    def labels(self) -> np.ndarray:
        return np.array(self.classes).repeat(self.shots)

    def with_examples(self, other: "Support") -> "Support":
        """Add examples of known or new classes, whose labels are of the same type."""
        both = self.features, other.features
        features = None if both[0] is None or both[1] is None else torch.cat([both[0], both[1]])
        labels = np.concatenate([self.labels, other.labels])
        return Support.of(torch.cat([self.images, other.images]), labels, features)

    def without(self, classes: Collection[Label]) -> "Support":
        """Remove classes; UserError for one that there is not, or if fewer than two are left."""
        if unknown := [name for name in classes if name not in self.classes]:
            near = nearest(str(unknown[0]), [str(name) for name in self.classes])
            raise UserError(f"remove={short(printable(str(unknown[0])))}: there is no such class{near}")
        if len(self.classes) - len({*classes}) < 2:
            raise UserError("remove: at least two classes must be left")
        kept = ~np.isin(self.labels, np.array(list(classes), dtype=self.labels.dtype))
        rows = torch.from_numpy(kept)
        return Support.of(self.images[rows], self.labels[kept], None if self.features is None else self.features[rows])

    def task(self, queries: Tensor, device: torch.device) -> TaskBatch:
        """Return one task with images [B, C, H, W] (uint8) as queries."""
        support, queries = (images.to(device).float().div(255) for images in (self.images, queries))
        return self.task_of(support, queries)

    def task_of(self, support: Tensor, queries: Tensor) -> TaskBatch:
        """Return one task with images or features of the support set [S, ...] and of queries [B, ...]."""
        way, device = len(self.classes), queries.device
        labels = torch.arange(way).repeat_interleave(torch.tensor(self.shots))
        return TaskBatch(
            support_x=support.unsqueeze(0),
            support_y=labels.to(device).unsqueeze(0),
            query_x=queries.unsqueeze(0),
            query_y=torch.zeros(1, len(queries), dtype=torch.long, device=device),  # unknown
            way=way,
            classes=torch.arange(way, device=device).unsqueeze(0),
        )


@dataclass(frozen=True)
class Answers:
    """What a model says of B images. Only the probabilities are known if its features depend on other images."""

    probabilities: Tensor  # [B, N]
    familiarity: Tensor | None = None  # [B]
    nearest: Tensor | None = None  # rows of the NEAREST most similar support images [B, up to NEAREST]
    sets: Tensor | None = None  # whether each label is in the label set [B, N], with a calibration
    unknown: Tensor | None = None  # whether the image is unlike all classes [B], with a calibration


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
        with self.checkpoint.blamed(self.config):
            return build_dataset(self.config.dataset, ".")

    @cached_property
    def algorithm(self) -> Algorithm:
        network = self.checkpoint.build(self.config)
        with self.checkpoint.blamed(self.config):
            algorithm = with_head(network, self.config, self.checkpoint.centre).to(self.device)
        if isinstance(algorithm, WithHead) and algorithm.needs_centre:
            path = self.checkpoint.path
            raise UserError(f"head: {path} has no mean feature of training images; choose another head")
        if isinstance(algorithm, Tuned):
            algorithm.check_rate()
        return algorithm

    def check_shape(self, kind: str, images: Tensor) -> None:
        """Raise UserError unless images [B, C, H, W] have the shape of those in training."""
        path, trained = self.checkpoint.path, self.checkpoint.image_shape
        if (shape := tuple(images.shape[1:])) != trained:
            raise UserError(f"{kind}: prepared images have shape {shape}, but {path} was trained on {trained}")

    @cached_property
    def method(self) -> MetricMethod | None:
        """The model if its features of an image depend on no other image, otherwise None."""
        with suppress(UserError):
            return alone(self.algorithm, self.config.batch_norm, "")
        return None

    def with_features(self, support: Support) -> Support:
        """Embed the examples, if the method allows it and they have no features yet."""
        if not self.method or support.features is not None:
            return support
        return replace(support, features=self.embedded(support.images, self.method.copies))

    def embedded(self, images: Tensor, copies: int = 0) -> Tensor:
        """Return features [B, 1 + copies, ...] of images [B, C, H, W] (uint8) and of augmented copies, on the CPU."""
        if not (method := self.method):
            raise UserError(f"{self.checkpoint.path}: its features depend on which images are given together")
        features = []
        with evaluating(method, "inductive", self.device), Progress("embedding").track(len(images), "image") as done:
            for some in images.split(max(1, QUERIES_AT_ONCE // (1 + copies))):
                batch = some.to(self.device).float().div(255)
                own = method.embed(batch).unsqueeze(1)
                if copies:
                    seeds = [zlib.crc32(picture) for picture in pictures(some)]  # independent of the other images
                    own = torch.cat([own, method.embed_copies(batch, seeds)], 1)
                features.append(own.cpu())
                done(len(some))
        return torch.cat(features)

    def calibrated(self, support: Support, coverage: float) -> Calibration:
        """Calibrate on the examples by leave-one-out; UserError if the method or the examples do not allow it."""
        method = alone(self.algorithm, self.config.batch_norm, "unknown and coverage")
        tasks, features = self.task(self.with_features(support), torch.empty(0))
        with evaluating(method, "inductive", self.device):
            return Calibration.of(leave_one_out(method, tasks, features), coverage)

    def task(self, support: Support, queries: Tensor) -> tuple[TaskBatch, Tensor]:
        """Return a task of features without copies, for query features [B, ...], and all support features."""
        if support.features is None:
            raise UserError(f"{self.checkpoint.path}: the examples have no features")
        features = support.features.to(self.device)
        return support.task_of(features[:, 0], queries.to(self.device)), features.unsqueeze(0)

    def answers(self, support: Support, images: Tensor, calibration: Calibration | None = None) -> Answers:
        """Label images [B, C, H, W] (uint8); UserError if a probability is not finite."""
        support = self.with_features(support)
        if not (method := self.method):
            logits = label(self.algorithm, support, images, self.config.batch_norm, self.device)
            return Answers(self.finite(self.algorithm.probabilities(logits)))
        tasks, features = self.task(support, self.embedded(images)[:, 0])
        with evaluating(method, "inductive", self.device):
            logits = classified(method, with_own_copies(tasks, features))[0]
            known = familiarity(tasks)[0].cpu()
            close = nearest_examples(tasks)[0].cpu()
        if not calibration:
            return Answers(self.finite(logits.softmax(-1)), known, close)
        scaled = logits.double().cpu() / calibration.temperature
        sets = scores(scaled) <= calibration.largest
        return Answers(self.finite(scaled.softmax(-1)), known, close, sets, known < calibration.least)

    def finite(self, probabilities: Tensor) -> Tensor:
        if not probabilities.isfinite().all():
            what = "the probabilities are not finite: adaptation diverged, or the weights are not finite"
            raise UserError(f"{self.checkpoint.path}: {what}")
        return probabilities.cpu()

    def save(self, path: Path, support: Support) -> None:
        """Write one file with the model and its support set, without paths of this machine."""
        # The name of a weights file stays: normalization may depend on whether there was one.
        names = with_paths(to_dict(self.config), lambda name, path: Path(path).name if "weights" in name else None)
        portable = names | {"init": None}
        kept = {"images": support.images, "shots": list(support.shots), "classes": list(support.classes)}
        if (features := self.with_features(support).features) is not None:
            kept["features"] = features
        content = self.checkpoint.content
        content = {name: content[name] for name in (*WEIGHTS, *OPTIONAL) if name in content}
        save_checkpoint(path, content | {"config": portable, "support": kept})

    def kept_support(self) -> Support:
        """Return the support set in the file; its features only if they are those of today's model and settings."""
        support, shape = kept_support(self.checkpoint), None
        if self.method and self.config == self.checkpoint.config:
            network = self.method.embedding
            own = (network.features_dim,) if self.method.features == "vectors" else network.out_shape
            shape = (len(support.images), 1 + self.method.copies, *own)
        same = support.features is not None and support.features.shape == shape
        return support if same else replace(support, features=None)


def label(algorithm: Algorithm, support: Support, images: Tensor, batch_norm: str, device: torch.device) -> Tensor:
    """Return logits [B, N] of query images [B, C, H, W] (uint8). If they depend on the other images, through batch norm
    or the head, all are queries of one task."""
    alone = batch_norm == "inductive" and not algorithm.uses_query_set
    if isinstance(algorithm, Tuned):  # once for all groups
        steps = Progress("tuning the network", lines=True).track(algorithm.steps, "step")
        with evaluating(algorithm, batch_norm, device), steps as done:
            algorithm = algorithm.tuned(support.task(images[:0], device), done)
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
        features = kept.get("features")
        plain = images.dtype == torch.uint8 and images.layout == torch.strided and images.is_contiguous()
        if len(classes) > limits.CLASSES:
            raise UserError(f"adapted={checkpoint.path} has {len(classes)} classes, above {limits.CLASSES}")
        check_labels(classes)
        named = len({*classes}) == len(classes) == len(shots) >= 2
        if not plain or not named or min(shots) < 1 or sum(shots) != len(images):
            raise ValueError
        if features is not None and not are_features(features, len(images)):
            raise ValueError
        return Support(images, shots, classes, features)
    except KeyError:
        text = "has no support set; save=FILE together with support=FOLDER makes one"
        raise UserError(f"adapted={checkpoint.path}: {text}") from None
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError):
        raise UserError(f"adapted={checkpoint.path} is damaged") from None


def are_features(features: Tensor, images: int) -> bool:
    plain = features.dtype == torch.float32 and features.layout == torch.strided and features.is_contiguous()
    return plain and features.dim() in (3, 5) and len(features) == images and bool(features.isfinite().all())


def nearest_examples(tasks: TaskBatch) -> Tensor:
    """Return the rows of the most similar support images of each query by cosine [T, Q, up to NEAREST]."""
    tasks = tasks.map(vectors).normalized()
    return (tasks.query_x @ tasks.support_x.mT).topk(min(NEAREST, tasks.support_x.shape[1]), -1).indices


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
