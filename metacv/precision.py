"""Precision, compiled steps and memory: faster steps whose results differ by rounding only."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metacv.errors import UserError
from metacv.text import first_line


def check_precision(name: str, device: torch.device) -> None:
    if name == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError(f"precision=tf32: needs a GPU of the Ampere generation or later, not {device}; use fp32")


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Compute products and convolutions in fp32, tf32 (10 bits of mantissa) or bf16 (7 bits); sums in fp32."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = name == "tf32"
    try:
        # No cache of casts: weights change within a step.
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16", cache_enabled=False):
            yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """Restore the random state of the CPU and of `device` at exit."""
    return torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type)


def keep_freed_memory() -> None:
    """Make glibc, if present, keep freed memory: new zeroed pages can take a quarter of a step's time on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_max = -1, -4  # names of parameters, in malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


class Compiled:
    """A function of tensors, including its autograd calls, that runs as one graph per shape of its inputs.

    On a CPU, torch.compile builds the graph. It supports first derivatives only, so make_fx first records the
    operations of autograd, and the graph to compile has no derivatives. On a GPU, the kernels of one call are recorded
    as a CUDA graph, which takes seconds; outputs are valid until the next call.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], state: Sequence[Tensor] = ()) -> None:
        """`function` takes the inputs of a call and uses the tensors of `state`, whose memory must not move.

        All tensors that change between calls, also those that `function` changes, must be in `state` or in the inputs.
        """
        self.function, self.state = function, list(state)
        self.graphs: dict[object, Callable[..., Sequence[Tensor]]] = {}

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        device = inputs[0].device.type
        autocast = torch.is_autocast_enabled(device)
        kind = autocast, *((t.shape, t.dtype) for t in inputs)
        if kind not in self.graphs:
            self.graphs[kind] = self._compiled(inputs) if device == "cpu" else self._captured(inputs)
        try:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return self.graphs[kind](*inputs)
        except RuntimeError as error:  # no compiler, or one that fails
            raise UserError(f"compile=true: {first_line(error)}") from error

    @contextmanager
    def _undone(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Undo changes to tensors and to the random state at exit."""
        tensors = [*self.state, *inputs]
        before = [t.detach().clone() for t in tensors]
        with random_state_kept(inputs[0].device):
            yield
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                if not torch.equal(tensor, value):  # an expanded tensor is never written to, and copy_ would refuse it
                    tensor.copy_(value)

    def _compiled(self, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        with self._undone(inputs):
            from torch.fx.experimental.proxy_tensor import make_fx  # takes a quarter of a second

            graph = make_fx(lambda *tensors: self.function(*tensors[len(self.state) :]))(*self.state, *inputs)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        compiled = torch.compile(graph, dynamic=False)
        return lambda *inputs: compiled(*self.state, *inputs)

    def _captured(self, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        own = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        graph, current, aside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with self._undone(inputs):
            with torch.cuda.stream(aside):  # warm up: a capture must not initialize libraries or memory
                for _ in range(2):
                    self.function(*own)
            current.wait_stream(aside)
            with torch.cuda.graph(graph):
                outputs = [t.detach() for t in self.function(*own)]

        def replay(*inputs: Tensor) -> Sequence[Tensor]:
            torch._foreach_copy_([t.detach() for t in own], list(inputs))
            graph.replay()
            return outputs

        return replay


class CompiledGradient:
    """An algorithm's `add_gradient`, compiled. It must not draw at random by the seeds of the tasks."""

    def __init__(self, algorithm: nn.Module, add_gradient: Callable[[Any, float], dict[str, Tensor]]) -> None:
        self.learned = [p for p in algorithm.parameters() if p.requires_grad]
        self.add_gradient = add_gradient
        self.compiled = Compiled(self._step, [*algorithm.parameters(), *algorithm.buffers()])
        self.names: list[str] = []  # of the scalars

    def __call__(self, batch: Any, share: float) -> dict[str, Tensor]:
        inputs = {key: t for key, t in vars(batch).items() if isinstance(t, Tensor) and key != "seeds"}
        self.batch, self.inputs, before = batch, list(inputs), [p.grad for p in self.learned]
        outputs = self.compiled(*(t.contiguous() for t in inputs.values()))
        grads, scalars = outputs[: len(self.learned)], outputs[len(self.learned) :]
        for p, grad, earlier in zip(self.learned, grads, before, strict=True):
            p.grad = grad * share if earlier is None else earlier + grad * share
        return {name: scalar * share for name, scalar in zip(self.names, scalars, strict=True)}

    def _step(self, *inputs: Tensor) -> list[Tensor]:
        for p in self.learned:
            p.grad = None
        batch = replace(self.batch, **dict[str, Any](zip(self.inputs, inputs, strict=True)))
        scalars = self.add_gradient(batch, 1.0)
        self.names = list(scalars)
        return [*(torch.zeros_like(p) if p.grad is None else p.grad for p in self.learned), *scalars.values()]
