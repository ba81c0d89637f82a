"""Meta-SGD (Li et al., 2017), https://arxiv.org/abs/1707.09835"""

from typing import Any

import torch
from torch import Tensor, nn

from metacv.algorithms.gradient.inner_loop import key
from metacv.algorithms.gradient.maml import MAML


class MetaSGD(MAML):
    """MAML with a learned inner learning rate for each single weight (equation 3), initially `inner_lr`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.rates = nn.ParameterDict()
        for name in self.adapted:
            self.rates[key(name)] = nn.Parameter(torch.full_like(self.net.get_parameter(name), self.inner_lr))

    def rate(self, name: str, step: int, way: int) -> Tensor:
        rate = self.rates[key(name)]
        if name.startswith("head.") and way != self.way:
            rate = rate.mean(0, keepdim=True)  # of the classes, which are exchangeable
        return rate if self.training else rate.detach()
