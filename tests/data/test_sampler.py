"""Tasks: their content, and a random stream that is exactly reproducible."""

import numpy as np
import pytest
import torch
from conftest import bank_of

from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.errors import UserError


@pytest.fixture
def sampler() -> EpisodeSampler:
    return EpisodeSampler(bank_of([20] * 12), way=5, shot=2, query=3)


def unbalanced(sizes=(200,) * 6, way=5, shot=2, query=20, **settings) -> EpisodeSampler:
    return EpisodeSampler(bank_of([*sizes]), way, shot, query, query_balance="dirichlet", **settings)


def identities(images: torch.Tensor) -> torch.Tensor:
    """(class, image) of the images of bank_of, [T, B, 1, 4, 4] -> [T, B, 2]"""
    return (images[:, :, 0, 0, :2] * 255).round().long()


def test_a_task_has_distinct_classes_and_its_support_and_query_are_disjoint(sampler):
    tasks = sampler.sample(50)
    support, query = identities(tasks.support_x), identities(tasks.query_x)
    assert tasks.support_x.shape == (50, 10, 1, 4, 4)
    assert tasks.query_x.shape == (50, 15, 1, 4, 4)
    for t in range(50):
        assert len(set(tasks.classes[t].tolist())) == 5
        assert len(set(map(tuple, torch.cat([support[t], query[t]]).tolist()))) == 25


def test_labels_and_classes_identify_the_class_of_every_image(sampler):
    tasks = sampler.sample(50)
    assert tasks.way == 5
    assert torch.equal(tasks.classes.gather(1, tasks.support_y), identities(tasks.support_x)[:, :, 0])
    assert torch.equal(tasks.classes.gather(1, tasks.query_y), identities(tasks.query_x)[:, :, 0])
    assert torch.bincount(tasks.support_y[0]).tolist() == [2] * 5
    assert torch.bincount(tasks.query_y[0]).tolist() == [3] * 5


def test_images_are_floats_from_0_to_1(sampler):
    images = sampler.sample(20).support_x
    assert images.dtype == torch.float32
    assert float(images.max()) == 1.0
    assert float(images.min()) == 0.0


@pytest.mark.parametrize("only_used_rows", [False, True])
def test_tasks_can_be_formed_from_features(sampler, only_used_rows):
    rows = sampler.draw(4)
    of_images = sampler.tasks(sampler.images, rows)
    used, index = rows.unique(return_inverse=True) if only_used_rows else (slice(None), None)
    features = (sampler.images[used].float() / 255).flatten(1)[:, :7]  # [U, 7]
    of_features = sampler.tasks(features, rows, index)
    assert torch.equal(of_features.support_x, of_images.support_x.flatten(2)[..., :7])
    assert torch.equal(of_features.query_x, of_images.query_x.flatten(2)[..., :7])
    for field in ("support_y", "query_y", "classes", "seeds"):
        assert torch.equal(getattr(of_features, field), getattr(of_images, field))


def test_every_class_and_image_is_equally_likely(sampler):
    tasks = sampler.sample(4000)
    seen = identities(torch.cat([tasks.support_x, tasks.query_x], dim=1)).flatten(0, 1)
    counts = torch.bincount(seen[:, 0] * 20 + seen[:, 1], minlength=240).double()
    expected = len(seen) / 240  # 100,000 draws: 417 of each image, standard deviation about 20
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_the_order_of_the_classes_in_a_task_is_random(sampler):
    first = sampler.sample(3000).classes[:, 0]
    assert torch.bincount(first, minlength=12).min() > 180  # 250 expected of each of 12 classes


def test_the_stream_does_not_depend_on_how_many_tasks_are_drawn_at_a_time():
    whole, parts = (EpisodeSampler(bank_of([20] * 12), 5, 2, 3, "per_class", seed=3) for _ in range(2))
    assert torch.equal(whole.draw(16), torch.cat([parts.draw(n) for n in (1, 2, 5, 1, 7)]))


