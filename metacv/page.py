"""A report as one HTML page with nothing outside it: no scripts, no network."""

import base64
import math
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from metacv import __version__

if TYPE_CHECKING:
    from metacv.report import Row, RunFound

CURVES, EPISODES, POINTS = 10, 6, 150  # at most: runs with curves, runs with a sample episode, points a curve
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 400, 230, 56, 30, 8, 20  # so that text can be read on a phone
Point = tuple[float, float, float]  # x, y and half an interval

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
# Ten hues that differ in both schemes; after Tableau's.
HUES = ("#4e79a7", "#f28e2b", "#e15759", "#2a9d8f", "#59a14f", "#c9a227", "#b07aa1", "#d4738a", "#9c755f", "#8a8f98")


def page(rows: "list[Row]", cells: list[dict[str, str]]) -> str:
    """`rows` are in the order of the table: those of a task together, the best first."""
    best_first = sorted(rows, key=lambda row: -row.accuracy)
    runs = list({id(row.run): row.run for row in best_first}.values())
    parts = [
        "<h1>metacv report</h1>",
        f"<p>{len(runs)} runs. Accuracies in %, with half of their 95 % interval over episodes; numbers of different "
        "tasks or protocols do not compare; the best of each is marked.</p>",
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
    body, before = "", None
    for row, own in zip(rows, cells, strict=True):
        best = ' class="best"' if row.task != before else ""
        body += f"<tr{best}>" + "".join(f"<td>{escape(value)}</td>" for value in own.values()) + "</tr>\n"
        before = row.task
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
    legend = "".join(
        f'<li><span style="background:{HUES[i % len(HUES)]}"></span>{escape(run.name)}</li>'
        for i, run in enumerate(runs)
    )
    return f'<h2>Curves</h2>{shown}<ul class="legend">{legend}</ul><div class="charts">{"".join(charts)}</div>'


def by_task(rows: "list[Row]") -> str:
    """Accuracy against shot at each way, and against way at each shot, of what was tested in just the same way."""
    charts = []
    for along, fixed in (("shot", "way"), ("way", "shot")):
        groups: dict[tuple[object, ...], dict[str, dict[float, Point]]] = defaultdict(lambda: defaultdict(dict))
        for row in rows:  # the best first: of several runs of an algorithm it is the one that is shown
            if test := row.test:
                same = (test[fixed], test["dataset"], test["split"], test["norm"], test["rotation"],
                        test["query"], test["episodes"], str(row.run.config["dataset"]))  # fmt: skip
                point = (float(test[along]), 100 * test["accuracy"], 100 * test["ci95"])
                groups[same][row.run.algorithm].setdefault(float(test[along]), point)
        for (value, dataset, split, norm, rotation, *_), lines in groups.items():
            if max(len(points) for points in lines.values()) < 2:
                continue
            drawn = [sorted(points.values()) for points in lines.values()]
            names = ", ".join(
                f'<span style="color:{HUES[i % len(HUES)]}">{escape(name)}</span>' for i, name in enumerate(lines)
            )
            said = escape(f"{value}-{fixed} accuracy by {along}, {dataset} {split}, {norm}, rotation {rotation}: ")
            charts.append(figure(chart(drawn), said + names, safe=True))
    return f'<h2>Way and shot</h2><div class="charts">{"".join(charts)}</div>' if charts else ""


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


def figure(content: str, caption: str, safe: bool = False) -> str:
    return f"<figure>{content}<figcaption>{caption if safe else escape(caption)}</figcaption></figure>"


def chart(lines: Sequence[Sequence[Point]]) -> str:
    """Lines of (x, y in %, half an interval) as SVG."""
    points = [point for line in lines for point in line]
    x_ticks = sorted({x for x, _, _ in points})
    if not 1 < len(x_ticks) < 6:
        x_ticks = ticks(x_ticks[0], x_ticks[-1])
    y_ticks = ticks(min(y - e for _, y, e in points), max(y + e for _, y, e in points))
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
                parts.append(
                    f'<line stroke="{hue}" x1="{across(x)}" x2="{across(x)}" y1="{up(y - e)}" y2="{up(y + e)}"/>'
                )
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
