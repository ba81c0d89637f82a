"""The table of a report: a row for each evaluation of a run, or for the run itself if it has none."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from metacv.report.gather import RunRecord
from metacv.results import Result
from metacv.text import csv_safe, percent, plural

BEST, SIMILAR = "best in validation", "not significantly different"
NOTE = (
    f'"{BEST}": the highest validation accuracy among the runs of a task, if all were validated on the same episodes. '
    f'"{SIMILAR}": its interval overlaps with that of the best run; metacv compare, which uses the same episodes for '
    "both, finds smaller differences."
)
Cells = list[dict[str, str]]


@dataclass
class Row:
    """A row of the table."""

    run: RunRecord
    test: Result | None
    selection: str = ""

    @property
    def task(self) -> tuple[int, int, str, str]:
        """Equal for rows whose accuracies can be compared."""
        if self.test:
            return self.test.way, self.test.shot, tested_on(self.test), self.test.episodes_sha256
        return self.run.config.way, self.run.config.shot, "", self.run.validated_on

    @property
    def heading(self) -> str:
        """The task and the images, for a group of rows."""
        config = self.run.config
        episodes = f"{plural(config.eval_episodes, 'episode')}, {config.batch_norm}"
        return f"{name_of(self.task)}, {self.task[2] or f'not tested; validated on {episodes}'}"

    @property
    def measured(self) -> tuple[float, float]:
        """Accuracy and half its interval: of the test if there is one, otherwise in validation."""
        if self.test:
            return self.test.accuracy, self.test.ci95
        return float(self.run.validation.get("accuracy", 0)), float(self.run.validation.get("ci95", 0))

    @property
    def settings(self) -> dict[str, str]:
        return self.run.settings | (self.test.changes if self.test else {})

    def cells(self, varied: list[str]) -> dict[str, str]:
        """The texts of the row by column; `varied` are settings with a column of their own."""
        test, validation = self.test, self.run.validation
        return {
            "run": self.run.name,
            "algorithm": self.run.algorithm,
            "task": name_of(self.task),
            "test %": percent(test.accuracy, test.ci95) if test else "",
            "paper %": self.run.paper(test) if test else "",
            "validation %": percent(validation["accuracy"], validation["ci95"]) if validation else "",
            "selection": self.selection,
            "at step": str(self.run.step),
            **{name: self.settings.get(name, "") for name in varied},
            "tested on": self.task[2],
        }


def rows_of(runs: list[RunRecord]) -> list[Row]:
    """All rows, those of a task together, the best first."""
    rows = [Row(run, test) for run in runs for test in run.tests]
    rows += [Row(run, None) for run in runs if not run.tests]
    rows.sort(key=lambda row: (*row.task, -row.measured[0]))
    for _, task in groupby(rows, key=lambda row: row.task):
        select(list(task))
    return rows


def select(rows: list[Row]) -> None:
    """Mark the best of the rows of a task, by validation: the highest of many test accuracies is high by chance too."""
    as_validated = [row for row in rows if not (row.test and row.test.changes)]
    comparable = len({row.run.validated_on for row in rows}) == 1 and all(row.run.validation for row in rows)
    if not as_validated or not comparable or len({row.run.folder for row in rows}) == 1:
        return
    best = max(as_validated, key=lambda row: float(row.run.validation["accuracy"]))
    for row in rows:
        if abs(row.measured[0] - best.measured[0]) <= row.measured[1] + best.measured[1]:
            row.selection = SIMILAR
    best.selection = BEST


def varied_settings(rows: list[Row]) -> list[str]:
    """Settings with different values: those that a command line changed, and those without which rows look alike."""
    changed = {name for row in rows for name in (*row.run.overrides, *(row.test.changes if row.test else ()))}
    changed |= {"batch_norm", "eval_episodes"}  # of validation
    varied = differing(rows, changed)
    alike = defaultdict(list)
    for row in rows:
        alike[row.task, row.run.algorithm, tuple(row.settings.get(name) for name in varied)].append(row)
    for group in alike.values():
        varied |= differing(group, {name for row in group for name in row.settings})
    return sorted(varied - {"algo"})  # the column algorithm


def differing(rows: list[Row], names: set[str]) -> set[str]:
    return {name for name in names if len({row.settings.get(name) for row in rows}) > 1}


def cells_of(rows: list[Row], varied: list[str]) -> Cells:
    """The texts of all rows, without columns that are empty."""
    cells = [row.cells(varied) for row in rows]
    kept = [name for name in cells[0] if any(row[name] for row in cells)]
    return [{name: row[name] for name in kept} for row in cells]


def name_of(task: tuple[int, int, str, str]) -> str:
    return f"{task[0]}-way {task[1]}-shot"


def tested_on(test: Result) -> str:
    rotation = "" if test.rotation in ("", "none") else f", rotation {test.rotation}"
    query = plural(test.query, "query", "queries")
    return f"{plural(test.episodes, 'episode')} of {test.dataset} {test.split}, {query}, {test.batch_norm}{rotation}"


def as_csv(cells: Cells) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([csv_safe(value) for value in line] for line in _lines(cells))
    return text.getvalue()


def as_markdown(cells: Cells) -> str:
    """A table of GitHub's Markdown in which names cannot become HTML, links or new cells."""
    lines = [
        [re.sub(r"([\\`*\[\]|])", r"\\\1", escape(value, quote=False)) for value in line] for line in _lines(cells)
    ]
    lines.insert(1, ["---"] * len(cells[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_text(cells: Cells) -> str:
    lines = _lines(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{v:<{w}}" for v, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _lines(cells: Cells) -> list[Sequence[str]]:
    return [list(cells[0]), *(list(row.values()) for row in cells)]
