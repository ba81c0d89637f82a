"""Evaluation: independent queries, unchanged models, cached features, and the interval."""

import hashlib
import math
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import Identity, SmoothNet, bank_of, random_tasks

from metacv import KEPT_DIR, evaluate
from metacv import episodes as episodes_module
from metacv.algorithms.base import accuracies
from metacv.algorithms.gradient.inner_loop import of_each_task
from metacv.algorithms.gradient.maml import MAML
from metacv.algorithms.gradient.reptile import Reptile
from metacv.algorithms.heads.base import Head, WithHead
from metacv.algorithms.heads.logistic import Logistic
from metacv.algorithms.heads.ncm import NearestMean
from metacv.algorithms.heads.ridge import Ridge
from metacv.algorithms.heads.svm import SVM
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.algorithms.metric.relationnet import RelationNet
from metacv.backbones.batch_norm import batch_norms, batch_statistics, uses_batch_statistics
from metacv.backbones.conv4 import Conv4
from metacv.config import AugmentConfig
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.data.task import TaskBatch
from metacv.episodes import evaluate_episodes, predicted_classes
from metacv.errors import UserError
from metacv.model import checkpoint_path
from metacv.progress import Progress
from metacv.results import summary

SHAPE = (1, 12, 12)


def backbone(running_stats: bool) -> Conv4:
    return Conv4(SHAPE, channels=4, downsample=["max_pool", "none", "none", "none"], running_stats=running_stats)


def maml(net, **settings) -> MAML:
    return MAML(net, way=3, inner_lr=0.4, inner_steps=1, eval_inner_steps=2, **settings)


def reptile(net, **settings) -> Reptile:
    settings |= {"inner_lr": 1e-3, "inner_steps": 2, "inner_batch": 3, "eval_inner_steps": 3, "eval_inner_batch": 3}
    return Reptile(net, way=3, **settings)


MAKERS = {
    "maml": maml,
    "maml loop": lambda net: maml(net, task_batching="loop"),
    "reptile": reptile,
    "reptile loop": lambda net: reptile(net, task_batching="loop"),
    "protonet": ProtoNet,
    "relationnet": RelationNet,
    "relationnet mlp": lambda net: RelationNet(net, relation="mlp"),
}


def trained(name: str, running_stats: bool):
    """A model after two outer steps, so that statistics and moments differ from their initial values."""
    torch.manual_seed(0)
    algorithm = MAKERS[name](backbone(running_stats))
    for norm in batch_norms(algorithm):
        norm.momentum = None  # running statistics are then the mean over the steps, so that features have size 1
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=0.1)
    for seed in range(2):
        algorithm.train()
        optimizer.zero_grad()
        algorithm.training_step(random_tasks(tasks=2, shape=SHAPE, seed=seed))
        optimizer.step()
    return algorithm


def weights_hash(algorithm) -> str:
    digest = hashlib.sha256()
    for name, value in algorithm.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def with_queries(tasks: TaskBatch, rows: torch.Tensor) -> TaskBatch:
    return replace(tasks, query_x=tasks.query_x[:, rows], query_y=tasks.query_y[:, rows])


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


every_algorithm = pytest.mark.parametrize("name", MAKERS)
both_statistics = pytest.mark.parametrize("running_stats", [True, False], ids=["running", "batch"])
both_modes = pytest.mark.parametrize("mode", ["inductive", "transductive"])


@every_algorithm
@both_statistics
def test_inductive_logits_of_a_query_do_not_depend_on_the_other_queries(name, running_stats):
    algorithm = trained(name, running_stats)
    tasks = random_tasks(tasks=2, query=3, shape=SHAPE, seed=9)
    whole = algorithm.predict(tasks, "inductive")
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert_close(algorithm.predict(with_queries(tasks, order), "inductive"), whole[:, order])
    for rows in torch.arange(9).split(4):
        assert_close(algorithm.predict(with_queries(tasks, rows), "inductive"), whole[:, rows])
    changed = replace(tasks, query_x=torch.cat([tasks.query_x[:, :1], 1 - tasks.query_x[:, 1:]], dim=1))
    assert_close(algorithm.predict(changed, "inductive")[:, 0], whole[:, 0])


