"""Prototypical Networks (Snell, Swersky & Zemel, 2017), https://arxiv.org/abs/1703.05175"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.base import MetricMethod
from metacv.backbones.base import Backbone
from metacv.data.task import TaskBatch


class ProtoNet(MetricMethod):
    """Classify each query by its distance to the mean embedding of every class."""

    def __init__(
        self, backbone: Backbone, metric: Literal["sqeuclidean", "cosine"] = "sqeuclidean", temperature: float = 1.0
    ) -> None:
        super().__init__(backbone)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        self.metric, self.temperature = metric, temperature

    def head(self, tasks: TaskBatch) -> Tensor:
        prototypes = tasks.class_means(tasks.support_x).unsqueeze(1)  # [T, 1, N, D], equation 1
        query = tasks.query_x.unsqueeze(2)  # [T, Q, 1, D]
        if self.metric == "cosine":
            similarity = (F.normalize(query, dim=-1) * F.normalize(prototypes, dim=-1)).sum(dim=-1)
        else:
            similarity = -(query - prototypes).square().sum(dim=-1)
        return similarity / self.temperature  # equation 2
