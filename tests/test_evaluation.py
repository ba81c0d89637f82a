"""Evaluation: exact, without a trace, and honest about its interval."""

import hashlib
from dataclasses import replace

import pytest
import torch
from conftest import SmoothNet, bank_of, random_tasks

from metacv.algorithms.base import accuracies, batch_norms, batch_statistics
from metacv.algorithms.gradient.maml import MAML
from metacv.algorithms.gradient.reptile import Reptile
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.algorithms.metric.relationnet import RelationNet
from metacv.backbones.conv4 import Conv4
from metacv.data.sampler import EpisodeList, EpisodeSampler, TaskBatch
from metacv.evaluate import evaluate_episodes, interval, summary

SHAPE = (1, 12, 12)


def backbone(running_stats: bool) -> Conv4:
    return Conv4(
        SHAPE, channels=8, downsample=["max_pool", "none", "none", "none"], running_stats=running_stats
    )  # fmt: skip


ONE_BY_ONE = {"task_batching": "loop"}


def maml(backbone, **settings):
    return MAML(backbone, way=3, inner_lr=0.4, inner_steps=1, eval_inner_steps=2, **settings)


def reptile(backbone, **settings):
    settings |= {"inner_lr": 1e-3, "inner_steps": 2, "inner_batch": 3, "eval_inner_steps": 3, "eval_inner_batch": 3}
    return Reptile(backbone, way=3, **settings)


MAKERS = {
    "maml": maml,
    "maml loop": lambda b: maml(b, **ONE_BY_ONE),
    "reptile": reptile,
    "reptile loop": lambda b: reptile(b, **ONE_BY_ONE),
    "protonet": lambda b: ProtoNet(b),
    "protonet cosine": lambda b: ProtoNet(b, metric="cosine"),
    "relationnet": lambda b: RelationNet(b),
    "relationnet mlp": lambda b: RelationNet(b, relation="mlp"),
}


def trained(name: str, running_stats: bool):
    """A model after two outer steps, so that statistics and moments are not what they begin as."""
    torch.manual_seed(0)
    algorithm = MAKERS[name](backbone(running_stats))
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=0.1)
    for seed in range(2):
        algorithm.train()
        optimizer.zero_grad()
        algorithm.backward(random_tasks(tasks=2, shape=SHAPE, seed=seed))
        optimizer.step()
    return algorithm


def weights_hash(algorithm) -> str:
    digest = hashlib.sha256()
    for name, value in algorithm.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def with_queries(tasks: TaskBatch, rows: torch.Tensor) -> TaskBatch:
    return TaskBatch(tasks.support_x, tasks.support_y, tasks.query_x[:, rows], tasks.query_y[:, rows], tasks.way)


every_algorithm = pytest.mark.parametrize("name", MAKERS)
both_statistics = pytest.mark.parametrize("running_stats", [True, False], ids=["running", "batch"])


@every_algorithm
@both_statistics
def test_inductive_logits_of_a_query_do_not_depend_on_the_other_queries_to_the_bit(name, running_stats):
    algorithm = trained(name, running_stats)
    tasks = random_tasks(tasks=2, query=7, shape=SHAPE, seed=9)
    whole = algorithm.predict(tasks, "inductive")
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0))
    assert torch.equal(algorithm.predict(with_queries(tasks, order), "inductive"), whole[:, order])
    for rows in torch.arange(21).split(4):
        assert torch.equal(algorithm.predict(with_queries(tasks, rows), "inductive"), whole[:, rows])
    changed = TaskBatch(tasks.support_x, tasks.support_y, tasks.query_x.clone(), tasks.query_y, tasks.way)
    changed.query_x[:, 1:] = 1 - changed.query_x[:, 1:]
    assert torch.equal(algorithm.predict(changed, "inductive")[:, 0], whole[:, 0])


@every_algorithm
@both_statistics
def test_transductive_logits_do_depend_on_the_other_queries(name, running_stats):
    algorithm = trained(name, running_stats)
    tasks = random_tasks(tasks=2, query=7, shape=SHAPE, seed=9)
    alone = algorithm.predict(with_queries(tasks, torch.arange(4)), "transductive")
    assert not torch.allclose(algorithm.predict(tasks, "transductive")[:, :4], alone, atol=1e-6)