@every_algorithm
@both_statistics
def test_transductive_logits_depend_on_the_other_queries(name, running_stats):
    algorithm = trained(name, running_stats)
    tasks = random_tasks(tasks=2, query=3, shape=SHAPE, seed=9)
    alone = algorithm.predict(with_queries(tasks, torch.arange(4)), "transductive")
    assert not torch.allclose(algorithm.predict(tasks, "transductive")[:, :4], alone, atol=1e-6)


@every_algorithm
@both_statistics
@both_modes
def test_tasks_of_a_batch_do_not_change_each_other(name, running_stats, mode):
    algorithm = trained(name, running_stats)
    tasks, others = (random_tasks(tasks=3, query=2, shape=SHAPE, seed=seed) for seed in (9, 10))
    together = algorithm.predict(tasks, mode)
    metric = "net" in name
    # Metric methods embed the tasks of a batch in one pass only if batch norm takes running statistics, and gradient
    # methods adapt them in one pass unless it keeps them: then the number of tasks decides which kernels run.
    one_pass = (metric and mode == "inductive") or not (
        metric or "loop" in name or (running_stats and mode == "inductive")
    )
    bound = (1e-5 if metric else 1e-3) if one_pass else 0
    for t, task in enumerate(tasks.split(1)):
        torch.testing.assert_close(algorithm.predict(task, mode), together[t : t + 1], rtol=bound, atol=bound)
        own = torch.arange(3).view(3, 1, 1, 1, 1) == t
        support_x = torch.where(own, tasks.support_x, others.support_x)
        mixed = replace(tasks, support_x=support_x, query_x=torch.where(own, tasks.query_x, others.query_x))
        assert torch.equal(algorithm.predict(mixed, mode)[t], together[t])


@every_algorithm
@both_statistics
def test_batch_statistics_in_training_come_from_one_task(name, running_stats):
    tasks = random_tasks(tasks=2, shape=SHAPE, seed=9)
    outputs = []
    for batch in (tasks, next(tasks.split(1))):
        torch.manual_seed(1)
        outputs.append(trained(name, running_stats).train()(batch).detach()[:1])
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize("name", [name for name in MAKERS if "loop" not in name])
@both_statistics
@both_modes
def test_evaluating_twice_gives_the_same_accuracies_and_changes_nothing(name, running_stats, mode):
    algorithm = trained(name, running_stats).train()
    episodes = EpisodeList(EpisodeSampler(bank_of([20] * 12, shape=SHAPE), 3, 1, 2), 4)
    flags = [(norm.training, norm.track_running_stats) for norm in batch_norms(algorithm)]
    before, random_state = weights_hash(algorithm), torch.get_rng_state()
    first = evaluate_episodes(algorithm, episodes, mode)
    assert torch.equal(evaluate_episodes(algorithm, episodes, mode), first)
    assert weights_hash(algorithm) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert algorithm.training
    assert [(norm.training, norm.track_running_stats) for norm in batch_norms(algorithm)] == flags
    algorithm.eval()
    evaluate_episodes(algorithm, episodes.part(slice(1)), mode)
    assert not algorithm.training


def test_batch_statistics_ignore_the_running_ones_and_do_not_change_them():
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
def test_inductive_queries_each_pass_in_one_batch_with_the_support_set(name):
    """Section 6.1 of Reptile's paper, written out for one query."""
    algorithm = trained(name, running_stats=False).eval()
    tasks = random_tasks(tasks=1, query=2, shape=SHAPE, seed=9)
    (params,) = of_each_task(algorithm.adapt(tasks))
    logits = algorithm.predict(tasks, "inductive")[0]
    with torch.no_grad():
        for q in range(6):
            batch = torch.cat([tasks.support_x[0], tasks.query_x[0, q : q + 1]])
            expected = torch.func.functional_call(algorithm.net, params, (batch,))[-1]
            bound = 0 if "loop" in name else 1e-4
            torch.testing.assert_close(logits[q], expected, rtol=bound, atol=bound)


