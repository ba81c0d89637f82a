"""What MAML and Reptile share: a classifier whose parameters are adapted to each task by gradient steps."""

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from metacv import MetacvError
from metacv.algorithms.base import Algorithm, in_fixed_chunks, keeps_running_statistics, uses_batch_statistics
from metacv.backbones.base import Backbone
from metacv.data.sampler import TaskBatch

Params = dict[str, Tensor]
TaskBatching = Literal["auto", "loop", "vmap"]
# Measured on CPUs with Conv4: passes of so few pixels a task (ten images of 28x28) are 1.5 to 1.8 times as fast when so
# many tasks go together; with twice as many nothing is gained, with ten times as many it is slower.
FEW_PIXELS, FEW_TASKS = 10 * 28 * 28, 8


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

    Tasks pass through the network one after another (task_batching=loop), or `task_chunk` of them together, each with
    its own weights (vmap): the same but for rounding. auto: together on a GPU, and on a CPU where that was measured to
    be faster.
    """

    def __init__(self, backbone: Backbone, way: int, task_batching: TaskBatching, task_chunk: int | None) -> None:
        super().__init__()
        if way < 2:
            raise ValueError(f"way={way}: must be at least 2")
        if task_chunk is not None and task_chunk < 1:
            raise ValueError(f"task_chunk={task_chunk}: must be at least 1")
        self.net = Classifier(backbone, way)
        self.way = way
        self.names = [name for name, _ in self.net.named_parameters()]
        self.task_batching, self.task_chunk = task_batching, task_chunk
        if task_batching == "vmap" and keeps_running_statistics(self.net):
            raise ValueError("task_batching=vmap: batch norm that keeps running statistics sees one task after another")

    @abstractmethod
    def adapt(self, tasks: TaskBatch) -> Params:
        """Parameters of `net`, those that were adapted to the support set of each task with a leading [T]."""

    def forward(self, tasks: TaskBatch) -> Tensor:
        return torch.cat([self.classify(self.adapt(part), part.query_x) for part in self.parts(tasks)])

    def one_query_at_a_time(self, tasks: TaskBatch) -> Tensor:
        logits = []
        for part in self.parts(tasks):
            own = self.of_each(self.adapt(part), len(part))
            for params, support, queries in zip(own, part.support_x, part.query_x, strict=True):
                beside = partial(self._beside, params, support)
                logits.append(in_fixed_chunks(beside, queries, FEW_TASKS if self.together(support) else 1))
        return torch.stack(logits)

    def _beside(self, params: Params, support: Tensor, queries: Tensor) -> Tensor:
        """Logits [B, N] of queries [B, C, H, W], each in one batch with the support set [N*K, C, H, W]."""
        batches = torch.cat([support.expand(len(queries), *support.shape), queries.unsqueeze(1)], dim=1)
        if len(batches) == 1:
            return self._call(params, batches[0])[-1:]
        return vmap(partial(self._call, params), randomness="different")(batches)[:, -1]

    def classify(self, params: Params, images: Tensor) -> Tensor:
        """Logits [T, B, N] of images [T, B, C, H, W] under each task's parameters."""
        inductive = not (self.training or uses_batch_statistics(self.net))
        if len(images) > 1 and self.together(images[0]) and not inductive:
            # Gradients are taken outside of vmap: inside, fused batch norm's are wrong (pytorch/functorch#534).
            shared = {name: None if self._is_shared(name, p) else 0 for name, p in params.items()}
            return vmap(self._call, in_dims=(shared, 0), randomness="different")(params, images)
        logits = []
        for own, task in zip(self.of_each(params, len(images)), images, strict=True):
            call = partial(self._call, own)
            logits.append(in_fixed_chunks(call, task) if inductive else call(task))
        return torch.stack(logits)

    def together(self, images: Tensor) -> bool:
        """Whether tasks with as many images as [B, C, H, W] pass through the network together."""
        if self.task_batching != "auto":
            return self.task_batching == "vmap"
        worth_it = images.is_cuda or len(images) * images[0, 0].numel() <= FEW_PIXELS
        return worth_it and not keeps_running_statistics(self.net)

    def parts(self, tasks: TaskBatch) -> Iterator[TaskBatch]:
        """The tasks, as many at a time as are adapted together."""
        if not self.together(tasks.support_x[0]):
            return tasks.split(1)
        return tasks.split(self.task_chunk or (len(tasks) if tasks.support_x.is_cuda else FEW_TASKS))

    def of_each(self, params: Params, tasks: int) -> list[Params]:
        """The parameters of each task, without the leading [T]."""
        own = {name: [p] * tasks if self._is_shared(name, p) else p.unbind() for name, p in params.items()}
        return [{name: each[t] for name, each in own.items()} for t in range(tasks)]

    def _is_shared(self, name: str, param: Tensor) -> bool:
        return param.dim() == self.net.get_parameter(name).dim()

    def _call(self, params: Params, images: Tensor) -> Tensor:
        return functional_call(self.net, params, (images,))

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