@every_algorithm
@both_statistics
@pytest.mark.parametrize("norm", ["inductive", "transductive"])
def test_the_tasks_of_a_batch_do_not_touch_each_other(name, running_stats, norm):
    algorithm = trained(name, running_stats)
    tasks = random_tasks(tasks=3, shape=SHAPE, seed=9)
    together = algorithm.predict(tasks, norm)
    others = random_tasks(tasks=3, shape=SHAPE, seed=10)
    vectorized = name in ("maml", "reptile") and (norm == "transductive" or not running_stats)
    for t, task in enumerate(tasks.split(1)):
        alone = algorithm.predict(task, norm)
        if vectorized:  # kernels are chosen by the number of tasks
            torch.testing.assert_close(alone, together[t : t + 1], rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(alone, together[t : t + 1])
        own = torch.arange(3).view(3, 1, 1, 1, 1) == t
        support_x = torch.where(own, tasks.support_x, others.support_x)
        mixed = replace(tasks, support_x=support_x, query_x=torch.where(own, tasks.query_x, others.query_x))
        assert torch.equal(algorithm.predict(mixed, norm)[t], together[t])


@every_algorithm
@both_statistics
def test_in_training_too_batch_statistics_belong_to_one_task(name, running_stats):
    tasks = random_tasks(tasks=2, shape=SHAPE, seed=9)
    outputs = []
    for batch in (tasks, next(tasks.split(1))):
        torch.manual_seed(1)
        outputs.append(trained(name, running_stats).train()(batch).detach()[:1])
    torch.testing.assert_close(outputs[0], outputs[1])


@every_algorithm
@both_statistics
@pytest.mark.parametrize("norm", ["inductive", "transductive"])
def test_evaluating_twice_gives_the_same_and_leaves_no_trace(name, running_stats, norm):
    algorithm = trained(name, running_stats).train()
    episodes = EpisodeList(EpisodeSampler(bank_of([20] * 12, shape=SHAPE), 3, 1, 4), 6)
    flags = [(n.training, n.track_running_stats) for n in batch_norms(algorithm)]
    before, random_state = weights_hash(algorithm), torch.get_rng_state()
    first = evaluate_episodes(algorithm, episodes, norm)
    assert torch.equal(evaluate_episodes(algorithm, episodes, norm), first)
    assert weights_hash(algorithm) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert algorithm.training
    assert [(n.training, n.track_running_stats) for n in batch_norms(algorithm)] == flags


def test_batch_statistics_ignore_the_running_ones_and_leave_them_alone():
    norm = torch.nn.BatchNorm2d(2)
    norm.running_mean.fill_(5)
    norm.eval()
    images = torch.randn(4, 2, 3, 3)
    with batch_statistics(norm):
        out = norm(images)
    assert out.mean().abs() < 1e-6
    assert norm.running_mean.tolist() == [5, 5]
    assert int(norm.num_batches_tracked) == 0
    assert not norm.training


@pytest.mark.parametrize("name", ["maml", "maml loop", "reptile", "reptile loop"])
def test_inductive_queries_each_get_one_batch_with_the_support_set(name):
    """Section 6.1 of Reptile's paper, written out for one query."""
    algorithm = trained(name, running_stats=False).eval()
    tasks = random_tasks(tasks=1, query=3, shape=SHAPE, seed=9)
    (params,) = algorithm.of_each(algorithm.adapt(tasks), 1)
    with torch.no_grad():
        for q in range(9):
            batch = torch.cat([tasks.support_x[0], tasks.query_x[0, q : q + 1]])
            expected = torch.func.functional_call(algorithm.net, params, (batch,))[-1]
            found = algorithm.predict(tasks, "inductive")[0, q]
            bound = 0 if "loop" in name else 1e-4
            torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("norm", ["inductive", "transductive"])
@pytest.mark.parametrize("way", [3, 4])
@pytest.mark.parametrize(
    "make", [maml, reptile, lambda b, **s: maml(b, adapt_norm=True, inner_loss="sum_per_shot", **s)]
)
def test_tasks_together_are_classified_as_tasks_in_a_loop(make, way, norm):
    tasks = random_tasks(tasks=5, way=way, shape=SHAPE, dtype=torch.float64)
    logits = []
    for batching in ("loop", "vmap"):
        torch.manual_seed(0)
        algorithm = make(backbone(False), task_batching=batching, task_chunk=2).double()
        algorithm.train().backward(random_tasks(tasks=2, shape=SHAPE, dtype=torch.float64))  # fills Reptile's moments
        logits.append(algorithm.predict(tasks, norm))
    assert (logits[0] - logits[1]).norm() < 1e-10 * logits[0].norm()


def test_the_interval_is_over_episodes():
    values = torch.tensor([0.2, 0.4, 0.6, 1.0], dtype=torch.float64)
    # deviations -.35 -.15 .05 .45: squares sum to .35, / 3, root .341565, * 1.96 / 2
    assert interval(values) == pytest.approx(1.96 * (0.35 / 3) ** 0.5 / 2, rel=1e-12)
    assert summary(values)["accuracy"] == pytest.approx(0.55)


def test_accuracy_is_counted_within_each_episode():
    logits = torch.tensor([[[2.0, 1], [0, 1]], [[2, 1], [1, 0]]])
    assert accuracies(logits, torch.tensor([[0, 1], [1, 1]])).tolist() == [1.0, 0.0]


def test_chance_is_measured_as_chance():
    """Noise images tell nothing: 3-way accuracy must hold 1/3 within three intervals."""
    torch.manual_seed(0)
    bank = bank_of([20] * 12, shape=(1, 6, 6))
    bank.images.random_(0, 256, generator=torch.Generator().manual_seed(5))
    episodes = EpisodeList(EpisodeSampler(bank, 3, 1, 5), 300)
    found = summary(evaluate_episodes(ProtoNet(SmoothNet(running_stats=True)), episodes, "inductive"))
    assert abs(found["accuracy"] - 1 / 3) < 3 * found["ci95"]
