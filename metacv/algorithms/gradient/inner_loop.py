"""The inner loop that MAML and Reptile share: adapt a classifier to each task by gradient steps."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import copy, deepcopy
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from metacv.algorithms.base import Algorithm, accuracies
from metacv.backbones.base import Backbone
from metacv.backbones.batch_norm import keeps_running_statistics
from metacv.data.task import TaskBatch
from metacv.errors import UserError

Params = dict[str, Tensor]  # parameters by name, each [T, ...]
TaskBatching = Literal["auto", "loop", "vmap"]
# Measured on CPUs with Conv4: with at most FEW_PIXELS per task (ten images of 28x28), FEW_TASKS tasks together are 1.5
# to 1.8 times as fast as one by one. Twice as many tasks gain nothing; ten times as many pixels are slower.
FEW_PIXELS, FEW_TASKS = 10 * 28 * 28, 8
DIAGNOSED_STEPS = (1, 2, 3, 5, 10, 20, 50, 100)


class Classifier(nn.Module):
    """A backbone with a linear head: images [B, C, H, W] -> logits [B, N]."""

    def __init__(self, backbone: Backbone, way: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.features_dim, way)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone.features(images))


class AsProducts(TorchFunctionMode):
    """Compute convolutions as matrix products of patches and weights.

    On a GPU this is faster for vmap with separate weights for each task, which otherwise becomes a grouped
    convolution.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (product if function is torch.conv2d else function)(*args, **(kwargs or {}))


def together(network: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Apply a network to T inputs at once: outputs [T, ...]; the last input has images [T, B, C, H, W]."""
    with nullcontext() if inputs[-1].device.type == "cpu" else AsProducts():
        return vmap(network, randomness="different")(*inputs)


def product(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Convolve images [B, C, H, W], with the signature of torch.conv2d."""
    if isinstance(padding, str) or dilation != (1, 1) or groups != 1:
        return F.conv2d(images, weight, bias, stride, padding, dilation, groups)
    height, width = weight.shape[2:]
    padded = F.pad(images, [padding[1], padding[1], padding[0], padding[0]])
    patches = padded.unfold(2, height, stride[0]).unfold(3, width, stride[1])  # [B, C, H', W', h, w]
    rows = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)
    maps = rows.flatten(0, 2) @ weight.flatten(1).T
    maps = maps if bias is None else maps + bias
    return maps.unflatten(0, rows.shape[:3]).permute(0, 3, 1, 2).contiguous()


