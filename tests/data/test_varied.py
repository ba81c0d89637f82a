"""Tasks with different numbers of classes and of support images: `vary=uniform` and `vary=meta_dataset`."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import SmoothNet, bank_of

from metacv.algorithms.base import accuracies
from metacv.algorithms.gradient.protomaml import ProtoMAML
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.data.task import TaskList
from metacv.data.transforms import Augment
from metacv.data.varied import ABSENT, MOST_SUPPORT, values_per_task, varied
from metacv.episodes import evaluate_episodes
from metacv.errors import UserError

BANK = bank_of([20, 9, 12, 30, 15, 8, 25, 11], shape=(1, 6, 6))


def sampler(vary="uniform", way=6, shot=5, query=3, **settings) -> EpisodeSampler:
    return EpisodeSampler(BANK, way, shot, query, vary=vary, **settings)


@pytest.mark.parametrize("vary", ["uniform", "meta_dataset"])
def test_each_class_has_support_and_queries_without_repetition(vary):
    own = sampler(vary)
    for rows in own.draw(200):
        present = rows != ABSENT
        way = int(present[:, own.shot].sum())
        assert present[:way, own.shot :].all()
        assert present[:way, 0].all()
        assert not present[way:].any()
        chosen = rows[present]
        assert len(chosen.unique()) == len(chosen)
        for c in range(way):
            assert len(own.classes_of(rows[c][present[c]]).unique()) == 1


def test_uniform_draws_each_way_and_each_shot_equally_often():
    rows = sampler(way=4, shot=3).draw(6000)
    ways = (rows[:, :, 3] != ABSENT).sum(1)
    shots = (rows[:, :, :3] != ABSENT).sum(2)
    assert (ways.bincount(minlength=5)[2:] / 6000 - 1 / 3).abs().max() < 0.03
    assert (shots[:, 0].bincount()[1:] / 6000 - 1 / 3).abs().max() < 0.03
    inside = shots > 0
    assert (shots == shots[:, :1])[inside].all()


def test_the_rule_of_meta_dataset_is_that_of_its_paper():
    """Calculated by hand for classes of 100, 50, 50, 50, 30 and 20 images, 10 of which are queries."""
    sizes = torch.tensor([[100, 50, 50, 50, 30, 20]])
    rows = torch.arange(6 * 110).view(1, 6, 110)
    random = torch.full((1, values_per_task(6)), 0.5, dtype=torch.float64)
    found = varied("meta_dataset", rows, sizes, random, 100, 10)
    # way 5 + floor(0.5 * 2) = 6. Half of 90 + 3 * 40 + 20 + 10 images are 45 + 60 + 10 + 5 = 120 in the support set.
    # All alphas are equal, so shots are floor(size / 300 * (120 - 6)) + 1, at most size - 10.
    expected = [min(math.floor(size / 300 * 114) + 1, size - 10) for size in sizes[0].tolist()]
    assert expected == [39, 20, 20, 20, 12, 8]
    assert (found[0, :, :100] != ABSENT).sum(1).tolist() == expected
    random[:, 0] = 0.49  # 5 + floor(0.98): the last class is left out
    assert (varied("meta_dataset", rows, sizes, random, 100, 10)[0, 5] == ABSENT).all()


def test_alpha_between_log_half_and_log_two_shifts_images_between_equal_classes():
    sizes = torch.full((1, 5), 100)
    random = torch.full((1, values_per_task(5)), 0.5, dtype=torch.float64)
    random[0, 2], random[0, 3] = 0, 1  # factors 0.5 and 2 beside 1
    found = varied("meta_dataset", torch.arange(550).view(1, 5, 110), sizes, random, 100, 10)
    total = 5 * 45
    expected = [math.floor(factor / 5.5 * (total - 5)) + 1 for factor in (0.5, 2, 1, 1, 1)]
    assert (found[0, :, :100] != ABSENT).sum(1).tolist() == expected


def test_each_class_has_a_support_image_also_in_tasks_of_more_classes_than_support_images_at_most():
    way = MOST_SUPPORT + 100
    random = torch.rand(20, values_per_task(way), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, sizes = torch.arange(8).expand(20, way, 8), torch.full((20, way), 8)
    found = varied("meta_dataset", rows, sizes, random, 5, 1) != ABSENT
    assert torch.equal(found[:, :, :5].any(2), found[:, :, 5])
    assert found[:, :, 5].sum(1).max() > MOST_SUPPORT


@pytest.mark.parametrize("vary", ["uniform", "meta_dataset"])
def test_tasks_do_not_depend_on_how_many_are_drawn_at_once(vary):
    one, other = sampler(vary), sampler(vary)
    assert torch.equal(one.draw(7), torch.cat([other.draw(n) for n in (1, 4, 2)]))


def test_a_sample_is_a_list_of_tasks_whose_labels_count_the_classes():
    own = sampler(augment=Augment(1, True, 0.1, seed=0))
    rows, tasks = sampler().draw(5), own.sample(5)
    assert isinstance(tasks, TaskList)
    assert len(tasks) == 5
    for task, own_rows in zip(tasks.parts(), rows, strict=True):
        shots = (own_rows[:, :5] != ABSENT).sum(1)
        assert task.way == int((shots > 0).sum())
        assert task.support_y[0].bincount().tolist() == shots[: task.way].tolist()
        assert task.query_y[0].bincount().tolist() == [3] * task.way
        assert task.support_x.shape == (1, len(task.support_y[0]), 1, 6, 6)
        assert task.classes.shape == (1, task.way)


def test_images_of_a_task_are_those_of_its_rows():
    episodes = EpisodeList(sampler(), 4)
    for task, rows in zip(episodes.batches(100), episodes.rows, strict=True):
        support = rows[:, :5]
        expected = BANK.images[support[support != ABSENT]].float() / 255
        assert torch.equal(task.support_x[0], expected)


@pytest.mark.parametrize("running_stats", [True, False], ids=["features once", "task by task"])
def test_accuracy_is_that_of_each_task_by_itself(running_stats):
    torch.manual_seed(0)
    algorithm = ProtoNet(SmoothNet(running_stats=running_stats))
    episodes = EpisodeList(sampler(), 30)
    alone = torch.cat([accuracies(algorithm.predict(task, "inductive"), task.query_y) for task in episodes.batches(1)])
    assert len({*alone.tolist()}) > 5
    torch.testing.assert_close(evaluate_episodes(algorithm, episodes, "inductive"), alone.double())


@pytest.mark.parametrize("make", [ProtoNet, lambda net: ProtoMAML(net, 6, 0.01, 1, 1)], ids=["ProtoNet", "ProtoMAML"])
def test_a_step_has_the_mean_gradient_of_its_tasks(make):
    torch.manual_seed(0)
    algorithm = make(SmoothNet()).double().train()
    tasks = TaskList([task.map(torch.Tensor.double) for task in sampler().sample(3).parts()])

    def gradient(batch) -> torch.Tensor:
        algorithm.zero_grad()
        algorithm.training_step(batch)
        return torch.cat([p.grad.flatten() for p in algorithm.parameters() if p.grad is not None])

    expected = torch.stack([gradient(task) for task in tasks.parts()]).mean(0)
    torch.testing.assert_close(gradient(tasks), expected, rtol=1e-9, atol=1e-12)


def test_settings_that_cannot_go_together_are_refused():
    with pytest.raises(UserError, match="query_balance=dirichlet: cannot be set together with vary=uniform"):
        sampler(query_balance="dirichlet")
    small = replace(BANK, offsets=BANK.offsets[:2], class_names=BANK.class_names[:1])
    with pytest.raises(UserError, match="way=2, but toy train has only 1 classes"):
        EpisodeSampler(small, 2, 1, 1, vary="uniform")
    with pytest.raises(UserError, match="shot=1 \\+ query=8 needs 9 images per class"):
        sampler(query=8)


@pytest.mark.slow
@pytest.mark.usefixtures("may_be_at_chance")
def test_training_and_evaluation_with_varied_tasks(metacv):
    words = ("algo=protonet", "dataset.classes={train:12,val:8,test:8}", "steps=2", "eval_every=2", "eval_episodes=5")
    code, out, err = metacv("train", *words, "way=8", "shot=4", "query=2", "vary=uniform", "hydra.run.dir=run")
    assert (code, err) == (0, "")
    assert "trained on up to 8-way 4-shot (uniform) tasks" in out
    code, out, err = metacv("evaluate", "checkpoint=run", "episodes=10")
    assert "up to 8-way 4-shot (uniform), 2 queries per class, 10 episodes" in out
    code, out, err = metacv("evaluate", "checkpoint=run", "episodes=10", "vary=meta_dataset", "head=logistic")
    assert "up to 8-way 4-shot (meta_dataset)" in out
    code, _, err = metacv("train", "algo=protonet", *words[1:], "way=8", "shot=4", "query=2", "hydra.run.dir=fixed")
    assert (code, err) == (0, "")
    code, _, err = metacv("compare", "run", "fixed", "episodes=10")
    assert (code, err) == (1, "metacv: fixed has vary=None, run has vary=uniform; set vary=VALUE for all runs\n")
    assert metacv("compare", "run", "fixed", "episodes=10", "vary=none")[0] == 0
    code, out, _ = metacv("evaluate", "checkpoint=run", "episodes=10", "vary=none")
    assert "ProtoNet, 8-way 4-shot, 2 queries per class" in out
    code, out, _ = metacv("evaluate", "checkpoint=run", "episodes=10", "head=tim")
    assert (code, out.count("accuracy "), out.count("up to 8-way 4-shot (uniform)")) == (0, 2, 3)
    code, _, err = metacv("evaluate", "checkpoint=run", "episodes=10", "query_balance=both")
    assert (code, err) == (1, "metacv: query_balance=both: cannot be set together with vary=uniform\n")
    code, _, err = metacv("train", "algo=maml", *words[1:], "way=8", "query=2", "vary=uniform", "hydra.run.dir=other")
    assert (code, err.count("\n")) == (1, 1)
    assert "algo.way=8: must be" in err
