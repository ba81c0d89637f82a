"""Transductive information maximization (Boudiaf et al., 2020), https://arxiv.org/abs/2008.11297"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.distances import closeness
from metacv.algorithms.heads.base import Head
from metacv.bounds import Copies, InnerSteps, NotNegative, Positive
from metacv.data.task import TaskBatch


class TIM(Head):
    """TIM-ADM: class weights that fit the support set, and whose predictions for the queries are sure and diverse.

    Minimizes `support` * cross-entropy of the support set - entropy of the mean prediction of the queries + `certainty`
    * mean entropy of a query's prediction, by the updates of proposition 1 (alternating direction method). The entropy
    of the mean prediction favours equally many queries of each class.
    """

    uses_query_set = True

    def __init__(
        self,
        steps: InnerSteps = 150,
        scale: Positive = 15.0,
        support: Positive = 0.1,
        certainty: NotNegative = 0.1,
        augment: Copies = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(augment, flip)
        self.steps, self.scale, self.support, self.certainty = steps, scale, support, certainty

    def forward(self, tasks: TaskBatch) -> Tensor:
        tasks = tasks.at_least_fp32().normalized()
        images = torch.cat([tasks.support_x, tasks.query_x], dim=1)  # [T, S + Q, D]
        labels = F.one_hot(tasks.support_y, tasks.way).to(images)
        shots, queries, sure = labels.shape[1], tasks.query_x.shape[1], 1 + self.certainty
        parts = images.new_full((shots, 1), self.support / sure), images.new_full((queries, 1), shots / queries)
        factors = torch.cat(parts)
        weights = tasks.class_means(tasks.support_x)  # [T, N, D]
        for _ in range(self.steps):
            logits = self.scale * closeness(images, weights)
            powers = sure * logits[:, shots:].log_softmax(-1)  # [T, Q, N]
            targets = (powers - powers.logsumexp(1, keepdim=True) / 2).softmax(-1)
            wanted = factors * torch.cat([labels, targets], dim=1)  # [T, S + Q, N]
            now = factors * logits.softmax(-1)
            total = (wanted - now).mT @ images + now.sum(1).unsqueeze(2) * weights
            weights = total / wanted.sum(1).unsqueeze(2)
        return self.scale * closeness(tasks.query_x, weights)
