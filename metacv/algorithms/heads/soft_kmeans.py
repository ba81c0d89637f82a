"""Soft k-means over support and query (Ren et al., 2018), https://arxiv.org/abs/1803.00676"""

from torch import Tensor

from metacv.algorithms.distances import closeness
from metacv.algorithms.heads.base import Head, means_with_queries
from metacv.bounds import Copies, InnerSteps, Positive
from metacv.data.task import TaskBatch


class SoftKMeans(Head):
    """Class means of unit features, to which each query then adds its share in the class, as in section 3.1.1.

    The queries of a task are the unlabelled images of the paper. `scale` multiplies squared distances: those
    of unit features are at most 4, so without it all shares would be about equal.
    """

    uses_query_set = True

    def __init__(self, steps: InnerSteps = 1, scale: Positive = 10.0, augment: Copies = 0, flip: bool = False) -> None:
        super().__init__(augment, flip)
        self.steps, self.scale = steps, scale

    def forward(self, tasks: TaskBatch) -> Tensor:
        tasks = tasks.at_least_fp32().normalized()
        means = tasks.class_means(tasks.support_x)  # [T, N, D]
        for _ in range(self.steps):
            shares = (2 * self.scale * closeness(tasks.query_x, means)).softmax(-1)  # [T, Q, N]
            means = means_with_queries(tasks, shares)  # the refined prototypes
        return 2 * self.scale * closeness(tasks.query_x, means)
