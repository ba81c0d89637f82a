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

from omegaconf import DictConfig

from metacv import MetacvError, checkpoint
from metacv.build import check_settings
from metacv.config import ReportConfig
from metacv.config_dir import config_dir
from metacv.evaluate import NORMS
from metacv.files import write_bytes_atomically
from metacv.page import page

PLACES = {"data_dir", "device", "resume", "log_every"}  # overrides that no reader asks for


@dataclass
class RunFound:
    """What lies in a run's folder, and where its checkpoint was tested."""

    name: str
    folder: Path
    saved: dict[str, Any]  # the content of best.pt
    trained: dict[str, Any]  # result.json of the training, or what is known of one that goes on
    metrics: list[dict[str, Any]]
    tests: list[dict[str, Any]] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        return self.saved["config"]

    @property
    def algorithm(self) -> str:
        return str(self.config["algo"].get("_target_")).rpartition(".")[2]

    @property
    def overrides(self) -> dict[str, str]:
        """What the command line changed."""
        words = [word.lstrip("+").partition("=") for word in self.trained.get("overrides", [])]
        return {name: value for name, _, value in words if name.split(".")[0] not in {"hydra", *PLACES}}

    @property
    def validation(self) -> dict[str, Any]:
        return self.saved.get("validation") or {}

    def paper(self, test: dict[str, Any]) -> str | None:
        """The published accuracy in the head of its experiment, if `test` was under that protocol."""
        path = config_dir() / "experiment" / f"{self.overrides.get('experiment')}.yaml"
        asked = {name: self.config[name] for name in ("way", "shot", "query")}
        rotation = self.config["dataset"].get("test_rotation")
        if not path.is_file() or asked | {"rotation": rotation} != {k: test[k] for k in (*asked, "rotation")}:
            return None
        line = next((line for line in path.read_text().splitlines() if line.startswith("# paper ")), "")
        for inductive, number in re.findall(r"(inductive )?(\d+\.\d+(?: ± \d+\.\d+)?) %", line):
            if test["norm"] == (inductive.strip() or self.config["norm"]):
                return str(number)
        return None


@dataclass
class Row:
    """A line of the table: a run, or one test of it."""

    run: RunFound
    test: dict[str, Any] | None
    varied: list[str]

    @property
    def task(self) -> tuple[int, int, str]:
        """Rows with the same can be compared."""
        task = self.test or self.run.config
        return task["way"], task["shot"], tested_on(self.test) if self.test else ""

    @property
    def accuracy(self) -> float:
        return float((self.test or self.run.validation or {"accuracy": 0})["accuracy"])

    @property
    def cells(self) -> dict[str, str]:
        test, (way, shot, tested) = self.test, self.task
        return {
            "run": self.run.name,
            "algorithm": self.run.algorithm,
            "task": f"{way}-way {shot}-shot",
            "test %": percent(test),
            "paper %": (self.run.paper(test) or "") if test else "",
            "validation %": percent(self.run.validation),
            "at step": str(self.run.saved["step"]),
            **{name: self.run.overrides.get(name, "") for name in self.varied},
            "tested on": tested,
        }


def report(cfg: DictConfig, folder: Path) -> list[dict[str, str]]:
    """Writes report.html, report.md and report.csv about all runs below the folders that are named."""
    check_settings(cfg, ReportConfig)
    places = [Path(place).expanduser() for place in cfg.runs]
    for place in places:
        if not place.is_dir():
            raise MetacvError(f"{place}: there is no such folder")
    runs = gather(places)
    if not runs:
        raise MetacvError(f"{', '.join(map(str, places))}: no run with a best.pt in there")
    varied = sorted({name for run in runs for name in run.overrides if len({r.overrides.get(name) for r in runs}) > 1})
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
    runs: dict[str, RunFound] = {}
    tests = []
    for place in places:
        for path in sorted(place.rglob("best.pt")):
            try:
                saved, digest = checkpoint.load(path), checkpoint.file_hash(path)
            except (MetacvError, OSError) as error:
                print(f"metacv: {error}: left out", file=sys.stderr)
                continue
            name = str(path.parent.relative_to(place)) if path.parent != place else place.resolve().name
            trained = next((found for found in jsons(path.parent) if "overrides" in found), {})
            runs[digest] = RunFound(name, path.parent, saved, trained, metrics(path.parent / "metrics.jsonl"))
        tests += [found for found in jsons(place, below=True) if "checkpoint_sha256" in found]
    for found in tests:
        run = runs.get(found["checkpoint_sha256"])
        if run and found not in run.tests:
            run.tests.append(found)
    return list(runs.values())


def jsons(folder: Path, below: bool = False) -> Iterator[dict[str, Any]]:
    """The results in a folder; of a result by ways of batch norm, or of a comparison, each."""
    for path in sorted(folder.glob("**/*.json" if below else "*.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        parts = [content]
        if isinstance(content, dict):
            parts += [content.get(norm) for norm in NORMS] + list(dict(content.get("runs") or {}).values())
        yield from (part for part in parts if isinstance(part, dict) and "accuracy" in part)


def metrics(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


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
    writer = csv.DictWriter(text, list(cells[0]))
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue()


def as_markdown(cells: list[dict[str, str]]) -> str:
    lines = [list(cells[0]), ["---"] * len(cells[0])]
    lines += [[value.replace("|", "\\|").replace("\n", " ") for value in row.values()] for row in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_text(cells: list[dict[str, str]]) -> str:
    lines = [list(cells[0]), *(list(row.values()) for row in cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{v:<{w}}" for v, w in zip(line, widths, strict=True)).rstrip() for line in lines)
