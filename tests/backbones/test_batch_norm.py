"""The batch norm with a fast second derivative, against torch's and finite differences."""

import pytest
import torch
from torch import nn

from metacv.backbones.batch_norm import BatchNorm


def norms(track_running_stats: bool = False) -> tuple[BatchNorm, nn.BatchNorm2d]:
    own, torchs = (cls(4, track_running_stats=track_running_stats).double() for cls in (BatchNorm, nn.BatchNorm2d))
    with torch.no_grad():
        own.weight.normal_()
        own.bias.normal_()
    torchs.load_state_dict(own.state_dict())
    own.second_order = True
    return own, torchs


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_and_its_first_two_gradients_equal_those_of_torch(layout):
    torch.manual_seed(0)
    images = torch.randn(3, 4, 5, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    results = []
    for norm in norms():
        inputs = [images, norm.weight, norm.bias]
        maps = norm(images)
        first = torch.autograd.grad((maps**3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum((grad**2).sum() for grad in first), inputs)
        results.append([maps, *first, *second])
    for own, torchs in zip(*results, strict=True):
        torch.testing.assert_close(own, torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("task_dim", [None, 0, 1])
def test_gradients_of_batch_norm_equal_finite_differences(task_dim):
    """For one task, and for two that share the scale but not the shift."""
    torch.manual_seed(0)
    own, _ = norms()
    if task_dim is None:
        images, weight, bias = torch.randn(3, 4, 2, 2), torch.randn(4), torch.randn(4)
    else:
        images, weight, bias = torch.randn(2, 3, 4, 2, 2), torch.randn(4), torch.randn(2, 4)
        images = images.movedim(0, task_dim)

    def call(images, weight, bias):
        return torch.func.functional_call(own, {"weight": weight, "bias": bias}, (images,))

    inputs = tuple(x.double().requires_grad_() for x in (images, weight, bias))
    function = call if task_dim is None else torch.vmap(call, in_dims=(task_dim, None, 0))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_batch_norm_with_running_statistics_equals_that_of_torch():
    own, torchs = norms(track_running_stats=True)
    images = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    for _ in range(2):
        assert torch.equal(own(images), torchs(images))
    assert torch.equal(own.eval()(images), torchs.eval()(images))
    for key, value in torchs.state_dict().items():
        assert torch.equal(own.state_dict()[key], value)


def test_a_third_gradient_of_batch_norm_is_refused():
    own, _ = norms()
    images = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    (by_images,) = torch.autograd.grad((own(images) ** 3).sum(), images, create_graph=True)
    with pytest.raises(NotImplementedError, match="third"):
        torch.autograd.grad((by_images**2).sum(), images, create_graph=True)


def test_batch_norm_refuses_one_value_a_channel_as_torch_does():
    own, _ = norms()
    with pytest.raises(ValueError, match="more than 1 value"):
        own(torch.randn(1, 4, 1, 1, dtype=torch.float64))
