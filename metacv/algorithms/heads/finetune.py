"""A linear layer trained on the support set: Baseline and Baseline++ (Chen et al., 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.heads.base import Head
from metacv.bounds import Copies, EvalInnerSteps, Positive
from metacv.data.task import TaskBatch

MOMENTUM, DECAY = 0.9, 0.001


class Finetune(Head):
    """Gradient descent with momentum on all support images, https://arxiv.org/abs/1904.04232

    `cosine` (Baseline++): logits are `scale` times the cosines between features and class weights.
    """

    def __init__(
        self,
        steps: EvalInnerSteps = 100,
        lr: Positive = 0.01,
        cosine: bool = False,
        scale: Positive = 10.0,
        augment: Copies = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(augment, flip)
        self.steps, self.lr, self.cosine, self.scale = steps, lr, cosine, scale

    def forward(self, tasks: TaskBatch) -> Tensor:
        if self.cosine:
            tasks = tasks.normalized()
        support, query = tasks.support_x, tasks.query_x
        weights = tasks.class_means(support)  # deterministic initial weights
        bias = torch.zeros_like(weights[..., :1])
        if not self.cosine:
            weights = torch.zeros_like(weights)
        targets = F.one_hot(tasks.support_y, tasks.way).to(support)
        with torch.enable_grad():
            weights, bias = (p.detach().requires_grad_() for p in (weights, bias))
            optimizer = torch.optim.SGD([weights, bias], self.lr, MOMENTUM, weight_decay=DECAY)
            for _ in range(self.steps):
                loss = -(self.logits(weights, bias, support).log_softmax(-1) * targets).sum() / support.shape[1]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return self.logits(weights, bias, query).detach()

    def logits(self, weights: Tensor, bias: Tensor, features: Tensor) -> Tensor:
        """Return logits [T, B, N] of features [T, B, D], for weights [T, N, D] and biases [T, N, 1]."""
        if self.cosine:
            return self.scale * features @ F.normalize(weights, dim=-1).mT
        return features @ weights.mT + bias.mT
