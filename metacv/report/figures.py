"""The figures of a report: curves, accuracy by shot and by way as SVG, and pictures of episodes."""

import io
import json
import re
import sys
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.style import context

from metacv import limits
from metacv.bounds import shown
from metacv.config import flat, to_dict
from metacv.errors import UserError
from metacv.files import size_of
from metacv.pictures import HUES, STYLE
from metacv.report.gather import RunRecord
from metacv.report.table import Row
from metacv.results import Result, method_text, t_interval
from metacv.text import plural, printable

CURVES, EPISODES, POINTS = 10, 6, 150  # at most: runs with curves, runs with a sample episode, points of a curve
TASK = {"way", "shot", "train_way", "train_shot"}
Point = tuple[float, float, float]  # x, accuracy and half its interval in %
Line = Sequence[Point]


@dataclass
class Chart:
    """A figure and the names of its lines, in the order of HUES."""

    caption: str
    names: list[str]
    svg: Markup


def curves(runs: list[RunRecord]) -> list[Chart]:
    """Draw validation and training accuracy by step, with a line for each run."""
    charts = []
    for kind, tag in (("Validation", "val/accuracy"), ("Training", "train/accuracy")):
        lines: list[Line] = []
        for run in runs:
            points = [(m["step"], 100 * m[tag], 100 * m.get("val/ci95", 0.0)) for m in run.metrics if tag in m]
            every = -(-len(points) // POINTS) or 1
            lines.append([*points[:-1:every], *points[-1:]])
        if any(lines):
            charts.append(Chart(f"{kind} accuracy by step", [], svg(draw(lines, "step"))))
    return charts


def by_task(rows: list[Row], varied: list[str]) -> list[Chart]:
    """Draw accuracy by shot for each way, and by way for each shot, for runs with the same test protocol.

    A point is the mean of runs that differ only in the seed, with Student's t interval over the runs.
    """
    charts = []
    for x_axis, fixed in (("shot", "way"), ("way", "shot")):
        # Tests by protocol, line, x and checkpoint.
        groups: dict[Any, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
        for row in rows:
            if test := row.test:
                shown = (test.dataset, test.split, test.conditions, test.rotation)
                protocol = (
                    getattr(test, fixed),
                    *shown,
                    test.query,
                    test.episodes,
                    test.seed,
                    str(row.run.config.dataset),
                )
                for line in lines_of(row, test, varied):
                    groups[protocol][line][getattr(test, x_axis)][row.run.sha256] = test
        for (value, dataset, split, conditions, rotation, *_), group in groups.items():
            lines = [(name, points) for (name, _), points in group.items() if len(points) > 1]
            if not lines:
                continue
            names, drawn = [], []
            for name, points in lines[: len(HUES)]:
                few, *_, many = sorted(len(tests) for tests in points.values())
                names.append(f"{name}: {plural(few, 'run') if few == many else f'{few} to {many} runs'}")
                drawn.append([point(x, list(tests.values())) for x, tests in sorted(points.items())])
            caption = f"{value}-{fixed} accuracy by {x_axis}: {dataset} {split}, {conditions}, rotation {rotation}"
            caption += f"; the first {len(names)} of {len(lines)} lines" * (len(names) < len(lines))
            charts.append(Chart(caption, names, svg(draw(drawn, x_axis))))
    return charts


def by_cost(rows: list[Row]) -> list[Chart]:
    """Draw accuracy by the floating-point operations of training, a point for each run of the same test protocol."""
    groups: dict[Any, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if (test := row.test) and test.train_flops:
            groups[row.heading][method_text(row.run.algorithm, test.head)].append(
                (test.train_flops / 1e12, 100 * test.accuracy, 100 * test.ci95)
            )
    charts = []
    for heading, lines in groups.items():
        if sum(map(len, lines.values())) > 1:
            shown = dict(list(lines.items())[: len(HUES)])
            drawn = [sorted(points) for points in shown.values()]
            caption = f"Accuracy by cost of training in TFLOP: {heading}"
            charts.append(Chart(caption, [*shown], svg(draw(drawn, "TFLOP", joined=False))))
    return charts


def lines_of(row: Row, test: Result, varied: list[str]) -> Iterator[tuple[str, str]]:
    """Yield name and identity of a test's lines: one of all tests of a run, one of runs trained on their test task."""
    config = row.run.config
    settings = {name: shown(value) for name, value in flat(to_dict(config)) if name != "seed"} | test.changes
    of_task = TASK | {f"algo.{x}" for x in ("way", "shot") if settings.get(f"algo.{x}") == settings[f"train_{x}"]}
    without_task = {name: value for name, value in settings.items() if name not in of_task}
    own = [f"{name}={row.settings[name]}" for name in varied if name in without_task]
    name = ", ".join([row.run.algorithm, *own])
    yield f"{name}, trained {config.train_way}-way {config.train_shot}-shot", json.dumps(settings)
    if (test.way, test.shot) == (config.way, config.shot):
        yield f"{name}, trained for each task", json.dumps(without_task)


def point(x: float, tests: list[Result]) -> Point:
    """Return the mean of the tests with an interval over the tests; for a single test, its interval over episodes."""
    if len(tests) == 1:
        return x, 100 * tests[0].accuracy, 100 * tests[0].ci95
    accuracy = 100 * torch.tensor([test.accuracy for test in tests], dtype=torch.float64)
    return x, float(accuracy.mean()), t_interval(accuracy)


@context(STYLE)
def draw(lines: Sequence[Line], x_label: str, joined: bool = True) -> Figure:
    """Draw lines, or points if not `joined`, with their intervals."""
    figure = Figure(figsize=(4.2, 2.5))
    axes = figure.add_axes((0.13, 0.2, 0.84, 0.75))
    for line, hue in zip(lines, HUES, strict=False):
        x, y, half = numpy.array(line).reshape(-1, 3).T
        y = y.clip(0, 100)
        axes.plot(x, y, color=hue, marker="o" if len(line) <= 30 or not joined else None, ls="-" if joined else "")
        if len(line) <= 30:
            axes.errorbar(x, y, numpy.minimum(half, [y, 100 - y]), fmt="none", ecolor=hue, elinewidth=1)
    axes.set_xlabel(x_label)
    ticks = sorted({point[0] for line in lines for point in line})
    wide = not joined and ticks[-1] > 10 * ticks[0] > 0
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")
    elif not joined:
        axes.set_xlim(0, 1.1 * ticks[-1])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.locator_params(axis="y" if wide else "both", nbins=5)
    if joined and 1 < len(ticks) < 6:
        axes.set_xticks(ticks)
    return figure


@context(STYLE)
def svg(figure: Figure) -> Markup:
    """Return the figure as a transparent SVG element, the same for the same data, without ids or comments."""
    content = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(content, format="svg", transparent=True, metadata=metadata)
    text = content.getvalue()
    return Markup(re.sub(r"<!--.*?-->\s*| id=\"\w+_\d+\"", "", text[text.index("<svg") :], flags=re.DOTALL))


def sample_episodes(runs: list[RunRecord]) -> list[tuple[str, str]]:
    """Return the name of a run and its picture, PNG in base64, for the first EPISODES runs that have one."""
    pictures = ((run.name, picture) for run in runs if (picture := sample_episode(run.folder)))
    return [(name, b64encode(picture).decode()) for name, picture in islice(pictures, EPISODES)]


def sample_episode(folder: Path) -> bytes | None:
    """Return the last picture of an episode in the run's TensorBoard files, as PNG; None if there is none."""
    files = [*folder.glob("*tfevents*")]  # those that TensorBoard reads
    try:
        if sum(map(size_of, files)) > limits.EVENTS:
            raise UserError(f"{folder}: the files of TensorBoard have more than {limits.EVENTS} bytes")
    except (OSError, UserError) as error:
        print(printable(f"metacv: {error}: without a picture"), file=sys.stderr)
        return None
    if not files:
        return None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Without the purge, TensorBoard prints nothing about a run that was resumed.
    events = EventAccumulator(str(folder), size_guidance={"images": 1, "scalars": 1}, purge_orphaned_data=False)
    try:
        events.Reload()
        picture: bytes = events.Images("val/episode")[-1].encoded_image_string
    except Exception:  # the file is damaged, or has no picture
        return None
    width, height = (int.from_bytes(picture[place : place + 4], "big") for place in (16, 20))
    small = len(picture) <= limits.PICTURE and 0 < width * height <= limits.IMAGE
    return picture if small and picture.startswith(b"\x89PNG") else None
