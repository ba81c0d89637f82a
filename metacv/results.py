"""The record of a measured accuracy, which every command writes and reads in the same form."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from metacv import limits
from metacv.config import from_dict
from metacv.errors import UserError
from metacv.files import read_text, write_bytes_atomically, written_or_refused
from metacv.pickles import check_extent
from metacv.terminal import warn
from metacv.text import percent, plural, printable, significant

SCHEMA = 2
ROUNDS = 10  # minimum for an interval over rounds
UNBALANCED = ", unbalanced queries"  # in descriptions


@dataclass(frozen=True)
class Result:
    """An accuracy with its interval, and the model, data and protocol it was measured with. Accuracies are 0 to 1."""

    accuracy: float
    ci95: float  # half the 95 % interval over episodes

    # Data and protocol.
    dataset: str  # class name of the data set
    split: str
    rotation: str
    left_out: int = field(default=0, kw_only=True)  # classes of the split that training or validation used
    way: int
    shot: int
    query: int
    vary: str | None = field(
        default=None, kw_only=True
    )  # rule by which tasks have at most `way` classes of at most `shot`
    episodes: int
    seed: int  # of the list of episodes
    batch_norm: str  # transductive or inductive
    uses_query_set: bool = False  # whether the head labels the queries of a task together
    query_balance: str = "balanced"  # dirichlet: numbers of queries per class are random
    disjoint: bool = False  # whether no image is in two episodes
    episodes_sha256: str = ""  # of the images and of the list of episodes
    images_sha256: str = ""

    # Model.
    method: str = ""  # class name of the algorithm
    backbone: str = ""  # class name of the network, and its name in a library
    head: str = ""  # class name of the head that classified instead of the algorithm, if any
    changes: dict[str, Any] = field(default_factory=dict)  # settings of method and head that differ from training
    chosen: dict[str, Any] = field(default_factory=dict)  # a setting chosen on validation episodes
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    step: int = 0
    stages: list[str] = field(default_factory=list)  # earlier runs, whose weights training started from
    train_images: int = 0  # drawn in training, all stages together
    train_flops: float = 0.0  # floating-point operations of training, forward and backward
    train_seconds: float = 0.0

    # Calibration, where it was measured, see reliability.py. Shares and errors are 0 to 1.
    calibrated: str = ""  # val or loo
    coverage: float | None = None  # share of label sets with the true class, where 0.9 is the target
    set_size: float | None = None  # mean number of labels in a set
    ece_before: float | None = None  # expected calibration error, 15 equal bins
    ece: float | None = None  # after scaling by the temperature
    auroc: float | None = None  # of queries of known against as many unknown classes, mean over episodes

    # Environment.
    device: str = ""
    tasks_per_second: float = 0.0
    torch: str = ""
    metacv: str = ""

    @property
    def shape(self) -> str:
        return shape_text(self.way, self.shot, self.vary)

    @property
    def task(self) -> str:
        """The method and the task it is tested on, for people to read."""
        average = " on average" * (self.query_balance != "balanced")
        return task_text(self.method, self.head, self.way, self.shot, self.query, self.vary) + average

    @property
    def conditions(self) -> str:
        """What a label depends on besides the support set and its query, for people to read."""
        text = f"{self.batch_norm} batch norm, head uses all queries" if self.uses_query_set else self.batch_norm
        return text + UNBALANCED * (self.query_balance != "balanced")

    @property
    def episodes_text(self) -> str:
        return plural(self.episodes, "disjoint episode" if self.disjoint else "episode")

    @property
    def protocol(self) -> str:
        """The images and episodes of the test, for people to read."""
        query = plural(self.query, "query", "queries")
        text = f"{self.episodes_text} of {self.dataset} {self.split}, {query}, {self.conditions}"
        text += f", rotation {self.rotation}" if self.rotation not in ("", "none") else ""
        return text + (f", without {plural(self.left_out, 'class', 'classes')}" if self.left_out else "")

    def describe(self) -> str:
        """Return a line for the terminal, and one for each earlier stage."""
        without = f" without {plural(self.left_out, 'class', 'classes')} of training" if self.left_out else ""
        line = (
            f"accuracy {percent(self.accuracy, self.ci95)} %: {self.task}, {self.episodes_text} of "
            f"{self.dataset} {self.split}{without}, {self.conditions} ({significant(self.tasks_per_second)} tasks/s)"
        )
        lines = [line, *(f"  after: {stage}" for stage in self.stages), *self.describe_calibration()]
        return "\n".join(map(printable, lines))

    def describe_calibration(self) -> Iterator[str]:
        """Yield lines on label sets, probabilities and unknown classes, if they were measured."""
        if not self.calibrated:
            return
        by = "leave-one-out on the support set" if self.calibrated == "loo" else "validation episodes"
        covered, size, before, after = self.coverage or 0, self.set_size or 0, self.ece_before or 0, self.ece or 0
        yield f"calibrated by {by}:"
        yield f"  label sets for 90 % of the queries: {100 * covered:.1f} % have the true class; mean size {size:.2f}"
        yield f"  expected calibration error {100 * after:.1f} % ({100 * before:.1f} % before scaling)"
        yield "  known against unknown classes: " + (
            f"AUROC {self.auroc:.3f}" if self.auroc is not None else "not measured, as no class is left over"
        )


@dataclass
class ResultFile:
    """The content of a result.json."""

    results: list[Result]
    training: dict[str, Any] | None = None  # steps, seconds and overrides of a training run
    differences: list[dict[str, Any]] | None = None  # of pairs of results, from compare

    def write(self, path: Path) -> None:
        """Replace `path` atomically. Raises UserError if the file cannot be written."""
        content = {"schema": SCHEMA} | {name: value for name, value in asdict(self).items() if value is not None}
        with written_or_refused(path):
            write_bytes_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_results(path: Path) -> ResultFile:
    """Read a result file; UserError if it is missing, damaged, or of another version."""
    try:
        content = json.loads(read_text(path))
        check_extent(content, limits.RESULT)
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}")
        training, differences = content.get("training"), content.get("differences")
        if not isinstance(training, dict | None) or not isinstance(differences, list | None):
            raise TypeError
        return ResultFile([_result(record) for record in content["results"]], training, differences)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is not a result file of this version of metacv, or is damaged") from None


def _result(record: dict[str, Any]) -> Result:
    for name in ("changes", "chosen"):
        check_extent(record.get(name), limits.WORDS)
    if any(isinstance(value, int | float) and abs(value) >= 1e25 for value in record.values()):
        raise ValueError
    return from_dict(Result, record)


def method_text(method: str, head: str) -> str:
    """`Classifier + Ridge`, or the method alone if no head replaces its classifier."""
    return f"{method} + {head}" if head else method


def task_text(method: str, head: str, way: int, shot: int, query: int, vary: str | None = None) -> str:
    """Describe a method and a task: `Classifier + Ridge, 5-way 1-shot, 15 queries per class`."""
    return f"{method_text(method, head)}, {shape_text(way, shot, vary)}, {plural(query, 'query', 'queries')} per class"


def shape_text(way: int, shot: int, vary: str | None) -> str:
    """Describe the way and shot of tasks: `5-way 1-shot`, or `up to 20-way 10-shot (uniform)`."""
    return f"up to {way}-way {shot}-shot ({vary})" if vary else f"{way}-way {shot}-shot"


def warn_at_chance(result: Result, name: str = "") -> None:
    """Print a warning if an accuracy, of the run called `name`, is not above chance."""
    if not result.vary and result.accuracy - result.ci95 <= 1 / result.way + 1e-6:  # accuracies are rounded
        run = f"{name}: " if name else ""
        text = f"the accuracy is not above chance ({100 / result.way:.3g} %)"
        warn(f"{run}{text}")


def summary(accuracies: Tensor, rounds: int = 0) -> dict[str, float]:
    """Return the mean of accuracies [E] of E episodes, and half its 95 % interval, 1.96 * std(ddof=1) / sqrt(E).

    Disjoint episodes come in `rounds`, which have the same classes: there the interval is Student's t over the means of
    rounds. If there are too few rounds for it, it is over episodes and somewhat too wide if classes differ much.
    """
    if not rounds:
        ci95 = 1.96 * float(accuracies.std(correction=1)) / len(accuracies) ** 0.5
    else:
        ci95 = t_interval(independent(accuracies, rounds))
    return {"accuracy": float(accuracies.mean()), "ci95": ci95}


def independent(values: Tensor, rounds: int) -> Tensor:
    """Return the means [R] of values [E] over the episodes of each of R `rounds`, if there are enough for an interval;
    otherwise the values."""
    return values.unflatten(0, (rounds, -1)).mean(1) if rounds >= ROUNDS else values


def t_interval(values: Tensor, alpha: float = 0.05) -> float:
    """Return half the (1 - `alpha`) confidence interval of the mean of values [E], by Student's t distribution."""
    from scipy import special  # takes time to import, for which training need not wait

    quantile = float(special.stdtrit(len(values) - 1, 1 - alpha / 2))
    return quantile * float(values.std(correction=1)) / len(values) ** 0.5
