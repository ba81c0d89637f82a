"""`metacv predict`: label images by a few examples of each class."""

import io
import json
from dataclasses import replace
from itertools import chain
from os.path import relpath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metacv.config import PredictConfig, class_name
from metacv.data.bank import SPLITS, Dataset, pictures, report_copies
from metacv.data.image_files import files_below, folders_in, has_only_folders, read_readable, report_skipped
from metacv.drawing import LINE, RIGHT, WRONG, captioned_picture, legible
from metacv.errors import UserError
from metacv.files import user_path, write_bytes_atomically
from metacv.look import unlike
from metacv.model import Checkpoint
from metacv.predictor import Predictor, Support, check_place_to_save, kept_support
from metacv.terminal import warn
from metacv.text import aligned, csv_bytes, printable, setting

LINES = 40  # maximum of lines of the table on the terminal
PICTURED = 200  # maximum of support images, and of queries, in the picture
ROWS = 25  # maximum of classes with a row each in the picture
Predictions = list[dict[str, Any]]  # file, label, probability, and probabilities by class


def predict(cfg: PredictConfig, folder: Path) -> Predictions:
    """Label the images at `cfg.query`; write predictions.csv, .json and .png into `folder`."""
    save = user_path(cfg.save) if cfg.save else None
    if save:
        check_place_to_save(save)
    instead = "backbone=NAME is a pre-trained network instead of a run"
    network = cfg.checkpoint is not None or bool(cfg.backbone)
    if (cfg.adapted is None) == (not network and cfg.support is None):
        raise UserError(f"give either checkpoint=RUN and support=FOLDER, or adapted=FILE; {instead}")
    if cfg.adapted is None and (not network or cfg.support is None):
        raise UserError(f"{'support' if network else 'checkpoint'}=... is missing")
    predictor = Predictor.load(cfg.adapted or cfg.checkpoint, cfg)
    checkpoint, dataset = predictor.checkpoint, predictor.dataset
    support = kept_support(checkpoint) if cfg.adapted else read_support(user_path(str(cfg.support)), dataset)
    place = user_path(cfg.query)
    if not place.exists():
        raise UserError(f"query={place}: there is no such file or folder")
    files = files_below(place) if place.is_dir() else [place]
    queries, images = read_images(files, dataset, str(place), f"query={place}: no readable image")
    for kind, own in (("support", support.images), ("query", images)):
        predictor.check_shape(kind, own)
    report_copies("support", support.images.split(support.shots), {})
    known = {*pictures(support.images)}
    if copies := sum(picture in known for picture in pictures(images)):
        text = "copies of support images; their labels say nothing about the model"
        warn(f"query: {copies} of {len(images)} images are {text}")
    kinds = {"the query images": images, "the support images": support.images}
    if odd := next(filter(None, (unlike(kind, own, checkpoint, dataset) for kind, own in kinds.items())), None):
        warn(odd)
    probabilities = predictor.probabilities(support, images)
    names = tuple(map(str, support.classes))
    predictions: Predictions = [
        {"file": printable(str(query)), "label": names[int(row.argmax())], "probability": float(row.max())}
        | {"probabilities": dict(zip(names, row.tolist(), strict=True))}
        for query, row in zip(queries, probabilities, strict=True)
    ]
    truth = labels_of_folders(queries, place, names)
    if save:  # first, so that a failure leaves no folder behind
        predictor.save(save, support)
    support = replace(support, classes=names)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, predictions, support, checkpoint, truth)
    write_bytes_atomically(folder / "predictions.png", picture(images, predictions, support, truth))
    show(folder, predictions, truth, cfg, predictor)
    return predictions


def read_support(folder: Path, dataset: Dataset) -> Support:
    """Read a support set from a folder with a folder per class; UserError for one class, or a class without images."""
    if not folder.is_dir():
        raise UserError(f"support={folder}: there is no such folder")
    folders = folders_in(folder)
    if len(folders) < 2:
        raise UserError(f"support={folder} has {len(folders)} folders: it needs one for each class, and at least 2")
    names = [printable(path.name) for path in folders]
    if {*names} <= {*SPLITS} and all(map(has_only_folders, folders)):
        raise UserError(f"support={folder} holds {' and '.join(names)}; use one of them, such as {folder / names[0]}")
    if len({*names}) < len(names):
        raise UserError(f"support={folder}: two class names look the same without unprintable characters; rename one")
    images = []
    for name, path in zip(names, folders, strict=True):
        missing = f"support={folder}: the class {name} has no readable image"
        images.append(read_images(files_below(path), dataset, str(path), missing)[1])
    return Support(torch.cat(images), tuple(map(len, images)), tuple(names))


