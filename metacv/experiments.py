"""Published accuracies in configs/experiment, and our results of kept models. Does not import torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar


class Measured(Protocol):
    """The fields of a result that this module uses."""

    @property
    def accuracy(self) -> float: ...
    @property
    def ci95(self) -> float: ...
    @property
    def batch_norm(self) -> str: ...


R = TypeVar("R", bound=Measured)


@dataclass
class Published:
    """An accuracy in a paper, in %."""

    accuracy: float
    ci95: float | None
    batch_norm: str
    source: str
    decimals: int = 0  # number of decimals in the paper

    def __str__(self) -> str:
        mean = f"{self.accuracy:.{self.decimals}f}"
        return mean if self.ci95 is None else f"{mean} ± {self.ci95:.{self.decimals}f}"

    def reproduced_by(self, result: Measured) -> bool:
        """Whether our mean reaches the paper's interval or, without one, our interval reaches its rounded accuracy."""
        margin = 100 * result.ci95 + 0.5 * 10**-self.decimals if self.ci95 is None else self.ci95
        return 100 * result.accuracy >= self.accuracy - margin


def published(paper: Iterable[Mapping[str, Any]]) -> list[Published]:
    """Read the published numbers of an experiment from its `paper`. They share the largest number of decimals."""
    entries = [dict(entry) for entry in paper]
    numbers = [number for entry in entries for number in (entry["accuracy"], entry["ci95"]) if number is not None]
    decimals = max((len(str(number).partition(".")[2]) for number in numbers), default=0)
    return [Published(**entry, decimals=decimals) for entry in entries]


def under_its_protocol(results: Iterable[R]) -> dict[str, R]:
    """Return the results of a kept model, which follow the paper's protocol, by batch-norm mode."""
    return {result.batch_norm: result for result in results}
