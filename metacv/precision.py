"""What makes a step faster and leaves what it computes as it is, but for rounding."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from metacv import MetacvError
from metacv.data.sampler import TaskBatch

Precision = Literal["fp32", "tf32", "bf16"]


def check_precision(name: str, device: torch.device) -> None:
    if name not in (known := get_args(Precision)):
        raise MetacvError(f"precision={name}: one of {', '.join(known)}")
    if name == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise MetacvError(f"precision=tf32: wants a GPU from Ampere on, not {device}")


@contextmanager
def precision(name: Precision, device: torch.device) -> Iterator[None]:
    """What convolutions and matrix products multiply in; parameters, sums and losses stay as they are.

    tf32 (GPUs from Ampere on) keeps 10 bits of a factor's mantissa, bf16 7.
    """
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = name == "tf32"
    try:
        # Weights change within a step, so that casts of them are not to be kept.
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16", cache_enabled=False):
            yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def keep_freed_memory() -> None:
    """Lets glibc keep what tensors leave for those of the next step.

    What goes back to the system is fetched again, page by page and cleared, in every step, which can take a quarter of
    its time on a CPU. Does nothing beside another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # names of parameters, in malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


class Compiled:
    """A function of tensors, and all that autograd does in it, as one compiled graph for each shape of its inputs.

    torch.compile differentiates once at most. So the operations are recorded as they come out of autograd, and what
    is left to compile has no derivatives in it. On a GPU they are launched together, as a CUDA graph: an output is
    good until the next call.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]]) -> None:
        """All tensors that change between calls must be among the arguments; those that `function` changes may be."""
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
            raise MetacvError(f"compile=true: {str(error).strip().splitlines()[0]}") from error

    def _recorded(self, tensors: Sequence[Tensor]) -> torch.fx.GraphModule:
        """By running `function`, whose changes to the tensors and to the random state are taken back."""
        before = [t.detach().clone() for t in tensors]
        devices = [tensors[0].device] if tensors[0].is_cuda else []
        with torch.random.fork_rng(devices):
            graph = make_fx(self.function)(*tensors)
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                if not torch.equal(tensor, value):  # those that are expanded are never written to
                    tensor.copy_(value)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph


class CompiledBackward:
    """An algorithm's `backward_part`, compiled."""

    def __init__(self, algorithm: nn.Module, backward_part: Callable[[TaskBatch, float], Tensor]) -> None:
        self.learned = [p for p in algorithm.parameters() if p.requires_grad]
        self.held = [*algorithm.parameters(), *algorithm.buffers()]
        self.backward_part = backward_part
        self.compiled = Compiled(self._step)

    def __call__(self, tasks: TaskBatch, share: float) -> Tensor:
        self.tasks, before = tasks, [p.grad for p in self.learned]
        images_and_labels = (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
        found, *grads = self.compiled(*self.held, *(t.contiguous() for t in images_and_labels))
        for p, grad, sum_ in zip(self.learned, grads, before, strict=True):
            p.grad = grad * share if sum_ is None else sum_ + grad * share
        return found * share

    def _step(self, *tensors: Tensor) -> list[Tensor]:
        for p in self.learned:
            p.grad = None
        support_x, support_y, query_x, query_y = tensors[len(self.held) :]
        tasks = replace(self.tasks, support_x=support_x, support_y=support_y, query_x=query_x, query_y=query_y)
        found = self.backward_part(tasks, 1.0)
        return [found, *(torch.zeros_like(p) if p.grad is None else p.grad for p in self.learned)]
