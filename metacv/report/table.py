"""The tables of a report: a row for each evaluation of a run, in groups with the same test protocol."""

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from itertools import groupby

import torch

from metacv.report.gather import RunRecord
from metacv.results import Result, shape_text, t_interval
from metacv.text import percent, printable, setting, shortened_in_the_middle

BEST, SIMILAR = "best", "similar"
NOTE = (
    f'"{BEST}": the highest validation accuracy among runs that were validated on the same episodes. '
    f'"{SIMILAR}": its interval overlaps with that of the best run; metacv compare, which uses the same episodes for '
    "both, finds smaller differences."
)
ALWAYS = ("run", "test %", "paper %", "validation %")  # columns that are shown even if all rows are equal
NAMES = 14  # minimum of letters of a name on the terminal
COMPARED = ("way", "shot", "query", "episodes")  # settings that metacv compare needs to be equal, or given


@dataclass
class Row:
    """A row of the table: an evaluation of a run, or the run itself if it has none."""

    run: RunRecord
    test: Result | None
    selection: str = ""

    @property
    def tested_on(self) -> str:
        """The images and episodes of the test; empty without a test."""
        return self.test.protocol if self.test else ""

    @property
    def task(self) -> tuple[int, int, str, bool, str, str]:
        """A key that is equal for rows whose accuracies can be compared; it sorts tests before runs without one."""
        if not (test := self.test):
            own = self.run.config
            return own.way, own.shot, own.vary or "", True, "", self.run.validated_on
        return test.way, test.shot, test.vary or "", False, self.tested_on, test.episodes_sha256

    @property
    def heading(self) -> str:
        """The task, images and episodes of a group of rows."""
        tested = self.tested_on or f"not tested yet; validated on {self.run.validation_text}"
        return f"{shape_text(*self.task[:3])}, {tested}"

    @property
    def measured(self) -> tuple[float, float]:
        """Accuracy and half its interval, from the test if there is one, otherwise from validation."""
        return (self.test.accuracy, self.test.ci95) if self.test else self.run.validation or (0, 0)

    @property
    def validated(self) -> float:
        """Accuracy in validation; -1 if unknown."""
        return self.run.validation[0] if self.run.validation else -1.0

    @property
    def changes(self) -> dict[str, str]:
        """Settings of the test that differ from training."""
        return self.test.changes if self.test else {}

    @property
    def settings(self) -> dict[str, str]:
        return self.run.settings | self.changes

    def method(self, varied: Iterable[str]) -> str:
        """Describe the algorithm, its settings among `varied` that have a value, and earlier stages."""
        own = self.settings
        known = [f"{name}={own[name]}" for name in varied if own.get(name, "null") != "null"]
        after = f", after {stages}" if (stages := self.run.stages) else ""
        return f"{self.run.algorithm}{' with ' * bool(known)}{', '.join(known)}{after}"

    def in_words(self, varied: Iterable[str]) -> str:
        """Describe the row in a sentence."""
        parts = [self.run.name, self.method(varied)]
        parts.append(f"{percent(*self.run.validation)} % validation" if self.run.validation else "not validated")
        parts.append(f"{percent(self.test.accuracy, self.test.ci95)} % test" if self.test else "not tested yet")
        todo = "" if self.test else f"; to test: metacv evaluate {printable(setting('checkpoint', self.run.folder))}"
        return ", ".join(parts) + (todo or ".")

    def cells(self, varied: list[str]) -> dict[str, str]:
        """Return the texts of the row by column; `varied` are settings with a column of their own."""
        test, validation = self.test, self.run.validation
        return {
            "run": self.run.name,
            "algorithm": self.run.algorithm,
            "task": shape_text(*self.task[:3]),
            "test %": percent(test.accuracy, test.ci95) if test else "",
            "paper %": self.run.paper(test) if test else "",
            "validation %": percent(*validation) if validation else "",
            "selection": self.selection,
            "at step": str(self.run.step),
            **{name: self.settings.get(name, "") for name in varied},
            "after": self.run.stages,
            "tested on": self.tested_on,
        }


@dataclass
class Group:
    """Rows with the same task and test protocol, the best in validation first."""

    heading: str
    sentences: list[str]  # which run validation selects
    rows: list[Row]


