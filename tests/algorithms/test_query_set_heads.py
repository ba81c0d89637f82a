"""Heads that use the whole query set: against plain loops in float64, and calculations by hand."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml

from metacv import CONFIG_DIR
from metacv.algorithms.heads.base import Head
from metacv.algorithms.heads.laplacian import LaplacianShot
from metacv.algorithms.heads.pt_map import PTMAP
from metacv.algorithms.heads.soft_kmeans import SoftKMeans
from metacv.algorithms.heads.tim import TIM
from metacv.data.task import TaskBatch
from metacv.model import build_node

HEADS = sorted(path.stem for path in (CONFIG_DIR / "head").glob("*.yaml"))
USE_QUERIES = {"soft_kmeans", "laplacian", "tim", "pt_map"}


def head_named(name: str) -> Head:
    def settings(file: str) -> dict:
        own = yaml.safe_load((CONFIG_DIR / "head" / f"{file}.yaml").read_text())
        return {name: value for base in own.pop("defaults", []) for name, value in settings(base).items()} | own

    return build_node("head", settings(name), Head)


def unequal_tasks(
    tasks=3, shots=(1, 3, 2, 2), queries=(9, 1, 4, 6), dim=6, dtype=torch.float64, noise=0.4
) -> TaskBatch:
    """Tasks of features with unequal numbers of images per class, of both signs, in random order."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(tasks, len(shots), dim, generator=generator, dtype=torch.float64)

    def images(counts) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        labels = labels[torch.randperm(len(labels), generator=generator)].expand(tasks, -1)
        features = centres.gather(1, labels.unsqueeze(2).expand(-1, -1, dim))
        features = features + noise * torch.randn(features.shape, generator=generator, dtype=torch.float64)
        return features.to(dtype), labels

    classes = torch.arange(len(shots)).expand(tasks, -1)
    return TaskBatch(*images(shots), *images(queries), len(shots), classes)


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def weighted_mean(images, weights) -> torch.Tensor:
    return sum(w * x for x, w in zip(images, weights, strict=True)) / sum(weights)


def mean_of_class(support, labels, n) -> torch.Tensor:
    return weighted_mean(support, [float(label == n) for label in labels])


def soft_kmeans_in_loops(support, labels, query, way, steps=2, scale=3.0):
    means = [mean_of_class(support, labels, n) for n in range(way)]
    for _ in range(steps):
        shares = [F.softmax(torch.stack([-scale * (x - m).square().sum() for m in means]), 0) for x in query]
        means = [
            weighted_mean(support + query, [float(y == n) for y in labels] + [s[n] for s in shares]) for n in range(way)
        ]
    return torch.stack([torch.stack([-scale * (x - m).square().sum() for m in means]) for x in query]).softmax(-1)


def laplacian_in_loops(support, labels, query, way, weight=0.7, neighbours=2):
    shift = sum(support) / len(support) - sum(query) / len(query)
    query = [x + shift for x in query]
    means = [unit(mean_of_class(support, labels, n)) for n in range(way)]
    sums, totals = [0.0] * way, [0.0] * way
    for i, x in enumerate(support + query):
        cosines = torch.stack([unit(x) @ m for m in means])
        n = labels[i] if i < len(support) else int(cosines.argmax())
        own = F.softmax(10 * cosines, 0)[n]
        sums[n], totals[n] = sums[n] + own * x, totals[n] + own
    unary = [torch.stack([(x - s / w).square().sum() for s, w in zip(sums, totals, strict=True)]) for x in query]
    near = []
    for i, x in enumerate(query):
        others = sorted((float((x - z).norm()), j) for j, z in enumerate(query) if j != i)
        near.append([j for _, j in others[:neighbours]])
    y = [F.softmax(-a, 0) for a in unary]
    for _ in range(20):
        y = [F.softmax(-a + weight * sum(y[j] for j in own), 0) for a, own in zip(unary, near, strict=True)]
    return torch.stack(y)


