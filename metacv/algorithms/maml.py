"""Model-Agnostic Meta-Learning (Finn et al., 2017), https://arxiv.org/abs/1703.03400"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.base import accuracies, batch_norms
from metacv.algorithms.inner_loop import InnerLoop, Params, TaskBatching
from metacv.backbones import Backbone
from metacv.data.episodes import TaskBatch


class MAML(InnerLoop):
    """Learns the initial parameters whose loss on the queries is least after gradient steps on the support set."""

    def __init__(
        self,
        backbone: Backbone,
        way: int,
        inner_lr: float,
        inner_steps: int,
        eval_inner_steps: int,
        first_order: bool = False,
        inner_loss: Literal["mean", "sum_per_shot"] = "mean",
        adapt_norm: bool = False,
        task_batching: TaskBatching = "auto",
        task_chunk: int | None = None,
    ) -> None:
        super().__init__(backbone, way, task_batching, task_chunk)
        if inner_lr <= 0 or inner_steps < 1 or eval_inner_steps < 1:
            raise ValueError(
                f"inner_lr={inner_lr}, inner_steps={inner_steps}, eval_inner_steps={eval_inner_steps}: "
                "all must be positive"
            )
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.eval_inner_steps = eval_inner_steps
        self.first_order = first_order
        self.inner_loss = inner_loss
        norms = {p for norm in batch_norms(self.net) for p in norm.parameters()}
        self.adapted = [
            name for name, p in self.net.named_parameters() if p.requires_grad and (adapt_norm or p not in norms)
        ]

    def adapt(self, tasks: TaskBatch) -> Params:
        """Equation 1. In training mode the result is a function of the initial parameters that can be
        differentiated: of second order unless `first_order`, which takes the inner gradients as constants."""
        params: Params = dict(self.net.named_parameters())
        if not self.training:
            params = {name: p.detach().requires_grad_() for name, p in params.items()}
        second_order = self.training and not self.first_order
        with torch.enable_grad():
            params = self.for_way(params, tasks.way)
            params |= {name: params[name].expand(len(tasks), *params[name].shape) for name in self.adapted}
            for _ in range(self.inner_steps if self.training else self.eval_inner_steps):
                loss = len(tasks) * F.cross_entropy(
                    self.classify(params, tasks.support_x).flatten(0, 1), tasks.support_y.flatten()
                )  # the sum over the tasks, so that each gets the gradient of its own mean
                if self.inner_loss == "sum_per_shot":
                    loss = loss * tasks.way
                adapted = [params[name] for name in self.adapted]
                grads = torch.autograd.grad(loss, adapted, create_graph=second_order)
                params = params | {
                    name: p - self.inner_lr * grad for name, p, grad in zip(self.adapted, adapted, grads, strict=True)
                }
        return params

    def backward(self, tasks: TaskBatch) -> dict[str, Tensor]:
        """A part of the tasks after another, so that memory holds the graph of one part only."""
        losses, right = [], []
        for part in self.parts(tasks):
            logits = self(part)
            loss = self.loss(logits, part.query_y) * (len(part) / len(tasks))
            loss.backward()
            losses.append(loss.detach())
            right.append(accuracies(logits, part.query_y))
        return {"loss": torch.stack(losses).sum(), "accuracy": torch.cat(right).mean()}
