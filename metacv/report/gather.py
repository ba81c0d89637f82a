"""Runs, or a whole sweep, gathered into a table and a page: what was set, what came out, what the papers have."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from metacv import MetacvError, checkpoint, clean
from metacv.compare import shortened
from metacv.config import ReportConfig
from metacv.config_dir import config_dir
from metacv.evaluate import NORMS
from metacv.files import csv_safe, write_bytes_atomically
from metacv.logger import ELSEWHERE, flat
from metacv.model import check_settings
from metacv.report.page import page

EXPERIMENTS = config_dir() / "experiment"
RUNNERS = {"hydra", "launcher", "sweeper"}
PROTOCOL = {"way", "shot", "query", "norm", "algo", "backbone", "dataset"}  # a paper's, which its experiment has
LARGEST = 10**7  # bytes of a text file
CHOICE = (
    "chosen: the highest accuracy in validation, where the runs of a task were validated alike; not told apart: an "
    "interval that overlaps with that of the chosen one, where metacv compare on the same episodes tells more"
)


@dataclass
class RunFound:
    """What lies in a run's folder, and where its checkpoint was tested."""

    folder: Path
    saved: dict[str, Any]  # the content of best.pt, without the weights
    digest: str
    overrides: dict[str, str]  # what the command line changed
    metrics: list[dict[str, float]]
    tests: list[dict[str, Any]] = field(default_factory=list)
    name: str = ""

    @property
    def config(self) -> dict[str, Any]:
        return self.saved["config"]

    @property
    def algorithm(self) -> str:
        return class_name(self.config["algo"])

    @property
    def settings(self) -> dict[str, str]:
        """Of what was changed the values as they were trained with."""
        trained = {name: str(value) for name, value in flat(self.config)}
        return self.overrides | {name: clean(value) for name, value in trained.items()}

    @property
    def validated_on(self) -> str:
        """Runs with the same were validated alike."""
        names = ("way", "shot", "query", "norm", "eval_episodes")
        images = {name: value for name, value in self.config["dataset"].items() if name != "train_rotation"}
        return json.dumps([images, *(self.config.get(name) for name in names)], default=str)

    @property
    def validation(self) -> dict[str, Any]:
        found = self.saved.get("validation")
        return found if isinstance(found, dict) and is_number(found.get("accuracy"), found.get("ci95")) else {}

    def paper(self, test: dict[str, Any]) -> str:
        """The published accuracy in the head of its experiment, if `test` was under that protocol."""
        line = paper_lines().get(self.overrides.get("experiment", ""))
        asked = {name: self.config[name] for name in ("way", "shot", "query")} | {
            "dataset": class_name(self.config["dataset"]),
            "rotation": self.config["dataset"].get("test_rotation"),
            "split": "test",
        }
        as_there = PROTOCOL.isdisjoint(name.split(".")[0] for name in self.overrides if not name.startswith("algo."))
        if not line or not as_there or test["algo"] or any(test[name] != value for name, value in asked.items()):
            return ""
        for inductive, number in re.findall(r"(inductive )?(\d+\.\d+(?: ± \d+\.\d+)?) %", line):
            if test["norm"] == (inductive.strip() or self.config["norm"]):
                return str(number)
        return ""


@dataclass
class Row:
    """A line of the table: a run, or one test of it."""

    run: RunFound
    test: dict[str, Any] | None
    varied: list[str]
    choice: str = ""

    @property
    def task(self) -> tuple[int, int, str, str]:
        """Rows with the same can be compared."""
        config = self.run.config
        if self.test:
            return self.test["way"], self.test["shot"], tested_on(self.test), self.test["episodes_sha256"]
        return config["way"], config["shot"], "", self.run.validated_on

    @property
    def accuracy(self) -> float:
        return self.measured[0]

    @property
    def measured(self) -> tuple[float, float]:
        """Accuracy and half its interval, on test if there was one."""
        found = self.test or self.run.validation or {"accuracy": 0, "ci95": 0}
        return float(found["accuracy"]), float(found["ci95"])

    @property
    def settings(self) -> dict[str, str]:
        return self.run.settings | (self.test["algo"] if self.test else {})

    @property
    def cells(self) -> dict[str, str]:
        way, shot, tested, _ = self.task
        return {
            "run": self.run.name,
            "algorithm": self.run.algorithm,
            "task": f"{way}-way {shot}-shot",
            "test %": percent(self.test),
            "paper %": self.run.paper(self.test) if self.test else "",
            "validation %": percent(self.run.validation),
            "choice": self.choice,
            "at step": str(self.run.saved["step"]),
            **{name: self.settings.get(name, "") for name in self.varied},
            "tested on": tested,
        }


