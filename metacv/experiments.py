"""Published accuracies in configs/experiment, and our results of kept models. Does not import torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


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

    def reproduced_by(self, accuracy: float, ci95: float) -> bool:
        """Whether our accuracy, from 0 to 1, reaches the paper's interval or, without one, our interval reaches the
        paper's rounded accuracy."""
        margin = 100 * ci95 + 0.5 * 10**-self.decimals if self.ci95 is None else self.ci95
        return 100 * accuracy >= self.accuracy - margin


def published(paper: Iterable[Mapping[str, Any]]) -> list[Published]:
    """Read the published numbers of an experiment from its `paper`. They share the largest number of decimals."""
    entries = [dict(entry) for entry in paper]
    numbers = [number for entry in entries for number in (entry["accuracy"], entry["ci95"]) if number is not None]
    decimals = max((len(str(number).partition(".")[2]) for number in numbers), default=0)
    return [Published(**entry, decimals=decimals) for entry in entries]
