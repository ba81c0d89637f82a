"""Tasks and image batches, which samplers produce and algorithms consume."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MANY = 2**20  # support images times classes above which a sum for each class is faster than a product of matrices


@dataclass(frozen=True)
class TaskBatch:
    """T tasks of N classes. The class of an image is given by its label, not by its position."""

    support_x: Tensor  # [T, S, C, H, W], from 0 to 1; or features: [T, S, D] vectors or [T, S, D, h, w] maps
    support_y: Tensor  # [T, S], from 0 to N - 1
    query_x: Tensor  # [T, Q, C, H, W]
    query_y: Tensor  # [T, Q]
    way: int  # N
    classes: Tensor  # [T, N], index of each class in its data set
    seeds: Tensor | None = None  # int64 [T], for random draws of the algorithm within a task

    def __len__(self) -> int:
        return len(self.support_x)

    def parts(self) -> "list[TaskBatch]":
        """Return batches whose tasks have equal shapes."""
        return [self]

    def members(self) -> Tensor:
        """Return whether each support image is of each class: bool [T, S, N]."""
        return self.support_y.unsqueeze(2) == torch.arange(self.way, device=self.support_y.device)

    def class_sums(self, values: Tensor) -> Tensor:
        """Return sums over the support images of each class, in fp32 or more: values [T, S, ...] -> [T, N, ...]."""
        values = at_least_fp32(values)
        if values.device.type == "cpu" and values.shape[1] * self.way > MANY:
            sums = values.new_zeros(len(values), self.way, *values.shape[2:])
            for total, own, labels in zip(sums, values, self.support_y, strict=True):
                total.index_add_(0, labels, own)
            return sums
        with torch.autocast(values.device.type, enabled=False):
            return (self.members().to(values.dtype).mT @ values.flatten(2)).unflatten(2, values.shape[2:])

    def class_means(self, values: Tensor) -> Tensor:
        """Return means over the support images of each class, in fp32 or more: values [T, S, ...] -> [T, N, ...]."""
        sums, sizes = self.class_sums(values), self.members().sum(1)
        return sums / sizes.to(sums.dtype).view(*sizes.shape, *(1,) * (sums.dim() - 2))

    def map(self, function: Callable[[Tensor], Tensor]) -> "TaskBatch":
        """Apply `function` to the images or features."""
        return replace(self, support_x=function(self.support_x), query_x=function(self.query_x))

    def normalized(self) -> "TaskBatch":
        """Scale each feature vector to length 1."""
        return self.map(lambda features: F.normalize(features, dim=-1))

    def at_least_fp32(self) -> "TaskBatch":
        """Convert features of lower precision to fp32."""
        return self.map(at_least_fp32)

    def with_copies(self, copies: Tensor) -> "TaskBatch":
        """Add V copies of each support image, [T, S * V, ...], with the copies of an image next to each other."""
        labels = self.support_y.repeat_interleave(copies.shape[1] // self.support_y.shape[1], dim=1)
        support = torch.cat([self.support_x, copies], dim=1), torch.cat([self.support_y, labels], dim=1)
        return replace(self, support_x=support[0], support_y=support[1])

    def split(self, size: int) -> "Iterator[TaskBatch]":
        """Yield the tasks in batches of `size`; the last may be smaller."""
        chunks = {name: value.split(size) for name, value in vars(self).items() if isinstance(value, Tensor)}
        for parts in zip(*chunks.values(), strict=True):
            yield replace(self, **dict[str, Any](zip(chunks, parts, strict=True)))

    def each_query(self) -> "list[TaskBatch]":
        """Return the tasks once for each of their queries, with that query only."""
        queries = zip(self.query_x.split(1, dim=1), self.query_y.split(1, dim=1), strict=True)
        return [replace(self, query_x=x, query_y=y) for x, y in queries]


def at_least_fp32(values: Tensor) -> Tensor:
    """Convert values of lower precision to fp32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class TaskList:
    """Tasks of different shapes, each a batch of one task."""

    tasks: list[TaskBatch]

    def __len__(self) -> int:
        return len(self.tasks)

    def parts(self) -> list[TaskBatch]:
        return self.tasks


@dataclass(frozen=True)
class ImageBatch:
    """Labelled images of all training classes."""

    images: Tensor  # [B, C, H, W], from 0 to 1
    labels: Tensor  # [B], from 0 to the number of classes - 1

    def __len__(self) -> int:
        return len(self.images)

    def parts(self) -> "list[ImageBatch]":
        return [self]
