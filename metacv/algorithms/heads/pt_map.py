"""Power transform and optimal transport, PT-MAP (Hu et al., 2021), https://arxiv.org/abs/2006.03806"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.distances import closeness
from metacv.algorithms.heads.base import Head, means_with_queries
from metacv.bounds import Copies, InnerSteps, Positive, Range, Share
from metacv.data.task import TaskBatch

SMALL = 1e-6  # added before the power transform
ROUNDS = 200  # of Sinkhorn's algorithm; more change no label of 22,500 queries of CIFAR-FS
Sharpness = Annotated[float, Range(0, 20, above=True)]  # beyond, shares underflow


class PTMAP(Head):
    """Class centres that move towards the queries, which are assigned by optimal transport in equal parts.

    As in algorithm 1: features are raised to `power` and scaled to length 1, then centred, for support and query
    separately, and scaled again. Each step moves the centres by the share `rate` of the way to the means of their
    images. `sharpness` is the paper's lambda. The assignment assumes equally many queries of each class.
    """

    uses_query_set = True

    def __init__(
        self,
        power: Positive = 0.5,
        sharpness: Sharpness = 10.0,
        rate: Share = 0.4,
        steps: InnerSteps = 20,
        augment: Copies = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(augment, flip)
        self.power, self.sharpness, self.rate, self.steps = power, sharpness, rate, steps

    def forward(self, tasks: TaskBatch) -> Tensor:
        tasks = tasks.at_least_fp32().map(self.transformed)
        centres = tasks.class_means(tasks.support_x)  # [T, N, D]
        for _ in range(self.steps):
            means = means_with_queries(tasks, self.assigned(tasks.query_x, centres).exp())
            centres = centres + self.rate * (means - centres)
        return self.assigned(tasks.query_x, centres)

    def transformed(self, features: Tensor) -> Tensor:
        """Transform features [T, B, D] so that those of a class are closer to a Gaussian."""
        signs = torch.where(features < 0, -1, 1)  # networks without a last ReLU have negative features too
        features = F.normalize(signs * (features.abs() + SMALL) ** self.power, dim=-1)
        return F.normalize(features - features.mean(1, keepdim=True), dim=-1)

    def assigned(self, query: Tensor, centres: Tensor) -> Tensor:
        """Return the logarithm of the shares of queries [T, Q, D] in the classes [T, Q, N], by Sinkhorn's algorithm.

        The shares of a query sum to 1, and those of a class to Q / N.
        """
        logits = 2 * self.sharpness * closeness(query, centres)
        plan = (logits - logits.amax(2, keepdim=True)).exp()
        columns = torch.ones_like(plan[:, :1].mT)  # [T, N, 1]
        for _ in range(ROUNDS):
            rows = 1 / (plan @ columns)  # [T, Q, 1]
            columns = query.shape[1] / centres.shape[1] / (plan.mT @ rows)
        return (logits + columns.log().mT).log_softmax(-1)
