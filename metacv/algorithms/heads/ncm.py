"""Nearest class mean, as in Prototypical Networks (Snell et al., 2017), and its variant in SimpleShot."""

import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.distances import negative_squared_distance
from metacv.algorithms.heads.base import Head
from metacv.bounds import Copies
from metacv.data.task import TaskBatch


class NearestMean(Head):
    """Classify by squared distance to the class means of features, which are scaled to length 1 if `normalize`.

    With `cosine` the means are scaled to length 1 too, so that the nearest mean is the one with the largest cosine.
    """

    def __init__(self, normalize: bool = True, cosine: bool = False, augment: Copies = 0, flip: bool = False) -> None:
        super().__init__(augment, flip)
        if cosine and not normalize:
            raise ValueError("cosine=true: needs normalize=true")
        self.normalize, self.cosine = normalize, cosine

    def forward(self, tasks: TaskBatch) -> Tensor:
        return nearest_mean(tasks.normalized() if self.normalize else tasks, self.cosine)


class CL2N(NearestMean):
    """SimpleShot (Wang et al., 2019), https://arxiv.org/abs/1911.04623: subtract the mean training feature."""

    centred = True

    def __init__(self, augment: Copies = 0, flip: bool = False) -> None:
        super().__init__(augment=augment, flip=flip)

    def forward(self, tasks: TaskBatch) -> Tensor:
        return super().forward(tasks.map(lambda features: features - self.centre))


def nearest_mean(tasks: TaskBatch, unit_means: bool = False) -> Tensor:
    """Return minus the squared distances [T, Q, N] of queries to class means, for tasks of features. Means are scaled
    to length 1 if `unit_means`."""
    means = tasks.class_means(tasks.support_x)
    return negative_squared_distance(tasks.query_x, F.normalize(means, dim=-1) if unit_means else means)
