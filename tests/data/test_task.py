"""Batches of tasks."""

from dataclasses import fields, replace

import pytest
import torch
from conftest import random_tasks
from torch import Tensor

from metacv.data.task import TaskBatch


@pytest.mark.parametrize("shape", [(5,), (3, 2, 2)], ids=["vectors", "maps"])
def test_class_means_equal_a_loop_for_unequal_classes_in_any_order(shape):
    torch.manual_seed(0)
    labels = torch.tensor([[2, 0, 1, 2, 2, 0, 1], [1, 1, 0, 2, 1, 1, 1]])
    values = torch.randn(2, 7, *shape, dtype=torch.float64)
    tasks = TaskBatch(values, labels, values[:, :1], labels[:, :1], way=3, classes=torch.arange(3).expand(2, 3))
    means = tasks.class_means(values)
    assert means.shape == (2, 3, *shape)
    for t in range(2):
        for c in range(3):
            own = [values[t, i] for i in range(7) if labels[t, i] == c]
            torch.testing.assert_close(means[t, c], sum(own) / len(own), rtol=1e-12, atol=1e-14)


def test_class_means_are_taken_in_fp32_under_autocast():
    tasks = random_tasks()
    features = tasks.support_x.flatten(2)
    expected = tasks.class_means(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tasks.class_means(features), expected)
        assert tasks.class_means(features.bfloat16()).dtype == torch.float32


def test_split_keeps_every_tensor_of_a_task():
    tasks = replace(random_tasks(tasks=5), seeds=torch.arange(5))
    parts = list(tasks.split(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    for own in fields(tasks):
        value = getattr(tasks, own.name)
        if isinstance(value, Tensor):
            assert torch.equal(torch.cat([getattr(part, own.name) for part in parts]), value)


def test_each_query_keeps_one_query_of_each_task():
    tasks = random_tasks(tasks=2)
    one = tasks.each_query()[4]
    assert torch.equal(one.query_x, tasks.query_x[:, 4:5])
    assert torch.equal(one.query_y, tasks.query_y[:, 4:5])
    assert one.support_x is tasks.support_x