def report(cfg: DictConfig, folder: Path) -> list[dict[str, str]]:
    """Writes report.html, report.md and report.csv about all runs below the folders that are named."""
    check_settings(cfg, ReportConfig)
    places = [place for name in cfg.runs if not (place := Path(name).expanduser()).is_file()]
    for place in places:
        if not place.is_dir():
            raise MetacvError(f"{place}: there is no such folder")
    runs, notes = gather(places)
    if not runs:
        raise MetacvError("; ".join([f"{', '.join(cfg.runs)}: no run with a best.pt in there", *notes]))
    rows = [Row(run, test, []) for run in runs for test in (run.tests or [None])]  # type: ignore[list-item]
    named = sorted({name for row in rows for name in (*row.run.overrides, *(row.test["algo"] if row.test else ()))})
    varied = [name for name in named if len({row.settings.get(name) for row in rows}) > 1]
    for row in rows:
        row.varied = varied
    rows.sort(key=lambda row: (*row.task, -row.accuracy))
    for _, task in groupby(rows, key=lambda row: row.task):
        choose(list(task))
    notes = [CHOICE] * any(row.choice for row in rows) + notes
    cells = without_empty([row.cells for row in rows])
    write_bytes_atomically(folder / "report.csv", as_csv(cells).encode())
    write_bytes_atomically(folder / "report.md", as_markdown(cells).encode())
    write_bytes_atomically(folder / "report.html", page(rows, cells, notes).encode())
    print("\n".join([as_text(cells), *notes]))
    for kind in ("html", "md", "csv"):
        print(f"{'written:' if kind == 'html' else '':<8} {folder / f'report.{kind}'}")
    return cells


def choose(rows: list[Row]) -> None:
    """Of the rows of a task, by validation, since the highest of many accuracies on test is high by chance too."""
    as_validated = [row for row in rows if not (row.test and row.test["algo"])]
    alike = len({row.run.validated_on for row in rows}) == 1 and all(row.run.validation for row in rows)
    if not as_validated or not alike or len({row.run.folder for row in rows}) == 1:
        return
    chosen = max(as_validated, key=lambda row: row.run.validation["accuracy"])
    for row in rows:
        if abs(row.accuracy - chosen.accuracy) <= row.measured[1] + chosen.measured[1]:
            row.choice = "not told apart"
    chosen.choice = "chosen"


@cache
def paper_lines() -> dict[str, str]:
    """What the head of each experiment says of its paper."""
    return {
        path.relative_to(EXPERIMENTS).with_suffix("").as_posix(): line
        for path in EXPERIMENTS.rglob("*.yaml")
        for line in path.read_text().splitlines()
        if line.startswith("# paper ")
    }


def gather(places: Iterable[Path]) -> tuple[list[RunFound], list[str]]:
    """Every folder with a best.pt, and every evaluation of its checkpoint, wherever it lies below `places`.

    And a line on the runs, and one on the evaluations, that this leaves out.
    """
    runs: dict[Path, RunFound] = {}
    tests: dict[tuple[str, ...], dict[str, Any]] = {}
    without: dict[Path, None] = {}
    for place in places:
        for path in sorted(place.rglob("best.pt")):
            try:
                saved, digest = checkpoint.load(path), checkpoint.file_hash(path)
            except (MetacvError, OSError) as error:
                print(f"metacv: {error}: left out", file=sys.stderr)
                continue
            del saved["algorithm"]
            home = path.parent
            runs[home.resolve()] = RunFound(home, saved, digest, overrides(home), metrics(home / "metrics.jsonl"))
        without |= dict.fromkeys(home for home in trainings(place) if not (home / "best.pt").exists())
        for path, found in tests_below(place):
            key = (found["checkpoint_sha256"], found["episodes_sha256"], found["norm"], str(found["algo"]))
            tests[key] = found | {"path": path}
    for run in runs.values():
        run.tests = [found for (digest, *_), found in tests.items() if digest == run.digest]
    for folder, name in zip(runs, shortened(list(runs)) if runs else [], strict=True):
        runs[folder].name = clean(name)
    known = {run.digest for run in runs.values()}
    strange = [found["path"] for found in tests.values() if found["checkpoint_sha256"] not in known]
    notes = [left_out("without a best.pt (failed, or not validated yet)", "run", list(without))]
    notes += [left_out("of a checkpoint that is not there, or has changed since", "evaluation", strange)]
    return list(runs.values()), [note for note in notes if note]


def trainings(place: Path) -> set[Path]:
    """The folders that a training has written to."""
    begun = {path.parent.parent for path in place.rglob(".hydra/hydra.yaml") if "name: metacv train\n" in read(path)}
    return begun | {path.parent for path in place.rglob("metrics.jsonl")}


