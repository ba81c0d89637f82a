"""Find the runs below some folders, and the evaluations of their checkpoints."""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from metacv import CONFIG_DIR, limits
from metacv.bounds import shown
from metacv.config import LOCAL, TrainConfig, class_name, flat, to_dict, validation_protocol
from metacv.errors import UserError
from metacv.files import read_text
from metacv.model import load_checkpoint, uses_query_set
from metacv.pickles import check_extent
from metacv.results import Result, ResultFile, read_results
from metacv.text import plural, printable, shortened
from metacv.upgrade import upgrade_override

EVALUATIONS = ("outputs/evaluate", "outputs/compare")  # the folders that commands write to by default
RUNNERS = {"hydra", "launcher", "sweeper"}  # settings for where runs are executed
PROTOCOL = {"way", "shot", "query", "batch_norm", "algo", "backbone", "dataset", "paper"}  # an experiment sets them


@dataclass
class RunRecord:
    """A folder with a best.pt, and the evaluations of this checkpoint. All texts are printable."""

    folder: Path
    config: TrainConfig
    step: int
    validation: tuple[float, float] | None  # accuracy and half its interval, from 0 to 1
    sha256: str
    overrides: dict[str, str]  # settings that the command line changed
    metrics: list[dict[str, float]]
    stages: str = ""  # the earlier runs that training started from, or learned from
    tests: list[Result] = field(default_factory=list)
    name: str = ""

    @property
    def algorithm(self) -> str:
        return printable(class_name(self.config.algo))

    @cached_property
    def settings(self) -> dict[str, str]:
        """Every setting that may change the result, as the run was trained with it."""
        known = {name: printable(shown(value)) for name, value in flat(to_dict(self.config))}
        return self.overrides | known | {"algo": self.overrides.get("algo", self.algorithm)}

    @cached_property
    def protocol(self) -> dict[str, str]:
        """The settings that determine the episodes of validation, by their full names, and a head that uses all
        queries of a task, with which the accuracy is of another kind."""
        known = validation_protocol(self.config)
        known |= {"head": class_name(self.config.head)} if uses_query_set(self.config) else {}
        return {name: printable(shown(value)) for name, value in known.items()}

    @cached_property
    def validated_on(self) -> str:
        """A key that is equal for runs that were validated on the same episodes."""
        return str(self.protocol)

    @property
    def validation_text(self) -> str:
        """The images and episodes of validation, for people to read."""
        config = self.config
        where = f"{plural(config.eval_episodes, 'episode')} of {printable(class_name(config.dataset))} val"
        whole = " batch norm, head uses all queries" * uses_query_set(config)
        return f"{where}, {plural(config.query, 'query', 'queries')}, {config.batch_norm}{whole}"

    def paper(self, test: Result) -> str:
        """Return the paper's accuracy in % if `test` follows the protocol of the run's experiment, otherwise empty."""
        config, changed = self.config, {name.split(".")[0] for name in self.overrides if not name.startswith("algo.")}
        images = class_name(config.dataset), config.dataset.get("test_rotation", "none"), "test"
        followed = (config.way, config.shot, config.query, *images)
        own = (test.way, test.shot, test.query, test.dataset, test.rotation, test.split)
        other = test.disjoint or test.query_balance != "balanced"
        if "experiment" not in self.overrides or PROTOCOL & changed or test.changes or own != followed or other:
            return ""
        for entry in config.paper or paper_of_experiment(self.overrides["experiment"]):
            accuracy, ci95 = entry.get("accuracy"), entry.get("ci95")
            if entry.get("batch_norm", config.batch_norm) == test.batch_norm and is_number(accuracy):
                numbers = [accuracy, ci95] if is_number(ci95) else [accuracy]
                decimals = max(1, *(len(f"{number:.10g}".partition(".")[2]) for number in numbers))
                return " ± ".join(f"{number:.{decimals}f}" for number in numbers)
        return ""


def paper_of_experiment(name: str) -> list[dict[str, Any]]:
    """Read the paper's numbers from the experiment's file, for older checkpoints whose settings lack them."""
    folder = CONFIG_DIR / "experiment"
    known = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return yaml.safe_load(known[name].read_text("utf-8")).get("paper", []) if name in known else []


