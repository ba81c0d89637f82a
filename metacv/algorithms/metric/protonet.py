"""Prototypical Networks (Snell, Swersky & Zemel, 2017), https://arxiv.org/abs/1703.05175"""

from typing import Literal

import torch
from torch import Tensor, nn

from metacv.algorithms.base import MetricMethod
from metacv.algorithms.distances import cosine_similarity, negative_squared_distance
from metacv.backbones.base import Backbone
from metacv.bounds import Positive
from metacv.data.task import TaskBatch


class ProtoNet(MetricMethod):
    """Classify each query by its distance to the mean embedding of every class.

    With `learn_temperature`, logits are multiplied by a trained scale (Chen et al. 2021, arXiv:2003.04390).
    """

    def __init__(
        self,
        backbone: Backbone,
        metric: Literal["sqeuclidean", "cosine"] = "sqeuclidean",
        temperature: Positive = 1.0,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__(backbone)
        self.metric, self.temperature = metric, temperature
        self.scale = nn.Parameter(torch.ones(())) if learn_temperature else 1.0

    def head(self, tasks: TaskBatch) -> Tensor:
        prototypes = tasks.class_means(tasks.support_x)  # [T, N, D], equation 1
        similarity = cosine_similarity if self.metric == "cosine" else negative_squared_distance
        return similarity(tasks.query_x, prototypes) * self.scale / self.temperature  # equation 2
