"""Model-Agnostic Meta-Learning (Finn et al., 2017), https://arxiv.org/abs/1703.03400"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metacv.algorithms.base import per_task
from metacv.algorithms.gradient.inner_loop import InnerLoop, Params, TaskBatching
from metacv.backbones.base import Backbone
from metacv.backbones.batch_norm import BatchNorm, batch_norms, keeps_running_statistics
from metacv.bounds import Count, EvalInnerSteps, InnerSteps, Positive, Way
from metacv.data.task import TaskBatch


class MAML(InnerLoop):
    """Learn initial parameters that minimize the query loss after gradient steps on the support set."""

    execution_settings = InnerLoop.execution_settings | {"gradient_checkpointing"}
    part = ""  # the inner loop adapts the parameters whose names begin so

    def __init__(
        self,
        backbone: Backbone,
        way: Way,
        inner_lr: Positive,
        inner_steps: InnerSteps,
        eval_inner_steps: EvalInnerSteps,
        first_order: bool = False,  # FOMAML: inner gradients are constants
        inner_loss: Literal["mean", "sum_per_shot"] = "mean",
        adapt_norm: bool = False,
        gradient_checkpointing: bool = False,  # recompute inner steps in the outer backward pass
        task_batching: TaskBatching = "auto",
        task_chunk: Count | None = None,
    ) -> None:
        super().__init__(backbone, way, task_batching, task_chunk)
        if gradient_checkpointing and keeps_running_statistics(self.net):
            text = "cannot be used with running statistics of batch norm, which would count every step twice"
            raise ValueError(f"gradient_checkpointing=true: {text}")
        self.inner_lr, self.inner_steps, self.eval_inner_steps = inner_lr, inner_steps, eval_inner_steps
        self.first_order, self.inner_loss = first_order, inner_loss
        self.gradient_checkpointing = gradient_checkpointing
        self.one_task_in_training = gradient_checkpointing and task_batching == "auto"  # needs the least memory
        self.set_order(first_order)
        kept = set() if adapt_norm else {p for norm in batch_norms(self.net) for p in norm.parameters()}
        trained = [(name, p) for name, p in self.net.named_parameters() if p.requires_grad and p not in kept]
        self.adapted = [name for name, _ in trained if name.startswith(self.part)]
        if not self.adapted:
            raise ValueError("backbone.frozen=true: leaves this method nothing to adapt")

    def set_order(self, first_order: bool) -> None:
        """Use gradients of first order only, or of second order too."""
        self.first_order = first_order
        for norm in batch_norms(self.net):
            if isinstance(norm, BatchNorm):
                norm.second_order = not first_order

    def with_features(self, tasks: TaskBatch) -> TaskBatch:
        """Replace the support images by their features [T, S, D]."""
        backbone = self.net.backbone
        with torch.set_grad_enabled(self.training):
            return replace(tasks, support_x=per_task(backbone, backbone.features, tasks.support_x))

    def update(self, params: Params, tasks: TaskBatch, step: int) -> Params:
        """Make one gradient step on the support set (equation 1)."""
        if not (self.training and self.gradient_checkpointing and not self.first_order):
            return self.gradient_step(params, tasks, step)

        def again(*values: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.gradient_step(dict(zip(params, values, strict=True)), tasks, step).values())

        return dict(zip(params, checkpoint(again, *params.values(), use_reentrant=True), strict=True))

    def gradient_step(self, params: Params, tasks: TaskBatch, step: int) -> Params:
        # Checkpointing disables gradients in its first pass, which keeps no graph.
        second_order = self.training and not self.first_order and torch.is_grad_enabled()
        with torch.enable_grad():
            logits = self.support_logits(params, tasks, step)
            loss = len(tasks) * self.loss(logits, tasks.support_y)  # the sum: each task gets the gradient of its mean
            if self.inner_loss == "sum_per_shot":
                loss = loss * tasks.way
            grads = torch.autograd.grad(loss, [params[name] for name in self.adapted], create_graph=second_order)
        steps = zip(self.adapted, grads, strict=True)
        return params | {name: params[name] - self.rate(name, step, tasks.way) * grad for name, grad in steps}

    def support_logits(self, params: Params, tasks: TaskBatch, step: int) -> Tensor:
        """Return logits [T, S, N] of the support set with the parameters before inner step number `step`."""
        return self.classify(params, tasks.support_x)

    def rate(self, name: str, step: int, way: int) -> float | Tensor:
        """Return the learning rate of a parameter at inner step number `step`, for tasks of `way` classes."""
        return self.inner_lr
