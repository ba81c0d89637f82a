"""Hold out labelled images to calibrate a model with, and measure how reliable its probabilities and label sets are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metacv.algorithms.base import Algorithm, MetricMethod
from metacv.algorithms.heads.base import WithHead
from metacv.calibration import (
    auroc,
    calibration_error,
    familiarity,
    fit_temperature,
    quantile,
    scores,
    scores_of,
)
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.data.task import TaskBatch
from metacv.errors import UserError

COVERAGE = 0.9  # of label sets, in evaluation
KEPT = 0.95  # share of images of known classes that are not called unknown
FOLDS = 10
AT_ONCE = 2**26  # maximum of numbers when queries are compared with classes: 256 MB
VALIDATION_EPISODES = 200
# Embeds the images at rows [R] of a sampler: features [R, ...], or [R, V, ...] of their augmented copies.
Embed = Callable[[EpisodeSampler, Tensor, bool], Tensor]


@dataclass(frozen=True)
class HeldOut:
    """What a model says of H labelled images that its support set did not have."""

    logits: Tensor  # [T, H, N]
    labels: Tensor  # [H]
    familiarity: Tensor  # [T, H], as that of new images
    scale: Tensor  # [T], of the logits of new images, relative to those here; no fold is left out for new images


def alone(algorithm: Algorithm, batch_norm: str, setting: str) -> MetricMethod:
    """Return the method if its features of an image depend on no other image; otherwise UserError for `setting`."""
    if algorithm.uses_query_set:
        raise UserError(f"{setting}: not available for a head that labels all queries of a task together")
    if algorithm.tunes_network:
        raise UserError(f"{setting}: not available with head.adapt=backbone, which tunes the network on the examples")
    if isinstance(algorithm, MetricMethod) and algorithm.embeds_each_image_alone(batch_norm):
        return algorithm
    own = algorithm.embedding if isinstance(algorithm, WithHead) else algorithm
    without = f"which {type(own).__name__} with batch_norm={batch_norm} does not"
    raise UserError(f"{setting}: needs a model that embeds each image by itself, {without}")


def folds(labels: Tensor) -> Iterator[Tensor]:
    """Yield the images to hold out together, as a mask of labels [S]: one of each class with two images or more.

    A class with more than FOLDS images has several in a fold, and one with a single image is always in the support set.
    """
    sizes = labels.bincount()
    starts = (sizes.cumsum(0) - sizes)[labels]
    place = labels.argsort(stable=True).argsort() - starts  # number of earlier images of the class
    fold = (place % FOLDS).where(sizes[labels] > 1, -1)
    for k in range(int(fold.max()) + 1):
        yield fold == k


def with_own_copies(tasks: TaskBatch, support: Tensor) -> TaskBatch:
    """Return the tasks with support features [T, S, 1 + V, ...], of the images and of their V augmented copies."""
    tasks = replace(tasks, support_x=support[:, :, 0])
    return tasks.with_copies(support[:, :, 1:].flatten(1, 2)) if support.shape[2] > 1 else tasks


def classified(algorithm: MetricMethod, tasks: TaskBatch) -> Tensor:
    """Return logits [T, Q, N] whose softmax are the probabilities, for tasks of features; in parts to limit memory."""
    numbers = len(tasks) * tasks.way * tasks.support_x[0, 0].numel()  # for each query
    parts = tasks.query_x.split(max(1, AT_ONCE // numbers), 1)
    return torch.cat([algorithm.softmax_logits(algorithm.head(replace(tasks, query_x=part))) for part in parts], 1)


def leave_one_out(algorithm: MetricMethod, tasks: TaskBatch, support: Tensor) -> HeldOut:
    """Classify each support image by the others; `support` [T, S, 1 + V, ...] as for `with_own_copies`.

    The images of a fold are held out together, so a head is fitted 2 * FOLDS times at most. All tasks have the labels
    of the first. New images have logits of another scale and are more familiar, as their classes lack no image: they
    are classified with all F folds, held-out ones with F - 1. So we measure how the level changes from F - 2 to F - 1
    folds, for the same held-out images, and add 1 - 2 / F of this change. That is right if what n folds give differs
    from its limit by about 1 / n (Quenouille, 1956, on the jackknife).
    """
    own, every = tasks.support_y[0], [*folds(tasks.support_y[0])]
    logits, labels, familiar = [], [], []
    one: list[Tensor] = []  # spread of logits and mean familiarity [T, 2] with one lacking image, for each fold
    two: list[Tensor] = []

    def without(left_out: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        kept, query = support[:, ~left_out], support[:, held, 0]
        part = replace(tasks, support_x=kept[:, :, 0], support_y=tasks.support_y[:, ~left_out], query_x=query)
        return classified(algorithm, with_own_copies(part, kept)), familiarity(part)

    def level(logits: Tensor, familiar: Tensor) -> Tensor:
        return torch.stack([logits.double().std(-1).mean(1), familiar.double().mean(1)], 1)

    for held, following in zip(every, every[1:] + every[:1], strict=True):
        found = without(held, held)
        logits.append(found[0])
        familiar.append(found[1])
        labels.append(own[held])
        if own[~(held | following)].bincount(minlength=tasks.way).all():
            one.append(level(*found))
            two.append(level(*without(held | following, held)))
    if not logits:
        raise UserError("leave-one-out needs a class with at least two images")
    means = [torch.stack(own).mean(0) if own else support.new_ones(len(tasks), 2).double() for own in (one, two)]
    share = 1 - 2 / len(every)
    scale = (means[0][:, 0] / means[1][:, 0].clamp_min(1e-12)) ** share
    more = share * (means[0][:, 1] - means[1][:, 1])
    return HeldOut(torch.cat(logits, 1), torch.cat(labels), torch.cat(familiar, 1) + more.unsqueeze(1), scale)


def calibrated(held: HeldOut, coverage: float) -> tuple[Tensor, Tensor]:
    """Return the temperatures [T] of new images, and the largest scores [T] in their label sets."""
    temperature = fit_temperature(held.logits, held.labels)
    own = scores_of(held.logits.double() / temperature[:, None, None], held.labels)
    return temperature * held.scale, quantile(own, coverage)


@dataclass(frozen=True)
class Calibration:
    """What leave-one-out on a support set says of a model."""

    temperature: float
    largest: float  # largest score in a label set
    least: float  # least familiarity of an image of a known class
    images: int  # that were held out
    kept: float  # share of images of known classes that are familiar enough

    @classmethod
    def of(cls, held: HeldOut, coverage: float) -> "Calibration":
        """Calibrate on one task for a coverage of label sets."""
        temperature, largest = (float(own) for own in calibrated(held, coverage))
        images = len(held.labels)
        kept = min(KEPT, images / (images + 1))
        return cls(temperature, largest, -float(quantile(-held.familiarity[0], kept)), images, kept)


def measure(
    algorithm: MetricMethod, test: EpisodeList, validation: EpisodeList | None, embed: Embed, at_once: int
) -> dict[str, Any]:
    """Return the fields of a Result on calibration: by `validation`, or by leave-one-out if it is None.

    The episodes are new ones, with as many unknown classes as known ones where the data set has them. `at_once`:
    maximum of numbers in the features of a batch of episodes.
    """
    sampler = test.sampler
    fitted = on_episodes(algorithm, validation, embed, at_once) if validation else None
    way = min(2 * sampler.way, sampler.classes)
    wide = EpisodeSampler(sampler.bank, way, sampler.shot, sampler.query, sampler.rotation, 0, sampler.device)
    known, before, after, right, sizes, covered, ranked = sampler.way * sampler.query, *([] for _ in range(6))
    for tasks, support in tasks_of(EpisodeList(wide, len(test)), sampler.way, algorithm, embed, at_once):
        familiar, tasks = familiarity(tasks).cpu(), replace(tasks, query_x=tasks.query_x[:, :known])
        if way > sampler.way:
            ranked += [auroc(own[:known], own[known:]) for own in familiar]
        logits = classified(algorithm, with_own_copies(tasks, support)).double()
        temperature, largest = fitted or calibrated(leave_one_out(algorithm, tasks, support), COVERAGE)
        scaled = logits / temperature[:, None, None]
        sets = scores(scaled) <= largest[:, None, None]
        before.append(logits.softmax(-1).amax(-1).flatten().cpu())
        after.append(scaled.softmax(-1).amax(-1).flatten().cpu())
        right.append((logits.argmax(-1) == tasks.query_y).flatten().cpu())
        sizes.append(sets.sum(-1).double().flatten().cpu())
        covered.append(sets.gather(-1, tasks.query_y.unsqueeze(-1)).double().flatten().cpu())
    correct = torch.cat(right)
    return {
        "coverage": float(torch.cat(covered).mean()),
        "set_size": float(torch.cat(sizes).mean()),
        "ece_before": calibration_error(torch.cat(before), correct),
        "ece": calibration_error(torch.cat(after), correct),
        "auroc": sum(ranked) / len(ranked) if ranked else None,
    }


def on_episodes(algorithm: MetricMethod, episodes: EpisodeList, embed: Embed, at_once: int) -> tuple[Tensor, Tensor]:
    """Calibrate on the queries of all episodes together, as `calibrated` does for one task."""
    logits, labels = [], []
    for tasks, support in tasks_of(episodes, episodes.sampler.way, algorithm, embed, at_once):
        logits.append(classified(algorithm, with_own_copies(tasks, support)).flatten(0, 1))
        labels.append(tasks.query_y.flatten())
    one = torch.ones(1, dtype=torch.float64, device=episodes.sampler.device)
    return calibrated(HeldOut(torch.cat(logits).unsqueeze(0), torch.cat(labels), torch.empty(0), one), COVERAGE)


def tasks_of(
    episodes: EpisodeList, way: int, algorithm: MetricMethod, embed: Embed, at_once: int
) -> Iterator[tuple[TaskBatch, Tensor]]:
    """Yield tasks of features with their support features [T, S, 1 + V, ...], see `with_own_copies`.

    The first `way` classes of an episode are those of the task; queries of the others come last, and have no label.
    """
    sampler, shot = episodes.sampler, episodes.sampler.shot
    rows, index = episodes.rows.unique(return_inverse=True)
    supports, support_index = episodes.rows[:, :way, :shot].unique(return_inverse=True)
    features = embed(sampler, rows, False)
    copies = embed(sampler, supports, True) if algorithm.copies else None
    numbers = (index[0].numel() + algorithm.copies * support_index[0].numel()) * features[0].numel()
    size = max(1, at_once // max(numbers, ((1 + algorithm.copies) * support_index[0].numel()) ** 2))
    for some, places, own in zip(*(part.split(size) for part in (episodes.rows, index, support_index)), strict=True):
        every = sampler.tasks(features, some, places)
        tasks = replace(
            every,
            support_x=every.support_x[:, : way * shot],
            support_y=every.support_y[:, : way * shot],
            query_y=every.query_y[:, : way * sampler.query],
            way=way,
            classes=every.classes[:, :way],
        )
        with_copies = tasks.support_x.unsqueeze(2)
        if copies is not None:
            with_copies = torch.cat([with_copies, sampler.gathered(copies, own).flatten(1, 2)], 2)
        yield tasks, with_copies