def test_episodes_equal_an_independent_implementation_of_the_sampler():
    """Computed a second time without torch: so it is the same on every machine and with every version of torch."""
    bits = np.random.RandomState(7)._bit_generator

    def uniform(n: int) -> list[float]:
        words = bits.random_raw(2 * n).reshape(n, 2).tolist()
        return [((high << 32 | low) & (2**53 - 1)) / 2**53 for high, low in words]

    def largest(values: list[float], n: int) -> list[int]:
        return sorted(range(len(values)), key=lambda i: -values[i])[:n]

    sizes, way, images_per_class = [4, 9, 6, 5, 7], 3, 4
    first_rows = [0, 4, 13, 19, 24]
    drawn = EpisodeSampler(bank_of(sizes), way, 1, 3, "per_class", seed=7).draw(50).tolist()
    for task in drawn:
        classes = largest(uniform(5), way)
        turns = [int(4 * u) for u in uniform(way)]
        expected = []
        for c, turn in zip(classes, turns, strict=True):
            images = largest(uniform(9)[: sizes[c]], images_per_class)
            expected.append([turn * sum(sizes) + first_rows[c] + image for image in images])
        assert task == expected


def test_task_seeds_are_the_same_as_in_version_1():
    sampler = EpisodeSampler(bank_of([8, 12, 9, 20, 7]), 3, 2, 3, "per_class", seed=4)
    rows = sampler.draw(20)
    expected = [sum(i * row for i, row in enumerate(task.flatten().tolist(), start=1)) for task in rows]
    assert sampler.tasks(sampler.images, rows).seeds.tolist() == expected


