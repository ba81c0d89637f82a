"""Classification of all training classes; its features then classify new classes by nearest mean.

The first stage of RFS (Tian et al., 2020), https://arxiv.org/abs/2003.11539, and of Meta-Baseline (Chen et al., 2021).
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metacv.algorithms.base import Algorithm, MetricMethod
from metacv.algorithms.heads.ncm import nearest_mean
from metacv.backbones.base import Backbone
from metacv.bounds import ShareBelowOne
from metacv.data.task import ImageBatch, TaskBatch
from metacv.errors import UserError

TEMPERATURE = 4.0  # of distillation, as in RFS


class Classifier(MetricMethod):
    """A backbone with a linear layer for `classes` classes, trained by cross-entropy.

    rotations  train on every image at four angles, with a second linear layer that predicts the angle (Gidaris et al.,
               2019, arXiv:1906.05186)
    cosine     logits are cosines times a learned scale (Gidaris & Komodakis, 2018, arXiv:1804.09458)
    teacher    a trained classifier of the same classes; distillation is half of the loss (RFS, equation 6)
    """

    batches: ClassVar[Literal["episodes", "images"]] = "images"

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        label_smoothing: ShareBelowOne = 0.0,
        rotations: bool = False,
        cosine: bool = False,
        teacher: str | None = None,
    ) -> None:
        super().__init__(backbone)
        if classes < 2:
            raise ValueError(f"{classes} training classes: must be at least 2")
        self.label_smoothing = label_smoothing
        self.linear = nn.Linear(backbone.features_dim, classes, bias=not cosine)
        self.scale = nn.Parameter(torch.tensor(10.0)) if cosine else None
        self.angle = nn.Linear(backbone.features_dim, 4) if rotations else None
        self.teacher: list[Classifier] = []  # a list, so that nn.Module neither trains nor saves it

    def head(self, tasks: TaskBatch) -> Tensor:
        return nearest_mean(tasks.normalized())

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [B, classes] of features [B, D]."""
        if self.scale is None:
            return self.linear(features)
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.linear.weight, dim=-1))

    def add_gradient(self, batch: ImageBatch, share: float) -> dict[str, Tensor]:
        images, labels = batch.images, batch.labels
        if self.angle:
            images = torch.cat([torch.rot90(images, turns, (2, 3)) for turns in range(4)])
            labels = labels.repeat(4)
        features = self.backbone.features(images)
        logits = self.logits(features)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        accuracy = (logits.detach().argmax(-1) == labels).float().mean()
        for teacher in self.teacher:
            loss = (loss + distillation(logits, teacher_logits(teacher, images))) / 2
        if self.angle:
            angles = torch.arange(4, device=labels.device).repeat_interleave(len(batch.labels))
            loss = loss + F.cross_entropy(self.angle(features), angles)
        (loss * share).backward()
        return {"loss": loss.detach() * share, "accuracy": accuracy * share}

    def learn_from(self, teacher: Algorithm) -> None:
        """Distil from `teacher` in training; UserError if it is not a classifier of as many classes."""
        if not isinstance(teacher, Classifier) or teacher.linear.out_features != self.linear.out_features:
            raise UserError(f"algo.teacher: must be a classifier of {self.linear.out_features} classes")
        self.teacher = [teacher.eval().requires_grad_(False)]


def teacher_logits(teacher: Classifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        return teacher.logits(teacher.backbone.features(images))


def distillation(logits: Tensor, target: Tensor) -> Tensor:
    """Return TEMPERATURE**2 times the KL divergence of the teacher's probabilities from ours, both at TEMPERATURE."""
    own, aim = F.log_softmax(logits / TEMPERATURE, dim=-1), F.softmax(target / TEMPERATURE, dim=-1)
    return TEMPERATURE**2 * F.kl_div(own, aim, reduction="batchmean")
