"""Reptile, against calculations by hand and torch's optimizers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import Identity, SmoothNet, random_tasks

from metacv.algorithms.gradient.reptile import Reptile, _batches


def reptile(backbone=None, **settings) -> Reptile:
    torch.manual_seed(0)
    settings = {
        "inner_optimizer": "sgd", "inner_lr": 0.1, "inner_steps": 1, "inner_batch": 6,
        "eval_inner_steps": 2, "eval_inner_batch": 6,
    } | settings  # fmt: skip
    return Reptile(backbone or SmoothNet(), way=3, **settings).double()


def outer_step(algorithm, tasks, lr: float) -> None:
    algorithm.train()
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=lr)
    optimizer.zero_grad()
    algorithm.training_step(tasks)
    optimizer.step()


def test_one_outer_step_equals_a_calculation_by_hand():
    """A linear net on two pixels: two SGD steps by the softmax gradient written out, then an outer step of 0.5."""
    algorithm = reptile(Identity(), inner_steps=2)
    tasks = random_tasks(tasks=1, shape=(1, 1, 2), dtype=torch.float64)
    x, y = tasks.support_x[0].flatten(1), F.one_hot(tasks.support_y[0]).double()
    weight, bias = algorithm.net.head.weight.detach().clone(), algorithm.net.head.bias.detach().clone()
    w, b = weight.clone(), bias.clone()
    for _ in range(2):
        error = ((x @ w.T + b).softmax(dim=1) - y) / len(x)
        w, b = w - 0.1 * error.T @ x, b - 0.1 * error.sum(0)
    outer_step(algorithm, tasks, lr=0.5)
    torch.testing.assert_close(algorithm.net.head.weight.detach(), weight + 0.5 * (w - weight), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(algorithm.net.head.bias.detach(), bias + 0.5 * (b - bias), rtol=1e-12, atol=1e-14)


def test_one_inner_step_of_sgd_is_sgd_on_the_mean_loss_of_all_tasks():
    tasks = random_tasks(tasks=4, dtype=torch.float64)
    algorithm, joint = reptile(), reptile()
    outer_step(algorithm, tasks, lr=0.5)
    optimizer = torch.optim.SGD(joint.parameters(), lr=0.5 * 0.1)
    loss = torch.stack(
        [F.cross_entropy(joint.net(x), y) for x, y in zip(tasks.support_x, tasks.support_y, strict=True)]
    )
    loss.mean().backward()
    optimizer.step()
    for ours, theirs in zip(algorithm.parameters(), joint.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def train_with_torch_adam(algorithm: Reptile, tasks, steps: int, reset: bool) -> list[torch.Tensor]:
    """The weights that torch's Adam reaches on the last task; it ran on the earlier tasks before, unless `reset`."""
    net = reptile().net
    start = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.Adam(net.parameters(), lr=algorithm.inner_lr, betas=(0.0, 0.999))
    for x, y in zip(tasks.support_x, tasks.support_y, strict=True):
        net.load_state_dict(start)
        if reset:
            optimizer = torch.optim.Adam(net.parameters(), lr=algorithm.inner_lr, betas=(0.0, 0.999))
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("reset", [False, True])
def test_inner_adam_equals_torchs_adam_with_beta1_0(reset):
    tasks = random_tasks(tasks=3, dtype=torch.float64)
    algorithm = reptile(inner_optimizer="adam", inner_lr=0.01, inner_steps=4, reset_moments=reset).train()
    for task in tasks.split(1):
        adapted = algorithm.adapt(task)
    expected = train_with_torch_adam(algorithm, tasks, 4, reset)
    for ours, theirs in zip(adapted.values(), expected, strict=True):
        torch.testing.assert_close(ours.squeeze(0), theirs, rtol=1e-7, atol=1e-9)


def test_moments_persist_in_training_and_evaluation_does_not_change_them():
    tasks = random_tasks(dtype=torch.float64)
    algorithm = reptile(inner_optimizer="adam", inner_steps=3)
    algorithm.training_step(tasks)
    assert int(algorithm.moment_steps) == 3 * len(tasks)
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    algorithm.predict(tasks, "transductive")
    assert all(torch.equal(before[name], value) for name, value in algorithm.state_dict().items())


@pytest.mark.parametrize("settings", [{}, {"inner_optimizer": "adam", "reset_moments": True}])
def test_tasks_together_have_the_gradient_of_tasks_in_a_loop(settings):
    """Each task has its own order of the support images, which take three inner batches."""
    tasks = replace(random_tasks(tasks=5, dtype=torch.float64), seeds=torch.tensor([3, 1, 4, 15, 9]))
    moved = []
    for batching in ("loop", "vmap"):
        algorithm = reptile(
            **settings, inner_steps=4, inner_batch=2, inner_lr=0.01, task_batching=batching, task_chunk=3
        ).train()
        assert [len(group) for group in algorithm.groups(tasks)] == ([1] * 5 if batching == "loop" else [3, 2])
        algorithm.training_step(tasks)
        moved.append({name: p.grad for name, p in algorithm.net.named_parameters()})
    for name, expected in moved[0].items():
        if settings and "conv" in name and name.endswith("bias"):
            continue  # before batch norm it has no gradient but rounding, which Adam divides by rounding
        torch.testing.assert_close(moved[1][name], expected, rtol=1e-8, atol=1e-11)


def test_tasks_pass_one_after_another_if_moments_pass_from_task_to_task():
    algorithm = reptile(inner_optimizer="adam", task_batching="vmap").train()
    assert len(list(algorithm.groups(random_tasks(tasks=3)))) == 3


def test_inner_batches_use_every_support_image_before_any_repeats():
    batches = _batches(images=6, size=2, steps=6, seed=0)
    assert batches.shape == (6, 2)
    for half in (batches[:3], batches[3:]):
        assert sorted(half.flatten().tolist()) == list(range(6))


@pytest.mark.parametrize("way", [2, 7])
def test_moments_fit_a_head_for_another_way_and_stay_positive(way):
    algorithm = reptile(inner_optimizer="adam", inner_lr=1e-3)
    algorithm.train().training_step(random_tasks(tasks=1, dtype=torch.float64))
    algorithm.eval()
    tasks = random_tasks(way=way, dtype=torch.float64)
    logits = algorithm.predict(tasks, "transductive")
    assert logits.shape == (2, 4 * way, way)
    assert logits.isfinite().all()  # a moment below zero has no root


def test_with_more_classes_than_trained_every_class_starts_from_the_mean_row():
    algorithm = reptile().eval()
    head = algorithm.for_way(dict(algorithm.net.named_parameters()), 5)
    torch.testing.assert_close(head["head.weight"], algorithm.net.head.weight.mean(0).expand(5, -1))
    torch.testing.assert_close(head["head.bias"], algorithm.net.head.bias.mean().expand(5))