@both_modes
@pytest.mark.parametrize("way", [3, 4])
@pytest.mark.parametrize(
    "make", [maml, reptile, lambda net, **s: maml(net, adapt_norm=True, inner_loss="sum_per_shot", **s)]
)
def test_tasks_together_are_classified_as_tasks_in_a_loop(make, way, mode):
    tasks = random_tasks(tasks=3, way=way, query=2, shape=SHAPE, dtype=torch.float64)
    logits = []
    for batching in ("loop", "vmap"):
        torch.manual_seed(0)
        algorithm = make(backbone(False), task_batching=batching, task_chunk=2).double()
        # Fills Reptile's moments.
        algorithm.train().training_step(random_tasks(tasks=2, shape=SHAPE, dtype=torch.float64))
        logits.append(algorithm.predict(tasks, mode))
    assert (logits[0] - logits[1]).norm() < 1e-10 * logits[0].norm()


def rotated_episodes(count: int = 12) -> EpisodeList:
    sampler = EpisodeSampler(bank_of([6] * 5, shape=SHAPE), way=3, shot=2, query=3, rotation="per_class")
    return EpisodeList(sampler, count)


def record(monkeypatch, algorithm) -> tuple[list[torch.Tensor], list[int]]:
    """Logits of every call of `head`, and the number of images in every pass through the backbone."""
    logits, passed, head = [], [], algorithm.head
    monkeypatch.setattr(algorithm, "head", lambda tasks: logits.append(head(tasks)) or logits[-1])
    algorithm.backbone.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    return logits, passed


metric_methods = pytest.mark.parametrize("name", ["protonet", "relationnet", "relationnet mlp"])


@metric_methods
def test_cached_features_give_the_logits_of_episodes_and_embed_each_image_once(name, monkeypatch):
    algorithm, episodes = trained(name, running_stats=True), rotated_episodes()
    expected = torch.cat([algorithm.predict(tasks, "inductive") for tasks in episodes.batches(5)])
    labels = torch.cat([tasks.query_y for tasks in episodes.batches(5)])
    logits, passed = record(monkeypatch, algorithm)
    monkeypatch.setattr(episodes_module, "IMAGES_AT_ONCE", 4 * 10)  # ten images a pass, the last with fewer
    monkeypatch.setattr(episodes_module, "FEATURES_AT_ONCE", 5 * 15 * 4 * 6 * 6)  # five episodes of 15 images
    measured = evaluate_episodes(algorithm, episodes, "inductive")
    assert [len(some) for some in logits] == [5, 5, 2]
    assert_close(torch.cat(logits), expected)
    assert torch.equal(measured, accuracies(torch.cat(logits), labels).double())
    images = len(episodes.rows.unique())
    assert images < episodes.rows.numel()
    assert sum(passed) == images
    assert max(passed) == 10


def with_head(head: Head, augment: AugmentConfig | None = None) -> WithHead:
    return WithHead(trained("protonet", running_stats=True), head, augment or AugmentConfig())


@pytest.mark.parametrize("head", [NearestMean(flip=True), Logistic(), Ridge(flip=True), SVM()])
def test_any_head_gives_on_cached_features_what_it_gives_on_episodes(head, monkeypatch):
    algorithm, episodes = with_head(head), rotated_episodes()
    expected = torch.cat([algorithm.predict(tasks, "inductive") for tasks in episodes.batches(5)])
    logits, passed = record(monkeypatch, algorithm)
    evaluate_episodes(algorithm, episodes, "inductive")
    assert_close(torch.cat(logits), expected)
    assert sum(passed) == len(episodes.rows.unique()) * (2 if head.flip else 1)


def test_many_copies_pass_one_image_at_a_time():
    algorithm = with_head(NearestMean(augment=300), AugmentConfig(crop=1))
    assert len(evaluate_episodes(algorithm, rotated_episodes(2), "inductive")) == 2


