"""Runs, or a whole sweep, gathered into a table and a page: what was set, what came out, what the papers have."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from metacv import MetacvError, checkpoint
from metacv.build import check_settings
from metacv.compare import shortened
from metacv.config import ReportConfig
from metacv.config_dir import config_dir
from metacv.evaluate import NORMS
from metacv.files import csv_safe, write_bytes_atomically
from metacv.logger import ELSEWHERE, flat
from metacv.page import page

EXPERIMENTS = config_dir() / "experiment"
RUNNERS = {"hydra", "launcher", "sweeper"}
PROTOCOL = {"way", "shot", "query", "norm", "algo", "backbone", "dataset"}  # a paper's, which its experiment has
LARGEST = 10**7  # bytes of a result


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
    def validation(self) -> dict[str, Any]:
        found = self.saved.get("validation")
        return found if isinstance(found, dict) and is_number(found.get("accuracy"), found.get("ci95")) else {}

    def paper(self, test: dict[str, Any]) -> str:
        """The published accuracy in the head of its experiment, if `test` was under that protocol."""
        heads = {path.relative_to(EXPERIMENTS).with_suffix("").as_posix(): path for path in EXPERIMENTS.rglob("*.yaml")}
        path = heads.get(self.overrides.get("experiment", ""))
        asked = {name: self.config[name] for name in ("way", "shot", "query")} | {
            "dataset": class_name(self.config["dataset"]),
            "rotation": self.config["dataset"].get("test_rotation"),
            "split": "test",
        }
        as_there = PROTOCOL.isdisjoint(name.split(".")[0] for name in self.overrides if not name.startswith("algo."))
        if not path or not as_there or any(test[name] != value for name, value in asked.items()):
            return ""
        line = next((line for line in path.read_text().splitlines() if line.startswith("# paper ")), "")
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

    @property
    def task(self) -> tuple[int, int, str, str]:
        """Rows with the same can be compared."""
        config = self.run.config
        if self.test:
            return self.test["way"], self.test["shot"], tested_on(self.test), self.test["episodes_sha256"]
        same = [config.get(name) for name in ("dataset", "query", "norm", "eval_episodes")]
        return config["way"], config["shot"], "", json.dumps(same, default=str)

    @property
    def accuracy(self) -> float:
        return float((self.test or self.run.validation or {"accuracy": 0})["accuracy"])

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
            "at step": str(self.run.saved["step"]),
            **{name: self.run.settings.get(name, "") for name in self.varied},
            "tested on": tested,
        }


def report(cfg: DictConfig, folder: Path) -> list[dict[str, str]]:
    """Writes report.html, report.md and report.csv about all runs below the folders that are named."""
    check_settings(cfg, ReportConfig)
    places = [place for name in cfg.runs if not (place := Path(name).expanduser()).is_file()]
    for place in places:
        if not place.is_dir():
            raise MetacvError(f"{place}: there is no such folder")
    runs = gather(places)
    if not runs:
        raise MetacvError(f"{', '.join(cfg.runs)}: no run with a best.pt in there")
    named = sorted({name for run in runs for name in run.overrides})
    varied = [name for name in named if len({run.settings.get(name) for run in runs}) > 1]
    rows = [Row(run, test, varied) for run in runs for test in (run.tests or [None])]  # type: ignore[list-item]
    rows.sort(key=lambda row: (*row.task, -row.accuracy))
    cells = without_empty([row.cells for row in rows])
    write_bytes_atomically(folder / "report.csv", as_csv(cells).encode())
    write_bytes_atomically(folder / "report.md", as_markdown(cells).encode())
    write_bytes_atomically(folder / "report.html", page(rows, cells).encode())
    print(as_text(cells))
    for kind in ("html", "md", "csv"):
        print(f"{'written:' if kind == 'html' else '':<8} {folder / f'report.{kind}'}")
    return cells


def gather(places: Iterable[Path]) -> list[RunFound]:
    """Every folder with a best.pt, and every evaluation of its checkpoint, wherever it lies below `places`."""
    runs: dict[Path, RunFound] = {}
    tests: dict[tuple[str, ...], dict[str, Any]] = {}
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
        for found in tests_below(place):
            tests[found["checkpoint_sha256"], found["episodes_sha256"], found["norm"]] = found
    for run in runs.values():
        run.tests = [found for (digest, *_), found in tests.items() if digest == run.digest]
    for folder, name in zip(runs, shortened(list(runs)) if runs else [], strict=True):
        runs[folder].name = clean(name)
    return list(runs.values())


def read_json(path: Path) -> Any:
    """Its content; nothing of a file that is damaged, or too large for a result."""
    try:
        if path.is_file() and path.stat().st_size < LARGEST:
            return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        pass
    return None


def tests_below(folder: Path) -> Iterator[dict[str, Any]]:
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
                found = {"rotation": "none"} | part
                texts = ("checkpoint_sha256", "episodes_sha256", "norm", "dataset", "split", "rotation")
                whole = all(type(found.get(name)) is int for name in ("way", "shot", "query", "episodes"))
                whole = whole and is_number(found.get("accuracy"), found.get("ci95"))
                if whole and all(isinstance(found.get(name), str) for name in texts):
                    yield found | {name: clean(found[name]) for name in texts}


def overrides(folder: Path) -> dict[str, str]:
    """What the command line of a run changed, but for what does not change what comes out."""
    files = [read_json(path) for path in sorted(folder.glob("*.json"))]
    words = next((found["overrides"] for found in files if isinstance(found, dict) and "overrides" in found), None)
    if words is None:
        try:
            words = yaml.safe_load((folder / ".hydra/overrides.yaml").read_text())
        except (OSError, ValueError, yaml.YAMLError):
            words = []
    pairs = [clean(str(word)).lstrip("+").partition("=") for word in words if isinstance(words, list)]
    return {name: value for name, _, value in pairs if name.split(".")[0] not in RUNNERS | ELSEWHERE}


def metrics(path: Path) -> list[dict[str, float]]:
    """The lines that can be drawn."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
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


def clean(text: str) -> str:
    """Text of strangers, for a terminal and a file: one line that can be encoded."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


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
