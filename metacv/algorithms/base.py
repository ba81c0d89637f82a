"""The interface of algorithms for training and evaluation: tasks in, gradients or logits out."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metacv.backbones.base import Backbone
from metacv.backbones.batch_norm import batch_norms, batch_statistics, uses_batch_statistics
from metacv.data.task import TaskBatch
from metacv.errors import UserError
from metacv.precision import CompiledGradient, precision


class Algorithm(nn.Module, ABC):
    """Base class: classify queries by a support set, and compute gradients of the outer loss."""

    batches: ClassVar[Literal["episodes", "images"]] = "episodes"  # what `training_step` takes
    execution_settings: ClassVar[frozenset[str]] = frozenset()  # settings that change speed and memory only
    uses_query_set = False  # whether logits depend on the other queries of the task, not only through batch norm
    tunes_network = False  # whether it tunes a copy of the network on each task, so that no features can be kept
    sequential_because: str | None = None  # reason why processes cannot share the tasks of a step

    def __init__(self) -> None:
        super().__init__()
        self.gradient: Callable[[Any, float], dict[str, Tensor]] = self.add_gradient

    @abstractmethod
    def forward(self, tasks: TaskBatch) -> Tensor:
        """Return query logits [T, Q, N]."""

    @property
    def embedding(self) -> Backbone:
        """The network that embeds images."""
        return next(module for module in self.modules() if isinstance(module, Backbone))

    def start_from_backbone(self) -> None:
        """Set the weights that depend on those of the backbone, after trained ones were loaded into it."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over all queries, given logits [T, Q, N] and labels [T, Q]."""
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def probabilities(self, logits: Tensor) -> Tensor:
        """Convert logits [..., N] to class probabilities."""
        return logits.softmax(dim=-1)

    def softmax_logits(self, logits: Tensor) -> Tensor:
        """Convert logits [..., N] to those whose softmax are the class probabilities, for a temperature to divide."""
        return logits

    def training_step(self, tasks: Any) -> dict[str, Tensor]:
        """Add the outer gradient to `.grad`; return scalars to log, averaged over the tasks."""
        groups = (group for part in tasks.parts() for group in self.groups(part))
        metrics = [self.gradient(group, len(group) / len(tasks)) for group in groups]
        return {name: torch.stack([own[name] for own in metrics]).sum() for name in metrics[0]}

    def groups(self, tasks: Any) -> Iterator[Any]:
        """Yield groups of tasks that pass through the network together; memory holds one group's graph at a time."""
        yield tasks

    def add_gradient(self, tasks: Any, share: float) -> dict[str, Tensor]:
        """Do `training_step` for one group; gradient and scalars are multiplied by `share`."""
        logits = self(tasks)
        loss = self.loss(logits, tasks.query_y) * share
        loss.backward()
        return {"loss": loss.detach(), "accuracy": accuracies(logits, tasks.query_y).mean() * share}

    def copy_for_counting(self) -> "Algorithm":
        """Return a copy whose floating-point operations torch counts correctly."""
        return copy.deepcopy(self)

    def learn_from(self, teacher: "Algorithm") -> None:
        """Use another model's predictions as a target in training; UserError if the method does not support it."""
        raise UserError(f"algo.teacher: {type(self).__name__} has no such setting")

    def compile_training(self) -> None:
        """Run training steps as compiled graphs from now on; a graph is compiled at its first use."""
        self.gradient = CompiledGradient(self, self.add_gradient)

    def diagnostics(self, tasks: TaskBatch, batch_norm: str) -> dict[str, float]:
        """Return values to log at validation, such as the accuracy after each inner step."""
        return {}

    def predict(self, tasks: TaskBatch, batch_norm: str) -> Tensor:
        """Return query logits [T, Q, N] in fp32, without changing weights or running statistics.

        transductive: batch norm uses the statistics of all queries of a task (code of MAML and Relation Networks).
        inductive: batch norm uses running statistics if it has them (Prototypical Networks), otherwise each query is
        in one batch with the support set (Reptile). The logits of a query do not depend on other queries.
        """
        with evaluating(self, batch_norm, tasks.support_x.device):
            if batch_norm == "inductive" and uses_batch_statistics(self):
                return self.predict_each_query(tasks)
            return self(tasks)

    def predict_each_query(self, tasks: TaskBatch) -> Tensor:
        """Return query logits [T, Q, N], with each query in one batch with the support set only."""
        return torch.cat([self(one) for one in tasks.each_query()], dim=1)


