"""Predict the class of each query of evaluation episodes. An image is embedded once if its features allow it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.base import Algorithm, MetricMethod, evaluating, predicted
from metacv.confusion import Predictions
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.data.task import TaskBatch
from metacv.data.varied import ABSENT
from metacv.errors import UserError
from metacv.feature_cache import FeatureCache
from metacv.progress import Progress

IMAGES_AT_ONCE = 1024
FEATURES_AT_ONCE = 2**24  # numbers in the features of a batch of episodes: 64 MB
FEATURES_KEPT = 2**29  # maximum of numbers in the cached features: 2 GB


@dataclass(frozen=True)
class Features:
    """The features of images, each embedded once."""

    rows: Tensor  # of EpisodeSampler.images, sorted, [R]
    features: Tensor  # [R, ...]
    supports: Tensor  # rows of support images, sorted, [S]
    copied: Tensor | None  # features of their augmented copies, [S, copies, ...]

    @property
    def of_copies(self) -> tuple[Tensor, Tensor]:
        assert self.copied is not None
        return self.supports, self.copied


class SharedFeatures:
    """The features of the images of several lists of episodes, embedded at their first use."""

    def __init__(self, lists: list[EpisodeList], cache: FeatureCache | None) -> None:
        self.lists, self.cache = lists, cache
        self.known: dict[str, Features | None] = {}  # by batch-norm mode

    def get(self, algorithm: Algorithm, batch_norm: str, progress: Progress) -> Features | None:
        if batch_norm not in self.known:
            self.known[batch_norm] = embedded_once(algorithm, self.lists, batch_norm, progress, self.cache)
        return self.known[batch_norm]


def evaluate_episodes(
    algorithm: Algorithm,
    episodes: EpisodeList,
    batch_norm: str,
    label: str = "evaluating",
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the accuracy of each episode, float64 [E]. Shows a progress bar; `check` is called after every batch and
    may raise."""
    return predict_episodes(algorithm, episodes, batch_norm, Progress(label, check)).accuracy


def predict_episodes(
    algorithm: Algorithm,
    episodes: EpisodeList,
    batch_norm: str,
    progress: Progress,
    features: Features | None = None,
    cause: str | None = None,
) -> Predictions:
    """Predict the class of each query, from the `features` of the images if they are known. Each image is embedded only
    once if its features depend on no other image.

    `cause`: if it is a text, the first prediction that is not finite raises UserError, with this text at the end. If it
    is None, nothing is raised, and the class of such a prediction is -1.
    """
    features = features or embedded_once(algorithm, [episodes], batch_norm, progress)
    if features:
        assert isinstance(algorithm, MetricMethod)
        with evaluating(algorithm, batch_norm, episodes.sampler.device):
            found = predicted_classes(from_features(algorithm, episodes, features), episodes, progress, cause)
        return Predictions(episodes, found, features.rows, features.features)
    # A head that tunes the network is slow: show each task.
    at_once = 1 if algorithm.tunes_network else max(1, IMAGES_AT_ONCE // episodes.rows[0].numel())
    batches = ((tasks, algorithm.predict(tasks, batch_norm)) for tasks in episodes.batches(at_once))
    return Predictions(episodes, predicted_classes(batches, episodes, progress, cause))


def predicted_classes(
    batches: Iterable[tuple[TaskBatch, Tensor]], episodes: EpisodeList, progress: Progress, cause: str | None = None
) -> Tensor:
    """Return the predicted classes [E, queries] of batches of episodes with logits [T, Q, N]; tasks with fewer queries
    are padded. `cause` as in `predict_episodes`."""
    found: list[Tensor] = []
    with progress.track(len(episodes), "task") as done:
        for tasks, logits in batches:
            own, count = predicted(logits), len(tasks)
            del tasks, logits  # not kept while the next batch is computed
            if cause is not None and len(wrong := (own < 0).any(dim=1).nonzero()):
                which = sum(map(len, found)) + int(wrong[0])
                raise UserError(f"predictions are not finite in episode {which} (counted from 0){cause}")
            found.append(F.pad(own, [0, episodes.queries - own.shape[1]]))
            done(count)
    return torch.cat(found).cpu()


def embedded_once(
    algorithm: Algorithm,
    lists: Sequence[EpisodeList],
    batch_norm: str,
    progress: Progress,
    cache: FeatureCache | None = None,
) -> Features | None:
    """Embed each image of some lists of episodes once; None if features depend on other images, or would take too much
    memory. Features in the cache are not computed."""
    if not (isinstance(algorithm, MetricMethod) and algorithm.embeds_each_image_alone(batch_norm)):
        return None
    sampler = lists[0].sampler
    rows = torch.cat([episodes.rows.unique() for episodes in lists]).unique()
    supports = torch.cat([episodes.rows[:, :, : sampler.shot].unique() for episodes in lists]).unique()
    rows, supports = rows[rows != ABSENT], supports[supports != ABSENT]

    def embedded(rows: Tensor, copies: int = 0) -> Tensor | None:
        with progress.track(len(rows) * max(1, copies), "image") as done:
            return embed_rows(algorithm, sampler, rows, copies, done)

    with evaluating(algorithm, batch_norm, sampler.device):
        features = cache.embedded(rows, embedded) if cache else embedded(rows)
        copied = embedded(supports, algorithm.copies) if algorithm.copies else None
    if features is None or (algorithm.copies and copied is None):
        return None
    return Features(rows, features, supports, copied)


def from_features(
    algorithm: MetricMethod, episodes: EpisodeList, known: Features
) -> Iterator[tuple[TaskBatch, Tensor]]:
    """Yield batches of episodes with the logits of their queries [T, Q, N], from known features."""
    sampler, device = episodes.sampler, episodes.sampler.device
    support = algorithm.copies * sampler.way * sampler.shot  # augmented copies in an episode
    images = episodes.rows[0].numel()
    numbers = max((images + support) * known.features[0].numel(), support**2)  # per episode
    numbers = max(numbers, images**2) if algorithm.uses_query_set else numbers  # a head may compare all pairs
    for rows in episodes.rows.split(1 if sampler.vary else max(1, FEATURES_AT_ONCE // numbers)):
        tasks = sampler.tasks(known.features, rows, torch.searchsorted(known.rows, rows).to(device))
        if known.copied is not None:
            own = rows[:, :, : sampler.shot].flatten(1)
            places = torch.searchsorted(known.supports, own[own != ABSENT].view(len(own), -1))
            tasks = tasks.with_copies(known.copied[places.to(device)].flatten(1, 2))
        yield tasks, algorithm.head(tasks)


def embed_rows(
    algorithm: MetricMethod, sampler: EpisodeSampler, rows: Tensor, copies: int, done: Callable[[int], None]
) -> Tensor | None:
    """Embed the images at `rows` [R]: features [R, ...], or [R, copies, ...] of augmented copies; None if they would
    take too much memory."""
    features, step = torch.empty(0), max(1, IMAGES_AT_ONCE // (4 + 4 * copies))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        images = sampler.images_at(some)
        own = algorithm.embed_copies(images, some.tolist()) if copies else algorithm.embed(images)
        if start == 0:
            if len(rows) * own[0].numel() > FEATURES_KEPT:
                return None
            features = own.new_empty(len(rows), *own.shape[1:])
        features[start : start + len(some)] = own
        done(len(some) * max(1, copies))
    return features