def groups_of(runs: list[RunRecord]) -> tuple[list[Group], list[str]]:
    """Return all rows in groups, and the settings in which rows differ, which have a column of their own."""
    rows = [Row(run, test) for run in runs for test in tuple(run.tests) or (None,)]
    rows.sort(key=lambda row: (*row.task, row.run.validated_on, -row.validated, len(row.changes)))
    varied = varied_settings(rows)
    tasks = [list(own) for _, own in groupby(rows, key=lambda row: row.task)]
    headings = [own[0].heading for own in tasks]
    groups = []
    for heading, own in zip(headings, tasks, strict=True):
        first = own[0]
        if headings.count(heading) > 1:
            alike = [others[0] for others in tasks if others[0].heading == heading]
            differ = sorted(differing(alike, first.run.protocol.keys()))
            texts = [f"{name}={first.run.protocol.get(name)}" for name in differ]
            heading += f", {f'episode list {first.test.episodes_sha256[:8]}' if first.test else ', '.join(texts)}"
        named = differing(own, varied) | {*first.changes} | (first.run.overrides.keys() - first.run.protocol.keys())
        shown = [name for name in varied if name in named]
        groups.append(Group(heading, [*select(own, shown), *over_seeds(own, shown)], own))
    return groups, varied


def select(rows: list[Row], varied: list[str]) -> list[str]:
    """Mark the best rows of a group, and describe them in sentences. Only validation selects, among runs with the same
    validation episodes: the highest of many test accuracies is high partly by chance."""
    validations = [list(own) for _, own in groupby(rows, key=lambda row: row.run.validated_on)]
    differ = sorted(differing(rows, {name for row in rows for name in row.run.protocol}))
    sentences = []
    for own in validations:
        best = next((row for row in own if not row.changes), None)  # tested with the settings that were validated
        if len({row.run.folder for row in own}) == 1:
            if len(validations) == 1:
                sentences.append(f"Only run: {own[0].in_words(varied)}")
        elif best and best.run.validation:
            where = [f"{name}={best.run.protocol.get(name)}" for name in differ]
            where += ["of runs tested with the settings of training"] * (best.validated < own[0].validated)
            text = f" ({', '.join(where)})" if where else ""
            sentences.append(f"Best in validation{text}: {best.in_words(varied)}")
            for row in own:
                if abs(row.measured[0] - best.measured[0]) <= row.measured[1] + best.measured[1]:
                    row.selection = SIMILAR
            best.selection = BEST
    if differ and not sentences:
        return [f"No best in validation: no two runs were validated in the same way ({', '.join(differ)})."]
    return sentences or ["No best in validation: no run has its accuracy on file."]


def over_seeds(rows: list[Row], varied: list[str]) -> list[str]:
    """Return a line for each set of runs that differ in the seed only: means with Student's t interval over runs."""
    alike = defaultdict(list)
    for row in rows:
        alike[str(sorted((row.settings | {"seed": "", "algo": row.run.algorithm}).items()))].append(row)
    lines = []
    for own in alike.values():
        if len({row.settings["seed"] for row in own}) == len(own) > 1:
            name = own[0].method([name for name in varied if name != "seed"])
            tests = [row.test.accuracy for row in own if row.test]
            validations = [row.run.validation[0] for row in own if row.run.validation]
            kinds = (("test", tests), ("validation", validations))
            means = [f"{mean_of(values)} % {kind}" for kind, values in kinds if len(values) == len(own)]
            lines.append(f"Over {len(own)} seeds: {name}, {', '.join(means)} (Student's t)." if means else "")
    return [line for line in lines if line]


def mean_of(accuracies: list[float]) -> str:
    """Format the mean over runs and half its interval, in %."""
    values = torch.tensor(accuracies, dtype=torch.float64)
    return percent(float(values.mean()), t_interval(values))


def modes_to_compare(runs: list[RunRecord]) -> list[str]:
    """Return a compare command for each task whose runs were validated in different batch-norm modes."""
    tasks: dict[str, list[RunRecord]] = defaultdict(list)
    for run in runs:
        tasks[str({name: value for name, value in run.protocol.items() if name != "batch_norm"})].append(run)
    lines = []
    for own in tasks.values():
        best: dict[str, RunRecord] = {}
        for run in sorted(own, key=lambda run: -run.validation[0] if run.validation else 1.0):
            best.setdefault(run.config.batch_norm, run)
        if len(best) > 1:
            first, *others = best.values()
            names = [name for name in COMPARED if any(name_differs(name, first, other) for other in others)]
            words = [f"{name}={getattr(first.config, name)}" for name in names]
            command = shlex.join(["metacv", "compare", *(str(run.folder) for run in best.values())])
            lines.append(
                f"{first.config.way}-way {first.config.shot}-shot: runs were validated in different batch-norm modes, "
                "whose accuracies cannot be compared. The best of each mode, in one mode on the same episodes: "
                f"{' '.join([printable(command), 'split=val batch_norm=inductive', *words])}"
            )
    return lines


