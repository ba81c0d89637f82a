"""Prototypical Networks (Snell, Swersky & Zemel, 2017), https://arxiv.org/abs/1703.05175"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.base import Algorithm, per_task
from metacv.backbones.base import Backbone
from metacv.data.sampler import TaskBatch


class ProtoNet(Algorithm):
    """Classifies a query by its distance to each class's mean support embedding."""

    def __init__(
        self,
        backbone: Backbone,
        metric: Literal["sqeuclidean", "cosine"] = "sqeuclidean",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        self.backbone = backbone
        self.metric = metric
        self.temperature = temperature

    def forward(self, tasks: TaskBatch) -> Tensor:
        images = torch.cat([tasks.support_x, tasks.query_x], dim=1)  # [T, N*(K+Q), C, H, W]
        z = per_task(self.backbone, images).flatten(2)  # [T, N*(K+Q), D]
        support, query = z.tensor_split([tasks.support_x.shape[1]], dim=1)
        prototypes = tasks.class_means(support)  # [T, N, D], equation 1
        return self.similarity(query, prototypes) / self.temperature

    def similarity(self, query: Tensor, prototypes: Tensor) -> Tensor:
        """Of queries [T, B, D] to prototypes [T, N, D]: [T, B, N]. Squared distances are summed over D."""
        # Entry by entry rather than as a matrix product, whose rounding would depend on the other queries.
        if self.metric == "cosine":
            query, prototypes = F.normalize(query, dim=-1), F.normalize(prototypes, dim=-1)
            return (query.unsqueeze(2) * prototypes.unsqueeze(1)).sum(dim=-1)
        return -(query.unsqueeze(2) - prototypes.unsqueeze(1)).square().sum(dim=-1)