class MetricMethod(Algorithm):
    """Base class: compare features of queries with features of the support set. Subclasses implement `head`."""

    features: ClassVar[Literal["vectors", "maps"]] = "vectors"  # what `head` takes
    copies = 0  # number of augmented copies of each support image
    one_batch: ClassVar[bool] = True  # support and query of a task share the statistics of batch norm in training

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    @abstractmethod
    def head(self, tasks: TaskBatch) -> Tensor:
        """Return query logits [T, Q, N] of tasks whose images are features: [T, S, D] or [T, S, D, h, w]."""

    def forward(self, tasks: TaskBatch) -> Tensor:
        return self.head(self.embedded(tasks, self.one_batch))

    def embed(self, images: Tensor) -> Tensor:
        return self.backbone.features(images) if self.features == "vectors" else self.backbone.maps(images)

    @property
    def embedding_key(self) -> list[Any]:
        """What besides the backbone and the image determines the result of `embed`."""
        return [type(self).embed.__qualname__, self.features]

    def embed_copies(self, images: Tensor, seeds: Iterable[int]) -> Tensor:
        """Embed augmented copies of images [B, C, H, W]: features [B, copies, ...]; `seeds`: one for each image."""
        raise NotImplementedError

    def embedded(self, tasks: TaskBatch, one_batch: bool) -> TaskBatch:
        """Replace the images of tasks by their features."""
        if one_batch:
            images = torch.cat([tasks.support_x, tasks.query_x], dim=1)  # [T, S + Q, C, H, W]
            support, query = per_task(self.backbone, self.embed, images).tensor_split([tasks.support_x.shape[1]], dim=1)
        else:
            support, query = (per_task(self.backbone, self.embed, own) for own in (tasks.support_x, tasks.query_x))
        return replace(tasks, support_x=support, query_x=query)

    def predict_each_query(self, tasks: TaskBatch) -> Tensor:
        return torch.cat([self.head(self.embedded(one, one_batch=True)) for one in tasks.each_query()], dim=1)

    def embeds_each_image_alone(self, batch_norm: str) -> bool:
        """Whether the features of an image do not depend on other images, so that evaluation can cache them."""
        keeps_statistics = all(norm.running_mean is not None for norm in batch_norms(self.backbone))
        own_forward = type(self).forward is not MetricMethod.forward  # may not use `head`
        return batch_norm == "inductive" and keeps_statistics and not own_forward


@contextmanager
def evaluating(algorithm: Algorithm, batch_norm: str, device: torch.device) -> Iterator[None]:
    """Switch to evaluation mode, fp32 and no gradients. The only place where the batch-norm mode takes effect."""
    was_training = algorithm.training
    algorithm.eval()
    statistics = batch_statistics(algorithm) if batch_norm == "transductive" else nullcontext()
    try:
        with torch.no_grad(), precision("fp32", device), statistics:
            yield
    finally:
        algorithm.train(was_training)


def accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the accuracy of each task: logits [T, Q, N], labels [T, Q] -> [T]; NaN as in `correct_share`."""
    return correct_share(predicted(logits), labels)


def predicted(logits: Tensor) -> Tensor:
    """Return the class of each query: logits [T, Q, N] -> int16 [T, Q]; -1 where logits are not finite, because argmax
    is meaningless there."""
    logits = logits.detach()
    return logits.argmax(dim=-1).where(logits.isfinite().all(dim=-1), -1).short()


def correct_share(predictions: Tensor, labels: Tensor) -> Tensor:
    """Return the accuracy of each task: classes [T, Q] from `predicted`, labels [T, Q] -> [T].

    NaN for a task with logits that are not finite. A negative label is that of no query.
    """
    right = (predictions == labels).float().where(predictions >= 0, torch.nan)
    return right.where(labels >= 0, 0).sum(dim=1) / (labels >= 0).sum(dim=1)


def per_task(network: nn.Module, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Apply `function`, which calls `network`, to inputs [T, B, ...]; batch statistics come from one task."""
    if network.training or uses_batch_statistics(network):
        return torch.stack([function(task) for task in inputs])
    return function(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