def left_out(why: str, what: str, paths: list[Path]) -> str:
    names = [clean(str(path)) for path in sorted(set(paths))]
    more = f" and {len(names) - 5} more" * (len(names) > 5)
    return f"left out: {len(paths)} {what}{'s' * (len(paths) > 1)} {why}: {', '.join(names[:5])}{more}" if paths else ""


def read(path: Path) -> str:
    """Its text; nothing of a file that cannot be read, or is too large."""
    try:
        if path.is_file() and path.stat().st_size < LARGEST:
            return path.read_text(errors="replace")
    except OSError:
        pass
    return ""


def read_json(path: Path) -> Any:
    """Its content; nothing of a file that is damaged."""
    try:
        return json.loads(read(path))
    except (ValueError, RecursionError):
        return None


def tests_below(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The evaluations in a folder's files; of one by ways of batch norm, or of a comparison, each."""
    for path in sorted(folder.rglob("*.json")):
        content = read_json(path)
        parts = [content]
        if isinstance(content, dict):
            compared = content.get("runs")
            parts += [content.get(norm) for norm in NORMS] + list(
                compared.values() if isinstance(compared, dict) else ()
            )
        for part in parts:
            if isinstance(part, dict) and "checkpoint_sha256" in part:
                found: dict[str, Any] = {"rotation": "none", "algo": {}} | part
                texts = ("checkpoint_sha256", "episodes_sha256", "norm", "dataset", "split", "rotation")
                whole = all(type(found.get(name)) is int for name in ("way", "shot", "query", "episodes"))
                whole = (
                    whole and is_number(found.get("accuracy"), found.get("ci95")) and isinstance(found["algo"], dict)
                )
                if whole and all(isinstance(found.get(name), str) for name in texts):
                    changed = {clean(f"algo.{name}"): clean(str(value)) for name, value in found["algo"].items()}
                    yield path, found | {name: clean(found[name]) for name in texts} | {"algo": changed}


def overrides(folder: Path) -> dict[str, str]:
    """What the command line of a run changed, but for what does not change what comes out."""
    files = [read_json(path) for path in sorted(folder.glob("*.json"))]
    words = next((found["overrides"] for found in files if isinstance(found, dict) and "overrides" in found), None)
    if words is None:
        try:  # as plain text, in which nothing can be merged
            words = yaml.load(read(folder / ".hydra/overrides.yaml"), yaml.BaseLoader)
        except (ValueError, RecursionError, yaml.YAMLError):
            words = []
    texts = dict.fromkeys(word for word in words if isinstance(word, str)) if isinstance(words, list) else {}
    pairs = [clean(word).lstrip("+").partition("=") for word in texts]
    return {name: value for name, _, value in pairs if name.split(".")[0] not in RUNNERS | ELSEWHERE}


def metrics(path: Path) -> list[dict[str, float]]:
    """The lines that can be drawn."""
    found = []
    for line in read(path).splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and is_number(content.get("step")):
            found.append({name: float(value) for name, value in content.items() if is_number(value)})
    return found


def is_number(*values: Any) -> bool:
    return all(type(value) in (int, float) and abs(value) < 1e15 for value in values)


def class_name(node: dict[str, Any]) -> str:
    return clean(str(node.get("_target_")).rpartition(".")[2])


def percent(found: dict[str, Any] | None) -> str:
    return f"{100 * found['accuracy']:.2f} ± {100 * found['ci95']:.2f}" if found else ""


def tested_on(test: dict[str, Any]) -> str:
    rotation = "" if test.get("rotation", "none") == "none" else f", rotation {test['rotation']}"
    where = f"{test['dataset']} {test['split']}"
    return f"{test['episodes']} episodes of {where}, {test['query']} queries, {test['norm']}{rotation}"


def without_empty(cells: list[dict[str, str]]) -> list[dict[str, str]]:
    kept = [name for name in cells[0] if any(row[name] for row in cells)]
    return [{name: row[name] for name in kept} for row in cells]


def as_csv(cells: list[dict[str, str]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    for line in (cells[0], *(row.values() for row in cells)):
        writer.writerow(map(csv_safe, line))
    return text.getvalue()


def as_markdown(cells: list[dict[str, str]]) -> str:
    lines = [list(cells[0]), *(list(row.values()) for row in cells)]
    lines = [[value.replace("|", "\\|") for value in line] for line in lines]
    lines.insert(1, ["---"] * len(cells[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_text(cells: list[dict[str, str]]) -> str:
    lines = [list(cells[0]), *(list(row.values()) for row in cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{v:<{w}}" for v, w in zip(line, widths, strict=True)).rstrip() for line in lines)
