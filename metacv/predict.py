"""From a few examples of each class, and a trained model, to the labels of other images."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from metacv import MetacvError, checkpoint, clean
from metacv.algorithms.base import Algorithm, Norm
from metacv.cli import setting
from metacv.config import PredictConfig
from metacv.data.bank import SPLITS, Dataset
from metacv.data.image_files import files_below, folders_in, holds_folders_alone, read_or_tell, tell_left_out
from metacv.data.sampler import TaskBatch
from metacv.drawing import LINE, RIGHT, WRONG, captioned_picture, legible
from metacv.evaluate import check_norm, with_changes
from metacv.files import csv_safe, write_bytes_atomically
from metacv.model import build_algorithm, build_dataset, check_settings, pick_device

SHOWN = 40  # lines of the table on the terminal
PICTURED = 200  # support images at most, and queries
QUERIES_AT_ONCE = 100


@dataclass(frozen=True)
class Support:
    """Labelled images [S, C, H, W] (uint8), class after class, `shots` of each of `classes`."""

    images: Tensor
    shots: tuple[int, ...]
    classes: tuple[str, ...]

    def task(self, queries: Tensor, device: torch.device) -> TaskBatch:
        """One task, with these uint8 images [B, C, H, W] as queries."""
        way = len(self.classes)
        labels = torch.arange(way).repeat_interleave(torch.tensor(self.shots))
        return TaskBatch(
            support_x=self.images.to(device).float().div(255).unsqueeze(0),
            support_y=labels.to(device).unsqueeze(0),
            query_x=queries.to(device).float().div(255).unsqueeze(0),
            query_y=torch.zeros(1, len(queries), dtype=torch.long, device=device),  # not known
            way=way,
            shots=None if len({*self.shots}) == 1 else self.shots,
        )


def predict(cfg: DictConfig, folder: Path) -> list[dict[str, Any]]:
    """Labels `cfg.query` and writes predictions.csv, .json and .png into `folder`."""
    check_settings(cfg, PredictConfig)
    if cfg.save:
        check_place_to_save(Path(cfg.save).expanduser())
    path, saved = _model(cfg)
    given: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    changes = {name: given[name] for name in ("norm", "algo", "dataset")}
    config = checkpoint.without_places(with_changes(saved["config"], changes, path))
    check_norm(config["norm"])
    device = pick_device(cfg.device)
    dataset = build_dataset(config, ".")
    support = _kept_support(saved, path) if cfg.adapted else read_support(Path(cfg.support).expanduser(), dataset)
    queries, images = read_queries(Path(cfg.query).expanduser(), dataset)
    for kind, found in (("support", support.images), ("query", images)):
        if list(found.shape[1:]) != saved["image_shape"]:
            raise MetacvError(f"{kind}: its images become {tuple(found.shape[1:])}, and {path} was trained on "
                              f"{tuple(saved['image_shape'])}")  # fmt: skip
    algorithm = build_algorithm(config, tuple(saved["image_shape"]))
    checkpoint.load_weights(algorithm, saved, path)
    algorithm.to(device)
    logits = label(algorithm, support, images, config["norm"], device)
    probabilities = algorithm.probabilities(logits).cpu()
    if not probabilities.isfinite().all():
        raise MetacvError(f"{path}: the probabilities are not finite; the weights are not, or adaptation diverges")

    predictions: list[dict[str, Any]] = [
        {"file": str(query), "label": support.classes[int(row.argmax())], "probability": float(row.max())}
        | {"probabilities": dict(zip(support.classes, row.tolist(), strict=True))}
        for query, row in zip(queries, probabilities, strict=True)
    ]
    _write(folder, predictions, support, path)
    truth = _folders_of(queries, Path(cfg.query).expanduser(), support.classes)
    write_bytes_atomically(folder / "predictions.png", _picture(images, predictions, support, truth))
    if cfg.save:
        keep = {"images": support.images, "shots": list(support.shots), "classes": list(support.classes)}
        content = {name: saved[name] for name in checkpoint.WEIGHTS} | {
            "config": checkpoint.without_folders(config),
            "support": keep,
        }
        checkpoint.save(Path(cfg.save).expanduser(), content)
    _show(folder, predictions, truth, cfg, config["norm"])
    return predictions


def label(algorithm: Algorithm, support: Support, images: Tensor, norm: Norm, device: torch.device) -> Tensor:
    """Logits [B, N] of query images [B, C, H, W] (uint8); transductive ones are of one task, as in evaluation."""
    parts = images.split(QUERIES_AT_ONCE if norm == "inductive" else len(images))
    try:
        return torch.cat([algorithm.predict(support.task(part, device), norm)[0] for part in parts])
    except (RuntimeError, ValueError) as error:  # no memory for so many, or a single one has no statistics
        if norm == "inductive":
            raise
        said = str(error).splitlines()[0]
        raise MetacvError(f"norm=transductive with {len(images)} query images: {said}; try norm=inductive") from error


def _model(cfg: DictConfig) -> tuple[Path, dict[str, Any]]:
    if (cfg.adapted is None) == (cfg.checkpoint is None and cfg.support is None):
        raise MetacvError("give checkpoint=RUN and support=FOLDER, or adapted=FILE alone")
    if cfg.adapted is None and (cfg.checkpoint is None or cfg.support is None):
        raise MetacvError(f"{'checkpoint' if cfg.checkpoint is None else 'support'}=... is missing")
    path = checkpoint.find(str(cfg.adapted or cfg.checkpoint), "best.pt")
    return path, checkpoint.load(path)


def _kept_support(saved: dict[str, Any], path: Path) -> Support:
    try:
        kept = saved["support"]
        support = Support(kept["images"], tuple(map(int, kept["shots"])), tuple(map(str, kept["classes"])))
        images, shots, classes = support.images, support.shots, support.classes
        plain = images.dtype == torch.uint8 and images.layout == torch.strided and images.is_contiguous()
        named = len({*classes}) == len(classes) == len(shots) >= 2 and all(map(str.isprintable, classes))
        if not plain or not named or min(shots) < 1 or sum(shots) != len(images):
            raise ValueError
    except KeyError:
        raise MetacvError(f"adapted={path}: holds no support set; save=FILE beside support=FOLDER makes one") from None
    except (TypeError, ValueError, AttributeError):
        raise MetacvError(f"adapted={path} is damaged") from None
    return support


def read_support(folder: Path, dataset: Dataset) -> Support:
    if not folder.is_dir():
        raise MetacvError(f"support={folder}: there is no such folder")
    folders = folders_in(folder)
    if len(folders) < 2:
        raise MetacvError(f"support={folder} holds {len(folders)} folders: it wants one for each class, and at least 2")
    names = [clean(path.name) for path in folders]
    if {*names} <= {*SPLITS} and all(map(holds_folders_alone, folders)):
        raise MetacvError(f"support={folder} holds {' and '.join(names)}: give one of them")
    if len({*names}) < len(names):
        raise MetacvError(f"support={folder}: two classes whose names cannot be printed look the same; rename one")
    images, shots = [], []
    for name, path in zip(names, folders, strict=True):
        _, own = _read(files_below(path), dataset, str(path))
        if not own:
            raise MetacvError(f"support={folder}: the class {name} has no readable image")
        images += own
        shots.append(len(own))
    return Support(torch.stack(images), tuple(shots), tuple(names))


def read_queries(place: Path, dataset: Dataset) -> tuple[list[Path], Tensor]:
    if not place.exists():
        raise MetacvError(f"query={place}: there is no such file or folder")
    files, images = _read(files_below(place) if place.is_dir() else [place], dataset, str(place))
    if not files:
        raise MetacvError(f"query={place}: no readable image")
    return files, torch.stack(images)


def _read(files: list[Path], dataset: Dataset, label: str) -> tuple[list[Path], list[Tensor]]:
    kept, images = read_or_tell(label, files, dataset.read)
    tell_left_out(label, len(kept), len(files))
    return kept, images


def _folders_of(queries: list[Path], place: Path, classes: tuple[str, ...]) -> list[str] | None:
    """The class of each query by the folder of `place` that it lies in, if all of them lie so."""
    if not place.is_dir():
        return None
    inside = [query.relative_to(place).parts for query in queries]
    found = [clean(parts[0]) if len(parts) > 1 else "" for parts in inside]
    return found if {*found} <= {*classes} else None


def _picture(images: Tensor, found: list[dict[str, Any]], support: Support, truth: list[str] | None) -> bytes:
    """As PNG: examples of each class, and the queries, in green or red where their class is known."""
    captions = {name: legible(name, f"class {i}") for i, name in enumerate(support.classes, start=1)}
    each = max(1, min(8, PICTURED // len(support.classes)))
    rows = [(sum(support.shots[:c]) + i, name) for c, name in enumerate(support.classes)
            for i in range(min(each, support.shots[c]))][:PICTURED]  # fmt: skip
    examples = [(support.images[row], captions[name], LINE) for row, name in rows]
    colours = [RIGHT if own == one["label"] else WRONG for own, one in zip(truth, found, strict=True)] if truth else []
    labelled = [
        (image, f"{captions[one['label']]} {one['probability']:.0%}", colour)
        for image, one, colour in zip(images[:PICTURED], found, colours or [LINE] * len(found), strict=False)
    ]
    picture = captioned_picture(
        [
            (f"support: {len(examples)} of {len(support.images)} images", examples),
            (f"query: {len(labelled)} of {len(found)} images", labelled),
        ]
    )
    content = io.BytesIO()
    picture.save(content, "png")
    return content.getvalue()


def check_place_to_save(path: Path) -> None:
    """Refuses to write over anything but an earlier kept model."""
    try:
        if not path.exists() or "support" in checkpoint.load(path):
            return
    except MetacvError:
        pass
    raise MetacvError(f"save={path}: is there already, and is not a model that `save` kept")


def _write(folder: Path, found: list[dict[str, Any]], support: Support, path: Path) -> None:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["file", "label", "probability", *(f"P({name})" for name in support.classes)])
    for one in found:
        names = map(csv_safe, (one["file"], one["label"]))
        writer.writerow([*names, one["probability"], *one["probabilities"].values()])
    content = {
        "checkpoint": str(path),
        "checkpoint_sha256": checkpoint.file_hash(path),
        "support": dict(zip(support.classes, support.shots, strict=True)),
        "predictions": found,
    }
    write_bytes_atomically(folder / "predictions.csv", table.getvalue().encode(errors="surrogateescape"))
    write_bytes_atomically(folder / "predictions.json", (json.dumps(content, indent=1) + "\n").encode())


def _show(folder: Path, found: list[dict[str, Any]], truth: list[str] | None, cfg: DictConfig, norm: Norm) -> None:
    base = Path(cfg.query).expanduser()
    names = [clean(str(Path(one["file"]).relative_to(base)) if base.is_dir() else one["file"]) for one in found]
    wide, label = (max(map(len, words)) for words in (names[:SHOWN], [one["label"] for one in found]))
    for name, one in zip(names[:SHOWN], found, strict=False):
        print(f"{name:<{wide}}  {one['label']:<{label}}  {100 * one['probability']:5.1f} %")
    if len(found) > SHOWN:
        print(f"... and {len(found) - SHOWN} more")
    if truth:
        right = sum(one["label"] == own for one, own in zip(found, truth, strict=True))
        print(f"accuracy {100 * right / len(found):.2f} %: {right} of {len(found)}, by the folders that they lie in")
    if norm == "transductive":
        print("norm=transductive: each label depends on the other query images; norm=inductive labels each for itself")
    for kind in ("csv", "json", "png"):
        print(f"{'written:' if kind == 'csv' else '':<8} {folder / f'predictions.{kind}'}")
    if cfg.save:
        print(f"kept:    {cfg.save}; go on with: metacv predict {setting('adapted', Path(cfg.save))} query=...")
