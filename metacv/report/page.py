"""A report as one HTML page with nothing outside it: no scripts, no network."""

import base64
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metacv import __version__
from metacv.compare import t_interval
from metacv.logger import flat

if TYPE_CHECKING:
    from metacv.report.gather import Row, RunFound

CURVES, EPISODES, POINTS = 10, 6, 150  # at most: runs with curves, runs with a sample episode, points a curve
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 400, 230, 56, 30, 8, 20  # so that text can be read on a phone
TASK = {"way", "shot", "train_way", "train_shot"}
Point = tuple[float, float, float]  # x, y and half an interval
# By what was tested, by line, by x and by checkpoint: a test
Groups = dict[tuple[object, ...], dict[tuple[str, str], dict[float, dict[str, dict[str, Any]]]]]

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --faint: #6b7280; --line: #d8dbe0; --best: #eaf6ee }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --ink: #e6e7e9; --faint: #9aa1ab; --line: #363a41; --best: #1c3326 } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1100px; padding: 16px }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
p { color: var(--faint); max-width: 70ch }
.wide { overflow-x: auto }
table { border-collapse: collapse; white-space: nowrap }
th, td { border-bottom: 1px solid var(--line); padding: 4px 12px 4px 0; text-align: left;
  font-variant-numeric: tabular-nums }
th { color: var(--faint); font-weight: 600 } tr.best { background: var(--best) }
.charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)) }
figure { margin: 0 } figcaption { color: var(--faint); font-size: .9em; overflow-wrap: anywhere }
svg { height: auto; width: 100% } svg text { fill: var(--faint); font-size: 13px }
svg .grid { stroke: var(--line) } svg .line { fill: none; stroke-width: 2 }
ul.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; padding: 0; font-size: .9em }
ul.legend span { border-radius: 2px; display: inline-block; height: .7em; margin-right: 6px; width: .7em }
img { background: #fff; height: auto; max-width: 100% }
"""
# Ten hues with a contrast of 3 or more on both grounds; after Tableau's.
HUES = ("#4e79a7", "#d9730d", "#e15759", "#2a9d8f", "#59a14f", "#a8860f", "#b07aa1", "#d4738a", "#9c755f", "#8a8f98")


def page(rows: "list[Row]", cells: list[dict[str, str]], notes: list[str]) -> str:
    """`rows` are in the order of the table: those of a task together, the best first."""
    best_first = sorted(rows, key=lambda row: -row.accuracy)
    runs = list({id(row.run): row.run for row in best_first}.values())
    parts = [
        "<h1>metacv report</h1>",
        f"<p>{len(runs)} runs. Accuracies in %, with half of their 95 % interval over episodes; numbers of different "
        "tasks or protocols do not compare.</p>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        f'<div class="wide">{table(rows, cells)}</div>',
        curves(runs[:CURVES], len(runs)),
        by_task(best_first),
        episodes(runs),
        f"<p>metacv {__version__}</p>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>metacv report</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(part for part in parts if part) + "\n</body></html>\n"
    )


def table(rows: "list[Row]", cells: list[dict[str, str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in cells[0])
    body = ""
    for row, own in zip(rows, cells, strict=True):
        best = ' class="best"' if row.choice == "chosen" else ""
        body += f"<tr{best}>" + "".join(f"<td>{escape(value)}</td>" for value in own.values()) + "</tr>\n"
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def curves(runs: "list[RunFound]", of: int) -> str:
    charts = []
    for title, tag in (("accuracy in validation", "val/accuracy"), ("accuracy in training", "train/accuracy")):
        lines = []
        for run in runs:
            found = [
                (float(line["step"]), 100 * line[tag], 100 * line.get("val/ci95", 0.0))
                for line in run.metrics
                if tag in line
            ]
            every = -(-len(found) // POINTS) or 1
            lines.append([*found[:-1:every], *found[-1:]])
        if any(lines):
            charts.append(figure(chart(lines), f"{title}, by steps"))
    if not charts:
        return ""
    shown = "" if len(runs) == of else f"<p>The first {len(runs)} of {of} runs.</p>"
    names = legend([run.name for run in runs])
    return f'<h2>Curves</h2>{shown}{names}<div class="charts">{"".join(charts)}</div>'


def legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<li><span style="background:{HUES[i % len(HUES)]}"></span>{escape(name)}</li>' for i, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def by_task(rows: "list[Row]") -> str:
    """Accuracy against shot at each way, and against way at each shot, of what was tested in just the same way."""
    charts = []
    for along, fixed in (("shot", "way"), ("way", "shot")):
        groups: Groups = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
        for row in rows:
            if test := row.test:
                same = (test[fixed], test["dataset"], test["split"], test["norm"], test["rotation"], test["query"],
                        test["episodes"], test.get("seed"), str(row.run.config["dataset"]))  # fmt: skip
                for line in lines_of(row, test):
                    groups[same][line][float(test[along])][row.run.digest] = test
        for (value, dataset, split, norm, rotation, *_), found in groups.items():
            lines = [(name, points) for (name, _), points in found.items() if len(points) > 1]
            if not lines:
                continue
            shown = lines[: len(HUES)]
            drawn = [[point(x, list(tests.values())) for x, tests in sorted(points.items())] for _, points in shown]
            names = [f"{name}: {counted([len(tests) for tests in points.values()])}" for name, points in shown]
            said = f"{value}-{fixed} accuracy by {along}, {dataset} {split}, {norm}, rotation {rotation}"
            said += f"; the first {len(shown)} of {len(lines)} lines" * (len(shown) < len(lines))
            charts.append(figure(legend(names) + chart(drawn), said))
    if not charts:
        return ""
    said = (
        "A point is the mean of the runs that differ in the seed alone, with its 95 % interval over these runs "
        "(Student's t); of one run, its accuracy with the interval over episodes. A line joins runs of one setting."
    )
    return f'<h2>Way and shot</h2><p>{said}</p><div class="charts">{"".join(charts)}</div>'


def lines_of(row: "Row", test: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and settings of the lines that a test belongs to: of how its run was trained, and of runs for each task."""
    config = row.run.config
    every = {name: str(value) for name, value in flat(config) if name != "seed"} | test["algo"]
    free = {name: value for name, value in every.items() if name.split(".")[-1] not in TASK}
    told = [f"{name}={row.settings[name]}" for name in row.varied if name in free and name != "algo"]
    name = ", ".join([row.run.algorithm, *told])
    way, shot = (config.get(f"train_{side}", config[side]) for side in ("way", "shot"))
    yield f"{name}, trained {way}-way {shot}-shot", json.dumps(every)
    if (test["way"], test["shot"]) == (config["way"], config["shot"]):
        yield f"{name}, trained for each", json.dumps(free)


def point(x: float, tests: list[dict[str, Any]]) -> Point:
    if len(tests) == 1:
        return x, 100 * tests[0]["accuracy"], 100 * tests[0]["ci95"]
    accuracy = 100 * torch.tensor([test["accuracy"] for test in tests], dtype=torch.float64)
    return x, float(accuracy.mean()), t_interval(accuracy)


def counted(runs: list[int]) -> str:
    few, many = min(runs), max(runs)
    return f"{few} run{'s' * (few > 1)}" if few == many else f"{few} to {many} runs"


def episodes(runs: "list[RunFound]") -> str:
    found = list(islice(((run, picture) for run in runs if (picture := sample_episode(run.folder))), EPISODES))
    figures = [
        figure(
            f'<img alt="an episode" src="data:image/png;base64,{base64.b64encode(picture).decode()}">',
            f"{run.name}: support set, and queries with the predicted class, green where it is right",
        )
        for run, picture in found
    ]
    return f'<h2>Episodes of validation</h2><div class="charts">{"".join(figures)}</div>' if figures else ""


def sample_episode(folder: Path) -> bytes | None:
    """The last picture that the run has sent to TensorBoard, a PNG file."""
    if not any(folder.glob("events.out.tfevents.*")):
        return None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 1, "scalars": 1})
    try:
        events.Reload()
        picture: bytes = events.Images("val/episode")[-1].encoded_image_string
    except Exception:  # damaged, or without a picture
        return None
    return picture if picture.startswith(b"\x89PNG") else None


def figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def chart(lines: Sequence[Sequence[Point]]) -> str:
    """Lines of (x, y in %, half an interval) as SVG."""
    points = [point for line in lines for point in line]
    x_ticks = sorted({x for x, _, _ in points})
    if not 1 < len(x_ticks) < 6:
        x_ticks = ticks(x_ticks[0], x_ticks[-1])
    y_ticks = ticks(max(0, min(y - e for _, y, e in points)), min(100, max(y + e for _, y, e in points)))
    (x0, x1), (y0, y1) = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])

    def across(x: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * (x - x0) / (x1 - x0):.1f}"

    def up(y: float) -> str:
        return f"{TOP + (HEIGHT - TOP - BOTTOM) * (y1 - y) / (y1 - y0):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(y)}" y2="{up(y)}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(y)}" dy="4" text-anchor="end">{y:g} %</text>')
    for x in x_ticks:
        parts.append(f'<text x="{across(x)}" y="{HEIGHT - 10}" text-anchor="middle">{x:g}</text>')
    for i, line in enumerate(lines):
        hue = HUES[i % len(HUES)]
        path = " ".join(f"{across(x)},{up(y)}" for x, y, _ in line)
        parts.append(f'<polyline class="line" stroke="{hue}" points="{path}"/>')
        if len(line) <= 30:
            for x, y, e in line:
                parts.append(f'<circle cx="{across(x)}" cy="{up(y)}" r="2.5" fill="{hue}"/>')
                low, high = up(max(0, y - e)), up(min(100, y + e))
                parts.append(f'<line stroke="{hue}" x1="{across(x)}" x2="{across(x)}" y1="{low}" y2="{high}"/>')
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    return [float(f"{step * n:.12g}") for n in range(first, math.ceil(high / step - 1e-9) + 1)]
