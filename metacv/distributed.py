"""Several processes that train one model, as torchrun starts them: each computes its share of every meta-batch."""

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
from metacv.terminal import error_line, world_size
from metacv.text import first_line

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run. A single process communicates nothing."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def share(self, count: int) -> slice:
        """The part of `count` items in a row that belongs to this process."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def device(self, name: str) -> str:
        """The value of the setting `device` for this process: each has a GPU of its own."""
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise UserError(f"device={name}: with {self.size} processes use auto, cuda or cpu")
        return f"cuda:{self.local_rank}"

    def sum(self, values: Tensor) -> Tensor:
        """Add the values of the other processes to `values`."""
        self._communicate(lambda: dist.all_reduce(values))
        return values

    def average(self, tensors: Sequence[Tensor], weight: float) -> None:
        """Replace each tensor by its weighted mean over the processes, whose weights add up to 1."""
        if self.size > 1 and tensors:
            flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]).mul_(weight))
            for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def maximum(self, number: int) -> int:
        """The largest of the processes' numbers. It passes through the CPU only, so that no GPU is waited for."""
        value = torch.tensor(number)
        self._communicate(lambda: dist.all_reduce(value, dist.ReduceOp.MAX))
        return int(value)

    def run_on_rank_zero(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank. An error there is raised on every rank."""
        message: list[Any] = [self.on_every_rank(make if self.rank == 0 else lambda: None)]
        self._communicate(lambda: dist.broadcast_object_list(message))
        return message[0]

    def on_every_rank(self, make: Callable[[], T]) -> T:
        """What `make` returns on this rank, after local rank 0 is done. One rank's error is raised on all."""
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
            self.maximum(0)  # waits for all
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
    """The processes of this run, connected by NCCL between GPUs and by gloo between CPUs."""
    if world_size() == 1:
        return Ranks()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # One process may wait long while another decodes images; one that has exited is noticed at once.
        dist.init_process_group(backend, timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
