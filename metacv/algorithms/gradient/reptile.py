"""Reptile (Nichol, Achiam & Schulman, 2018), https://arxiv.org/abs/1803.02999"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from metacv.algorithms.base import accuracies
from metacv.algorithms.gradient.inner_loop import InnerLoop, Params, TaskBatching, key
from metacv.backbones.base import Backbone
from metacv.bounds import Count, EvalInnerSteps, Images, InnerSteps, Positive, Way
from metacv.data.task import TaskBatch
from metacv.precision import Compiled

BETA2, EPSILON = 0.999, 1e-8


class Reptile(InnerLoop):
    """Move the initial parameters towards the parameters after training on each task."""

    def __init__(
        self,
        backbone: Backbone,
        way: Way,
        inner_lr: Positive,
        inner_steps: InnerSteps,
        inner_batch: Images,
        eval_inner_steps: EvalInnerSteps,
        eval_inner_batch: Images,
        inner_optimizer: Literal["adam", "sgd"] = "adam",  # Adam with beta1 = 0
        reset_moments: bool = False,  # false: Adam's moments persist between tasks, as in the authors' code
        task_batching: TaskBatching = "auto",
        task_chunk: Count | None = None,
    ) -> None:
        super().__init__(backbone, way, task_batching, task_chunk)
        self.inner_lr, self.inner_optimizer = inner_lr, inner_optimizer
        self.inner_steps, self.inner_batch = inner_steps, inner_batch
        self.eval_inner_steps, self.eval_inner_batch = eval_inner_steps, eval_inner_batch
        self.moments_pass = self.one_task_in_training = inner_optimizer == "adam" and not reset_moments
        if self.moments_pass:
            self.sequential_because = "reset_moments=false keeps moments from task to task"
        self.training_loop: Callable[..., Sequence[Tensor]] = self.loop
        self.adapted = [name for name, p in self.net.named_parameters() if p.requires_grad]
        if inner_optimizer == "adam":
            self.register_buffer("moment_steps", torch.zeros((), dtype=torch.long))
            for name in self.adapted:
                self.register_buffer(_buffer(name), torch.zeros_like(self.net.get_parameter(name)))

    def adapt(self, tasks: TaskBatch) -> Params:
        """Return the parameters after training on the support set, detached."""
        steps, size = self.eval_inner_steps, self.eval_inner_batch
        if self.training:
            steps, size = self.inner_steps, self.inner_batch
        params = {name: p.detach() for name, p in self.initial(tasks).items()}
        moments = {name: torch.zeros_like(p) for name, p in params.items()}  # Adam's
        count = torch.zeros((), dtype=torch.long, device=tasks.support_x.device)  # number of steps in the moments
        if self.moments_pass:
            moments = self.for_way({name: self.get_buffer(_buffer(name)) for name in self.adapted}, tasks.way)
            moments = {name: moment.expand(len(tasks), *moment.shape) for name, moment in moments.items()}
            count = self.get_buffer("moment_steps")
        seeds = tasks.seeds.tolist() if self.training and tasks.seeds is not None else [0] * len(tasks)
        batches = torch.stack([_batches(tasks.support_x.shape[1], size, steps, seed) for seed in seeds])
        device = tasks.support_x.device
        own = torch.arange(len(tasks), device=device)[:, None, None], batches.to(device, non_blocking=True)
        loop = self.training_loop if self.training else self.loop
        found = loop(tasks.support_x[own], tasks.support_y[own], count, *params.values(), *moments.values())
        count, params = found[0], dict(zip(params, found[1:], strict=False))
        moments = dict(zip(moments, found[1 + len(params) :], strict=True))
        if self.training and self.moments_pass:  # evaluation starts from these moments without changing them
            self.get_buffer("moment_steps").copy_(count)
            for name, moment in moments.items():
                self.get_buffer(_buffer(name)).copy_(moment.squeeze(0))
        return params

    def more_rows(self, rows: Tensor, count: int) -> Tensor:
        """Repeat the mean row, which favours no class (Ye & Chao 2022, arXiv:2106.16245): best with many steps."""
        return torch.stack([rows.mean(0)] * count)

    def loop(self, images: Tensor, labels: Tensor, count: Tensor, *values: Tensor) -> list[Tensor]:
        """Run the inner optimizer on batches of images [T, steps, B, C, H, W] with labels [T, steps, B].

        `values` are the adapted parameters of each task, followed by their moments after `count` steps. Returns count
        and values after the last step.
        """
        weights, squares = list(values[: len(self.adapted)]), list(values[len(self.adapted) :])
        for batch, own in zip(images.unbind(1), labels.unbind(1), strict=True):
            weights = [weight.detach().requires_grad_() for weight in weights]
            with torch.enable_grad():
                logits = self.classify(dict(zip(self.adapted, weights, strict=True)), batch)
                loss = len(batch) * self.loss(logits, own)  # the sum: each task gets the gradient of its mean
                slopes = list(torch.autograd.grad(loss, weights))
            count = count + 1
            with torch.no_grad():
                if self.inner_optimizer == "sgd":
                    weights = list(torch._foreach_add(weights, slopes, alpha=-self.inner_lr))
                    continue
                squares = list(torch._foreach_mul(squares, BETA2))
                torch._foreach_addcmul_(squares, slopes, slopes, value=1 - BETA2)
                roots = torch._foreach_sqrt(squares)
                torch._foreach_div_(roots, (1 - BETA2 ** count.double()).sqrt())  # on the device, without waiting
                torch._foreach_add_(roots, EPSILON)
                weights = list(torch._foreach_addcdiv(weights, slopes, roots, value=-self.inner_lr))
        return [count, *weights, *squares]

    def add_gradient(self, tasks: TaskBatch, share: float) -> dict[str, Tensor]:
        """Add initial minus adapted parameters to `.grad`, used as a gradient (section 2)."""
        params = self.adapt(tasks)
        with torch.no_grad():
            for name in self.adapted:
                weight = self.net.get_parameter(name)
                step = share * (weight - params[name].mean(0))
                weight.grad = step if weight.grad is None else weight.grad + step
            logits = self.classify(params, tasks.query_x)
            loss, accuracy = self.loss(logits, tasks.query_y), accuracies(logits, tasks.query_y).mean()
        return {"loss": loss * share, "accuracy": accuracy * share}

    def compile_training(self) -> None:
        self.training_loop = Compiled(self.loop, list(self.net.buffers()))


def _batches(images: int, size: int, steps: int, seed: int) -> Tensor:
    """Return the rows of the batch of each inner step, [steps, size], from shuffled passes over the support set."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, images)
    passes = -(-size * steps // images)
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(passes)])
    return order[: size * steps].view(steps, size)


def _buffer(name: str) -> str:
    return "moment_" + key(name)