def gather(places: list[Path]) -> tuple[list[RunRecord], list[str]]:
    """Return the runs below `places`, with the evaluations of their checkpoints there and in EVALUATIONS, and notes.

    Prints a line for each damaged checkpoint. Other damaged files count as missing.
    """

    def below(pattern: str) -> list[Path]:
        return [path for place in places for path in sorted(place.rglob(pattern))]

    files, old = result_files(places)
    elsewhere, _ = result_files([place for place in map(Path, EVALUATIONS) if place.is_dir()])
    tests = {
        (test.checkpoint_sha256, test.episodes_sha256, test.batch_norm, str(test.changes)): (test, path)
        for path, file in (elsewhere | files).items()
        for test in map(printable_result, file.results)
        if test.checkpoint_sha256
    }
    runs: dict[Path, RunRecord] = {}
    for path in below("best.pt"):
        try:
            runs[path.parent.resolve()] = read_run(path, files)
        except (UserError, OSError) as error:
            print(printable(f"metacv: {error}: left out"), file=sys.stderr)
    for run, name in zip(runs.values(), shortened(list(runs)) if runs else [], strict=True):
        run.name = printable(name)
        run.tests = [test for test, _ in tests.values() if test.checkpoint_sha256 == run.sha256]
    started = {path.parent.parent for path in below(".hydra/hydra.yaml") if "name: metacv train\n" in read(path)}
    started |= {path.parent for path in below("metrics.jsonl")}
    failed = {folder for folder in started if not (folder / "best.pt").exists()}
    known = {run.sha256 for run in runs.values()}
    unmatched = {path for test, path in tests.values() if test.checkpoint_sha256 not in known and path in files}
    notes = [
        left_out("run", "without a best.pt (failed, or not validated yet)", failed),
        left_out("evaluation", "of a checkpoint that is not in these folders, or has changed since", unmatched),
        left_out("evaluation", "of version 1: evaluate again", old),
    ]
    return list(runs.values()), [note for note in notes if note]


def result_files(places: list[Path]) -> tuple[dict[Path, ResultFile], set[Path]]:
    """Read the result files below `places`; also return the paths of those of version 1, which cannot be read."""
    files, old = dict[Path, ResultFile](), set[Path]()
    for path in (path for place in places for path in sorted(place.rglob("*.json")) if path.is_file()):
        try:
            files[path] = read_results(path)
        except UserError:  # another program's file, or one that is damaged or of version 1
            if '"norm": "' in (text := read(path)) and '"checkpoint_sha256": "' in text:
                old.add(path)
    return files, old


def read_run(path: Path, files: dict[Path, ResultFile]) -> RunRecord:
    """Read the run of a best.pt, without its weights."""
    checkpoint, folder = load_checkpoint(path), path.parent
    best = checkpoint.content.get("validation")
    measured: Any = (best.get("accuracy"), best.get("ci95")) if isinstance(best, dict) else (None, None)
    validation = measured if is_number(*measured) else None
    changed = overrides(folder, [file for place, file in files.items() if place.parent == folder])
    lines = metrics(folder / "metrics.jsonl")
    stages = "; ".join(stage.partition(", sha256")[0] for stage in checkpoint.training.stages)
    known = checkpoint.config, checkpoint.step, validation, checkpoint.sha256, changed, lines
    return RunRecord(folder, *known, printable(stages))


def printable_result(test: Result) -> Result:
    texts: dict[str, Any] = {own.name: printable(getattr(test, own.name)) for own in fields(Result) if own.type is str}
    changes = {
        printable(name if name.split(".")[0] == "head" else f"algo.{name}"): printable(shown(value))
        for name, value in test.changes.items()
    }
    return replace(test, **texts, changes=changes)


def overrides(folder: Path, files: list[ResultFile]) -> dict[str, str]:
    """Return the settings that a run's command line changed, except those that do not affect its result."""
    words = next((file.training["overrides"] for file in files if file.training and "overrides" in file.training), None)
    if words is None:  # the run is unfinished, or of version 1
        try:
            # BaseLoader builds only texts and lists. Neither it nor the loop below expands aliases.
            text = read(folder / ".hydra/overrides.yaml")
            words = yaml.load(text, yaml.BaseLoader) if len(text) <= 10 * limits.WORDS else text
        except (ValueError, RecursionError, yaml.YAMLError):
            words = []
    try:
        check_extent(words, limits.WORDS)
    except ValueError as error:
        print(printable(f"metacv: {folder}: without the settings of its command line ({error})"), file=sys.stderr)
        words = []
    texts = dict.fromkeys(word for word in words if isinstance(word, str)) if isinstance(words, list) else {}
    pairs = [upgrade_override(printable(word).lstrip("+")).partition("=") for word in texts]
    # dataset@dataset.sets.NAME=NAME, of dataset=[A,B], chooses settings that the config has too.
    return {n: value for n, _, value in pairs if n.split(".")[0] not in RUNNERS | LOCAL and "@dataset." not in n}


def metrics(path: Path) -> list[dict[str, float]]:
    """Read the lines of metrics.jsonl that have a step, with the values that are numbers."""
    lines = []
    for line in read(path).splitlines():
        with suppress(ValueError, RecursionError):
            content = json.loads(line)
            if isinstance(content, dict) and is_number(content.get("step")):
                lines.append({name: float(value) for name, value in content.items() if is_number(value)})
    return lines


def left_out(noun: str, reason: str, paths: set[Path]) -> str:
    """Return a note that counts `paths` and names up to five of them; empty if there are none."""
    names = [printable(str(path)) for path in sorted(paths)]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"left out: {plural(len(names), noun)} {reason}: {', '.join(names[:5])}{more}" if names else ""


def read(path: Path) -> str:
    """Return the text of a file; empty if it cannot be read or is too large."""
    with suppress(OSError, UserError):
        return read_text(path, "replace")
    return ""


def is_number(*values: Any) -> bool:
    return all(type(value) in (int, float) and abs(value) < 1e15 for value in values)