def tim_in_loops(support, labels, query, way, steps=4, scale=5.0, lam=0.3, alpha=0.2):
    weights = [mean_of_class(support, labels, n) for n in range(way)]

    def probabilities(x):
        return F.softmax(torch.stack([-scale / 2 * (x - w).square().sum() for w in weights]), 0)

    for _ in range(steps):
        p_support, p_query = [probabilities(x) for x in support], [probabilities(x) for x in query]
        powers = torch.stack([p ** (1 + alpha) for p in p_query])
        q = powers / powers.sum(0).sqrt()
        q = q / q.sum(1, keepdim=True)
        new, ratio = [], len(support) / len(query)
        for n, w in enumerate(weights):
            top, bottom = 0.0, 0.0
            for x, y, p in zip(support, labels, p_support, strict=True):
                top = top + lam / (1 + alpha) * ((y == n) * x + p[n] * (w - x))
                bottom = bottom + lam / (1 + alpha) * (y == n)
            for i, (x, p) in enumerate(zip(query, p_query, strict=True)):
                top = top + ratio * (q[i, n] * x + p[n] * (w - x))
                bottom = bottom + ratio * q[i, n]
            new.append(top / bottom)
        weights = new
    return torch.stack([probabilities(x) for x in query])


def pt_map_in_loops(support, labels, query, way, steps=3, sharpness=4.0, rate=0.3, power=0.5):
    def transformed(images):
        images = [unit(torch.sign(x) * (x.abs() + 1e-6) ** power) for x in images]
        mean = sum(images) / len(images)
        return [unit(x - mean) for x in images]

    support, query = transformed(support), transformed(query)
    centres = [mean_of_class(support, labels, n) for n in range(way)]

    def assigned():
        plan = torch.stack([torch.stack([(-sharpness * (x - c).square().sum()).exp() for c in centres]) for x in query])
        for _ in range(400):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0) * len(query) / way
        return plan

    for _ in range(steps):
        plan = assigned()
        for n in range(way):
            mean = weighted_mean(support + query, [float(y == n) for y in labels] + [*plan[:, n]])
            centres[n] = centres[n] + rate * (mean - centres[n])
    return assigned()


@pytest.mark.parametrize(
    ("head", "in_loops"),
    [
        (SoftKMeans(steps=2, scale=3.0), soft_kmeans_in_loops),
        (LaplacianShot(weight=0.7, neighbours=2), laplacian_in_loops),
        (TIM(steps=4, scale=5.0, support=0.3, certainty=0.2), tim_in_loops),
        (PTMAP(steps=3, sharpness=4.0, rate=0.3), pt_map_in_loops),
    ],
    ids=["soft_kmeans", "laplacian", "tim", "pt_map"],
)
def test_probabilities_equal_those_of_the_paper_written_as_loops(head, in_loops):
    tasks = unequal_tasks(noise=1.0).normalized()
    own = head(tasks).softmax(-1)
    assert own.dtype == torch.float64
    for t in range(len(tasks)):
        lists = [*tasks.support_x[t]], tasks.support_y[t].tolist(), [*tasks.query_x[t]]
        assert (own[t] - in_loops(*lists, tasks.way)).abs().max() < 1e-10


def test_soft_kmeans_by_hand():
    """Classes at 0 and 90 degrees, a query at each: the share of the near class is 1 / (1 + e^-2)."""
    support, labels = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.arange(2).unsqueeze(0)
    tasks = TaskBatch(support, labels, 2 * support, labels, 2, labels)
    share = 1 / (1 + math.exp(-2))
    near, far = (1 + share) / 2, (1 - share) / 2  # coordinates of the new mean
    difference = (near**2 + (1 - far) ** 2) - ((1 - near) ** 2 + far**2)
    logits = SoftKMeans(scale=1.0)(tasks)[0]
    assert float(logits[0, 0] - logits[0, 1]) == pytest.approx(difference, abs=1e-6)
    assert float(logits[1, 1] - logits[1, 0]) == pytest.approx(difference, abs=1e-6)


