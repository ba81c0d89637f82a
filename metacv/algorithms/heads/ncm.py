"""Nearest class mean, as Prototypical Networks classify (Snell et al., 2017), and SimpleShot's variant of it."""

import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.heads.base import Head
from metacv.algorithms.metric.protonet import negative_squared_distance
from metacv.data.task import TaskBatch


class NearestMean(Head):
    """Squared distances to the means of the classes' features, which are scaled to length 1 if `normalize`."""

    def __init__(self, normalize: bool = True, augment: int = 0, flip: bool = False) -> None:
        super().__init__(augment, flip)
        self.normalize = normalize

    def forward(self, tasks: TaskBatch) -> Tensor:
        if self.normalize:
            tasks = tasks.map(lambda features: F.normalize(features, dim=-1))
        return negative_squared_distance(tasks.query_x, tasks.class_means(tasks.support_x))


class CL2N(NearestMean):
    """SimpleShot (Wang et al., 2019), https://arxiv.org/abs/1911.04623: features minus their mean in training."""

    centred = True

    def forward(self, tasks: TaskBatch) -> Tensor:
        return super().forward(tasks.map(lambda features: features - self.centre))
