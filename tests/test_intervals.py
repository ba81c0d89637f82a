"""The three intervals of an accuracy, by simulation: each contains the number that it is about in 95 % of trials.

Images are Gaussian features around the centres of 20 classes, labelled by the nearest class mean.
"""

import pytest
import torch

from metacv.algorithms.base import accuracies
from metacv.algorithms.heads.ncm import nearest_mean
from metacv.data.bank import ImageBank
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.data.task import TaskBatch
from metacv.results import summary, t_interval

pytestmark = pytest.mark.slow
CLASSES, WAY, SHOT, QUERY, DIM = 20, 5, 1, 5, 6
CENTRES = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0))


def sampler(images_per_class: int, seed: int) -> EpisodeSampler:
    """Tasks of a fresh set of images."""
    noise = torch.randn(CLASSES, images_per_class, DIM, generator=torch.Generator().manual_seed(seed))
    features = (CENTRES.unsqueeze(1) + noise).flatten(0, 1)
    offsets = images_per_class * torch.arange(CLASSES + 1)
    bank = ImageBank("toy", features.view(-1, DIM, 1, 1), offsets, tuple(map(str, range(CLASSES))))
    return EpisodeSampler(bank, WAY, SHOT, QUERY, seed=seed)


def measured(episodes: EpisodeList) -> torch.Tensor:
    """The accuracy of each episode."""
    tasks = [tasks.map(lambda images: images.flatten(2)) for tasks in episodes.batches(2000)]
    return torch.cat([accuracies(nearest_mean(own), own.query_y).double() for own in tasks])


def coverage(intervals: list[dict[str, float]], truth: float) -> float:
    return sum(abs(own["accuracy"] - truth) <= own["ci95"] for own in intervals) / len(intervals)


@pytest.fixture(scope="module")
def with_any_images() -> float:
    """The accuracy that tasks of these classes have on average when each has new images."""
    generator, total = torch.Generator().manual_seed(1), 200_000
    classes = torch.rand(total, CLASSES, generator=generator).topk(WAY).indices
    images = CENTRES[classes].unsqueeze(2) + torch.randn(total, WAY, SHOT + QUERY, DIM, generator=generator)
    labels = [torch.arange(WAY).repeat_interleave(each).expand(total, -1) for each in (SHOT, QUERY)]
    support, query = images[:, :, :SHOT].flatten(1, 2), images[:, :, SHOT:].flatten(1, 2)
    tasks = TaskBatch(support, labels[0], query, labels[1], WAY, classes)
    return float(torch.cat([accuracies(nearest_mean(own), own.query_y).double() for own in tasks.split(10_000)]).mean())


def test_the_interval_over_episodes_contains_the_mean_over_all_tasks_of_these_images():
    whole = measured(EpisodeList(sampler(30, seed=1), 100_000))
    trials = [summary(some) for some in whole.split(100)]
    assert 0.93 <= coverage(trials, float(whole.mean())) <= 0.97


@pytest.mark.parametrize(
    ("images_per_class", "low", "high"),
    [(60, 0.93, 0.97), (30, 0.95, 0.99)],  # 10 rounds; 5 rounds, which are too few: a wider interval over episodes
)
def test_the_interval_over_disjoint_episodes_contains_the_mean_over_new_images(
    with_any_images, images_per_class, low, high
):
    trials = []
    for seed in range(1000):
        episodes = EpisodeList(sampler(images_per_class, seed), "disjoint")
        trials.append(summary(measured(episodes), episodes.rounds))
    assert low <= coverage(trials, with_any_images) <= high


def test_the_interval_over_many_episodes_of_few_images_does_not_contain_it(with_any_images):
    trials = [summary(measured(EpisodeList(sampler(30, seed), 1000))) for seed in range(100)]
    assert coverage(trials, with_any_images) < 0.7


@pytest.mark.parametrize("runs", [3, 5])
def test_the_interval_over_seeds_contains_the_mean_over_all_training_runs(runs):
    """A training run is a random projection of the features; all runs are tested on the same episodes."""
    (tasks,) = EpisodeList(sampler(30, seed=2), 20).batches(20)
    generator = torch.Generator().manual_seed(0)
    tested = []
    for _ in range(1000 * runs):
        network = torch.randn(DIM, 4, generator=generator)
        own = tasks.map(lambda images, network=network: images.flatten(2) @ network)
        tested.append(accuracies(nearest_mean(own), own.query_y).double().mean())
    whole = torch.stack(tested)
    trials = [{"accuracy": float(some.mean()), "ci95": t_interval(some)} for some in whole.split(runs)]
    assert 0.93 <= coverage(trials, float(whole.mean())) <= 0.97
