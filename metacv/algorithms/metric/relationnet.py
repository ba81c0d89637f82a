"""Relation Networks (Sung et al., 2018), https://arxiv.org/abs/1711.06025"""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metacv.algorithms.base import Algorithm, in_fixed_chunks, per_task
from metacv.backbones.base import Backbone
from metacv.data.sampler import TaskBatch


class ConvRelation(nn.Module):
    """The paper's relation module, from pairs of maps [B, 2D, h, w] to scores [B] between 0 and 1, in two parts.

    `first_layer` convolves one half of a pair, [B, D, h, w] with its `part` of the weights; `forward` takes the sum
    of both halves from there.
    """

    def __init__(self, out_shape: tuple[int, int, int], hidden: int) -> None:
        super().__init__()
        depth, height, width = out_shape
        # Two poolings want maps of 4x4 or more after two convolutions; smaller ones keep their border.
        self.padding = padding = 1 if min(height, width) < 10 else 0
        self.blocks = nn.Sequential(_block(2 * depth, depth, padding), _block(depth, depth, padding))
        for _ in range(2):
            height, width = (height + 2 * padding - 2) // 2, (width + 2 * padding - 2) // 2
        if min(height, width) < 1:
            raise ValueError(f"relation=conv needs feature maps of 4x4 or more, not {out_shape[1]}x{out_shape[2]}")
        self.fc1 = nn.Linear(depth * height * width, hidden)
        self.fc2 = nn.Linear(hidden, 1)

    def first_layer(self, maps: Tensor, part: slice) -> Tensor:
        return F.conv2d(maps, self.get_parameter("blocks.0.0.weight")[:, part], padding=self.padding)

    def forward(self, sums: Tensor) -> Tensor:
        first, second = self.blocks.children()
        _, *rest = first.children()
        maps = sums + self.get_parameter("blocks.0.0.bias")[:, None, None]
        for layer in (*rest, second):
            maps = layer(maps)
        return torch.sigmoid(self.fc2(F.relu(self.fc1(maps.flatten(1))))).squeeze(1)


class MLPRelation(nn.Module):
    """A two-layer perceptron, from pairs of embedding vectors [B, 2D] to positive scores [B], in the same two parts."""

    def __init__(self, out_shape: tuple[int, int, int], hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * torch.Size(out_shape).numel(), hidden)
        self.fc2 = nn.Linear(hidden, 1)

    def first_layer(self, vectors: Tensor, part: slice) -> Tensor:
        return F.linear(vectors, self.fc1.weight[:, part])

    def forward(self, sums: Tensor) -> Tensor:
        return F.softplus(self.fc2(F.relu(sums + self.fc1.bias))).squeeze(1)


class RelationNet(Algorithm):
    """Classifies a query by a learned comparison with each class.

    relation=conv: maps of a class's support images are summed and laid on the query's; the score is regressed to
    1 for the right class and 0 for the others (equation 4).
    relation=mlp: embedding vectors are compared pair by pair, and P(y=c|x) is the mean of the scores over the
    support of c over the sum of these means; trained by cross-entropy. The logits are log P.
    """

    def __init__(self, backbone: Backbone, relation: Literal["conv", "mlp"] = "conv", hidden: int = 8) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden={hidden}: must be at least 1")
        self.backbone = backbone
        self.kind = relation
        self.relation: ConvRelation | MLPRelation
        if relation == "conv":
            self.relation = ConvRelation(backbone.out_shape, hidden)
        else:
            self.relation = MLPRelation(backbone.out_shape, hidden)

    def forward(self, tasks: TaskBatch) -> Tensor:
        support, query = per_task(self.backbone, tasks.support_x), per_task(self.backbone, tasks.query_x)
        return self.compare(support, query, tasks)

    def one_query_at_a_time(self, tasks: TaskBatch) -> Tensor:
        logits = []
        for query_x in tasks.query_x.split(1, dim=1):
            maps = per_task(self.backbone, torch.cat([tasks.support_x, query_x], dim=1))
            logits.append(self.compare(maps[:, :-1], maps[:, -1:], tasks))
        return torch.cat(logits, dim=1)

    def compare(self, support: Tensor, query: Tensor, tasks: TaskBatch) -> Tensor:
        """Logits [T, B, N] of query maps [T, B, D, h, w] against support maps [T, N*K, D, h, w]."""
        if self.kind == "conv":
            # The sum over a class's support; where classes differ in size, as if all had the mean size.
            classes = tasks.class_means(support) * (support.shape[1] / tasks.way)  # [T, N, D, h, w]
            return self.scores(classes, query)
        scores = self.scores(support.flatten(2), query.flatten(2))  # [T, B, N*K]
        per_class = tasks.class_means(scores, dim=2)  # [T, B, N]
        return (per_class / per_class.sum(dim=-1, keepdim=True)).clamp_min(1e-12).log()

    def scores(self, left: Tensor, right: Tensor) -> Tensor:
        """The relation of each of left [T, A, D, ...] with each of right [T, B, D, ...]: [T, B, A].

        The module's first layer is linear in the two halves of a pair, so it runs once on each image and not on
        each pair: the same function for a fraction of the work.
        """

        def first_layer(maps: Tensor, part: slice) -> Tensor:
            layer = partial(self.relation.first_layer, part=part)
            images = maps.flatten(0, 1)
            return (layer(images) if self.training else in_fixed_chunks(layer, images)).unflatten(0, maps.shape[:2])

        depth = left.shape[2]
        ones, others = first_layer(left, slice(depth)), first_layer(right, slice(depth, None))
        sums = ones.unsqueeze(1) + others.unsqueeze(2)  # [T, B, A, ...]
        return per_task(self.relation, sums.flatten(1, 2)).unflatten(1, sums.shape[1:3])

    def probabilities(self, logits: Tensor) -> Tensor:
        if self.kind == "mlp":
            return super().probabilities(logits)
        return logits / logits.sum(dim=-1, keepdim=True).clamp_min(1e-12)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "mlp":
            return super().loss(logits, labels)
        return F.mse_loss(logits, torch.zeros_like(logits).scatter(-1, labels.unsqueeze(-1), 1.0))


def _block(inputs: int, outputs: int, padding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=padding), nn.BatchNorm2d(outputs), nn.MaxPool2d(2), nn.ReLU()
    )
