"""Logistic regression on the support set with scikit-learn's objective, for many tasks at once."""

from math import sqrt
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.heads.base import Head
from metacv.bounds import Copies, Range
from metacv.data.task import TaskBatch

PRECISION = 12.0  # -log of the remaining share of the initial error
Weight = Annotated[float, Range(0, 1000, above=True)]  # the number of steps grows with its square root


class Logistic(Head):
    """Multinomial logistic regression on features of length 1: C * sum of cross-entropies + |W|^2 / 2.

    As in RFS (Tian et al., 2020), https://arxiv.org/abs/2003.11539. Class weights are combinations of support
    features, W = A X. Accelerated gradient descent (Nesterov 1983) on A costs S^2 N products a step for S support
    images, whatever the dimension.
    """

    def __init__(self, C: Weight = 1.0, augment: Copies = 0, flip: bool = False) -> None:
        super().__init__(augment, flip)
        self.C = C

    def forward(self, tasks: TaskBatch) -> Tensor:
        tasks = tasks.normalized()
        support, query = tasks.support_x, tasks.query_x
        coefficients, bias = fit(support @ support.mT, F.one_hot(tasks.support_y, tasks.way).to(support), self.C)
        return query @ support.mT @ coefficients + bias


def fit(kernel: Tensor, targets: Tensor, C: float) -> tuple[Tensor, Tensor]:
    """Return coefficients [T, S, N] and biases [T, 1, N], given products [T, S, S] of unit features and one-hot labels
    [T, S, N]."""
    # The Hessian of the cross-entropies is at most half the largest eigenvalue of the products of features with a 1
    # appended for the bias, which is at most their trace, 2 S.
    rate = 1 / (kernel.shape[1] + 1 / C)
    root = sqrt(rate / C)
    momentum = (1 - root) / (1 + root)
    point = torch.zeros_like(targets)
    before, bias, bias_before = point, point[:, :1], point[:, :1]
    for _ in range(int(PRECISION / root) + 1):  # each step shrinks the error by the factor 1 - root
        ahead, bias_ahead = point + momentum * (point - before), bias + momentum * (bias - bias_before)
        error = (kernel @ ahead + bias_ahead).softmax(-1) - targets
        before, bias_before = point, bias
        point, bias = ahead - rate * (error + ahead / C), bias_ahead - rate * error.sum(1, keepdim=True)
    return point, bias
