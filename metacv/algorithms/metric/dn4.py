"""DN4 (Li et al., 2019), https://arxiv.org/abs/1903.12290"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.base import MetricMethod
from metacv.backbones.base import Backbone
from metacv.bounds import Count
from metacv.data.task import TaskBatch


class DN4(MetricMethod):
    """Compare every place of a query's map with its `neighbours` most similar places in the support maps of a class."""

    features: ClassVar[Literal["vectors", "maps"]] = "maps"

    def __init__(self, backbone: Backbone, neighbours: Count) -> None:
        super().__init__(backbone)
        self.neighbours = neighbours

    def head(self, tasks: TaskBatch) -> Tensor:
        support, query = (F.normalize(maps.flatten(3), dim=2).mT for maps in (tasks.support_x, tasks.query_x))
        logits = []
        for own, labels, queries in zip(support, tasks.support_y, query, strict=True):  # [S, hw, D], [S], [Q, hw, D]
            classes = [own[labels == c].flatten(0, 1) for c in range(tasks.way)]  # [K hw, D] each
            cosines = [queries @ places.mT for places in classes]  # [Q, hw, K hw]
            # Equations 2 and 3: the sum of the cosines to the nearest places, over all places of the query.
            nearest = [own.topk(min(self.neighbours, own.shape[-1])).values.sum((1, 2)) for own in cosines]
            logits.append(torch.stack(nearest, dim=1))
        return torch.stack(logits)
