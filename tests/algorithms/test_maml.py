"""MAML's outer gradient, against finite differences, an independent implementation and tasks in a loop."""

from dataclasses import replace

import higher
import pytest
import torch
import torch.nn.functional as F
from conftest import SmoothNet, random_tasks
from torch import nn

from metacv.algorithms.gradient.maml import MAML
from metacv.backbones.batch_norm import BatchNorm, batch_norms
from metacv.backbones.conv4 import Conv4


def smooth_maml(backbone=None, **settings) -> MAML:
    torch.manual_seed(0)
    settings = {"inner_lr": 0.1, "inner_steps": 1, "eval_inner_steps": 2, "adapt_norm": True} | settings
    return MAML(backbone or SmoothNet(), way=3, **settings).double()


def outer_gradient(algorithm, tasks) -> torch.Tensor:
    algorithm.zero_grad()
    algorithm.train()
    algorithm.training_step(tasks)
    return torch.cat([p.grad.flatten() for p in algorithm.parameters() if p.requires_grad])


def finite_difference(algorithm, tasks, direction: torch.Tensor, step: float = 1e-4) -> float:
    """Fourth-order central difference of the outer loss along a direction."""
    parameters = [p for p in algorithm.parameters() if p.requires_grad]
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    algorithm.train()

    def loss(at: float) -> float:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(start + at * direction, parameters)
        return float(algorithm.loss(algorithm(tasks), tasks.query_y).detach())

    value = (8 * (loss(step) - loss(-step)) - (loss(2 * step) - loss(-2 * step))) / (12 * step)
    torch.nn.utils.vector_to_parameters(start, parameters)
    return value


@pytest.mark.parametrize(("inner_steps", "adapt_norm"), [(1, True), (3, True), (3, False)])
def test_outer_gradient_equals_finite_differences(inner_steps, adapt_norm):
    algorithm = smooth_maml(inner_steps=inner_steps, adapt_norm=adapt_norm)
    tasks = random_tasks(dtype=torch.float64)
    gradient = outer_gradient(algorithm, tasks)
    directions = [gradient / gradient.norm()]
    generator = torch.Generator().manual_seed(1)
    directions += [F.normalize(torch.randn(gradient.shape, generator=generator).double(), dim=0) for _ in range(2)]
    for direction in directions:
        expected = finite_difference(algorithm, tasks, direction)
        assert abs(float(gradient @ direction) - expected) <= 1e-7 * float(gradient.norm())