def read_images(files: list[Path], dataset: Dataset, label: str, missing: str) -> tuple[list[Path], Tensor]:
    """Return the readable files and their images [B, C, H, W] (uint8); UserError(`missing`) if there are none."""
    readable, images = read_readable(label, files, dataset.read)
    report_skipped(label, len(readable), len(files))
    if not images:
        raise UserError(missing)
    return readable, torch.stack(images)


def labels_of_folders(queries: list[Path], place: Path, classes: tuple[str, ...]) -> list[str]:
    """Return the class of each query if all of them are in folders named after classes; otherwise an empty list."""
    if not place.is_dir():
        return []
    inside = [query.relative_to(place).parts for query in queries]
    names = [printable(parts[0]) if len(parts) > 1 else "" for parts in inside]
    return names if {*names} <= {*classes} else []


def picture(images: Tensor, predictions: Predictions, support: Support, truth: list[str]) -> bytes:
    """Draw examples of each class and the queries as PNG, framed green or red if the true class is known."""
    captions = {name: legible(str(name), f"class {i}") for i, name in enumerate(support.classes, start=1)}
    per_class = max(1, min(8, PICTURED // len(support.classes)))
    examples = [
        [(image, captions[name], LINE) for image in images_of_class[:per_class]]
        for name, images_of_class in zip(support.classes, support.images.split(support.shots), strict=True)
    ]
    if len(examples) > ROWS:  # all in one block
        examples = [list(chain(*examples))[:PICTURED]]
    labelled = []
    for i, (image, one) in enumerate(zip(images[:PICTURED], predictions, strict=False)):
        colour = (RIGHT if truth[i] == one["label"] else WRONG) if truth else LINE
        labelled.append((image, f"{captions[one['label']]} {one['probability']:.0%}", colour))
    heading = f"support: {sum(map(len, examples))} of {len(support.images)} images"
    colours = " (green: correct, red: wrong)" if truth else ""
    sections = [("" if row else heading, cells) for row, cells in enumerate(examples)]
    sections.append((f"query: {len(labelled)} of {len(predictions)} images{colours}", labelled))
    content = io.BytesIO()
    captioned_picture(sections).save(content, "png")
    return content.getvalue()


def count_correct(predictions: Predictions, truth: list[str]) -> int:
    return sum(one["label"] == own for one, own in zip(predictions, truth, strict=True))


def write(folder: Path, predictions: Predictions, support: Support, checkpoint: Checkpoint, truth: list[str]) -> None:
    table: list[list[object]] = [["file", "label", "probability", *(f"P({name})" for name in support.classes)]]
    for one in predictions:
        table.append([one["file"], one["label"], one["probability"], *one["probabilities"].values()])
    content: dict[str, Any] = {
        "checkpoint": str(checkpoint.path),
        "checkpoint_sha256": checkpoint.sha256,
        "support": dict(zip(support.classes, support.shots, strict=True)),
        "predictions": predictions,
    }
    if truth:
        content["accuracy"] = count_correct(predictions, truth) / len(truth)
        content["predictions"] = [one | {"truth": own} for one, own in zip(predictions, truth, strict=True)]
    write_bytes_atomically(folder / "predictions.csv", csv_bytes(table))
    write_bytes_atomically(folder / "predictions.json", (json.dumps(content, indent=1) + "\n").encode())


def show(folder: Path, predictions: Predictions, truth: list[str], cfg: PredictConfig, predictor: Predictor) -> None:
    """Print the labels, the accuracy if the true classes are known, and the files written."""
    base = user_path(cfg.query)
    names = [printable(relpath(one["file"], base) if base.is_dir() else one["file"]) for one in predictions]
    shown = zip(names[:LINES], predictions, strict=False)
    print(aligned([[name, one["label"], f"{100 * one['probability']:5.1f} %"] for name, one in shown]))
    if len(predictions) > LINES:
        print(f"... and {len(predictions) - LINES} more")
    if truth:
        correct, count = count_correct(predictions, truth), len(truth)
        print(f"accuracy {100 * correct / count:.2f} %: {correct} of {count}, by the names of their folders")
    if predictor.algorithm.uses_query_set:
        head = class_name(predictor.config.head)
        print(f"head {head}: each label depends on all query images, in both batch_norm modes")
    elif predictor.config.batch_norm == "transductive":
        print("batch_norm=transductive: each label depends on all query images; batch_norm=inductive labels each alone")
    for kind in ("csv", "json", "png"):
        print(f"{'written:' if kind == 'csv' else '':<8} {folder / f'predictions.{kind}'}")
    if cfg.save:
        print(f"kept:    {cfg.save}; continue with: metacv predict {setting('adapted', Path(cfg.save))} query=...")
