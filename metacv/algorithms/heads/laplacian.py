"""LaplacianShot (Ziko et al., 2020), https://arxiv.org/abs/2006.15486"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.distances import closeness
from metacv.algorithms.heads.base import Head
from metacv.bounds import Copies, Images, NotNegative
from metacv.data.task import TaskBatch

STEPS = 20  # of the bound optimization; the paper's code stops at 20 too
SHARPNESS = 10  # factor of cosines in the weights of rectified prototypes


class LaplacianShot(Head):
    """Nearest prototype, with a penalty `weight` for each pair of neighbouring queries in different classes.

    Prototypes are first rectified by the queries (Liu et al., 2020, arXiv:1911.10713), as in the paper. `neighbours`
    is the number of nearest queries to which each query is tied.
    """

    uses_query_set = True

    def __init__(
        self, weight: NotNegative = 0.3, neighbours: Images = 3, augment: Copies = 0, flip: bool = False
    ) -> None:
        super().__init__(augment, flip)
        self.weight, self.neighbours = weight, neighbours

    def forward(self, tasks: TaskBatch) -> Tensor:
        tasks = tasks.at_least_fp32().normalized()
        query = tasks.query_x + tasks.support_x.mean(1, keepdim=True) - tasks.query_x.mean(1, keepdim=True)
        # Minus the unary terms of the objective, up to a number for each query.
        near = 2 * closeness(query, rectified(tasks, query))  # [T, Q, N]
        logits, ties = near, nearest(query, self.neighbours)  # [T, Q, Q]
        for _ in range(STEPS):
            logits = near + self.weight * ties @ logits.softmax(-1)  # algorithm 1, with its exponentials in the softmax
        return logits


def rectified(tasks: TaskBatch, query: Tensor) -> Tensor:
    """Return prototypes [T, N, D]: means of the support images of a class and of the queries [T, Q, D] nearest to it,
    weighted by a softmax of their cosines to the means of the support images."""
    images = torch.cat([tasks.support_x, query], dim=1)  # [T, S + Q, D]
    cosines = F.normalize(images, dim=-1) @ F.normalize(tasks.class_means(tasks.support_x), dim=-1).mT
    nearest_class = cosines[:, tasks.support_x.shape[1] :].argmax(-1)
    member = F.one_hot(torch.cat([tasks.support_y, nearest_class], dim=1), tasks.way)  # [T, S + Q, N]
    weights = (SHARPNESS * cosines).softmax(-1) * member
    return weights.mT @ images / weights.sum(1).unsqueeze(2)


def nearest(query: Tensor, neighbours: int) -> Tensor:
    """Return a matrix [T, Q, Q] with ones where the column is one of the nearest other queries of the row."""
    count = query.shape[1]
    distances = torch.cdist(query, query, compute_mode="donot_use_mm_for_euclid_dist")
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    columns = distances.topk(min(neighbours, count - 1), largest=False).indices
    return torch.zeros_like(distances).scatter_(2, columns, 1)
