"""What configs/experiment and the kept models say of an experiment: the paper's accuracy and ours. Without torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar


class Measured(Protocol):
    """The part of a result that this module looks at."""

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
    decimals: int = 0  # as printed in the paper

    def __str__(self) -> str:
        mean = f"{self.accuracy:.{self.decimals}f}"
        return mean if self.ci95 is None else f"{mean} ± {self.ci95:.{self.decimals}f}"

    def reproduced_by(self, result: Measured) -> bool:
        """Whether our mean reaches the paper's interval or, if it gives none, our interval its rounded accuracy."""
        margin = 100 * result.ci95 + 0.5 * 10**-self.decimals if self.ci95 is None else self.ci95
        return 100 * result.accuracy >= self.accuracy - margin


def published(paper: Iterable[Mapping[str, Any]]) -> list[Published]:
    """The papers' numbers for an experiment, from its `paper`. Papers print all of them with as many decimals."""
    entries = [dict(entry) for entry in paper]
    numbers = [number for entry in entries for number in (entry["accuracy"], entry["ci95"]) if number is not None]
    decimals = max((len(str(number).partition(".")[2]) for number in numbers), default=0)
    return [Published(**entry, decimals=decimals) for entry in entries]


def under_its_protocol(results: Iterable[R]) -> dict[str, R]:
    """The results in the result.json of a kept model, which are under its paper's protocol, by batch-norm mode."""
    return {result.batch_norm: result for result in results}
