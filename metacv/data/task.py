"""Tasks, as the sampler makes them and the algorithms take them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskBatch:
    """T tasks of N classes. Labels, not positions, say which class an image belongs to.

    The images may also be features: [T, S, D] vectors or [T, S, D, h, w] maps instead of [T, S, C, H, W].
    """

    support_x: Tensor  # [T, S, C, H, W], from 0 to 1
    support_y: Tensor  # [T, S], from 0 to N - 1
    query_x: Tensor  # [T, Q, C, H, W]
    query_y: Tensor  # [T, Q]
    way: int  # N
    classes: Tensor  # [T, N], index of each class in its data set
    seeds: Tensor | None = None  # int64 [T], for algorithms that draw at random within a task

    def __len__(self) -> int:
        return len(self.support_x)

    def class_means(self, values: Tensor) -> Tensor:
        """Means over the support images of each class: values [T, S, ...] -> [T, N, ...]."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        labels = torch.arange(self.way, device=values.device)
        member = (self.support_y.unsqueeze(2) == labels).to(values.dtype)  # [T, S, N]
        weights = (member / member.sum(dim=1, keepdim=True)).mT
        with torch.autocast(values.device.type, enabled=False):
            means = weights @ values.reshape(*values.shape[:2], -1)
        return means.reshape(len(self), self.way, *values.shape[2:])

    def split(self, size: int) -> "Iterator[TaskBatch]":
        """The tasks in batches of `size`; the last may have fewer."""
        for start in range(0, len(self), size):
            tensors: dict[str, Any] = {
                own.name: value[start : start + size]
                for own in fields(self)
                if isinstance(value := getattr(self, own.name), Tensor)
            }
            yield replace(self, **tensors)

    def with_query(self, index: int) -> "TaskBatch":
        """The same tasks with one of their queries alone."""
        one = slice(index, index + 1)
        return replace(self, query_x=self.query_x[:, one], query_y=self.query_y[:, one])
