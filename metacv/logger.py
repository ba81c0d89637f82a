"""Logs of a run: train.log, results.png, metrics.jsonl, and TensorBoard events with the same names."""

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

REDRAWN = 10  # minimum of seconds between two drawings of the curves


@contextlib.contextmanager
def errors_of_threads_once() -> Iterator[None]:
    """Print no traceback for OSError in a thread: TensorBoard's thread raises its error in the main thread too."""
    before = threading.excepthook
    threading.excepthook = lambda failed: None if isinstance(failed.exc_value, OSError) else before(failed)
    try:
        yield
    finally:
        threading.excepthook = before


class Logger:
    """Append to a run's logs, after removing training lines after `step` and validation lines after `validated`.

    Every method raises UserError if it cannot write.
    """

    def __init__(self, folder: Path, step: int, validated: int) -> None:
        self.text = folder / "train.log"
        self.metrics = path = folder / "metrics.jsonl"
        self.results = folder / "results.png"
        self.events = folder / "events.out.tfevents.*"
        kept: list[tuple[str, dict[str, float]]] = []  # lines and their values
        if path.exists():
            check_file(path, limits.EVENTS)
        for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
            # Drop lines that were truncated by a kill, or that hold more than numbers.
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
            if number > validated:  # TensorBoard purges all points after the last validation, so write these again
                self.points(number, content)

    @cached_property
    def tensorboard(self) -> Any:
        """TensorBoard's writer, created at first use."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        return SummaryWriter(str(self.events.parent), purge_step=self.validated + 1)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        with contextlib.suppress(*([UserError] if kind else [])):  # report the first error only
            with written_or_refused(self.metrics):
                self.file.close()
            with written_or_refused(self.events):
                if "tensorboard" in vars(self):
                    self.tensorboard.close()

    def line(self, text: str, shown: bool = True) -> None:
        """Write a line with the time to train.log, and print it if `shown`."""
        with written_or_refused(self.text), self.text.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {printable(text)}\n")
        if shown:
            say(text if alone() else f"{self.text.parent.name}: {text}")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log values by tag, such as train/loss, to metrics.jsonl and TensorBoard."""
        line = json.dumps({"step": step} | {name: float(f"{v:.6g}") for name, v in values.items()}) + "\n"
        with written_or_refused(self.metrics):
            self.file.write(line)
            self.file.flush()
        self.lines.append({"step": step, **values})
        self.points(step, values)

    def curves(self, title: str, often: bool = False) -> None:
        """Draw the curves to results.png, unless that was less than REDRAWN seconds ago and not `often`."""
        if often or time.monotonic() - self.drawn >= REDRAWN:
            from metacv.curves import results_picture  # imports matplotlib, which takes half a second

            with written_or_refused(self.results):
                write_bytes_atomically(self.results, results_picture(self.lines, title))
            self.drawn = time.monotonic()

    def points(self, step: int, values: dict[str, float]) -> None:
        """Log values to TensorBoard only."""
        with written_or_refused(self.events):
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """Log an image, uint8 [3, H, W], to TensorBoard."""
        with written_or_refused(self.events):
            self.tensorboard.add_image(name, image, step)

    def hparams(self, config: dict[str, Any]) -> None:
        """Add the run to TensorBoard's table of runs: every setting with a value, and the last values of the curves.

        TensorBoard sorts a column only if all values are numbers or all are texts, so lists have separate columns.
        """
        from torch.utils.tensorboard.summary import hparams

        given = {f"{name}[]" if isinstance(value, list) else name: value for name, value in flat(config)}
        values = {
            name: value if isinstance(value, bool | int | float) else printable(str(value))
            for name, value in given.items()
            if value is not None
        }
        _, *session = hparams(values, {})  # drop the columns: TensorBoard takes those of the first run for all
        with written_or_refused(self.events):
            for summary in session:
                self.tensorboard._get_file_writer().add_summary(summary)

    def features(self, step: int, name: str, features: Tensor, labels: list[str], images: Tensor) -> None:
        """Log features [M, D] of labelled images [M, C, H, W], from 0 to 1, for TensorBoard's projector."""
        with written_or_refused(self.events.with_name("projector_config.pbtxt")):
            self.tensorboard.add_embedding(features, list(map(printable, labels)), images, step, name)

    def sync(self) -> None:
        """Flush metrics and events to disk; call it before saving a checkpoint."""
        with written_or_refused(self.metrics):
            self.file.flush()
            os.fsync(self.file.fileno())
        with written_or_refused(self.events):
            self.tensorboard.flush()
