"""Data-parallel training with torchrun: each process computes its share of every meta-batch."""

import atexit
import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metacv.errors import UserError
from metacv.processes import end_with_starter
from metacv.terminal import error_line, world_size
from metacv.text import first_line

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among all processes of the run. A single process does not communicate."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def share(self, count: int) -> slice:
        """Return the slice of `count` items that this process computes."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def device(self, name: str) -> str:
        """Return the device for this process, given the setting `device`: each process uses its own GPU."""
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise UserError(f"device={name}: must be auto, cuda or cpu with {self.size} processes")
        return f"cuda:{self.local_rank}"

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over the processes, in place."""
        self._communicate(lambda: dist.all_reduce(values))
        return values

    def average(self, tensors: Sequence[Tensor], weight: float) -> None:
        """Replace each tensor by its weighted mean over the processes; the weights sum to 1."""
        if self.size > 1 and tensors:
            flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]).mul_(weight))
            for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def maximum(self, number: int) -> int:
        """Return the maximum of the processes' numbers. Communicates between CPUs only, to avoid waiting for a GPU."""
        value = torch.tensor(number)
        self._communicate(lambda: dist.all_reduce(value, dist.ReduceOp.MAX))
        return int(value)

    def run_on_rank_zero(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 only, and return its result on every rank. An error is raised on every rank."""
        message: list[Any] = [self.on_every_rank(make if self.rank == 0 else lambda: None)]
        self._communicate(lambda: dist.broadcast_object_list(message))
        return message[0]

    def on_every_rank(self, make: Callable[[], T]) -> T:
        """Call `make` on every rank, on local rank 0 first, and return its result. An error is raised on every rank."""
        if self.size == 1:
            return make()
        result: Any = None
        error: Exception | None = None
        for first in (True, False):  # local rank 0, then the others
            if first == (self.local_rank == 0):
                try:
                    result = make()
                except Exception as raised:
                    error = raised
            self.maximum(0)  # a barrier
        texts: list[Any] = [None] * self.size
        self._communicate(lambda: dist.all_gather_object(texts, error and error_line(error)))
        if error or any(texts):
            raise error or UserError(next(filter(None, texts)))
        return result

    def _communicate(self, exchange: Callable[[], object]) -> None:
        try:
            if self.size > 1:
                exchange()
        except RuntimeError as error:
            text = f"rank {self.rank} of {self.size}: another process exited; stopping ({first_line(error)})"
            raise ConnectionResetError(errno.ECONNRESET, text) from error


def connect() -> Ranks:
    """Connect the processes of this run, by NCCL between GPUs and by gloo between CPUs."""
    if world_size() == 1:
        return Ranks()
    end_with_starter()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # Long, because one process may wait while another decodes images. An exited process is noticed at once.
        dist.init_process_group(backend, timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
