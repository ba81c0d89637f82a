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
        classes = torch.arange(tasks.way, device=query.device).view(-1, 1, 1, 1, 1)  # [N, Q, hw, S, n] below
        logits = []
        for own, labels, queries in zip(support, tasks.support_y, query, strict=True):  # [S, hw, D], [S], [Q, hw, D]
            cosines = (queries @ own.flatten(0, 1).mT).unflatten(-1, own.shape[:2])  # [Q, hw, S, hw]
            # Equations 2 and 3: sum the cosines to the nearest places over all places of the query. The nearest places
            # of a class are among the nearest of each image. Masks, unlike indexing, do not wait for the GPU.
            nearest = cosines.topk(min(self.neighbours, cosines.shape[-1])).values  # [Q, hw, S, n]
            of_class = nearest.where(labels.unsqueeze(-1) == classes, -torch.inf).flatten(3)  # [N, Q, hw, S n]
            nearest = of_class.topk(min(self.neighbours, of_class.shape[-1])).values
            logits.append(nearest.masked_fill(nearest == -torch.inf, 0).sum((2, 3)).T)  # a small class may have fewer
        return torch.stack(logits)
