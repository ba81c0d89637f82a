"""Select the statistics of batch norm, and a batch norm with a fast second derivative for MAML."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_gradients = torch.ops.aten.native_batch_norm_backward  # with respect to images, scale and shift


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def uses_batch_statistics(network: nn.Module) -> bool:
    """Whether any batch norm uses batch statistics in the current mode of the network."""
    return any(norm.training or norm.running_mean is None for norm in batch_norms(network))


def keeps_running_statistics(network: nn.Module) -> bool:
    return any(norm.track_running_stats for norm in batch_norms(network))


def running_statistics(network: nn.Module) -> list[Tensor]:
    return [s for norm in batch_norms(network) for s in (norm.running_mean, norm.running_var) if s is not None]


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Make batch norms use batch statistics, without updating running statistics."""
    before = [(norm, norm.training, norm.track_running_stats) for norm in batch_norms(network)]
    for norm, _, _ in before:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, training, track in before:
            norm.training, norm.track_running_stats = training, track


class BatchNorm(nn.BatchNorm2d):
    """Equal to nn.BatchNorm2d up to rounding. `second_order`: in training, its second derivative is fast."""

    second_order = False  # only without running statistics; no third derivative, no torch.func.grad

    def forward(self, images: Tensor) -> Tensor:
        own = self.second_order and self.training and self.running_mean is None and self.weight is not None
        if not own or images.dim() != 4 or images.numel() <= images.shape[1]:
            return super().forward(images)
        return _Norm.apply(images, self.weight, self.bias, self.eps)[0]


class _Norm(torch.autograd.Function):
    """images x [B, C, H, W], scale w [C], shift b [C] -> w z + b, with z = (x - mean) r and r = 1 / std of each C."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_batch_norm(x, w, b, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, w, _, ctx.eps = inputs
        _, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        ctx.save_for_backward(x, w, mean, r)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *_Gradient.apply(g, *ctx.saved_tensors, ctx.eps), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Treat tasks as additional channels."""

        def merged(t: Tensor, task_dim: int | None, channels: int) -> Tensor:
            if task_dim is None:
                t, task_dim = t.unsqueeze(0).expand(info.batch_size, *t.shape), 0
            return t.movedim(task_dim, channels).flatten(channels, channels + 1)

        x, w, b, eps = inputs
        outputs = _Norm.apply(merged(x, in_dims[0], 1), merged(w, in_dims[1], 0), merged(b, in_dims[2], 0), eps)
        dims = (1, 0, 0)
        return tuple(t.unflatten(dim, (info.batch_size, -1)) for t, dim in zip(outputs, dims, strict=True)), dims


class _Gradient(torch.autograd.Function):
    """Gradients by x, w and b, given the gradient g by the output: w r P(g), sum(g z) and sum(g) of each channel, with
    P(a) = a - mean(a) - z mean(a z)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, r: Tensor, eps: float) -> tuple[Tensor, ...]:
        g = _laid_out_as(x, g)
        by_x, by_w, by_b = _gradients(g, x, w, None, None, mean, r, True, eps, [True, True, True])
        ctx.save_for_backward(g, x, w, mean, r, by_w, by_b)
        return by_x, by_w, by_b

    @staticmethod
    def backward(ctx: Any, u: Tensor, u_w: Tensor, u_b: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of sum(u w r P(g)) + sum(u_w g z) + sum(u_b g) by g, x, w: dz = r P(dx), dr = -r^2 mean(z dx)."""
        if torch.is_grad_enabled():
            raise NotImplementedError("the third derivative of batch norm is not implemented")
        g, x, w, mean, r, gz, g_sum = ctx.saved_tensors
        u = _laid_out_as(x, u)
        n = x.numel() // len(w)
        uz, u_sum = _sums(u, x, mean, r)
        ug, _ = _sums(u, g, torch.zeros_like(mean), torch.ones_like(r))
        q = ug - u_sum * g_sum / n - uz * gz / n  # sum(u P(g))
        for_u, for_g = -w * r * gz / n, u_w - w * r * uz / n  # of z: the gradient is for_u u + for_g g
        for_x = -r * r * (for_u * uz + for_g * gz + w * r * q) / n  # of x, where z = r (x - mean)
        constant = -r * (for_u * u_sum + for_g * g_sum) / n - for_x * mean
        by_x = _combined(constant, (r * for_u, u), (r * for_g, g), (for_x, x))
        by_g = _combined(u_b - w * r * u_sum / n - r * for_g * mean, (w * r, u), (r * for_g, x))
        return by_g, by_x, r * q, None, None, None


def _laid_out_as(x: Tensor, a: Tensor) -> Tensor:
    """Copy `a` to the memory layout of `x`: sums over maps of different layouts are several times slower."""
    return a if a.stride() == x.stride() else torch.empty_like(x).copy_(a)


def _sums(a: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum(a (x - mean) r) and sum(a) of each channel; torch's fastest kernel for it is that of batch norm."""
    scale = r  # unused, because the gradient by x is not computed, but a GPU needs a tensor
    return _gradients(a, x, scale, None, None, mean, r, True, 0.0, [False, True, True])[1:]


def _combined(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """Return constant [C] + the sum of factor [C] * maps [B, C, H, W]."""
    (factor, maps), *others = terms
    total = torch.addcmul(constant.view(-1, 1, 1), maps, factor.view(-1, 1, 1))
    for factor, maps in others:
        total.addcmul_(maps, factor.view(-1, 1, 1))
    return total
