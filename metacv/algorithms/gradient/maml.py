"""Model-Agnostic Meta-Learning (Finn et al., 2017), https://arxiv.org/abs/1703.03400"""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metacv.algorithms.base import batch_norms, keeps_running_statistics
from metacv.algorithms.gradient.inner_loop import InnerLoop, Params, TaskBatching
from metacv.backbones.base import Backbone
from metacv.backbones.batch_norm import BatchNorm
from metacv.data.sampler import TaskBatch


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
        gradient_checkpointing: bool = False,
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
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing and keeps_running_statistics(self.net):
            raise ValueError("gradient_checkpointing: batch norm's running statistics would count every step twice")
        kept = set()
        for norm in batch_norms(self.net):
            if isinstance(norm, BatchNorm):
                norm.second_order = not first_order
            if not adapt_norm:
                kept |= {*norm.parameters()}
        self.adapted = [name for name, p in self.net.named_parameters() if p.requires_grad and p not in kept]

    def together(self, images: Tensor) -> bool:
        """With gradient_checkpointing, auto does what takes the least memory."""
        sparing = self.training and self.gradient_checkpointing and self.task_batching == "auto"
        return not sparing and super().together(images)

    def adapt(self, tasks: TaskBatch) -> Params:
        """Equation 1. In training mode the result is a function of the initial parameters that can be
        differentiated: of second order unless `first_order`, which takes the inner gradients as constants.
        `gradient_checkpointing` forgets each inner step and repeats it when the outer gradient comes by."""
        params: Params = dict(self.net.named_parameters())
        if not self.training:
            params = {name: p.detach().requires_grad_() for name, p in params.items()}
        second_order = self.training and not self.first_order
        with torch.enable_grad():
            params = self.for_way(params, tasks.way)
            params |= {name: params[name].expand(len(tasks), *params[name].shape) for name in self.adapted}
            for _ in range(self.inner_steps if self.training else self.eval_inner_steps):
                step = partial(self.inner_step, tasks)
                if second_order and self.gradient_checkpointing:
                    adapted = checkpoint(step, *params.values(), use_reentrant=True)
                else:
                    adapted = step(*params.values())
                params = params | dict(zip(self.adapted, adapted, strict=True))
        return params

    def inner_step(self, tasks: TaskBatch, *values: Tensor) -> tuple[Tensor, ...]:
        """The adapted ones of all parameters after one step more."""
        params = dict(zip(self.names, values, strict=True))
        adapted = [params[name] for name in self.adapted]
        second_order = self.training and not self.first_order and torch.is_grad_enabled()
        with torch.enable_grad():
            logits = self.classify(params, tasks.support_x)
            # The sum over the tasks, so that each gets the gradient of its own mean.
            loss = len(tasks) * F.cross_entropy(logits.flatten(0, 1), tasks.support_y.flatten())
            if self.inner_loss == "sum_per_shot":
                loss = loss * tasks.way
            grads = torch.autograd.grad(loss, adapted, create_graph=second_order)
        return tuple(p - self.inner_lr * grad for p, grad in zip(adapted, grads, strict=True))
