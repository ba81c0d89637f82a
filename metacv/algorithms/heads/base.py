"""Heads: classifiers that are fitted to the support features of each task, for the backbone of any method."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metacv.algorithms.base import Algorithm, MetricMethod
from metacv.backbones.base import Backbone
from metacv.bounds import Copies
from metacv.config import AugmentConfig
from metacv.data.task import TaskBatch
from metacv.data.transforms import Augment
from metacv.errors import UserError


class Head(nn.Module, ABC):
    """Base class: classify queries by the features of a support set. A head has no trained weights.

    augment  number of copies of every support image to add, augmented as in training
    flip     average features with those of the mirror image, for support and query
    """

    centred = False  # whether it subtracts `centre`, the mean feature of training images
    uses_query_set = False  # whether the logits of a query depend on the other queries of its task
    centre: Tensor

    def __init__(self, augment: Copies = 0, flip: bool = False) -> None:
        super().__init__()
        self.augment, self.flip = augment, flip
        self.register_buffer("centre", torch.zeros(()))

    @abstractmethod
    def forward(self, tasks: TaskBatch) -> Tensor:
        """Return query logits [T, Q, N] of tasks whose images are features [T, S, D]."""

    @property
    def needs_images(self) -> bool:
        """Whether features alone are not enough."""
        return bool(self.augment or self.flip or self.centred)

    def on(self, algorithm: Algorithm, augment: AugmentConfig) -> "WithHead":
        """Return the backbone of a method with this head; ValueError if the head does not suit a model whose training
        had the augmentation `augment`."""
        return WithHead(algorithm, self, augment)


class Embedding(Algorithm):
    """A pre-trained network without a classifier of its own, for use with a head."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tasks: TaskBatch) -> Tensor:
        raise UserError("head=null: this network has no classifier of its own; set head=ncm or another head")


class WithHead(MetricMethod):
    """The backbone of a method with a head instead of the method's own classifier."""

    def __init__(self, algorithm: Algorithm, head: Head, augment: AugmentConfig) -> None:
        super().__init__(algorithm.embedding)
        self.classify, self.augment, self.copies = head, augment, head.augment
        self.uses_query_set = head.uses_query_set
        if self.copies and not Augment(**vars(augment)):
            raise ValueError(f"augment={self.copies}: needs a model that was trained with augment.*; use augment=0")

    def head(self, tasks: TaskBatch) -> Tensor:
        return self.classify(tasks)

    def embed(self, images: Tensor) -> Tensor:
        if not self.classify.flip:
            return self.backbone.features(images)
        return self.backbone.features(torch.cat([images, images.flip(-1)])).unflatten(0, (2, -1)).mean(0)

    def embedded(self, tasks: TaskBatch, one_batch: bool) -> TaskBatch:
        if self.copies:
            support = tasks.support_x
            copies = [self.augmented(images, range(support.shape[1])) for images in support]
            tasks = tasks.with_copies(torch.stack(copies))
        return super().embedded(tasks, one_batch)

    def embed_copies(self, images: Tensor, seeds: Iterable[int]) -> Tensor:
        return self.embed(self.augmented(images, seeds)).unflatten(0, (-1, self.copies))

    def augmented(self, images: Tensor, seeds: Iterable[int]) -> Tensor:
        """Return augmented copies [B * copies, C, H, W] of images [B, C, H, W]; `seeds`: one for each image."""
        changes = changes_of_each(self.augment, seeds, self.copies).flatten(0, 1)
        return Augment(**vars(self.augment))(images.repeat_interleave(self.copies, 0), changes)

    @property
    def embedding_key(self) -> list[Any]:
        return [*super().embedding_key, self.classify.flip]

    @property
    def needs_centre(self) -> bool:
        return self.classify.centred and not self.classify.centre.dim()

    def centre(self, images: Tensor) -> Tensor:
        """Set and return the mean feature [D] of training images [B, C, H, W], for a `centred` head."""
        self.eval()
        with torch.no_grad():
            self.classify.centre = torch.cat([self.embed(some) for some in images.split(200)]).mean(0)
        return self.classify.centre


def changes_of_each(augment: AugmentConfig, seeds: Iterable[int], count: int) -> Tensor:
    """Draw `count` changes of each image, [B, count, 6]; `seeds`: one for each image."""
    return torch.stack([Augment(**vars(augment), seed=seed).draw(count) for seed in seeds])


def means_with_queries(tasks: TaskBatch, shares: Tensor) -> Tensor:
    """Return the mean feature of each class [T, N, D] over its support images and all queries, of which the class has
    `shares` [T, Q, N]."""
    weights = torch.cat([F.one_hot(tasks.support_y, tasks.way).to(shares), shares], dim=1)  # [T, S + Q, N]
    return weights.mT @ torch.cat([tasks.support_x, tasks.query_x], dim=1) / weights.sum(1).unsqueeze(2)