def test_each_copy_of_a_support_image_passes_once_and_is_the_same_in_every_episode(monkeypatch):
    algorithm, episodes = with_head(NearestMean(augment=3), AugmentConfig(crop=2)), rotated_episodes()
    seen = []
    head = algorithm.head
    monkeypatch.setattr(algorithm, "head", lambda tasks: seen.append(tasks) or head(tasks))
    passed = []
    algorithm.backbone.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    evaluate_episodes(algorithm, episodes, "inductive")
    supports = episodes.rows[:, :, :2]
    assert sum(passed) == len(episodes.rows.unique()) + 3 * len(supports.unique())
    (tasks,) = seen
    assert tasks.support_x.shape[1] == 6 + 18
    copies: dict[int, torch.Tensor] = {}
    for t, rows in enumerate(supports.flatten(1).tolist()):
        for i, row in enumerate(rows):
            own = tasks.support_x[t, 6 + 3 * i : 9 + 3 * i]
            assert (tasks.support_y[t, 6 + 3 * i : 9 + 3 * i] == i // 2).all()
            assert torch.equal(copies.setdefault(row, own), own)
    with evaluate.evaluating(algorithm, "inductive", torch.device("cpu")):
        direct = algorithm.embed_copies(episodes.sampler.images_at(torch.tensor([*copies])), copies)
    assert_close(torch.stack([*copies.values()]), direct)


def test_features_above_the_memory_limit_are_not_cached(monkeypatch):
    algorithm, episodes = trained("protonet", running_stats=True), rotated_episodes()
    expected = evaluate_episodes(algorithm, episodes, "inductive")
    _, passed = record(monkeypatch, algorithm)
    monkeypatch.setattr(episodes_module, "FEATURES_KEPT", len(episodes.rows.unique()) * 4 * 6 * 6)
    evaluate_episodes(algorithm, episodes, "inductive")
    assert sum(passed) == len(episodes.rows.unique())
    passed.clear()
    monkeypatch.setattr(episodes_module, "FEATURES_KEPT", episodes_module.FEATURES_KEPT - 1)
    measured = evaluate_episodes(algorithm, episodes, "inductive")
    assert sum(passed) >= episodes.rows.numel()
    assert torch.equal(measured, expected)


@metric_methods
@pytest.mark.parametrize(
    ("running_stats", "mode"), [(True, "transductive"), (False, "transductive"), (False, "inductive")]
)
def test_features_that_depend_on_other_images_are_not_cached(name, running_stats, mode, monkeypatch):
    algorithm, episodes = trained(name, running_stats), rotated_episodes(3)
    expected = torch.cat([accuracies(algorithm.predict(t, mode), t.query_y).double() for t in episodes.batches(3)])
    _, passed = record(monkeypatch, algorithm)
    assert torch.equal(evaluate_episodes(algorithm, episodes, mode), expected)
    assert sum(passed) >= episodes.rows.numel()


def test_interval_is_over_episodes():
    values = torch.tensor([0.2, 0.4, 0.6, 1.0], dtype=torch.float64)
    # deviations -.35 -.15 .05 .45: squares sum to .35, / 3, root .341565, * 1.96 / 2
    assert summary(values)["ci95"] == pytest.approx(1.96 * (0.35 / 3) ** 0.5 / 2, rel=1e-12)
    assert summary(values)["accuracy"] == pytest.approx(0.55)


def test_accuracy_is_counted_within_each_episode():
    logits = torch.tensor([[[2.0, 1], [0, 1]], [[2, 1], [1, 0]]])
    assert accuracies(logits, torch.tensor([[0, 1], [1, 1]])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_task_with_a_logit_that_is_not_finite_has_no_accuracy(value):
    logits = torch.tensor([[[2.0, 1], [0, 1]], [[2, 1], [1, value]]])
    first, second = accuracies(logits, torch.tensor([[0, 1], [0, 0]])).tolist()
    assert first == 1.0
    assert math.isnan(second)


@pytest.mark.parametrize("running_stats", [True, False], ids=["cached", "not cached"])
def test_accuracy_on_noise_is_chance(running_stats):
    """3-way accuracy must be 1/3 within three intervals."""
    torch.manual_seed(0)
    bank = bank_of([20] * 12, shape=(1, 6, 6))
    bank.images.random_(0, 256, generator=torch.Generator().manual_seed(5))
    episodes = EpisodeList(EpisodeSampler(bank, 3, 1, 5), 200)
    mode = "inductive" if running_stats else "transductive"
    measured = summary(evaluate_episodes(ProtoNet(SmoothNet(running_stats=running_stats)), episodes, mode))
    assert abs(measured["accuracy"] - 1 / 3) < 3 * measured["ci95"]


class Negated(ProtoNet):
    """A metric method whose logits are not those of `head` alone."""

    def forward(self, tasks: TaskBatch) -> torch.Tensor:
        return -super().forward(tasks)


def test_features_are_not_cached_for_a_method_with_a_forward_of_its_own():
    assert ProtoNet(Identity()).embeds_each_image_alone("inductive")
    assert not Negated(Identity()).embeds_each_image_alone("inductive")


def test_batch_norm_of_any_dimension_is_seen():
    backbone = Identity()
    backbone.norm = torch.nn.BatchNorm1d(2, track_running_stats=False)
    assert not ProtoNet(backbone).embeds_each_image_alone("inductive")
    assert uses_batch_statistics(backbone)


@pytest.mark.slow
def test_commands_refuse_predictions_that_are_not_finite_and_name_the_rate(metacv, trained):
    for algo in ("maml", "reptile", "protonet"):
        content = torch.load(trained(algo) / "best.pt", weights_only=True)
        for name in ("net.head.weight", "net.head.bias"):  # finite, but their products with features are not
            if name in content["algorithm"]:
                content["algorithm"][name].fill_(3e38)
        Path(algo).mkdir()
        torch.save(content, f"{algo}/best.pt")
    commands = {
        ("evaluate", "checkpoint=maml"): "algo.inner_lr=0.4",
        ("evaluate", "checkpoint=maml", "batch_norm=inductive"): "algo.inner_lr=0.4",
        ("evaluate", "checkpoint=reptile", "algo.inner_lr=0.01"): "algo.inner_lr=0.01",
        ("compare", "maml", "reptile", "batch_norm=transductive"): "algo.inner_lr=0.4",
        ("evaluate", "checkpoint=protonet", "head=finetune", "head.lr=1e9"): "head.lr=1000000000.0",
    }
    for words, rate in commands.items():
        code, out, err = metacv(*words, "episodes=8", "query=5", "device=cpu")
        assert code == 1, words
        assert out == "" or out.splitlines()[-1].startswith("device    "), out  # the header, and no accuracy
        assert re.fullmatch(
            r"metacv: predictions are not finite in episode \d \(counted from 0\): "
            rf"adaptation diverged with {re.escape(rate)}\n",
            err,
        ), words


def test_after_a_prediction_that_is_not_finite_no_further_batch_is_evaluated():
    episodes = EpisodeList(EpisodeSampler(bank_of([2] * 5), 5, 1, 1), 9)

    def batches():
        first, second = islice(episodes.batches(3), 2)
        yield first, torch.zeros(3, 5, 5)
        logits = torch.zeros(3, 5, 5)
        logits[1, 2, 3] = torch.nan
        yield second, logits
        pytest.fail("a third batch was evaluated")

    with pytest.raises(UserError, match=r"^predictions are not finite in episode 4 \(counted from 0\): by a test$"):
        predicted_classes(batches(), episodes, Progress(), ": by a test")


def test_a_kept_model_is_known_by_its_name_unless_a_folder_here_has_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    kept = checkpoint_path("omniglot/protonet_5w1s")
    assert kept == KEPT_DIR / "omniglot/protonet_5w1s/best.pt"
    assert kept.is_file()
    for place in ("omniglot", "omniglot/protonet", "protonet_5w1s"):
        assert checkpoint_path(place) == Path(place)  # which is no file, as its reader will say
    Path("omniglot/protonet_5w1s").mkdir(parents=True)
    with pytest.raises(UserError, match=r"omniglot/protonet_5w1s has no best.pt"):
        checkpoint_path("omniglot/protonet_5w1s")
