"""R2D2 (Bertinetto et al., 2019), https://arxiv.org/abs/1805.08136; also MetaOptNet with ridge (Lee et al., 2019)."""

import torch
from torch import Tensor, nn

from metacv.algorithms.base import MetricMethod
from metacv.algorithms.heads.ridge import ridge
from metacv.backbones.base import Backbone
from metacv.bounds import Positive
from metacv.data.task import TaskBatch


class R2D2(MetricMethod):
    """Differentiable ridge regression from features to one-hot labels, in closed form (section 3.2).

    Scale, shift and, if `learn_penalty`, the penalty are trained as well.
    """

    def __init__(self, backbone: Backbone, penalty: Positive, scale: Positive, learn_penalty: bool) -> None:
        super().__init__(backbone)
        self.log_penalty = nn.Parameter(torch.tensor(penalty).log(), requires_grad=learn_penalty)
        self.scale, self.shift = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.zeros(()))

    def head(self, tasks: TaskBatch) -> Tensor:
        return self.scale * ridge(tasks, self.log_penalty.exp()) + self.shift  # equations 5 and 6
