"""The log of a run: metrics.jsonl and TensorBoard, under the same names (train/loss, val/accuracy, ...)."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from metacv.config import flat
from metacv.files import write_bytes_atomically


class Logger:
    """Appends to a run's folder; removes what an interrupted run wrote after `step`, or after step `validated`."""

    def __init__(self, folder: Path, step: int, validated: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        path = folder / "metrics.jsonl"
        kept = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut short
                content = json.loads(line)
                of_training = any(name.startswith("train/") for name in content)
                if content["step"] <= (step if of_training else validated):
                    kept.append(line + "\n")
        write_bytes_atomically(path, "".join(kept).encode())
        self.file = path.open("a")
        self.tensorboard = SummaryWriter(str(folder), purge_step=step + 1)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        self.tensorboard.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line and one point of each curve, of values by their tags, such as train/loss."""
        self.file.write(json.dumps({"step": step} | {name: float(f"{v:.6g}") for name, v in values.items()}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """image: uint8 [3, H, W]"""
        self.tensorboard.add_image(name, image, step)
        self.tensorboard.flush()

    def hparams(self, config: dict[str, Any], step: int, name: str, metric: float) -> None:
        """A row in TensorBoard's table of runs: every setting, and the final value of a metric."""
        from torch.utils.tensorboard.summary import hparams

        values = {own: value if isinstance(value, bool | int | float) else str(value) for own, value in flat(config)}
        for summary in hparams(values, {name: metric}):
            self.tensorboard._get_file_writer().add_summary(summary)
        self.tensorboard.add_scalar(name, metric, step)

    def sync(self) -> None:
        """Write to disk everything that the next checkpoint relies on."""
        self.file.flush()
        os.fsync(self.file.fileno())
