"""What a run writes down: metrics.jsonl and TensorBoard, under the same names (train/loss, val/accuracy, ...)."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from metacv.files import write_bytes_atomically

ELSEWHERE = {"data_dir", "device", "resume", "log_every", "projector"}  # settings that do not change what comes out


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their full names; of a class the name alone, without what does not change a run."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif name == "_target_":
            yield prefix.rstrip("."), str(value).rpartition(".")[2]
        elif prefix or name not in ELSEWHERE:
            yield f"{prefix}{name}", value


class Logger:
    """Appends to a run's folder; what an interrupted run wrote after `step`, or `validated`, is taken back."""

    def __init__(self, folder: Path, step: int, validated: int) -> None:
        path = folder / "metrics.jsonl"
        kept = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                content = json.loads(line)
                if content["step"] <= (step if "train/loss" in content else validated):
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the line that a kill cut short
        write_bytes_atomically(path, "".join(kept).encode())
        self.file = path.open("a")
        self.tensorboard = SummaryWriter(str(folder), purge_step=step + 1)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        self.tensorboard.close()

    def scalars(self, step: int, split: str, **values: float) -> None:
        named = {f"{split}/{name}": value for name, value in values.items()}
        self.file.write(json.dumps({"step": step} | {name: float(f"{v:.6g}") for name, v in named.items()}) + "\n")
        self.file.flush()
        for name, value in named.items():
            self.tensorboard.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """image: uint8 [3, H, W]"""
        self.tensorboard.add_image(name, image, step)
        self.tensorboard.flush()

    def hparams(self, config: dict[str, Any], step: int, **metrics: float) -> None:
        """A row of TensorBoard's table of runs: every setting, and how it ended."""
        values = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in flat(config)}
        for summary in hparams(values, metrics):
            self.tensorboard._get_file_writer().add_summary(summary)
        for name, metric in metrics.items():
            self.tensorboard.add_scalar(name, metric, step)

    def embedding(self, step: int, features: Tensor, names: list[str], images: Tensor) -> None:
        """features [B, D] of images [B, C, H, W], 0 to 1, by the names of their classes, for the projector."""
        self.tensorboard.add_embedding(features, names, images, step, tag="val/features")

    def sync(self) -> None:
        """Puts on disk what the checkpoint about to be written counts on."""
        self.file.flush()
        os.fsync(self.file.fileno())
