"""Rank the runs of a sweep by validation accuracy, printed at its end."""

import shlex
import shutil
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from metacv.errors import UserError
from metacv.text import aligned, percent, plural, printable, setting

if TYPE_CHECKING:
    from metacv.results import Result

LINES = 20  # maximum of lines of a ranking


class Folder(Callback):
    """Remember the folder of the sweep, which Hydra passes only to callbacks. configs/train.yaml names this class."""

    started: Path | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        Folder.started = Path(config.hydra.sweep.dir)


def ranking(folder: Path) -> str:
    """Format a table of a sweep's runs for each task, the best in validation first, and the next commands.

    Only runs that were validated in the same way on the same episodes share a table. Empty if there are no runs.
    """
    from metacv.results import read_results  # imports torch, which takes seconds

    runs: list[tuple[str, Result, list[str]]] = []  # name, result, overrides
    for path in sorted(folder.glob("*/result.json")):
        with suppress(UserError):
            file = read_results(path)
            if file.training and file.results:
                runs.append((path.parent.name, file.results[0], list(map(str, file.training.get("overrides", [])))))
    if not runs:
        return ""
    shared = set.intersection(*({*words} for _, _, words in runs))
    runs.sort(key=lambda run: (task(run[1]), -run[1].accuracy))
    tables = []
    for name, group in groupby(runs, key=lambda run: task(run[1])):
        lines = [
            [f"{percent(result.accuracy, result.ci95)} %", run, " ".join(word for word in words if word not in shared)]
            for run, result, words in group
        ]
        more = f"\n... and {plural(len(lines) - LINES, 'run')} more" if len(lines) > LINES else ""
        shown = [[printable(cell) for cell in line] for line in lines[:LINES]]
        tables.append(printable(f"best in validation: {name}") + "\n" + aligned(shown) + more)
    if len(tables) > 1:
        tables.append("Runs of different tables were validated differently: metacv compare RUN RUN ... compares them.")
    test, report = setting("checkpoint", folder), shlex.quote(str(folder))
    return "\n\n".join([*tables, f"to test:   metacv evaluate {test}\nto report: metacv report {report}"])


def finish() -> None:
    """Print the ranking of the sweep that ran, if any, and remove its folder if it has no run."""
    if folder := Folder.started:
        if table := ranking(folder):
            print(f"\n{table}")
        remove_unused(folder)


def remove_unused(folder: Path) -> None:
    """Remove the folder of a sweep without a run: after a dry run, or where every run failed before it trained."""
    with suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {"multirun.yaml"}:
            shutil.rmtree(folder)


def task(result: "Result") -> str:
    """Describe task and protocol; accuracies with equal descriptions can be compared."""
    return f"{result.shape}, {result.protocol}"
