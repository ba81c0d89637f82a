"""Precision, compiled steps and memory: they make a step faster, and change what it computes by rounding only."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from metacv.data.task import TaskBatch
from metacv.errors import UserError
from metacv.text import first_line

INPUTS = ("support_x", "support_y", "query_x", "query_y", "classes")  # of TaskBatch


def check_precision(name: str, device: torch.device) -> None:
    if name == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError(f"precision=tf32: needs a GPU of the Ampere generation or later, not {device}")


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Matrix products and convolutions in fp32, tf32 (factors with 10 bits of mantissa) or bf16 (7); sums in fp32."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = name == "tf32"
    try:
        # No cache of casts: weights change within a step.
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16", cache_enabled=False):
            yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def keep_freed_memory() -> None:
    """Let glibc, if it is there, keep freed memory: new, cleared pages can take a quarter of a step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_max = -1, -4  # names of parameters, in malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


class Compiled:
    """A function of tensors, with everything that autograd does in it, as one compiled graph per shape of its inputs.

    torch.compile differentiates at most once. So the operations that autograd produces are recorded first, and the
    graph to compile has no derivatives. On a GPU it runs as a CUDA graph: an output is valid until the next call.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]]) -> None:
        """All tensors that change between calls must be arguments, also those that `function` itself changes."""
        self.function = function
        self.graphs: dict[object, Callable[..., Sequence[Tensor]]] = {}

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        autocast = torch.is_autocast_enabled(tensors[0].device.type)
        kind = autocast, *((t.shape, t.dtype) for t in tensors)
        with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            if kind in self.graphs:
                return self.graphs[kind](*tensors)
        graph = self._recorded(tensors)
        self.graphs[kind] = torch.compile(graph, mode="reduce-overhead" if tensors[0].is_cuda else None, dynamic=False)
        try:
            return self(*tensors)
        except RuntimeError as error:  # no compiler, or one that fails
            raise UserError(f"compile=true: {first_line(error)}") from error

    def _recorded(self, tensors: Sequence[Tensor]) -> torch.fx.GraphModule:
        """The operations of `function`. It is run once; its changes to tensors and to the random state are undone."""
        before = [t.detach().clone() for t in tensors]
        with torch.random.fork_rng([tensors[0].device] if tensors[0].is_cuda else []):
            graph = make_fx(self.function)(*tensors)
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                if not torch.equal(tensor, value):  # an expanded tensor is never written to, and copy_ would refuse it
                    tensor.copy_(value)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph


class CompiledGradient:
    """An algorithm's `add_gradient`, compiled. It must not draw at random by the seeds of the tasks."""

    def __init__(self, algorithm: nn.Module, add_gradient: Callable[[TaskBatch, float], dict[str, Tensor]]) -> None:
        self.learned = [p for p in algorithm.parameters() if p.requires_grad]
        self.state = [*algorithm.parameters(), *algorithm.buffers()]
        self.add_gradient = add_gradient
        self.compiled = Compiled(self._step)
        self.names: list[str] = []  # of the scalars

    def __call__(self, tasks: TaskBatch, share: float) -> dict[str, Tensor]:
        self.tasks, before = tasks, [p.grad for p in self.learned]
        outputs = self.compiled(*self.state, *(getattr(tasks, name).contiguous() for name in INPUTS))
        grads, scalars = outputs[: len(self.learned)], outputs[len(self.learned) :]
        for p, grad, earlier in zip(self.learned, grads, before, strict=True):
            p.grad = grad * share if earlier is None else earlier + grad * share
        return {name: scalar * share for name, scalar in zip(self.names, scalars, strict=True)}

    def _step(self, *tensors: Tensor) -> list[Tensor]:
        for p in self.learned:
            p.grad = None
        tasks = replace(self.tasks, seeds=None, **dict[str, Any](zip(INPUTS, tensors[len(self.state) :], strict=True)))
        scalars = self.add_gradient(tasks, 1.0)
        self.names = list(scalars)
        return [*(torch.zeros_like(p) if p.grad is None else p.grad for p in self.learned), *scalars.values()]