def name_differs(name: str, one: RunRecord, other: RunRecord) -> bool:
    return getattr(one.config, name) != getattr(other.config, name)


def varied_settings(rows: list[Row]) -> list[str]:
    """Return settings with different values that a command line changed, or that distinguish otherwise equal rows."""
    changed = {name for row in rows for name in (*row.run.overrides, *row.changes)}
    varied = differing(rows, changed | {"batch_norm", "eval_episodes"})  # the last two are of validation
    headings, alike = defaultdict(list), defaultdict(list)
    swept = all("algo" in row.run.overrides for row in rows)  # the word tells Baseline from Baseline++, of one class
    for row in rows:
        headings[row.heading].append(row)
    for group in headings.values():  # rows under one heading that were not validated alike
        varied |= differing(group, {name for row in group for name in row.run.protocol})
    for row in rows:
        method = row.settings["algo"] if swept else row.run.algorithm
        alike[row.heading, method, tuple(row.settings.get(name) for name in varied - {"algo"})].append(row)
    for group in alike.values():
        found = differing(group, {name for row in group for name in row.settings} - {"algo"})
        several = {name for name in found if len({row.settings.get(name, "null") for row in group} - {"null"}) > 1}
        # Of different schedules or heads the class, not the settings that only one of them has.
        varied |= several | {name for name in found if name.split(".")[0] not in found - {name}}
    methods = {(row.run.algorithm, row.settings["algo"]) for row in rows}
    if not swept or len(methods) == len({row.run.algorithm for row in rows}):
        varied -= {"algo"}  # the same as the column algorithm
    return sorted(varied)


def differing(rows: list[Row], names: Iterable[str]) -> set[str]:
    return {name for name in names if len({row.settings.get(name, "null") for row in rows}) > 1}


def shown_columns(cells: list[dict[str, str]]) -> list[str]:
    """Return the columns of a group's table, without those that are empty or have the same value in every row."""
    values = {name: {own[name] for own in cells} for name in cells[0]}
    return [name for name, own in values.items() if own != {""} and (name in ALWAYS or len(own) > 1)]


def for_terminal(lines: list[list[str]], width: int) -> list[list[str]]:
    """Shorten long texts in the middle until the table fits into `width`, as long as they stay different."""
    shown, *cells = lines
    table = list(zip(*cells, strict=True))  # by column
    for i in sorted(range(len(shown)), key=lambda i: -max(map(len, table[i]))):
        over = sum(max(map(len, [name, *own])) + 2 for name, own in zip(shown, table, strict=True)) - 2 - width
        length = max(NAMES, max(map(len, table[i])) - over)
        shorter = [shortened_in_the_middle(text, length) for text in table[i]]
        if over > 0 and len({*shorter}) == len({*table[i]}):
            table[i] = tuple(shorter)
    return [shown, *map(list, zip(*table, strict=True))]


def for_csv(cells: list[dict[str, str]]) -> list[list[str]]:
    """Give an accuracy and its interval a column each, so that cells hold single numbers."""
    lines: list[dict[str, str]] = []
    for own in cells:
        lines.append({})
        for name, text in own.items():
            if name.endswith(" %"):
                kind = name.removesuffix(" %")
                lines[-1][f"{kind} accuracy %"], _, lines[-1][f"{kind} ci95 %"] = text.partition(" ± ")
            else:
                lines[-1][name] = text
    return [[*lines[0]], *([*line.values()] for line in lines)]


def as_markdown(lines: list[list[str]]) -> str:
    """Format a table in GitHub Markdown, escaped so that texts cannot become HTML, links or new cells."""
    safe = [[markdown_safe(cell) for cell in line] for line in lines]
    safe.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in safe)


def markdown_safe(text: str) -> str:
    """Escape text for GitHub Markdown. @, www. and :// are escaped because GitHub turns them into links."""
    return re.sub(r"([\\`*\[\]|@]|(?<=www)\.|:(?=//))", r"\\\1", escape(text, quote=False))