def test_another_seed_gives_other_tasks():
    one, other = (EpisodeSampler(bank_of([20] * 12), 5, 1, 1, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.draw(4), other.draw(4))


def test_a_sampler_continues_from_its_saved_state(sampler):
    sampler.draw(3)
    state = sampler.state_dict()
    expected = sampler.draw(4)
    sampler.load_state_dict(state)
    assert torch.equal(sampler.draw(4), expected)


def test_sampling_does_not_use_the_global_random_state(sampler):
    before = torch.get_rng_state()
    sampler.sample(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_classes_of_different_sizes_give_all_of_their_own_images():
    tasks = EpisodeSampler(bank_of([4, 9, 30]), 3, 1, 3).sample(300)
    seen = identities(torch.cat([tasks.support_x, tasks.query_x], dim=1)).flatten(0, 1)
    for c, size in enumerate([4, 9, 30]):
        assert sorted(set(seen[seen[:, 0] == c, 1].tolist())) == list(range(size))


def corner_bank(classes: int = 6):
    """Images with one bright corner, the upper left."""
    bank = bank_of([5] * classes)
    bank.images.zero_()
    bank.images[:, :, 0, 0] = 255
    return bank


def turns_of(x: torch.Tensor) -> torch.Tensor:
    """Quarter turns of images of corner_bank [..., 1, H, W]."""
    x = x[..., 0, :, :]
    corners = torch.stack([x[..., 0, 0], x[..., -1, 0], x[..., -1, -1], x[..., 0, -1]], dim=-1)
    return corners.argmax(dim=-1)


@pytest.mark.parametrize(
    ("rotation", "angles_in_a_task", "angles"),
    [("none", 1, 1), ("per_episode", 1, 4), ("per_class", 3, 4), ("as_classes", 3, 4)],
)
def test_each_rotation_turns_images_as_documented(rotation, angles_in_a_task, angles):
    turned = turns_of(EpisodeSampler(corner_bank(), 3, 1, 1, rotation).sample(400).support_x)
    assert max(len(set(task.tolist())) for task in turned) == angles_in_a_task
    assert len(set(turned.flatten().tolist())) == angles


def test_rotations_as_classes_make_four_classes_of_each():
    sampler = EpisodeSampler(corner_bank(2), 8, 1, 1, "as_classes")
    tasks = sampler.sample(1)
    assert sorted(turns_of(tasks.support_x)[0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(tasks.classes[0].tolist()) == list(range(8))
    assert torch.equal(tasks.classes // 2, turns_of(tasks.support_x))
    with pytest.raises(UserError, match="way=9, but toy train has only 8 classes"):
        EpisodeSampler(corner_bank(2), 9, 1, 1, "as_classes")


@pytest.mark.parametrize("rotation", ["per_class", "per_episode"])
def test_other_rotations_do_not_change_the_class(rotation):
    tasks = EpisodeSampler(corner_bank(), 3, 1, 1, rotation).sample(50)
    assert turns_of(tasks.support_x).max() == 3
    assert tasks.classes.max() == 5


def test_support_and_query_of_a_class_have_the_same_rotation():
    tasks = EpisodeSampler(corner_bank(), 3, 1, 1, "per_class").sample(50)
    assert torch.equal(tasks.support_x, tasks.query_x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"way": 100}, "way=100, but toy train has only 12 classes"),
        ({"shot": 15, "query": 6}, r"shot=15 \+ query=6 needs 21 images per class, but class0 of toy train has 20"),
    ],
)
def test_impossible_tasks_are_refused_with_the_setting_and_the_reason(settings, message):
    with pytest.raises(UserError, match=message):
        EpisodeSampler(bank_of([20] * 12), **({"way": 5, "shot": 1, "query": 1} | settings))


def test_rotation_needs_square_images():
    with pytest.raises(UserError, match="rotation=per_class needs square images, not 4x6"):
        EpisodeSampler(bank_of([20] * 12, shape=(1, 4, 6)), 5, 1, 1, "per_class")


def test_a_list_of_episodes_too_large_for_memory_is_refused_with_its_size(sampler):
    message = r"^eval_episodes=10000000000: the list of episodes takes 2,000.0 GB, above 8.6 GB; reduce it$"
    with pytest.raises(UserError, match=message):
        EpisodeList(sampler, 10**10, "eval_episodes")


def test_the_fingerprint_depends_on_images_seed_number_and_support_size():
    def fingerprint(bank=None, shot=1, query=2, seed=0, episodes=5):
        return EpisodeList(EpisodeSampler(bank or bank_of([20] * 12), 5, shot, query, seed=seed), episodes).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    other_images = bank_of([20] * 12)
    other_images.images[7] += 1
    others = [fingerprint(other_images), fingerprint(shot=2, query=1), fingerprint(seed=1), fingerprint(episodes=6)]
    assert len({first, *others}) == 5


def test_an_episode_list_gives_the_same_tasks_every_time_in_batches_of_any_size(sampler):
    episodes = EpisodeList(sampler, 7)
    whole = next(episodes.batches(7)).query_x
    assert torch.equal(torch.cat([tasks.query_x for tasks in episodes.batches(3)]), whole)
    assert torch.equal(next(episodes.part(slice(2, 5)).batches(7)).query_x, whole[2:5])


def test_a_long_episode_list_is_the_start_of_the_same_stream():
    one, other = (EpisodeSampler(bank_of([3] * 3), 2, 1, 1) for _ in range(2))
    assert torch.equal(EpisodeList(one, 1500).rows, other.draw(1500))


def counts_of(tasks) -> torch.Tensor:
    """The number of queries of each class, [T, N]."""
    return torch.nn.functional.one_hot(tasks.query_y, tasks.way).sum(1)


def test_unbalanced_queries_have_the_labels_of_their_classes_and_are_no_support_images():
    tasks = unbalanced(rotation="per_class").sample(20)
    plain = EpisodeSampler(bank_of([200] * 6), 5, 2, 20).sample(20)
    assert torch.equal(tasks.classes, plain.classes)
    unturned = unbalanced().sample(20)
    assert torch.equal(unturned.support_x, plain.support_x)
    assert unturned.query_x.shape == plain.query_x.shape
    assert torch.equal(tasks.classes.gather(1, unturned.query_y), identities(unturned.query_x)[:, :, 0])
    for t in range(20):
        images = torch.cat([identities(unturned.support_x)[t], identities(unturned.query_x)[t]])
        assert len(set(map(tuple, images.tolist()))) == 5 * 22


def test_the_shares_of_unbalanced_queries_have_mean_and_variance_of_a_dirichlet_distribution_with_alpha_2():
    counts = counts_of(unbalanced().sample(4000))
    assert counts.sum(1).unique().tolist() == [100]
    shares = counts / 100
    # Mean 1/5; variance (1/5) (4/5) / (2 * 5 + 1) = 0.01455, with a standard deviation of 0.0004 for 4000 tasks
    assert (shares.mean(0) - 0.2).abs().max() < 5 * (0.01455 / 4000) ** 0.5
    assert (shares.var(0) - 0.01455).abs().max() < 0.002


def test_numbers_of_unbalanced_queries_are_shares_rounded_one_query_at_a_time():
    """Dealt by a loop: each query goes to the class with the largest share per query, counting half a query more."""
    sampler = unbalanced(sizes=[200, 200, 25, 200, 200], seed=3)
    state = sampler.shares.get_state()
    shares = -(1 - torch.rand(50, 2, 5, generator=sampler.shares, dtype=torch.float64)).log().sum(1)
    sampler.shares.set_state(state)
    tasks = sampler.sample(50)
    for own, counted, classes in zip(shares.tolist(), counts_of(tasks).tolist(), tasks.classes.tolist(), strict=True):
        expected = [0] * 5
        room = [23 if c == 2 else 198 for c in classes]
        for _ in range(100):
            free = [n for n in range(5) if expected[n] < room[n]]
            expected[max(free, key=lambda n: own[n] / (expected[n] + 0.5))] += 1
        assert counted == expected


def test_unbalanced_tasks_do_not_depend_on_how_many_are_drawn_at_a_time_and_have_their_own_fingerprint():
    whole, parts = unbalanced(seed=3), unbalanced(seed=3)
    assert torch.equal(whole.draw(16), torch.cat([parts.draw(n) for n in (1, 2, 5, 1, 7)]))
    balanced = EpisodeList(EpisodeSampler(bank_of([200] * 6), 5, 2, 20, seed=3), 16)
    other = balanced.balanced_as("dirichlet")
    assert torch.equal(other.rows, EpisodeList(unbalanced(seed=3), 16).rows)
    assert other.fingerprint != balanced.fingerprint
    assert other.balanced_as("balanced").fingerprint == balanced.fingerprint


def test_classes_without_more_images_leave_their_queries_to_others():
    tasks = unbalanced(sizes=[4, 4, 4], way=3, shot=1, query=3).sample(10)
    assert counts_of(tasks).unique().tolist() == [3]


@pytest.mark.parametrize(("sizes", "way", "tasks"), [([20] * 12, 5, 8), ([10, 30, 14, 10], 3, 2), ([10] * 5, 5, 2)])
def test_disjoint_episodes_use_no_image_twice_and_no_class_twice_in_a_round(sizes, way, tasks):
    episodes = EpisodeList(EpisodeSampler(bank_of(sizes), way, shot=2, query=3), "disjoint")
    assert len(episodes) == tasks  # of 5 images of each class
    assert len(episodes.rows.unique()) == episodes.rows.numel()
    (batch,) = episodes.batches(100)
    assert torch.equal(batch.classes.gather(1, batch.query_y), identities(batch.query_x)[:, :, 0])
    for classes in batch.classes.chunk(min(sizes) // 5):
        assert len(classes.unique()) == classes.numel() == len(sizes) // way * way
    other = EpisodeList(EpisodeSampler(bank_of(sizes), way, shot=2, query=3, seed=1), "disjoint")
    assert other.fingerprint != episodes.fingerprint


def test_disjoint_episodes_need_two_tasks_without_rotations():
    with pytest.raises(
        UserError, match=r"^episodes=disjoint: toy train has images for one task only, and two are needed$"
    ):
        EpisodeList(EpisodeSampler(bank_of([9] * 5), 5, 2, 3), "disjoint")
    with pytest.raises(UserError, match=r"^episodes=disjoint: .* needs dataset\.test_rotation=none$"):
        EpisodeList(EpisodeSampler(bank_of([20] * 5), 5, 2, 3, "per_class"), "disjoint")
