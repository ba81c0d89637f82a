"""Matching Networks, without context embeddings (Vinyals et al., 2016), https://arxiv.org/abs/1606.04080"""

import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.base import MetricMethod
from metacv.backbones.base import Backbone
from metacv.bounds import Positive
from metacv.data.task import TaskBatch


class MatchingNet(MetricMethod):
    """Predict the average label of the support images, weighted by a softmax over their cosines with the query."""

    def __init__(self, backbone: Backbone, scale: Positive) -> None:
        super().__init__(backbone)
        self.scale = scale

    def head(self, tasks: TaskBatch) -> Tensor:
        support = F.normalize(tasks.support_x, dim=-1)  # [T, S, D]
        query = F.normalize(tasks.query_x, dim=-1)  # [T, Q, D]
        attention = (self.scale * query @ support.mT).softmax(dim=-1)  # [T, Q, S]
        labels = F.one_hot(tasks.support_y, tasks.way).to(attention)  # [T, S, N]
        return (attention @ labels).clamp_min(1e-30).log()  # [T, Q, N]
