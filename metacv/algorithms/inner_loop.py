"""What MAML and Reptile share: a classifier whose parameters are adapted to each task by gradient steps."""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metacv import MetacvError
from metacv.algorithms.base import Algorithm, in_fixed_chunks, uses_batch_statistics
from metacv.backbones import Backbone
from metacv.data.episodes import TaskBatch

Params = dict[str, Tensor]


class Classifier(nn.Module):
    """A backbone with a linear head: images [B, C, H, W] -> logits [B, N]."""

    def __init__(self, backbone: Backbone, way: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(torch.Size(backbone.out_shape).numel(), way)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).flatten(1))


class InnerLoop(Algorithm):
    """Adapts a classifier to the support set, then lets it label the queries.

    The head fits the trained number of classes. For any other number, every class starts from the mean of the
    trained head's rows: a start that prefers no class, from which adaptation tells them apart (Ye & Chao 2022,
    arXiv:2106.16245, use it for the trained number too).
    """

    def __init__(self, backbone: Backbone, way: int) -> None:
        super().__init__()
        if way < 2:
            raise ValueError(f"way={way}: must be at least 2")
        self.net = Classifier(backbone, way)
        self.way = way

    @abstractmethod
    def adapt(self, task: TaskBatch) -> Params:
        """Parameters of `net` adapted to the support set of a batch of one task."""

    def forward(self, tasks: TaskBatch) -> Tensor:
        return torch.stack([self.classify(self.adapt(task), task.query_x[0]) for task in tasks])

    def one_query_at_a_time(self, tasks: TaskBatch) -> Tensor:
        logits = []
        for task in tasks:
            params, support = self.adapt(task), task.support_x[0]
            each = (torch.cat([support, query]) for query in task.query_x[0].split(1))
            logits.append(torch.cat([self.classify(params, images)[-1:] for images in each]))
        return torch.stack(logits)

    def classify(self, params: Params, images: Tensor) -> Tensor:
        """Logits [B, N] of images [B, C, H, W] under these parameters of `net`."""
        if self.training or uses_batch_statistics(self.net):
            return functional_call(self.net, params, (images,))
        return in_fixed_chunks(lambda part: functional_call(self.net, params, (part,)), images)

    def for_way(self, params: Params, way: int) -> Params:
        """The parameters with a head for `way` classes, by the rule above."""
        if way == self.way:
            return params
        if self.training:
            raise MetacvError(f"algo.way={self.way} but train_way={way}: the head is trained for train_way classes")
        head = {name: params[name] for name in ("head.weight", "head.bias")}
        return params | {
            name: rows.mean(0, keepdim=True).repeat(way, *[1] * (rows.dim() - 1)) for name, rows in head.items()
        }
