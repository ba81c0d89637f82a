"""Several processes that train one model, as torchrun starts them: each takes its share of every meta-batch."""

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

from metacv import MetacvError
from metacv.cli import one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of its run, by torch.distributed's words; one alone talks to nobody."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def share(self, count: int) -> slice:
        """Of `count` things in a row those that are for this process."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def device(self, name: str) -> str:
        """The setting `device` as this process is to take it: each has a GPU to itself."""
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise MetacvError(f"device={name}: with {self.size} processes take auto, cuda or cpu")
        return f"cuda:{self.local_rank}"

    def sum(self, values: Tensor) -> Tensor:
        """`values`, with those of the others added to them."""
        if self.size > 1:
            self._talk(lambda: dist.all_reduce(values))
        return values

    def average(self, tensors: Sequence[Tensor], weight: float) -> None:
        """Puts into each the weighted mean over the processes; the weights add up to 1."""
        if self.size > 1 and tensors:
            flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]).mul_(weight))
            for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def largest(self, number: int) -> int:
        """Of the numbers that the processes say. Passes the CPU alone, so that a GPU need not be waited for."""
        if self.size == 1:
            return number
        said = torch.tensor(number)
        self._talk(lambda: dist.all_reduce(said, dist.ReduceOp.MAX))
        return int(said)

    def of_first(self, make: Callable[[], T]) -> T:
        """What `make` gives or raises in the first process."""
        if self.size == 1:
            return make()
        said: list[Any] = [_attempt(make) if self.rank == 0 else None]
        self._talk(lambda: dist.broadcast_object_list(said))
        result, error = said[0]
        if error is not None:
            raise MetacvError(error)
        return result

    def each(self, make: Callable[[], T]) -> T:
        """What `make` gives here, once the first process of this machine is done with it; what one raises, all do."""
        if self.size == 1:
            return make()
        result, error = _attempt(make) if self.local_rank == 0 else (None, None)
        self.largest(0)  # waits for all
        if self.local_rank > 0:
            result, error = _attempt(make)
        errors: list[Any] = [None] * self.size
        self._talk(lambda: dist.all_gather_object(errors, error))
        for error in errors:
            if error is not None:
                raise MetacvError(error)
        return result  # type: ignore[return-value]

    def _talk(self, words: Callable[[], object]) -> None:
        try:
            words()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            said = f"process {self.rank} of {self.size}: another one has ended, and so does this ({reason})"
            raise ConnectionResetError(errno.ECONNRESET, said) from error


def _attempt(make: Callable[[], T]) -> tuple[T | None, str | None]:
    """What it gives, or what it has to say of an error."""
    try:
        return make(), None
    except Exception as error:
        return None, one_line(error)


def processes() -> Processes:
    """Those of this run, connected to each other: NCCL between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # One may wait long while another decodes images; one that has died is noticed at once.
        dist.init_process_group(backend, timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)
    return Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