def by_higher(algorithm: MAML, tasks, inner_lr: float, steps: int, first_order: bool) -> torch.Tensor:
    net = nn.Sequential(
        algorithm.net.backbone.blocks, nn.Flatten(), algorithm.net.head
    )  # higher refuses abstract classes
    optimizer = torch.optim.SGD(net.parameters(), lr=inner_lr)
    parameters = [p for p in net.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for t in range(len(tasks)):
        with higher.innerloop_ctx(net, optimizer, track_higher_grads=not first_order) as (fast, inner):
            for _ in range(steps):
                inner.step(F.cross_entropy(fast(tasks.support_x[t]), tasks.support_y[t]))
            loss = F.cross_entropy(fast(tasks.query_x[t]), tasks.query_y[t])
            with_respect_to = fast.parameters(time=-1) if first_order else fast.parameters(time=0)
            wanted = [p for p, own in zip(with_respect_to, net.parameters(), strict=True) if own.requires_grad]
            for sum_, grad in zip(total, torch.autograd.grad(loss, wanted), strict=True):
                sum_ += grad / len(tasks)
    return torch.cat([g.flatten() for g in total])


@pytest.mark.parametrize(
    ("downsample", "inner_steps", "first_order"),
    [("stride", 1, False), ("stride", 3, True), ("max_pool", 3, False), ("max_pool", 1, True)],
)
def test_outer_gradient_of_conv4_equals_that_of_higher(downsample, inner_steps, first_order):
    torch.manual_seed(0)
    backbone = Conv4((1, 16, 16), channels=4, downsample=downsample, global_pool=True, running_stats=False)
    algorithm = MAML(
        backbone, way=3, inner_lr=0.1, inner_steps=inner_steps, eval_inner_steps=1,
        first_order=first_order, adapt_norm=True,
    ).double()  # fmt: skip
    tasks = random_tasks(shape=(1, 16, 16), dtype=torch.float64)
    ours = outer_gradient(algorithm, tasks)
    theirs = by_higher(algorithm, tasks, 0.1, inner_steps, first_order)
    assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


def test_second_order_gradient_differs_from_first_order_gradient():
    tasks = random_tasks(dtype=torch.float64)
    second = outer_gradient(smooth_maml(), tasks)
    first = outer_gradient(smooth_maml(first_order=True), tasks)
    assert (second - first).norm() > 1e-3 * second.norm()


def test_outer_loss_is_that_of_the_adapted_parameters():
    """Calculated by hand with one step of autograd; the initial parameters would give another loss."""
    algorithm = smooth_maml()
    tasks = random_tasks(tasks=1, dtype=torch.float64)
    net = algorithm.net
    unadapted = F.cross_entropy(net(tasks.query_x[0]), tasks.query_y[0])
    parameters = list(net.parameters())
    grads = torch.autograd.grad(F.cross_entropy(net(tasks.support_x[0]), tasks.support_y[0]), parameters)
    with torch.no_grad():
        for p, grad in zip(parameters, grads, strict=True):
            p -= 0.1 * grad
        by_hand = F.cross_entropy(net(tasks.query_x[0]), tasks.query_y[0])
        for p, grad in zip(parameters, grads, strict=True):
            p += 0.1 * grad
    reported = algorithm.training_step(tasks)["loss"]
    torch.testing.assert_close(reported, by_hand, rtol=1e-12, atol=0)
    assert abs(float(reported - unadapted.detach())) > 1e-3


def test_gradient_of_a_batch_is_the_mean_of_the_gradients_of_its_tasks():
    algorithm = smooth_maml()
    tasks = random_tasks(tasks=2, dtype=torch.float64)
    one, other = (outer_gradient(algorithm, task) for task in tasks.split(1))
    torch.testing.assert_close(outer_gradient(algorithm, tasks), (one + other) / 2, rtol=1e-10, atol=1e-14)


STRIDED = {"downsample": "stride", "global_pool": True, "norm_scale": False}
POOLED = {"downsample": ["max_pool", "max_pool", "none", "none"]}


@pytest.mark.parametrize(
    ("net", "norm", "first_order", "inner_steps", "chunk"),
    [
        (STRIDED, "own", False, 3, 2),
        (STRIDED, "torch", False, 3, 8),
        (POOLED, "own", False, 3, 8),
        (POOLED, "torch", False, 3, 2),
        (POOLED, "own", True, 1, 2),
        (POOLED, "torch", True, 3, 8),
    ],
)
def test_tasks_together_have_the_gradient_of_tasks_in_a_loop(net, norm, first_order, inner_steps, chunk):
    """Also with max pool and torch's fused batch norm, as on a GPU, whose gradient within vmap is wrong by percents."""
    tasks = random_tasks(tasks=3, shape=(1, 14, 14), dtype=torch.float64)
    gradients = []
    for batching in ("loop", "vmap"):
        torch.manual_seed(0)
        backbone = Conv4((1, 14, 14), channels=4, running_stats=False, **net)
        settings = {"inner_steps": inner_steps, "eval_inner_steps": 1, "first_order": first_order}
        algorithm = MAML(backbone, 3, 0.4, **settings, task_batching=batching, task_chunk=chunk).double()
        for layer in batch_norms(algorithm):
            assert isinstance(layer, BatchNorm)
            layer.second_order &= norm == "own"
        gradients.append(outer_gradient(algorithm, tasks))
    assert (gradients[0] - gradients[1]).norm() < 1e-10 * gradients[0].norm()


def test_auto_passes_small_tasks_together_and_running_statistics_one_after_another():
    def together(images: torch.Tensor, running_stats: bool = False) -> bool:
        return smooth_maml(SmoothNet(running_stats=running_stats)).tasks_together(images) > 1

    assert together(torch.rand(10, 1, 28, 28))
    assert not together(torch.rand(11, 1, 28, 28))
    assert not together(torch.rand(5, 3, 84, 84))
    assert not together(torch.rand(5, 1, 28, 28), running_stats=True)
    with pytest.raises(ValueError, match="task_batching=vmap"):
        smooth_maml(SmoothNet(running_stats=True), task_batching="vmap")


def test_sum_per_shot_is_way_times_the_mean_loss():
    tasks = random_tasks(dtype=torch.float64)
    summed = outer_gradient(smooth_maml(inner_loss="sum_per_shot", inner_lr=0.1), tasks)
    mean = outer_gradient(smooth_maml(inner_loss="mean", inner_lr=0.1 * tasks.way), tasks)
    torch.testing.assert_close(summed, mean, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("adapt_norm", [True, False])
def test_batch_norm_is_adapted_only_if_adapt_norm_is_true(adapt_norm):
    algorithm = smooth_maml(adapt_norm=adapt_norm)
    adapted = algorithm.adapt(random_tasks(tasks=1, dtype=torch.float64))
    net = dict(algorithm.net.named_parameters())
    changed = {name for name in adapted if not torch.equal(net[name].unsqueeze(0), adapted[name])}
    assert "backbone.conv2.weight" in changed
    assert ("backbone.norm1.bias" in changed) == adapt_norm


def test_adaptation_in_evaluation_keeps_no_graph(monkeypatch):
    algorithm = smooth_maml(eval_inner_steps=3).eval()
    tasks = random_tasks(tasks=1, dtype=torch.float64)
    grad, kept = torch.autograd.grad, []

    def watched(*args, create_graph=False):
        kept.append(create_graph)
        return grad(*args, create_graph=create_graph)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    with torch.no_grad():
        logits = algorithm(tasks)
    assert not logits.requires_grad
    assert kept == [False] * 3
    algorithm.adapt(tasks)["head.weight"].sum().backward()
    assert all(p.grad is None for p in algorithm.parameters())


def test_first_order_keeps_no_second_order_graph():
    """The gradient of an adapted weight by an initial one is then the identity."""
    algorithm = smooth_maml(first_order=True, inner_steps=3).train()
    adapted = algorithm.adapt(random_tasks(tasks=1, dtype=torch.float64))
    grads = torch.autograd.grad(adapted["head.weight"].sum(), list(algorithm.net.parameters()), allow_unused=True)
    for name, grad in zip(dict(algorithm.net.named_parameters()), grads, strict=True):
        if name == "head.weight":
            assert torch.equal(grad, torch.ones_like(grad))
        else:
            assert grad is None


def test_with_fewer_classes_than_trained_the_head_keeps_its_first_rows():
    algorithm = smooth_maml().eval()
    params = algorithm.for_way(dict(algorithm.net.named_parameters()), 2)
    assert torch.equal(params["head.weight"], algorithm.net.head.weight[:2])
    assert torch.equal(params["head.bias"], algorithm.net.head.bias[:2])
    tasks = random_tasks(way=2, dtype=torch.float64)
    with torch.no_grad():
        algorithm.net.head.bias[2] = -1e6  # takes the third class out of a task of three
    expected = algorithm.predict(replace(tasks, way=3), "transductive")[..., :2]
    torch.testing.assert_close(algorithm.predict(tasks, "transductive"), expected, rtol=1e-9, atol=0)


def test_with_more_classes_than_trained_the_rows_of_the_head_are_drawn_like_the_trained_ones():
    algorithm = smooth_maml().eval()
    params = algorithm.for_way(dict(algorithm.net.named_parameters()), 2000)
    weight, rows = params["head.weight"], algorithm.net.head.weight
    assert weight.shape == (2000, rows.shape[1])
    assert ((weight.mean(0) - rows.mean(0)).abs() < 0.1 * rows.std(0)).all()
    torch.testing.assert_close(weight.std(0), rows.std(0), rtol=0.1, atol=0)
    again = algorithm.for_way(dict(algorithm.net.named_parameters()), 2000)
    assert torch.equal(again["head.weight"], weight)
    assert torch.equal(again["head.bias"], params["head.bias"])
    tasks = random_tasks(way=5, dtype=torch.float64)
    logits = algorithm.predict(tasks, "transductive")
    assert logits.shape == (2, 20, 5)
    assert torch.equal(algorithm.predict(tasks, "transductive"), logits)


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_gradient_checkpointing_changes_no_gradient(batching):
    tasks = random_tasks(tasks=3, dtype=torch.float64)
    settings = {"inner_steps": 3, "adapt_norm": False, "task_batching": batching}
    kept, recomputed = (
        outer_gradient(smooth_maml(**settings, gradient_checkpointing=on), tasks) for on in (False, True)
    )
    torch.testing.assert_close(recomputed, kept, rtol=1e-12, atol=1e-15)


def test_gradient_checkpointing_keeps_one_inner_step_at_a_time():
    """Measured as the numbers that autograd saves while the inner steps run."""

    def saved(checkpointing: bool) -> int:
        algorithm = smooth_maml(inner_steps=5, gradient_checkpointing=checkpointing).train()
        tasks = random_tasks(tasks=1, shot=5, query=1, dtype=torch.float64)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            algorithm.adapt(tasks)
        return sum(sizes)

    assert saved(True) < 0.4 * saved(False)


@pytest.mark.parametrize(("batching", "groups"), [("auto", 3), ("vmap", 1)])
def test_gradient_checkpointing_takes_one_task_at_a_time_unless_vmap_is_set(batching, groups):
    tasks = random_tasks(tasks=3)
    algorithm = smooth_maml(gradient_checkpointing=True, task_batching=batching)
    assert len(list(algorithm.train().groups(tasks))) == groups
    assert len(list(algorithm.eval().groups(tasks))) == 1


def test_gradient_checkpointing_refuses_running_statistics():
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        smooth_maml(SmoothNet(running_stats=True), gradient_checkpointing=True)
