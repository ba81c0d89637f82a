"""Relation Networks (Sung et al., 2018), https://arxiv.org/abs/1711.06025"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metacv.algorithms.base import MetricMethod, per_task
from metacv.backbones.base import Backbone
from metacv.bounds import Images, Width
from metacv.data.task import TaskBatch


class ConvRelation(nn.Module):
    """The paper's relation module: sums of `first_layer` of two maps [B, D, h, w] -> scores [B].

    The scores are from 0 to 1, or logits if the module has no sigmoid.
    """

    def __init__(self, out_shape: tuple[int, ...], hidden: int, sigmoid: bool = True) -> None:
        super().__init__()
        self.sigmoid = sigmoid
        depth, height, width = out_shape if len(out_shape) == 3 else (*out_shape, 1, 1)
        # Two convolutions without padding and two poolings need maps of 10x10; smaller maps are padded.
        self.padding = padding = 1 if min(height, width) < 10 else 0
        if min(height, width) < 4:
            raise ValueError(f"relation=conv needs feature maps of 4x4 or more, not {height}x{width}")
        self.blocks = nn.Sequential()
        for inputs in (2 * depth, depth):
            conv = nn.Conv2d(inputs, depth, 3, padding=padding)
            self.blocks.append(nn.Sequential(conv, nn.BatchNorm2d(depth), nn.MaxPool2d(2), nn.ReLU()))
            height, width = (height + 2 * padding - 2) // 2, (width + 2 * padding - 2) // 2
        self.fc1 = nn.Linear(depth * height * width, hidden)
        self.fc2 = nn.Linear(hidden, 1)

    def first_layer(self, maps: Tensor, half: slice) -> Tensor:
        return F.conv2d(maps, self.get_parameter("blocks.0.0.weight")[:, half], padding=self.padding)

    def forward(self, sums: Tensor) -> Tensor:
        maps = sums + self.get_parameter("blocks.0.0.bias")[:, None, None]
        for layer in [*self.blocks[0].children(), self.blocks[1]][1:]:  # all after the first convolution
            maps = layer(maps)
        scores = self.fc2(F.relu(self.fc1(maps.flatten(1))))
        return (torch.sigmoid(scores) if self.sigmoid else scores).squeeze(1)


class MLPRelation(nn.Module):
    """A two-layer perceptron: sums of `first_layer` of two vectors [B, D] -> positive scores [B]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * dim, hidden)
        self.fc2 = nn.Linear(hidden, 1)

    def first_layer(self, vectors: Tensor, half: slice) -> Tensor:
        return F.linear(vectors, self.fc1.weight[:, half])

    def forward(self, sums: Tensor) -> Tensor:
        return F.softplus(self.fc2(F.relu(sums + self.fc1.bias))).squeeze(1)


class RelationNet(MetricMethod):
    """Classify each query by a learned comparison with every class.

    relation=conv: the maps of a class's support images are summed and concatenated with those of the query. The sum is
    scaled to `shot` images, the number in training, because the relation module has learned that scale; None: to the
    mean number of images per class in the task. With loss=mse, the score is regressed to 1 for the correct class and to
    0 for the others (equation 4). With loss=cross_entropy, the scores are logits, as in Chen et al., 2019,
    https://arxiv.org/abs/1904.04232.
    relation=mlp: a query is compared with each support image as vectors. P(y=c|x) is the mean score over the support of
    c, divided by the sum of these means over the classes; the logits are log P, trained by cross-entropy.
    """

    features = "maps"
    one_batch = False  # as in the authors' code

    def __init__(
        self,
        backbone: Backbone,
        relation: Literal["conv", "mlp"] = "conv",
        hidden: Width = 8,
        loss: Literal["mse", "cross_entropy"] | None = None,
        shot: Images | None = None,
    ) -> None:
        super().__init__(backbone)
        if (relation, loss) == ("mlp", "mse"):
            raise ValueError("loss=mse needs relation=conv")
        self.shot, self.kind = shot, relation
        self.regression = relation == "conv" and loss != "cross_entropy"
        self.relation: ConvRelation | MLPRelation = (
            ConvRelation(backbone.out_shape, hidden, sigmoid=self.regression)
            if relation == "conv"
            else MLPRelation(backbone.features_dim, hidden)
        )

    def head(self, tasks: TaskBatch) -> Tensor:
        support, query = tasks.support_x, tasks.query_x
        if self.kind == "conv":
            # Sums as if each class had self.shot images; if that is None, as many as the classes have on average.
            sums = tasks.class_means(support) * (self.shot or support.shape[1] / tasks.way)  # [T, N, D, h, w]
            return self.scores(sums, query)
        scores = self.scores(support.flatten(2), query.flatten(2))  # [T, Q, S]
        per_class = tasks.class_means(scores.mT).mT  # [T, Q, N]
        return (per_class / per_class.sum(dim=-1, keepdim=True)).clamp_min(1e-12).log()

    def scores(self, left: Tensor, right: Tensor) -> Tensor:
        """Return relation scores of every pair of left [T, A, D, ...] and right [T, B, D, ...]: [T, B, A]."""
        # The first layer is linear in both halves of a pair, so it runs once per image instead of once per pair.
        depth = left.shape[2]
        lefts = self.relation.first_layer(left.flatten(0, 1), slice(depth)).unflatten(0, left.shape[:2])
        rights = self.relation.first_layer(right.flatten(0, 1), slice(depth, None)).unflatten(0, right.shape[:2])
        sums = lefts.unsqueeze(1) + rights.unsqueeze(2)  # [T, B, A, ...]
        return per_task(self.relation, self.relation, sums.flatten(1, 2)).unflatten(1, sums.shape[1:3])

    def probabilities(self, logits: Tensor) -> Tensor:
        if self.regression:
            return logits / logits.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        return super().probabilities(logits)

    def softmax_logits(self, logits: Tensor) -> Tensor:
        return self.probabilities(logits).clamp_min(1e-12).log() if self.regression else logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.regression:
            return F.mse_loss(logits, torch.zeros_like(logits).scatter(-1, labels.unsqueeze(-1), 1.0))
        return super().loss(logits, labels)
