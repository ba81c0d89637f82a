"""What every algorithm is to the outer loop: tasks in, gradients or logits out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metacv.data.sampler import TaskBatch
from metacv.precision import CompiledBackward, precision

Norm = Literal["inductive", "transductive"]


class Algorithm(nn.Module, ABC):
    """A way to classify queries from a support set, and to learn from how well that went."""

    eval_inner_steps = 0
    one_process_because: str | None = None  # why the tasks of a meta-batch cannot be shared out

    @abstractmethod
    def forward(self, tasks: TaskBatch) -> Tensor:
        """Query logits [T, N*Q, N]."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of logits [T, N*Q, N] and labels [T, N*Q]: the mean over all queries."""
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of the classes, from logits [..., N]."""
        return logits.softmax(dim=-1)

    def parts(self, tasks: TaskBatch) -> Iterator[TaskBatch]:
        """The tasks, as many at a time as pass through the network together."""
        yield tasks

    def backward(self, tasks: TaskBatch) -> dict[str, Tensor]:
        """Adds the outer gradient to `.grad`; gives the mean `loss` and `accuracy` over the tasks.

        A part of the tasks after another, so that memory holds the graph of one part only.
        """
        found = [self.backward_part(part, len(part) / len(tasks)) for part in self.parts(tasks)]
        loss, accuracy = torch.stack(found).sum(0)
        return {"loss": loss, "accuracy": accuracy}

    def backward_part(self, tasks: TaskBatch, share: float) -> Tensor:
        """`backward` of some of the tasks, which count as that share of all: loss and accuracy, [2], times `share`."""
        logits = self(tasks)
        loss = self.loss(logits, tasks.query_y) * share
        if loss.requires_grad:  # something is not frozen
            loss.backward()
        return torch.stack([loss.detach(), accuracies(logits, tasks.query_y).mean() * share])

    def compile_steps(self) -> None:
        """From now on `backward` runs as compiled graphs, each made at its first use."""
        self.backward_part = CompiledBackward(self, self.backward_part)  # type: ignore[method-assign]

    def predict(self, tasks: TaskBatch, norm: Norm) -> Tensor:
        """Query logits [T, N*Q, N] in fp32, leaving weights and statistics as they are.

        transductive: batch norm sees all queries of a task together (MAML's code, Relation Networks').
        inductive: with running statistics where the batch norms keep them (Prototypical Networks), otherwise each
        query passes in one batch with the support set alone (Reptile's "no transduction"). No query can change
        another's logits, to the bit.
        """
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), precision("fp32", tasks.support_x.device):
                if norm == "transductive":
                    with batch_statistics(self):
                        return self(tasks)
                if uses_batch_statistics(self):
                    return self.one_query_at_a_time(tasks)
                return self(tasks)
        finally:
            self.train(was_training)

    def one_query_at_a_time(self, tasks: TaskBatch) -> Tensor:
        """`forward` with the support set and a single query, for each query: [T, N*Q, N]."""
        alone = [
            self(replace(tasks, query_x=x, query_y=y))
            for x, y in zip(tasks.query_x.split(1, dim=1), tasks.query_y.split(1, dim=1), strict=True)
        ]
        return torch.cat(alone, dim=1)


def accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of right queries of each task: [T, N*Q, N], [T, N*Q] -> [T]."""
    return (logits.detach().argmax(dim=-1) == labels).float().mean(dim=1)


def per_task(network: nn.Module, inputs: Tensor) -> Tensor:
    """`network` over [T, B, ...], keeping the tasks apart: batch statistics belong to one task."""
    if network.training or uses_batch_statistics(network):
        return torch.stack([network(task) for task in inputs])
    return in_fixed_chunks(network, inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])


def in_fixed_chunks(network: Callable[[Tensor], Tensor], inputs: Tensor, chunk: int = 64) -> Tensor:
    """`network` over [B, ...], always at the same batch size.

    Kernels are chosen by batch size and differ in the last bit; an inductive prediction must not depend on its company.
    """
    padding = inputs.new_zeros(-len(inputs) % chunk, *inputs.shape[1:])
    outputs = torch.cat([network(part) for part in torch.cat([inputs, padding]).split(chunk)])
    return outputs[: len(inputs)]


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def uses_batch_statistics(network: nn.Module) -> bool:
    return any(norm.training or norm.running_mean is None for norm in batch_norms(network))


def keeps_running_statistics(network: nn.Module) -> bool:
    return any(norm.track_running_stats for norm in batch_norms(network))


def running_statistics(network: nn.Module) -> list[Tensor]:
    return [s for norm in batch_norms(network) for s in (norm.running_mean, norm.running_var) if s is not None]


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norms use the statistics of the batch and leave their running ones alone."""
    before = [(norm, norm.training, norm.track_running_stats) for norm in batch_norms(network)]
    for norm, _, _ in before:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, training, track in before:
            norm.training, norm.track_running_stats = training, track
