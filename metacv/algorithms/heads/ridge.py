"""Ridge regression to one-hot labels, in closed form (Bertinetto et al., 2019), https://arxiv.org/abs/1805.08136"""

import torch
from torch import Tensor

from metacv.algorithms.heads.base import Head
from metacv.bounds import Copies, Positive
from metacv.data.task import TaskBatch, at_least_fp32


class Ridge(Head):
    """W = X' (X X' + penalty I)^-1 Y, for unit features X and one-hot labels Y: a system of S equations, not D."""

    def __init__(self, penalty: Positive = 1.0, augment: Copies = 0, flip: bool = False) -> None:
        super().__init__(augment, flip)
        self.penalty = penalty

    def forward(self, tasks: TaskBatch) -> Tensor:
        return ridge(tasks.normalized(), self.penalty)


def ridge(tasks: TaskBatch, penalty: float | Tensor) -> Tensor:
    """Return predictions [T, Q, N] for the queries of tasks of features; differentiable."""
    with torch.autocast(tasks.support_x.device.type, enabled=False):
        support, query = at_least_fp32(tasks.support_x), at_least_fp32(tasks.query_x)  # [T, S, D], [T, Q, D]
        targets = tasks.members().to(support)
        unit = torch.eye(support.shape[1], dtype=support.dtype, device=support.device)
        products = support @ support.mT + penalty * unit
        # solve_ex does not check for errors, which would wait for the GPU; products + penalty I is always invertible.
        return query @ support.mT @ torch.linalg.solve_ex(products, targets).result
