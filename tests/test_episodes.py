"""Episodes: what a task may hold, and that its stream is exact."""

import numpy as np
import pytest
import torch
from conftest import bank_of

from metacv import MetacvError
from metacv.data.sampler import EpisodeList, EpisodeSampler


def identities(images: torch.Tensor) -> torch.Tensor:
    """(class, image) of toy images [T, B, 1, 4, 4]"""
    return (images[:, :, 0, 0, :2] * 255).round().long()


def test_tasks_are_class_major_with_distinct_classes_and_disjoint_support_and_query(sampler):
    tasks = sampler.sample(200)
    support, query = identities(tasks.support_x), identities(tasks.query_x)
    assert tasks.support_x.shape == (200, 10, 1, 4, 4)
    assert tasks.query_x.shape == (200, 15, 1, 4, 4)
    assert tasks.support_y[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for t in range(200):
        classes = support[t, ::2, 0].tolist()
        assert len(set(classes)) == 5
        assert support[t, :, 0].tolist() == [c for c in classes for _ in range(2)]
        assert query[t, :, 0].tolist() == [c for c in classes for _ in range(3)]
        images = [tuple(pair) for pair in torch.cat([support[t], query[t]]).tolist()]
        assert len(set(images)) == 25


def test_images_lie_between_0_and_1(sampler):
    images = sampler.sample(20).support_x
    assert images.dtype == torch.float32
    assert float(images.max()) == 1.0
    assert float(images.min()) == 0.0


def test_every_class_and_image_is_equally_likely(sampler):
    tasks = sampler.sample(4000)
    seen = identities(torch.cat([tasks.support_x, tasks.query_x], dim=1)).flatten(0, 1)
    counts = torch.bincount(seen[:, 0] * 20 + seen[:, 1], minlength=240).double()
    expected = len(seen) / 240  # 100,000 draws: 417 an image, binomial deviation about 20
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_the_order_of_classes_is_shuffled(sampler):
    first = identities(sampler.sample(3000).support_x)[:, 0, 0]
    assert torch.bincount(first, minlength=12).min() > 180  # 250 expected of each of 12 classes


def test_the_stream_does_not_depend_on_how_many_tasks_are_drawn_at_a_time():
    whole, parts = (EpisodeSampler(bank_of([20] * 12), 5, 2, 3, "per_class", seed=3) for _ in range(2))
    drawn = torch.cat([parts.draw(n) for n in (1, 2, 5, 1, 7)])
    assert torch.equal(whole.draw(16), drawn)


def test_the_stream_is_what_the_mersenne_twister_and_a_sort_give():
    """Drawn again without torch: so it is the same on every machine, and stays so with another torch."""
    bits = np.random.RandomState(7)._bit_generator

    def uniform(n: int) -> list[float]:
        words = bits.random_raw(2 * n).reshape(n, 2).tolist()
        return [((high << 32 | low) & (2**53 - 1)) / 2**53 for high, low in words]

    def largest(values: list[float], n: int) -> list[int]:
        return sorted(range(len(values)), key=lambda i: -values[i])[:n]

    sizes, way, each = [4, 9, 6, 5, 7], 3, 4
    first_rows = [0, 4, 13, 19, 24]
    drawn = EpisodeSampler(bank_of(sizes), way, 1, 3, "per_class", seed=7).draw(50).tolist()
    for task in drawn:
        classes = largest(uniform(5), way)
        turns = [int(4 * u) for u in uniform(way)]
        expected = []
        for c, turn in zip(classes, turns, strict=True):
            images = largest(uniform(9)[: sizes[c]], each)
            expected.append([turn * sum(sizes) + first_rows[c] + image for image in images])
        assert task == expected


def test_another_seed_is_another_stream():
    one, other = (EpisodeSampler(bank_of([20] * 12), 5, 1, 1, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.draw(4), other.draw(4))


def test_the_state_of_a_sampler_brings_its_stream_back(sampler):
    sampler.draw(3)
    state = sampler.state_dict()
    expected = sampler.draw(4)
    sampler.load_state_dict(state)
    assert torch.equal(sampler.draw(4), expected)


def test_drawing_leaves_the_global_random_state_alone(sampler):
    before = torch.get_rng_state()
    sampler.sample(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_classes_of_different_sizes_give_only_their_own_images():
    tasks = EpisodeSampler(bank_of([4, 9, 30]), 3, 1, 3).sample(300)
    seen = identities(torch.cat([tasks.support_x, tasks.query_x], dim=1)).flatten(0, 1)
    for c, size in enumerate([4, 9, 30]):
        assert sorted(set(seen[seen[:, 0] == c, 1].tolist())) == list(range(size))


def angles(sampler: EpisodeSampler, tasks: int = 400) -> torch.Tensor:
    """Quarter turns of each support image, [T, N], of a bank whose images hold one bright corner."""
    x = sampler.sample(tasks).support_x[:, :, 0]
    corners = torch.stack([x[..., 0, 0], x[..., -1, 0], x[..., -1, -1], x[..., 0, -1]], dim=-1)
    return corners.argmax(dim=-1)


def corner_bank(classes: int = 6):
    bank = bank_of([5] * classes)
    bank.images.zero_()
    bank.images[:, :, 0, 0] = 255
    return bank


@pytest.mark.parametrize(
    ("rotation", "in_a_task", "in_all"),
    [("none", 1, 1), ("per_episode", 1, 4), ("per_class", 3, 4), ("as_classes", 3, 4)],
)
def test_rotations_turn_what_they_say(rotation, in_a_task, in_all):
    turned = angles(EpisodeSampler(corner_bank(), 3, 1, 1, rotation))
    assert max(len(set(task.tolist())) for task in turned) == in_a_task
    assert len(set(turned.flatten().tolist())) == in_all


def test_rotations_as_classes_count_every_class_four_times():
    sampler = EpisodeSampler(corner_bank(2), 8, 1, 1, "as_classes")
    assert sorted(angles(sampler, 1)[0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(MetacvError, match="way=9 but toy train has only 8 classes"):
        EpisodeSampler(corner_bank(2), 9, 1, 1, "as_classes")


def test_support_and_query_of_a_class_are_turned_alike():
    tasks = EpisodeSampler(corner_bank(), 3, 1, 1, "per_class").sample(50)
    assert torch.equal(tasks.support_x, tasks.query_x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"way": 100}, "way=100 but toy train has only 12 classes"),
        ({"way": 1}, "way=1: a task needs at least 2 classes"),
        ({"shot": 0}, "shot=0: a class needs at least 1 image"),
        ({"shot": 15, "query": 6}, r"shot=15 \+ query=6 needs 21 images a class but class0 of toy train has 20"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**70}, "seed="),
    ],
)
def test_impossible_tasks_are_refused_with_the_setting_and_the_fact(settings, message):
    with pytest.raises(MetacvError, match=message):
        EpisodeSampler(bank_of([20] * 12), **({"way": 5, "shot": 1, "query": 1} | settings))


def test_the_fingerprint_tells_lists_banks_and_splits_of_images_apart():
    def fingerprint(bank=None, shot=1, query=2, seed=0, episodes=5):
        return EpisodeList(EpisodeSampler(bank or bank_of([20] * 12), 5, shot, query, seed=seed), episodes).fingerprint

    same = fingerprint()
    assert fingerprint() == same
    other_images = bank_of([20] * 12)
    other_images.images[7] += 1
    others = [fingerprint(other_images), fingerprint(shot=2, query=1), fingerprint(seed=1), fingerprint(episodes=6)]
    assert len({same, *others}) == 5


def test_an_episode_list_is_the_same_every_time_and_however_it_is_cut(sampler):
    episodes = EpisodeList(sampler, 7)
    whole = next(episodes.batches(7)).query_x
    assert torch.equal(torch.cat([tasks.query_x for tasks in episodes.batches(3)]), whole)