def test_pt_map_gives_every_class_its_part_of_the_queries_and_every_query_a_sum_of_1():
    shares = PTMAP()(unequal_tasks(noise=1.0)).exp()
    torch.testing.assert_close(shares.sum(2), torch.ones(3, 20, dtype=torch.float64))
    torch.testing.assert_close(shares.sum(1), torch.full((3, 4), 5.0, dtype=torch.float64), rtol=0, atol=0.01)


def test_tim_raises_the_mutual_information_of_queries_and_classes():
    def information(steps: int) -> torch.Tensor:
        p = TIM(steps=steps, certainty=1.0)(unequal_tasks()).softmax(-1)
        return -torch.special.xlogy(p.mean(1), p.mean(1)).sum(-1) + torch.special.xlogy(p, p).sum(-1).mean(1)

    assert (information(150) > information(1)).all()


@pytest.mark.parametrize("name", HEADS)
def test_a_head_uses_the_other_queries_exactly_if_it_says_so(name):
    head, tasks = head_named(name), unequal_tasks(noise=1.0)
    assert head.uses_query_set == (name in USE_QUERIES)
    few = head(replace(tasks, query_x=tasks.query_x[:, :5], query_y=tasks.query_y[:, :5])).softmax(-1)
    change = (few - head(tasks)[:, :5].softmax(-1)).abs().max()
    assert (change > 1e-2) == head.uses_query_set


@pytest.mark.parametrize("name", sorted(USE_QUERIES))
class TestEveryHeadThatUsesTheQuerySet:
    @pytest.fixture(autouse=True)
    def fewer_rounds(self, monkeypatch):
        monkeypatch.setattr("metacv.algorithms.heads.pt_map.ROUNDS", 40)

    def test_tasks_of_a_batch_do_not_change_each_other(self, name):
        head, tasks = head_named(name), unequal_tasks()
        together = head(tasks).softmax(-1)
        for t, task in enumerate(tasks.split(1)):
            torch.testing.assert_close(head(task)[0].softmax(-1), together[t], rtol=0, atol=1e-3)

    def test_the_order_of_queries_and_of_support_images_does_not_matter(self, name):
        head, tasks = head_named(name), unequal_tasks()
        order, other = torch.randperm(20), torch.randperm(8)
        mixed = replace(
            tasks,
            support_x=tasks.support_x[:, other],
            support_y=tasks.support_y[:, other],
            query_x=tasks.query_x[:, order],
        )
        torch.testing.assert_close(head(mixed).softmax(-1), head(tasks)[:, order].softmax(-1), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lower_precision_gives_nearly_the_same_probabilities(self, name, dtype):
        head, tasks = head_named(name), unequal_tasks()
        own = head(tasks.map(lambda features: features.to(dtype)))
        exact = head(tasks.map(lambda features: features.to(dtype).double()))
        assert own.dtype == torch.float32
        torch.testing.assert_close(own.softmax(-1).double(), exact.softmax(-1), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("queries", [(1, 0), (0, 2), (300, 1)])
    def test_any_number_of_queries_gives_finite_logits(self, name, queries):
        tasks = unequal_tasks(shots=(1, 1), queries=queries, dtype=torch.float32)
        logits = head_named(name)(tasks)
        assert logits.shape == (3, sum(queries), 2)
        assert logits.isfinite().all()

    def test_equal_features_and_features_of_zero_give_finite_logits(self, name):
        for value in (0.0, 1e30):
            logits = head_named(name)(unequal_tasks(dtype=torch.float32).map(lambda x, v=value: torch.full_like(x, v)))
            assert logits.isfinite().all()

    def test_clear_classes_are_told_apart(self, name):
        tasks = unequal_tasks(queries=(15, 15, 15, 15), noise=0.05)
        assert (head_named(name)(tasks).argmax(-1) == tasks.query_y).all()
