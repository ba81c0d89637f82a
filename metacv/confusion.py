"""Predictions of an evaluation: accuracies by episode and by class, and pairs of classes that are confused."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from metacv.algorithms.base import correct_share
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.text import aligned, csv_bytes, plural, printable

if TYPE_CHECKING:  # importing scipy takes a second, for which training need not wait
    from scipy import sparse

HARDEST = 3  # pairs on the terminal
HEADING = ("class", "episodes", "queries", "accuracy in %", "ci95 in %", "most often taken for", "share in %")


@dataclass(frozen=True)
class Predictions:
    """The predicted class of each query, and the features of the images if each was embedded once."""

    episodes: EpisodeList
    classes: Tensor  # int16 [E, Q], from 0 to N - 1; -1 where logits are not finite
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # of EpisodeSampler.images, [R]
    features: Tensor = field(default_factory=lambda: torch.empty(0))  # [R, ...]

    @property
    def accuracy(self) -> Tensor:
        """The accuracy of each episode, float64 [E]; NaN for an episode with logits that are not finite."""
        return correct_share(self.classes, self.episodes.labels).double()


@dataclass(frozen=True)
class Pair:
    """Queries of class `true` that were predicted as class `other`."""

    true: int
    other: int
    wrong: int
    queries: int  # of class `true` in tasks with both classes

    @property
    def share(self) -> float:
        return self.wrong / self.queries


@dataclass(frozen=True)
class Confusion:
    """Queries counted by true class and by predicted class. `pairs` are sorted, the most confused first."""

    names: list[str]
    episodes: numpy.ndarray  # number of episodes with queries of each class, [C]
    accuracy: numpy.ndarray  # mean over these episodes, [C]; NaN for a class in none
    ci95: numpy.ndarray  # half its 95 % interval, [C]; NaN for a class in fewer than two episodes
    taken: "sparse.csr_matrix"  # queries of the row's class that were predicted as the column's, [C, C]
    together: "sparse.csr_matrix"  # queries of the row's class in tasks with both classes, [C, C]
    pairs: list[Pair]

    def shares(self, classes: list[int]) -> numpy.ndarray:
        """Return `taken` / `together` for some classes; NaN for two classes that were never in one task."""
        queries = self.together[classes][:, classes].toarray()
        taken = self.taken[classes][:, classes].toarray()
        return numpy.where(queries > 0, taken / queries.clip(1), numpy.nan)

    def hardest_classes(self, most: int) -> list[int]:
        """Return up to `most` classes: those of the most confused pairs, side by side, then the others in order."""
        found = dict.fromkeys(c for pair in self.pairs for c in (pair.true, pair.other))
        return list(found | dict.fromkeys(range(len(self.names))))[:most]

    def describe(self) -> str:
        """Return the hardest pairs, one a line; empty if every prediction was correct."""
        lines = [
            [
                f"  {self.names[own.true]} taken for {self.names[own.other]}",
                f"{100 * own.share:.0f} % of {plural(own.queries, 'query', 'queries')}",
            ]
            for own in self.pairs[:HARDEST]
        ]
        return f"hardest pairs, in tasks with both classes:\n{aligned(lines)}" if lines else ""

    def csv(self) -> bytes:
        """Return a CSV table with a line for each class."""
        worst: dict[int, Pair] = {}
        for pair in self.pairs:
            worst[pair.true] = max(worst.get(pair.true, pair), pair, key=lambda own: own.wrong)
        lines: list[tuple[object, ...]] = [HEADING]
        queries = self.together.diagonal()
        for c, name in enumerate(self.names):
            count, most = int(self.episodes[c]), worst.get(c)
            measured = self.accuracy[c], self.ci95[c]
            shown = ["" if numpy.isnan(value) else f"{100 * value:.2f}" for value in measured]
            other = (self.names[most.other], f"{100 * most.share:.2f}") if most else ("", "")
            lines.append((name, count, int(queries[c]), *shown, *other))
        return csv_bytes(lines)


def confusion(predictions: Predictions) -> Confusion:
    """Count the predictions for the queries of every class."""
    episodes, sampler = predictions.episodes, predictions.episodes.sampler
    classes = sampler.classes_of(episodes.rows[:, :, 0])  # [E, N]
    count, labels = sampler.classes, episodes.labels
    asked, right = torch.zeros(2, *classes.shape, dtype=torch.long)  # queries of each class, and correct ones, [E, N]
    asked.scatter_add_(1, labels, torch.ones_like(labels))
    right.scatter_add_(1, labels, (predictions.classes == labels).long())
    measured = asked > 0
    flat_classes = classes[measured].numpy()
    flat_hits = (right[measured].double() / asked[measured]).numpy()
    number = numpy.bincount(flat_classes, minlength=count)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        mean = numpy.bincount(flat_classes, flat_hits, count) / number
        squares = numpy.bincount(flat_classes, (flat_hits - mean[flat_classes]) ** 2, count)
        ci95 = 1.96 * numpy.sqrt(squares / (number - 1) / number)
    places = torch.arange(len(classes)).unsqueeze(1).expand_as(classes), classes
    inside, queries = (table(*places, (len(classes), count), values) for values in (torch.ones_like(asked), asked))
    taken_for = classes.gather(1, predictions.classes.long())
    taken = table(classes.gather(1, labels), taken_for, (count, count), torch.ones_like(labels))
    together = (queries.T @ inside).tocsr()
    return Confusion(class_names(sampler), number, mean, ci95, taken, together, worst_pairs(taken, together))


def table(rows: Tensor, columns: Tensor, shape: tuple[int, int], values: Tensor) -> "sparse.csr_matrix":
    """Sum the values for each pair of a row and a column."""
    from scipy import sparse

    places = rows.flatten().numpy(), columns.flatten().numpy()
    return sparse.csr_matrix((values.flatten().numpy(), places), shape)


def worst_pairs(taken: "sparse.csr_matrix", together: "sparse.csr_matrix") -> list[Pair]:
    """Sort pairs of different classes by the lower end of the share's 95 % interval (Clopper and Pearson), so that a
    pair that was in few tasks together is not first by chance."""
    from scipy import special

    found = taken.tocoo()
    wrong = found.row != found.col
    if not wrong.any():
        return []
    true, other, count = found.row[wrong], found.col[wrong], found.data[wrong]
    queries = numpy.asarray(together[true, other]).ravel()
    order = numpy.argsort(-special.betaincinv(count, queries - count + 1, 0.025), kind="stable")
    columns = (column[order].tolist() for column in (true, other, count, queries))
    return [Pair(*own) for own in zip(*columns, strict=True)]


def class_names(sampler: EpisodeSampler) -> list[str]:
    """Return the names of the classes of tasks, with the angle where rotations are classes of their own."""
    names = [printable(name) for name in sampler.bank.class_names]
    turns = range(sampler.classes // len(names))
    return [f"{name} {90 * turn}°" if turn else name for turn in turns for name in names]
