"""Matching Networks, without context embeddings (Vinyals et al., 2016), https://arxiv.org/abs/1606.04080"""

from torch import Tensor

from metacv.algorithms.base import MetricMethod
from metacv.algorithms.distances import cosine_similarity
from metacv.backbones.base import Backbone
from metacv.bounds import Positive
from metacv.data.task import TaskBatch


class MatchingNet(MetricMethod):
    """Predict the average label of the support images, weighted by a softmax over their cosines with the query."""

    def __init__(self, backbone: Backbone, scale: Positive) -> None:
        super().__init__(backbone)
        self.scale = scale

    def head(self, tasks: TaskBatch) -> Tensor:
        similarity = self.scale * cosine_similarity(tasks.query_x, tasks.support_x)  # [T, Q, S]
        attention = similarity.softmax(dim=-1)
        return tasks.class_sums(attention.mT).mT.clamp_min(1e-30).log()  # [T, Q, N]
