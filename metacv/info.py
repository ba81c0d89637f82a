"""`metacv info RUN`: describe a run or a file with a model in about 15 lines."""

import shutil
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from metacv.config import InfoConfig, class_name, network_name
from metacv.errors import UserError
from metacv.files import user_path
from metacv.model import Checkpoint, Training, load_checkpoint
from metacv.report.gather import EVALUATIONS, is_number, metrics, overrides, printable_result, result_files
from metacv.results import shape_text
from metacv.text import aligned, duration, percent, plural, printable, short

SHOWN = 8  # maximum of evaluations, earlier runs, classes and files
NAMES = 12  # columns: the longest name of a line with the space after it


def info(config: InfoConfig, folder: Path) -> None:
    """Print a description of each run; UserError if one is not a run or a model."""
    if not config.runs:
        raise UserError("runs=[]: name a run, or a file with a model")
    checkpoints = [load(place) for place in config.runs]
    print("\n\n".join(aligned([*wrapped(lines(checkpoint))]) for checkpoint in checkpoints))


def wrapped(lines: Iterable[tuple[str, str]]) -> Iterator[list[str]]:
    """The lines with printable texts, which continue in a line of their own at the end of a terminal's line."""
    width = shutil.get_terminal_size((10_000, 24)).columns - NAMES
    for name, text in lines:
        parts = textwrap.wrap(short(printable(text)), max(width, 20), break_long_words=False, break_on_hyphens=False)
        yield from ([shown, part] for shown, part in zip([name, *[""] * len(parts)], parts, strict=False))


def load(place: str) -> Checkpoint:
    """Load the best.pt of a run, or its last.pt if it was not validated yet."""
    path = user_path(place)
    untested = not (path / "best.pt").exists() and (path / "last.pt").exists()
    return load_checkpoint(place, "last.pt" if untested else "best.pt")


def lines(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield name and text of each line."""
    path, config, content = checkpoint.path, checkpoint.config, checkpoint.content
    algorithm = checkpoint.build()
    run = path.parent if path.name in ("best.pt", "last.pt") else None
    yield "file", f"{path}, {path.stat().st_size / 1e6:.2f} MB, sha256 {checkpoint.sha256[:16]}"
    head = class_name(config.head)
    yield "method", f"{class_name(config.algo)}{f', tested with {head}' if head else ''}"
    parameters = sum(parameter.numel() for parameter in algorithm.parameters())
    yield "network", f"{network_name(config.backbone)}, {parameters:,} parameters"
    yield "data", f"{class_name(config.dataset)}, images of {'x'.join(map(str, checkpoint.image_shape))}"
    task = f"{shape_text(config.way, config.shot, config.vary)}, {plural(config.query, 'query', 'queries')} per class"
    train_query = plural(config.train_query, "query", "queries")
    trained = f"; trained {shape_text(config.train_way, config.train_shot, config.train_vary)}, {train_query} per class"
    yield "task", task + trained * (algorithm.batches == "episodes")
    steps = [line["step"] for line in metrics(run / "metrics.jsonl")] if run else []
    further = f"; the run is at step {max(steps):,.0f}" if steps and max(steps) > checkpoint.step else ""
    yield "step", f"{checkpoint.step:,} of {config.steps:,}{further}"
    best: Any = content.get("validation", content.get("best"))
    if isinstance(best, dict) and is_number(best.get("accuracy"), best.get("ci95"), best.get("step")):
        episodes = f"{plural(config.eval_episodes, 'episode')}, {config.batch_norm}"
        yield "validation", f"{percent(best['accuracy'], best['ci95'])} % at step {best['step']:,} ({episodes})"
    yield from history(checkpoint.training)
    yield from support(content)
    if run:
        yield from beside(run, checkpoint)


def history(training: Training) -> Iterator[tuple[str, str]]:
    """Yield classes, earlier runs and cost of training, as far as the checkpoint has them."""
    trained, validated = (
        sum(not name.startswith("pixels:") for name in names)  # a hash of images: another name of the same class
        for names in (training.trained_on, training.validated_on)
    )
    if trained := trained or training.classes:
        in_validation = f", {validated:,} in validation" if validated else ""
        yield "classes", f"{trained:,} in training{in_validation}"
    for stage in training.stages[:SHOWN]:
        yield "after", stage
    if training.images:
        stages = " (with earlier runs)" if training.stages else ""
        cost = f"{training.images:,} images, {training.flops / 1e12:,.3g} TFLOP, {duration(training.seconds)}"
        yield "cost", f"training took {cost}{stages}"


def support(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a line on the support set in a file of `metacv predict save=`."""
    if "support" in content:
        try:
            classes, images = [str(name) for name in content["support"]["classes"]], len(content["support"]["images"])
        except (TypeError, KeyError):
            raise UserError("the support set in the file is damaged; write it again by metacv predict save=") from None
        more = f" and {len(classes) - SHOWN} more" if len(classes) > SHOWN else ""
        names = f"{', '.join(classes[:SHOWN])}{more}"
        yield "adapted to", f"{plural(images, 'image')} of {plural(len(classes), 'class', 'classes')}: {names}"


def beside(run: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield changed settings, evaluations of the checkpoint and files in the run's folder."""
    own, _ = result_files([run])
    files = own | result_files([place for place in map(Path, EVALUATIONS) if place.is_dir()])[0]
    if changed := overrides(run, [file for path, file in own.items() if path.parent == run]):
        yield "changed", " ".join(f"{name}={value}" for name, value in changed.items())
    tests = [
        (path, test)
        for path, file in files.items()
        for test in map(printable_result, file.results)
        if test.checkpoint_sha256 == checkpoint.sha256
    ]
    for path, test in tests[:SHOWN]:
        accuracy = percent(test.accuracy, test.ci95)
        yield "evaluated", f"{accuracy} %: {test.shape}, {test.protocol} ({path})"
    if len(tests) > SHOWN:
        yield "", f"and {len(tests) - SHOWN} more evaluations"
    names = sorted(path.name for path in run.iterdir() if not path.name.startswith("."))
    yield "folder", f"{', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
