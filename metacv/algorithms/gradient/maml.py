"""Model-Agnostic Meta-Learning (Finn et al., 2017), https://arxiv.org/abs/1703.03400"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metacv.algorithms.gradient.inner_loop import InnerLoop, Params, TaskBatching
from metacv.backbones.base import Backbone
from metacv.backbones.batch_norm import BatchNorm, batch_norms, keeps_running_statistics
from metacv.data.task import TaskBatch


class MAML(InnerLoop):
    """Learn the initial parameters whose loss on the queries is lowest after gradient steps on the support set.

    With `first_order` (FOMAML) the outer gradient treats the inner gradients as constants. With
    `gradient_checkpointing` the graph of each inner step is dropped, and computed again for the outer gradient.
    """

    execution_settings = InnerLoop.execution_settings | {"gradient_checkpointing"}

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
        if gradient_checkpointing and keeps_running_statistics(self.net):
            raise ValueError("gradient_checkpointing: running statistics of batch norm would count every step twice")
        self.inner_lr = inner_lr
        self.inner_steps, self.eval_inner_steps = inner_steps, eval_inner_steps
        self.first_order = first_order
        self.inner_loss = inner_loss
        self.gradient_checkpointing = gradient_checkpointing
        self.one_task_in_training = gradient_checkpointing and task_batching == "auto"  # takes the least memory
        norms = batch_norms(self.net)
        for norm in norms:
            if isinstance(norm, BatchNorm):
                norm.second_order = not first_order
        kept = set() if adapt_norm else {p for norm in norms for p in norm.parameters()}
        self.adapted = [name for name, p in self.net.named_parameters() if p.requires_grad and p not in kept]

    def update(self, params: Params, tasks: TaskBatch, step: int) -> Params:
        """One gradient step on the support set (equation 1)."""
        if not (self.training and self.gradient_checkpointing and not self.first_order):
            return self.gradient_step(params, tasks)

        def again(*values: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.gradient_step(dict(zip(params, values, strict=True)), tasks).values())

        return dict(zip(params, checkpoint(again, *params.values(), use_reentrant=True), strict=True))

    def gradient_step(self, params: Params, tasks: TaskBatch) -> Params:
        adapted = {name: params[name] for name in self.adapted}
        # Checkpointing disables gradients in its first pass, whose graph is not kept.
        second_order = self.training and not self.first_order and torch.is_grad_enabled()
        with torch.enable_grad():
            logits = self.classify(params, tasks.support_x)
            # The sum over the tasks, so that each task gets the gradient of its own mean.
            loss = len(tasks) * F.cross_entropy(logits.flatten(0, 1), tasks.support_y.flatten())
            if self.inner_loss == "sum_per_shot":
                loss = loss * tasks.way
            grads = torch.autograd.grad(loss, list(adapted.values()), create_graph=second_order)
        steps = zip(adapted.items(), grads, strict=True)
        return params | {name: p - self.inner_lr * grad for (name, p), grad in steps}
