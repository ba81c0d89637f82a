"""Fine-tuning on the support set of each task.

A linear layer on fixed features, as in Baseline and Baseline++ (Chen et al., 2019), https://arxiv.org/abs/1904.04232
Or the network itself, as in P>M>F (Hu et al., 2022), https://arxiv.org/abs/2204.07305
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.base import Algorithm
from metacv.algorithms.heads.base import Embedding, Head, WithHead, changes_of_each
from metacv.algorithms.heads.ncm import nearest_mean
from metacv.bounds import Copies, EvalInnerSteps, NotNegative, Positive
from metacv.config import AugmentConfig
from metacv.data.task import TaskBatch
from metacv.data.transforms import Augment
from metacv.errors import UserError

MOMENTUM, DECAY = 0.9, 0.001  # of the linear layer
STEPS = {"head": 100, "backbone": 50}
LR = 0.01  # of the linear layer
RATES = (0.0, 0.0001, 0.001, 0.01)  # of the network: those that the authors of P>M>F choose from
SHIFT = 8  # without augmentation in training, images are shifted by up to 1 / SHIFT of their size, as in P>M>F


class Finetune(Head):
    """adapt=head: gradient descent with momentum on all support images; `cosine` (Baseline++): logits are `scale` times
    the cosines between features and class weights.

    adapt=backbone: nearest class mean of the features of a network that is tuned first, see `Tuned`. Logits are `scale`
    times minus the squared distances of features of length 1.
    """

    def __init__(
        self,
        adapt: Literal["head", "backbone"] = "head",
        steps: EvalInnerSteps | Literal["auto"] = "auto",
        lr: NotNegative | Literal["auto"] = "auto",
        cosine: bool = False,
        scale: Positive = 10.0,
        augment: Copies = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(augment, flip)
        if adapt == "backbone" and cosine:
            raise ValueError("cosine=true: only with adapt=head; adapt=backbone classifies by distances")
        if adapt == "head" and lr == 0:
            raise ValueError("lr=0: must be above 0 with adapt=head, which starts from a layer that knows nothing")
        self.adapt, self.cosine, self.scale = adapt, cosine, scale
        self.steps = STEPS[adapt] if steps == "auto" else steps
        self.lr = LR if adapt == "head" and lr == "auto" else lr

    @property
    def needs_images(self) -> bool:
        return super().needs_images or self.adapt == "backbone"

    def on(self, algorithm: Algorithm, augment: AugmentConfig) -> WithHead:
        return Tuned(algorithm, self, augment) if self.adapt == "backbone" else super().on(algorithm, augment)

    def forward(self, tasks: TaskBatch) -> Tensor:
        if self.adapt == "backbone":
            return self.scale * nearest_mean(tasks.normalized())
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
            optimizer = torch.optim.SGD([weights, bias], float(self.lr), MOMENTUM, weight_decay=DECAY)
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


class Tuned(WithHead):
    """Tune a copy of the backbone on the support set of each task, then classify by the class means of its features.

    In each of `steps` steps of Adam, every support image is augmented once, as in training. The loss is the
    cross-entropy of these images, classified by the class means of the support images. Where training had no
    augmentation, they are shifted only. Batch norm stays as in evaluation: with batch_norm=inductive it uses its
    running statistics.
    """

    tunes_network = True

    def __init__(self, algorithm: Algorithm, head: Finetune, augment: AugmentConfig) -> None:
        super().__init__(algorithm, head, augment)
        self.steps, self.lr = head.steps, head.lr

    def check_rate(self) -> float:
        """Return the learning rate; UserError if it is to be chosen."""
        if isinstance(self.lr, str):
            text = "only evaluate and compare choose it, on validation episodes; set a number, such as head.lr=0.0001"
            raise UserError(f"head.lr={self.lr}: {text}")
        return self.lr

    def tuned(self, task: TaskBatch, done: Callable[[int], None] = lambda steps: None) -> WithHead:
        """Return the model tuned on the support set of one task; `done` is called after every step."""
        rate = self.check_rate()
        model = WithHead(Embedding(copy.deepcopy(self.backbone)), self.classify, self.augment)
        optimizer = torch.optim.Adam(model.backbone.requires_grad_(True).parameters(), rate)
        images = task.support_x[0]
        config = self.augment
        if not Augment(**vars(config)):
            config = AugmentConfig(crop=min(images.shape[2:]) // SHIFT)
        augment, changes = Augment(**vars(config)), changes_of_each(config, range(len(images)), self.steps)
        with torch.enable_grad():
            for step in range(self.steps if rate else 0):
                queries = augment(images, changes[:, step]).unsqueeze(0)
                loss = self.loss(model(replace(task, query_x=queries)), task.support_y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done(1)
        return model

    def forward(self, tasks: TaskBatch) -> Tensor:
        return torch.cat([self.tuned(one)(one) for one in tasks.split(1)])

    def predict_each_query(self, tasks: TaskBatch) -> Tensor:
        return torch.cat([self.tuned(one).predict_each_query(one) for one in tasks.split(1)])
