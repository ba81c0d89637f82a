"""ProtoMAML (Triantafillou et al., 2020), https://arxiv.org/abs/1903.03096"""

from typing import Any

from metacv.algorithms.gradient.inner_loop import Params
from metacv.algorithms.gradient.maml import MAML
from metacv.data.task import TaskBatch


class ProtoMAML(MAML):
    """MAML whose head starts as a Prototypical Network: weights 2 c and bias -|c|^2 for the class mean c (section 3).

    The outer gradient flows through the means, also with first_order=true. Tasks may have any number of classes.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.net.head.requires_grad_(False)  # each task has its own

    def initial(self, tasks: TaskBatch) -> Params:
        means = tasks.class_means(self.with_features(tasks).support_x)  # [T, N, D]
        head = {"head.weight": 2 * means, "head.bias": -means.square().sum(-1)}
        if not self.training:
            head = {name: value.detach().requires_grad_() for name, value in head.items()}
        return super().initial(tasks) | head

    def for_way(self, params: Params, way: int) -> Params:
        return params
