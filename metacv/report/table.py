"""The table of a report: a row for each evaluation of a run, or for the run itself if it has none."""

import re
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from itertools import groupby

from metacv.report.gather import RunRecord
from metacv.results import Result
from metacv.text import percent, plural

BEST, SIMILAR = "best in validation", "not significantly different"
NOTE = (
    f'"{BEST}": the highest validation accuracy among the runs of a task, if all were validated on the same episodes. '
    f'"{SIMILAR}": its interval overlaps with that of the best run; metacv compare, which uses the same episodes for '
    "both, finds smaller differences."
)


@dataclass
class Row:
    """A row of the table."""

    run: RunRecord
    test: Result | None
    selection: str = ""

    @property
    def task(self) -> tuple[int, int, str, str]:
        """Equal for rows whose accuracies can be compared."""
        if not (test := self.test):
            return self.run.config.way, self.run.config.shot, "", self.run.validated_on
        query = plural(test.query, "query", "queries")
        tested_on = f"{plural(test.episodes, 'episode')} of {test.dataset} {test.split}, {query}, {test.batch_norm}"
        if test.rotation not in ("", "none"):
            tested_on += f", rotation {test.rotation}"
        return test.way, test.shot, tested_on, test.episodes_sha256

    @property
    def heading(self) -> str:
        """The task and the images, for a group of rows."""
        config, (way, shot, tested_on, _) = self.run.config, self.task
        episodes = f"{plural(config.eval_episodes, 'episode')}, {config.batch_norm}"
        return f"{way}-way {shot}-shot, {tested_on or f'not tested; validated on {episodes}'}"

    @property
    def measured(self) -> tuple[float, float]:
        """Accuracy and half its interval: of the test if there is one, otherwise in validation."""
        return (self.test.accuracy, self.test.ci95) if self.test else self.run.validation or (0, 0)

    @property
    def settings(self) -> dict[str, str]:
        return self.run.settings | (self.test.changes if self.test else {})

    def cells(self, varied: list[str]) -> dict[str, str]:
        """The texts of the row by column; `varied` are settings with a column of their own."""
        test, validation, (way, shot, tested_on, _) = self.test, self.run.validation, self.task
        return {
            "run": self.run.name,
            "algorithm": self.run.algorithm,
            "task": f"{way}-way {shot}-shot",
            "test %": percent(test.accuracy, test.ci95) if test else "",
            "paper %": self.run.paper(test) if test else "",
            "validation %": percent(*validation) if validation else "",
            "selection": self.selection,
            "at step": str(self.run.step),
            **{name: self.settings.get(name, "") for name in varied},
            "tested on": tested_on,
        }


def rows_of(runs: list[RunRecord]) -> list[Row]:
    """All rows, those of a task together, the best first."""
    rows = [Row(run, test) for run in runs for test in tuple(run.tests) or (None,)]
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
    best = max(as_validated, key=lambda row: row.run.validation or (0, 0))
    for row in rows:
        if abs(row.measured[0] - best.measured[0]) <= row.measured[1] + best.measured[1]:
            row.selection = SIMILAR
    best.selection = BEST


def varied_settings(rows: list[Row]) -> list[str]:
    """Settings with different values: those that a command line changed, and those without which rows look alike."""
    changed = {name for row in rows for name in (*row.run.overrides, *(row.test.changes if row.test else ()))}
    varied = differing(rows, changed | {"batch_norm", "eval_episodes"})  # the last two are of validation
    alike = defaultdict(list)
    for row in rows:
        alike[row.task, row.run.algorithm, tuple(row.settings.get(name) for name in varied)].append(row)
    for group in alike.values():
        varied |= differing(group, {name for row in group for name in row.settings})
    return sorted(varied - {"algo"})  # the column algorithm


def differing(rows: list[Row], names: set[str]) -> set[str]:
    return {name for name in names if len({row.settings.get(name) for row in rows}) > 1}


def as_markdown(lines: list[list[str]]) -> str:
    """A table of GitHub's Markdown in which texts cannot become HTML, links or new cells."""
    special = re.compile(r"([\\`*\[\]|@]|(?<=www)\.|:(?=//))")  # the last three: GitHub links names and addresses
    safe = [[special.sub(r"\\\1", escape(cell, quote=False)) for cell in line] for line in lines]
    safe.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in safe)
