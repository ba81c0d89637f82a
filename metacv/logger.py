"""A run's logs: train.log and results.png to look at, metrics.jsonl and TensorBoard's events with the same names."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from metacv import limits
from metacv.config import flat
from metacv.errors import UserError
from metacv.files import check_file, write_bytes_atomically, written_or_refused
from metacv.terminal import alone, say
from metacv.text import printable

REDRAWN = 10  # seconds at least between two drawings of the curves


@contextlib.contextmanager
def errors_of_threads_once() -> Iterator[None]:
    """Print no traceback where a thread cannot write a file: TensorBoard's thread raises its error in ours too."""
    before = threading.excepthook
    threading.excepthook = lambda failed: None if isinstance(failed.exc_value, OSError) else before(failed)
    try:
        yield
    finally:
        threading.excepthook = before


class Logger:
    """Appends to a run's logs; removes what an interrupted run wrote after `step`, or after step `validated`.

    Every method raises UserError if it cannot write.
    """

    def __init__(self, folder: Path, step: int, validated: int) -> None:
        self.text = folder / "train.log"
        self.metrics = path = folder / "metrics.jsonl"
        self.results = folder / "results.png"
        self.events = folder / "events.out.tfevents.*"
        kept: list[tuple[str, dict[str, float]]] = []  # lines, and their values
        if path.exists():
            check_file(path, limits.EVENTS)
        for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
            # Without a line that a kill cut short, or that has more than numbers.
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
                content = json.loads(line)
                of_training = any(name.startswith("train/") for name in content)
                if 0 <= content["step"] <= (step if of_training else validated):
                    kept.append((line + "\n", {printable(name): float(value) for name, value in content.items()}))
        with written_or_refused(path):
            write_bytes_atomically(path, "".join(line for line, _ in kept).encode())
            self.file = path.open("a")
        self.validated = validated
        self.lines = [dict(content) for _, content in kept]
        self.drawn = -float(REDRAWN)
        for _, content in kept:
            number = int(content.pop("step"))
            if number > validated:  # training after the last validation, purged with the rest
                self.points(number, content)

    @cached_property
    def tensorboard(self) -> Any:
        """TensorBoard's writer, made for the first point."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        return SummaryWriter(str(self.events.parent), purge_step=self.validated + 1)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        with contextlib.suppress(*([UserError] if kind else [])):  # the first error is the one to report
            with written_or_refused(self.metrics):
                self.file.close()
            with written_or_refused(self.events):
                if "tensorboard" in vars(self):
                    self.tensorboard.close()

    def line(self, text: str, shown: bool = True) -> None:
        """A line of train.log, with the time, and of the output."""
        with written_or_refused(self.text), self.text.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {printable(text)}\n")
        if shown:
            say(text if alone() else f"{self.text.parent.name}: {text}")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line and one point of each curve, of values by their tags, such as train/loss."""
        line = json.dumps({"step": step} | {name: float(f"{v:.6g}") for name, v in values.items()}) + "\n"
        with written_or_refused(self.metrics):
            self.file.write(line)
            self.file.flush()
        self.lines.append({"step": step, **values})
        self.points(step, values)

    def curves(self, title: str, often: bool = False) -> None:
        """Draw the curves so far into results.png, unless this was done less than REDRAWN seconds ago."""
        if often or time.monotonic() - self.drawn >= REDRAWN:
            from metacv.curves import results_picture  # imports matplotlib, which takes half a second

            with written_or_refused(self.results):
                write_bytes_atomically(self.results, results_picture(self.lines, title))
            self.drawn = time.monotonic()

    def points(self, step: int, values: dict[str, float]) -> None:
        """For TensorBoard alone."""
        with written_or_refused(self.events):
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """image: uint8 [3, H, W]"""
        with written_or_refused(self.events):
            self.tensorboard.add_image(name, image, step)

    def hparams(self, config: dict[str, Any]) -> None:
        """A row in TensorBoard's table of runs: every setting that has a value, and the last values of the curves.

        TensorBoard sorts a column only if it has numbers alone or texts alone, so lists have columns of their own.
        """
        from torch.utils.tensorboard.summary import hparams

        given = {f"{name}[]" if isinstance(value, list) else name: value for name, value in flat(config)}
        values = {
            name: value if isinstance(value, bool | int | float) else printable(str(value))
            for name, value in given.items()
            if value is not None
        }
        _, *session = hparams(values, {})  # without the list of columns, which would be that of the first run for all
        with written_or_refused(self.events):
            for summary in session:
                self.tensorboard._get_file_writer().add_summary(summary)

    def features(self, step: int, name: str, features: Tensor, labels: list[str], images: Tensor) -> None:
        """For the projector: features [M, D] of labelled images [M, C, H, W] from 0 to 1."""
        with written_or_refused(self.events.with_name("projector_config.pbtxt")):
            self.tensorboard.add_embedding(features, list(map(printable, labels)), images, step, name)

    def sync(self) -> None:
        """Write to disk everything that the next checkpoint relies on."""
        with written_or_refused(self.metrics):
            self.file.flush()
            os.fsync(self.file.fileno())
        with written_or_refused(self.events):
            self.tensorboard.flush()
