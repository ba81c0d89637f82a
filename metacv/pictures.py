"""Pictures of an evaluation: a confusion matrix, and an embedding of image features by t-SNE."""

import io
from collections.abc import Sequence

import numpy
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.style import context
from matplotlib.text import Text
from threadpoolctl import threadpool_limits

from metacv.confusion import Confusion, Predictions, class_names
from metacv.curves import STYLE
from metacv.drawing import font_for, legible
from metacv.results import Result, method_text
from metacv.text import columns, without_middle

PRINTED = {"savefig.dpi": 150, "text.parse_math": False, "font.size": 9}  # a $ in a class name is no formula
# Ten hues based on Tableau's, with a contrast of at least 3 on light and dark backgrounds.
HUES = ("#4e79a7", "#d9730d", "#e15759", "#2a9d8f", "#59a14f", "#a8860f", "#b07aa1", "#d4738a", "#9c755f", "#8a8f98")
MARKERS = "os^Dv"
MOST_CLASSES = 20  # of a confusion matrix
EMBEDDED, IMAGES_EACH, FEWEST = 10, 30, 20  # maximum of classes and of images per class; minimum of images
LETTER, LONGEST = 0.085, 30  # width of a letter in inches; maximum of letters in a name


def pictures(predictions: Predictions, result: Result, found: Confusion) -> dict[str, bytes]:
    """Draw confusion.png and, if images were embedded once, embedding.png; return the files by name."""
    tested = f"{result.dataset} {result.split}, {method_text(result.method, result.head)}, {result.shape}"
    files = {"confusion.png": png(confusion_matrix(found, tested))}
    if len(predictions.features) and (figure := embedding(predictions, tested)):
        files["embedding.png"] = png(figure)
    return files


@context([STYLE, PRINTED])
def confusion_matrix(found: Confusion, tested: str) -> Figure:
    """Draw the confusion matrix in %, of all classes or of those in the hardest pairs."""
    count = len(found.names)
    classes = list(range(count)) if count <= MOST_CLASSES else found.hardest_classes(MOST_CLASSES)
    shares = 100 * found.shares(classes)
    names = legible_names(found.names, classes)
    cell = 0.62 if len(classes) <= 8 else 0.36  # inches
    margin = 0.3 + LETTER * max(map(columns, names))
    side = cell * len(classes)
    lines = [tested, "Rows: class. Columns: predicted class.", "In % of the row's queries in tasks with both classes."]
    if len(classes) < count:
        lines.append(f"The {len(classes)} of {count:,} classes that are mixed up most; dots: never in one task.")
    width, height = max(margin + side + 0.3, 5.2), margin + side + 0.25 + 0.17 * len(lines)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=110)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for (i, j), share in numpy.ndenumerate(shares):
        if numpy.isnan(share):
            axes.text(j, i, "·", ha="center", va="center", color="#8a8f98")
        elif i == j or share >= 0.5:
            axes.text(j, i, f"{share:.0f}", ha="center", va="center", color="white" if share > 60 else "black", size=8)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labelcolor="black")
    in_their_letters([*axes.get_xticklabels(), *axes.get_yticklabels()])
    figure.text(0.1 / width, 1 - 0.1 / height, "\n".join(lines), va="top")
    return figure


@context([STYLE, PRINTED])
def embedding(predictions: Predictions, tested: str) -> Figure | None:
    """Draw features of some images of some classes by t-SNE; None if there are too few, or all are equal."""
    from sklearn.manifold import TSNE  # takes time

    sampler, rows = predictions.episodes.sampler, predictions.rows
    classes = sampler.classes_of(rows).where(rows < len(sampler.bank.images), -1)  # -1: rotated
    own = classes[classes >= 0].unique()
    own = own[torch.linspace(0, len(own) - 1, min(EMBEDDED, len(own))).long()]
    places = [(classes == c).nonzero()[:IMAGES_EACH, 0] for c in own]
    features = torch.cat([predictions.features[place].flatten(1).float().cpu() for place in places])
    if len(features) < FEWEST or features.shape[1] < 2 or not features.var(dim=0).any():
        return None
    with threadpool_limits(1):  # several threads would wait for each other at every small step
        given = {"init": "pca", "perplexity": min(30, len(features) / 4), "max_iter": 500, "random_state": 0}
        points = TSNE(**given).fit_transform(features.numpy())
    names = legible_names(class_names(sampler), own.tolist())
    figure = Figure(figsize=(4.6 + LETTER * max(map(columns, names)), 4.4))
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0.1 / width, 0.1 / height, 4 / width, 3.75 / height))
    ends = numpy.cumsum([0, *map(len, places)])
    for name, start, end, hue, marker in zip(names, ends, ends[1:], HUES, MARKERS * 2, strict=False):
        x, y = points[start:end].T
        axes.scatter(x, y, 14, [hue], marker=marker, linewidths=0, label=name)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(True)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.01), frameon=False, handletextpad=0.1)
    in_their_letters(legend.get_texts())
    of_all = f" of {sampler.classes}" if len(own) < sampler.classes else ""
    title = f"{tested}\nfeatures of {len(features)} images of {len(own)}{of_all} classes, by t-SNE"
    figure.text(0.1 / width, 1 - 0.08 / height, title, va="top")
    return figure


def legible_names(names: Sequence[str], classes: Sequence[int]) -> list[str]:
    """Shorten the names of `classes` for a picture: drop outer folders and the middle of long names. A name with
    letters that no font has becomes the number of its line in classes.csv."""
    ends = ["/".join(names[c].split("/")[-2:]) for c in classes]
    return [clipped(legible(name, f"class {c + 1}")) for c, name in zip(classes, ends, strict=True)]


def clipped(name: str) -> str:
    """Drop the middle of a name that takes more than LONGEST columns."""
    return without_middle(name, lambda text: columns(text) <= LONGEST, "…")


def in_their_letters(texts: Sequence[Text]) -> None:
    """Set a font for each text that has its letters."""
    for text in texts:
        size = text.get_fontsize()
        text.set_fontproperties(FontProperties(fname=font_for(text.get_text()), size=size))


@context([STYLE, PRINTED])
def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file, with the same bytes for the same data."""
    content = io.BytesIO()
    figure.savefig(content, format="png", bbox_inches="tight", pad_inches=0.1, metadata={"Software": None})
    return content.getvalue()
