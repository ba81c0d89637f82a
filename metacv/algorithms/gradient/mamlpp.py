"""MAML++ (Antoniou et al., 2019), https://arxiv.org/abs/1810.09502"""

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from metacv.algorithms.base import accuracies
from metacv.algorithms.gradient.inner_loop import Params, key
from metacv.algorithms.gradient.maml import MAML
from metacv.backbones.base import Backbone
from metacv.backbones.batch_norm import batch_norms, keeps_running_statistics
from metacv.bounds import Range
from metacv.data.task import TaskBatch
from metacv.precision import CompiledGradient

LEAST = 0.03  # as in the authors' code: at least this share of 1 / inner_steps remains to the loss of each inner step
OuterSteps = Annotated[int, Range(0, 10**9)]


class MAMLPlusPlus(MAML):
    """MAML with the changes of MAML++, each a setting; its cosine schedule of the outer learning rate is `schedule`.

    learn_rates            a learned inner learning rate for each layer and inner step, initially `inner_lr`
    per_step_norm          a scale and shift of batch norm for each inner step. Batch norm uses the statistics of the
                           batch, as in the authors' code, which collects running statistics but never uses them.
    multi_step_loss_steps  in the first outer steps, the outer loss is a weighted sum of the query losses after each
                           inner step; the weight moves linearly to the last one. FLOPs are counted with all of them.
    first_order_steps      the first outer steps use first-order gradients

    In evaluation, inner steps beyond `inner_steps` use the rates and the batch norm of the last one.
    """

    loss_weights: Tensor  # [inner_steps]

    def __init__(
        self,
        *args: Any,
        learn_rates: bool = True,
        per_step_norm: bool = True,
        multi_step_loss_steps: OuterSteps = 0,
        first_order_steps: OuterSteps = 0,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.multi_step_loss_steps, self.first_order_steps = multi_step_loss_steps, first_order_steps
        self.always_first_order = self.first_order
        self.done = 0  # outer steps; the buffer is the same number in checkpoints
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))
        self.register_buffer("loss_weights", torch.zeros(self.inner_steps), persistent=False)
        self.rates, self.norms = nn.ParameterDict(), nn.ParameterDict()
        if learn_rates:
            for name in self.adapted:
                self.rates[key(name)] = nn.Parameter(torch.full((self.inner_steps,), self.inner_lr))
        self.norm_names: list[str] = []
        if per_step_norm:
            if keeps_running_statistics(self.net) or settings.get("adapt_norm"):
                raise ValueError("per_step_norm=true: needs backbone.running_stats=false and adapt_norm=false")
            learned = {p for norm in batch_norms(self.net) for p in norm.parameters() if p.requires_grad}
            for name, p in self.net.named_parameters():
                if p in learned:
                    self.norm_names.append(name)
                    self.norms[key(name)] = nn.Parameter(p.detach().repeat(self.inner_steps, 1))
                    p.requires_grad_(False)  # replaced by those of each step

    @property
    def embedding(self) -> Backbone:
        """The backbone before adaptation, with the batch norm of the first inner step."""
        with torch.no_grad():
            for name in self.norm_names:
                self.net.get_parameter(name).copy_(self.norms[key(name)][0])
        return super().embedding

    def start_from_backbone(self) -> None:
        super().start_from_backbone()
        with torch.no_grad():
            for name in self.norm_names:
                self.norms[key(name)].copy_(self.net.get_parameter(name))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        self.done = int(state_dict.get(f"{prefix}steps_done", 0))

    def training_step(self, tasks: TaskBatch) -> dict[str, Tensor]:
        self.set_order(self.always_first_order or self.done < self.first_order_steps)
        for own, weight in zip(self.loss_weights, self.weights(self.done), strict=True):
            own.fill_(weight)
        changes = self.done in (self.first_order_steps, self.multi_step_loss_steps)
        if changes and isinstance(self.gradient, CompiledGradient):
            self.compile_training()  # the graph is another one from now on
        scalars = super().training_step(tasks)
        self.done += 1
        self.get_buffer("steps_done").add_(1)
        return scalars

    def weights(self, done: int) -> list[float]:
        """Return the weights of the query losses after each inner step, whose sum is 1, after `done` outer steps."""
        count = self.inner_steps
        part = min(1.0, done / self.multi_step_loss_steps) if self.multi_step_loss_steps else 1.0
        early = max(1 - part, LEAST if part < 1 else 0.0) / count
        return [early] * (count - 1) + [1 - (count - 1) * early]

    def add_gradient(self, tasks: TaskBatch, share: float) -> dict[str, Tensor]:
        if self.done >= self.multi_step_loss_steps:
            return super().add_gradient(tasks, share)
        params = self.initial(tasks)
        total = torch.zeros((), device=tasks.query_x.device)
        for step, weight in enumerate(self.loss_weights):
            params = self.update(params, tasks, step)
            logits = self.classify(self.at_step(params, step), tasks.query_x)
            total = total + weight * self.loss(logits, tasks.query_y) * share
        total.backward()
        return {"loss": total.detach(), "accuracy": accuracies(logits, tasks.query_y).mean() * share}

    def adapt(self, tasks: TaskBatch) -> Params:
        steps = self.inner_steps if self.training else self.eval_inner_steps
        return self.at_step(super().adapt(tasks), steps - 1)

    def support_logits(self, params: Params, tasks: TaskBatch, step: int) -> Tensor:
        return super().support_logits(self.at_step(params, step), tasks, step)

    def at_step(self, params: Params, step: int) -> Params:
        """Add the scales and shifts of batch norm of an inner step to the parameters of each task."""
        count = len(next(iter(params.values())))
        own = {name: self.of_step(self.norms[key(name)], step) for name in self.norm_names}
        return params | {name: value.expand(count, -1) for name, value in own.items()}

    def rate(self, name: str, step: int, way: int) -> float | Tensor:
        return self.of_step(self.rates[key(name)], step) if self.rates else self.inner_lr

    def of_step(self, values: Tensor, step: int) -> Tensor:
        own = values[min(step, self.inner_steps - 1)]
        return own if self.training else own.detach()
