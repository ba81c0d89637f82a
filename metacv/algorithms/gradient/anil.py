"""ANIL, Almost No Inner Loop (Raghu et al., 2020), https://arxiv.org/abs/1909.09157"""

import torch
from torch import Tensor

from metacv.algorithms.gradient.inner_loop import Params
from metacv.algorithms.gradient.maml import MAML
from metacv.data.task import TaskBatch


class ANIL(MAML):
    """MAML whose inner loop adapts the last layer only (section 4). The support set is embedded once."""

    part = "head."

    def adapt(self, tasks: TaskBatch) -> Params:
        return super().adapt(self.with_features(tasks))

    def update(self, params: Params, tasks: TaskBatch, step: int) -> Params:
        return self.gradient_step(params, tasks, step)  # needs too little memory to be computed again

    def support_logits(self, params: Params, tasks: TaskBatch, step: int) -> Tensor:
        return torch.baddbmm(params["head.bias"].unsqueeze(1), tasks.support_x, params["head.weight"].mT)
