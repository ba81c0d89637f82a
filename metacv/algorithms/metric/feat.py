"""FEAT (Ye et al., 2020), https://arxiv.org/abs/1812.03664"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metacv.algorithms.base import MetricMethod, accuracies
from metacv.algorithms.distances import negative_squared_distance
from metacv.backbones.base import Backbone
from metacv.bounds import NotNegative, Positive, ShareBelowOne
from metacv.data.task import TaskBatch


class FEAT(MetricMethod):
    """Prototypical Networks with prototypes that are adapted to each other by self-attention (section 3.3).

    In training, a second loss with weight `balance` pulls the adapted features of a class towards their mean
    (equation 8).
    """

    def __init__(self, backbone: Backbone, temperature: Positive, balance: NotNegative, dropout: ShareBelowOne) -> None:
        super().__init__(backbone)
        dim = backbone.features_dim
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=(1 / dim) ** 0.5)
        self.output, self.norm, self.dropout = nn.Linear(dim, dim), nn.LayerNorm(dim), nn.Dropout(dropout)
        nn.init.xavier_normal_(self.output.weight)
        self.temperature, self.balance = temperature, balance

    def head(self, tasks: TaskBatch) -> Tensor:
        prototypes = self.adapt(tasks.class_means(tasks.support_x))
        return negative_squared_distance(tasks.query_x, prototypes) / self.temperature

    def adapt(self, features: Tensor, among: Tensor | None = None) -> Tensor:
        """Apply self-attention to features [T, B, D] (equations 4 and 5), among all B of them or, with `among`
        [T, B, B], where it is true."""
        scores = self.query(features) @ self.key(features).mT / features.shape[-1] ** 0.5
        scores = scores if among is None else scores.masked_fill(~among, -torch.inf)
        attended = self.dropout(self.output(scores.softmax(-1) @ self.value(features)))
        return self.norm(features + attended)

    def add_gradient(self, tasks: TaskBatch, share: float) -> dict[str, Tensor]:
        embedded = self.embedded(tasks, self.one_batch)
        logits = self.head(embedded)
        loss = self.loss(logits, tasks.query_y)
        scalars = {"loss": loss.detach() * share, "accuracy": accuracies(logits, tasks.query_y).mean() * share}
        if self.balance:
            contrast = self.contrast(embedded)
            loss = loss + self.balance * contrast
            scalars["contrast"] = contrast.detach() * share
        (loss * share).backward()
        return scalars

    def contrast(self, tasks: TaskBatch) -> Tensor:
        """Return the loss of all images against the means of their classes, adapted within each class."""
        features = torch.cat([tasks.support_x, tasks.query_x], dim=1)
        labels = torch.cat([tasks.support_y, tasks.query_y], dim=1)
        adapted = self.adapt(features, labels.unsqueeze(1) == labels.unsqueeze(2))
        means = replace(tasks, support_y=labels).class_means(adapted)
        logits = negative_squared_distance(adapted, means) / self.temperature
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
