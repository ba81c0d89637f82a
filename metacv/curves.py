"""Draw the curves of a run."""

import io
from collections.abc import Sequence

import numpy
from matplotlib.figure import Figure
from matplotlib.style import context

STYLE = "metacv.report.figures"  # the file figures.mplstyle
POINTS = 150  # maximum of points of a curve
BLUE, ORANGE = "#4e79a7", "#d9730d"


@context(STYLE)
def results_picture(lines: Sequence[dict[str, float]], title: str) -> bytes:
    """Draw loss, training and validation accuracy with its interval, and learning rate; return a PNG.

    `lines` are those of metrics.jsonl, with accuracies from 0 to 1.
    """
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    figure.suptitle(title)
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy in %"), (rate, "learning rate")):
        axes.set_title(name)
        axes.set_xlabel("step")
    for axes, tag, scale in ((loss, "train/loss", 1), (accuracy, "train/accuracy", 100), (rate, "train/lr", 1)):
        steps, values = curve(lines, tag)
        if len(steps):
            axes.plot(steps, scale * values, color=BLUE, label="training")
    rate.set_ylim(bottom=0)
    measured = [line for line in lines if {"val/accuracy", "val/ci95"} <= line.keys()]
    steps, values = curve(measured, "val/accuracy")
    if len(steps):
        _, half = curve(measured, "val/ci95")
        best = max(measured, key=lambda line: line["val/accuracy"])["step"]
        accuracy.errorbar(steps, 100 * values, 100 * half.clip(0), color=ORANGE, marker="o", label="validation")
        accuracy.axvline(best, color=ORANGE, ls=":", label=f"best, step {best:.0f}")
        figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def curve(lines: Sequence[dict[str, float]], tag: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return steps and values of a curve, averaged over groups of points so that at most POINTS remain."""
    points = numpy.array([(line["step"], line[tag]) for line in lines if tag in line]).reshape(-1, 2)
    group = -(-len(points) // POINTS) or 1
    starts = numpy.arange(0, len(points), group)
    means = numpy.add.reduceat(points, starts) / numpy.diff([*starts, len(points)])[:, None] if len(points) else points
    return means[:, 0], means[:, 1]