class InnerLoop(Algorithm):
    """Base class: adapt a classifier to the support set by `update` steps, then classify the queries.

    Subclasses set `adapted` (names of the parameters to adapt), implement `update` (one inner step), and may override
    `add_gradient` (the outer loss). Tasks pass through the network one by one (task_batching=loop), or `task_chunk`
    at a time, each with its own weights (vmap); results are equal up to rounding. auto: vmap on a GPU, and on a CPU
    where it was measured to be faster.
    """

    execution_settings = frozenset({"task_batching", "task_chunk"})
    inner_steps: int
    eval_inner_steps: int
    adapted: list[str]
    one_task_in_training = False  # in training, process tasks one by one whatever task_batching is

    def __init__(self, backbone: Backbone, way: int, task_batching: TaskBatching, task_chunk: int | None) -> None:
        super().__init__()
        self.net = Classifier(backbone, way)
        self.way, self.task_batching, self.task_chunk = way, task_batching, task_chunk
        if task_batching == "vmap" and keeps_running_statistics(self.net):
            text = "cannot be used with running statistics of batch norm, which see tasks in turn; use loop"
            raise ValueError(f"task_batching=vmap: {text}")

    def update(self, params: Params, tasks: TaskBatch, step: int) -> Params:
        """Return the adapted parameters after inner step number `step`, from 0."""
        raise NotImplementedError

    def start_from_backbone(self) -> None:
        """Set the head to zero, if the inner loop adapts it, as Kao et al. 2022 (arXiv:2106.15367) do at every step.

        With plain gradient steps and classes of equal size, the first step sets the row of each class to a multiple of
        the difference between the class mean and the mean of all features.
        """
        if "head.weight" in self.adapted:
            for parameter in self.net.head.parameters():
                nn.init.zeros_(parameter)

    def adapt(self, tasks: TaskBatch) -> Params:
        """Return the parameters of `net` adapted to the support sets."""
        with torch.enable_grad():
            params = self.initial(tasks)
            for step in range(self.inner_steps if self.training else self.eval_inner_steps):
                params = self.update(params, tasks, step)
        return params

    def initial(self, tasks: TaskBatch) -> Params:
        """Return the initial values of the adapted parameters for each task; detached in evaluation."""
        params: Params = {name: self.net.get_parameter(name) for name in self.adapted}
        if not self.training:
            params = {name: p.detach().requires_grad_() for name, p in params.items()}
        return {name: p.expand(len(tasks), *p.shape) for name, p in self.for_way(params, tasks.way).items()}

    def for_way(self, params: Params, way: int) -> Params:
        """Resize the head in the parameters to `way` classes; UserError in training if the head does not fit.

        For fewer classes than in training, keep the first rows.
        """
        if way == self.way:
            return params
        if self.training:
            raise UserError(
                f"algo.way={self.way}: must be the number of classes of all training tasks, and one has {way}"
            )
        rows = {name: params.get(name, self.net.get_parameter(name)) for name in ("head.weight", "head.bias")}
        return params | {name: own[:way] if way < self.way else self.more_rows(own, way) for name, own in rows.items()}

    def more_rows(self, rows: Tensor, count: int) -> Tensor:
        """Draw rows [count, ...] of a head for more classes, with mean and deviation of the trained `rows` and a fixed
        seed. One gradient step separates them better than copies of the mean, or repeated trained rows.
        """
        drawn = torch.randn(count, *rows.shape[1:], generator=torch.Generator().manual_seed(0))
        return rows.mean(0) + rows.std(0) * drawn.to(rows)

    def forward(self, tasks: TaskBatch) -> Tensor:
        return torch.cat([self.classify(self.adapt(group), group.query_x) for group in self.groups(tasks)])

    def classify(self, params: Params, images: Tensor) -> Tensor:
        """Return logits [T, B, N] of images [T, B, C, H, W] with the parameters of each task."""
        if len(images) > 1 and self.tasks_together(images[0]) > 1:
            # Gradients are taken outside of vmap: inside, those of fused batch norm are wrong (pytorch/functorch#534).
            return together(partial(functional_call, self.net), params, images)
        pairs = zip(of_each_task(params), images, strict=True)
        return torch.stack([functional_call(self.net, own, task) for own, task in pairs])

    def predict_each_query(self, tasks: TaskBatch) -> Tensor:
        logits = []
        for group in self.groups(tasks):
            adapted = of_each_task(self.adapt(group))
            for params, support, queries in zip(adapted, group.support_x, group.query_x, strict=True):
                for some in queries.split(self.tasks_together(support)):
                    # Each query is the last image of a batch with the support images.
                    batches = torch.cat([support.expand(len(some), *support.shape), some.unsqueeze(1)], dim=1)
                    if len(batches) > 1:
                        logits.append(together(partial(functional_call, self.net, params), batches)[:, -1])
                    else:
                        logits.append(functional_call(self.net, params, batches[0])[-1:])
        return torch.cat(logits).unflatten(0, tasks.query_y.shape)

    def copy_for_counting(self) -> "InnerLoop":
        looped = deepcopy(self)
        looped.task_batching = "loop"  # torch counts the backward pass of grouped convolutions more than once
        return looped

    def groups(self, tasks: TaskBatch) -> Iterator[TaskBatch]:
        return tasks.split(self.tasks_together(tasks.support_x[0]))

    def tasks_together(self, images: Tensor) -> int:
        """Return how many tasks, with images [B, C, H, W] each, pass through the network together."""
        on_cpu = images.device.type == "cpu"
        large = on_cpu and self.task_batching == "auto" and len(images) * images[0, 0].numel() > FEW_PIXELS
        one_by_one = self.task_batching == "loop" or (self.training and self.one_task_in_training)
        if one_by_one or large or keeps_running_statistics(self.net):
            return 1
        return self.task_chunk or (FEW_TASKS if on_cpu else 2**31)

    def diagnostics(self, tasks: TaskBatch, batch_norm: str) -> dict[str, float]:
        """Return accuracies after fewer inner steps."""
        values = {}
        shorter = copy(self)  # with the same network
        for steps in [*(steps for steps in DIAGNOSED_STEPS if steps < self.eval_inner_steps), self.eval_inner_steps]:
            shorter.eval_inner_steps = steps
            accuracy = accuracies(shorter.predict(tasks, batch_norm), tasks.query_y)
            values[f"inner_steps/accuracy_{steps:03d}"] = float(accuracy.mean())
        return values


def key(name: str) -> str:
    """Return the name of a parameter without dots, which nn.Module does not allow in names."""
    return name.replace(".", "_")


def of_each_task(params: Params) -> list[Params]:
    """Return the parameters of each task, without the leading [T]."""
    columns = zip(*(p.unbind() for p in params.values()), strict=True)  # unbind adds one node to the graph
    return [dict(zip(params, column, strict=True)) for column in columns]
