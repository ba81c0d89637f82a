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

from metacv import limits
from metacv.calibration import auroc
from metacv.config import PredictConfig, class_name
from metacv.data.bank import SPLITS, Dataset, pictures, report_copies
from metacv.data.image_files import files_below, folders_in, has_only_folders, read_readable, report_skipped
from metacv.drawing import LINE, RIGHT, WRONG, captioned_picture, legible
from metacv.errors import UserError
from metacv.files import user_path, write_bytes_atomically
from metacv.look import unlike
from metacv.model import Checkpoint
from metacv.page import write_page
from metacv.predictor import Answers, Predictor, Support, check_place_to_save
from metacv.reliability import COVERAGE, Calibration, alone
from metacv.terminal import warn
from metacv.text import aligned, csv_bytes, plural, printable, setting

LINES = 40  # maximum of lines of the table on the terminal
PICTURED = 200  # maximum of support images, and of queries, in the picture
ROWS = 25  # maximum of classes with a row each in the picture
UNKNOWN = "unknown"  # label of images that are unlike all classes
Predictions = list[dict[str, Any]]  # file, label, probability, and probabilities by class


def predict(cfg: PredictConfig, folder: Path) -> Predictions:
    """Label the images at `cfg.query`; write predictions.csv, .json, .png and .html into `folder`."""
    save = user_path(cfg.save) if cfg.save else None
    if save:
        check_place_to_save(save)
    check_given(cfg)
    predictor = Predictor.load(cfg.adapted or cfg.checkpoint, cfg)
    algorithm = predictor.algorithm  # first, as it raises errors in its settings
    if cfg.unknown or cfg.coverage:
        alone(algorithm, predictor.config.batch_norm, "unknown=true" if cfg.unknown else "coverage")
    support = examples(cfg, predictor)
    predictions: Predictions = []
    if cfg.query is not None:
        predictions = label_images(cfg, folder, predictor, support)
    elif save:
        predictor.save(save, support)
    if cfg.save:
        print(f"kept:    {cfg.save}; continue with: metacv predict {setting('adapted', Path(cfg.save))} query=...")
    return predictions


def check_given(cfg: PredictConfig) -> None:
    """Raise UserError if settings are missing or exclude each other."""
    network = cfg.checkpoint is not None or bool(cfg.backbone)
    if (cfg.adapted is None) != network and not (cfg.adapted is None and cfg.support):
        instead = "backbone=NAME is a pre-trained network instead of a run"
        raise UserError(f"give either checkpoint=RUN and support=FOLDER, or adapted=FILE; {instead}")
    if cfg.adapted is None and (not network or cfg.support is None):
        raise UserError(f"{'support' if network else 'checkpoint'}=... is missing")
    if cfg.adapted is None and cfg.remove is not None:
        raise UserError("remove: takes classes from a file of `save`, so it needs adapted=FILE")
    if cfg.query is None and not cfg.save:
        raise UserError("query=... is missing; give images to label, or save=FILE to keep the model with its examples")


def examples(cfg: PredictConfig, predictor: Predictor) -> Support:
    """Return the support set: that of a saved model, without the classes in `remove` and with those in `support`."""
    if not cfg.adapted:
        return new_examples(str(cfg.support), predictor, fewest=2)
    support = predictor.kept_support()
    if cfg.remove is not None:
        removed = cfg.remove if isinstance(cfg.remove, list) else [cfg.remove]
        names = {str(name): name for name in support.classes}
        support = support.without([names.get(str(name), str(name)) for name in removed])
    if cfg.support:
        more = new_examples(cfg.support, predictor, fewest=1)
        support = replace(predictor.with_features(support), classes=tuple(map(str, support.classes)))
        support = support.with_examples(predictor.with_features(more))
        if len(support.classes) > limits.CLASSES:
            raise UserError(f"support={cfg.support}: {len(support.classes)} classes, above {limits.CLASSES}")
        report_copies("support", support.images.split(support.shots), {})
    return support


def new_examples(place: str, predictor: Predictor, fewest: int) -> Support:
    support = read_support(user_path(place), predictor.dataset, fewest)
    predictor.check_shape("support", support.images)
    if fewest > 1:  # otherwise they are checked together with the earlier ones
        report_copies("support", support.images.split(support.shots), {})
    return support


def label_images(cfg: PredictConfig, folder: Path, predictor: Predictor, support: Support) -> Predictions:
    """Label the images at `cfg.query`; keep the model if asked for, write the files, and print what was found."""
    checkpoint, dataset, place = predictor.checkpoint, predictor.dataset, user_path(str(cfg.query))
    if not place.exists():
        raise UserError(f"query={place}: there is no such file or folder")
    names = tuple(map(str, support.classes))
    if cfg.unknown and UNKNOWN in names:
        raise UserError(f"unknown=true: a class is called {UNKNOWN}; rename it, or set unknown=false")
    files = files_below(place) if place.is_dir() else [place]
    queries, images = read_images(files, dataset, str(place), f"query={place}: no readable image")
    predictor.check_shape("query", images)
    warn_of_images(support, images, predictor, new=not cfg.adapted)
    support = predictor.with_features(support)
    calibration = predictor.calibrated(support, cfg.coverage or COVERAGE) if cfg.unknown or cfg.coverage else None
    answers = predictor.answers(support, images, calibration)
    if cfg.save:  # first, so that a failure leaves no folder behind
        predictor.save(user_path(cfg.save), support)
    support = replace(support, classes=names)
    truth = labels_of_folders(queries, place, names, cfg.unknown)
    predictions = described(queries, answers, names, cfg)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, predictions, support, checkpoint, truth)
    write_bytes_atomically(folder / "predictions.png", picture(images, predictions, support, truth))
    write_page(folder, place, queries, images, predictions, support, answers, truth, calibration)
    show(folder, predictions, truth, cfg, predictor, calibration)
    return predictions


def described(queries: list[Path], answers: Answers, names: tuple[str, ...], cfg: PredictConfig) -> Predictions:
    """Return a record of each query, as predictions.json has it."""
    probabilities = answers.probabilities
    best = probabilities.argmax(-1).tolist()
    records: Predictions = []
    for i, (query, row) in enumerate(zip(queries, probabilities.tolist(), strict=True)):
        record: dict[str, Any] = {"file": printable(str(query)), "label": names[best[i]], "probability": row[best[i]]}
        if cfg.unknown and answers.unknown is not None and answers.unknown[i]:
            record["label"] = UNKNOWN
        if cfg.coverage and answers.sets is not None:
            record["label_set"] = [names[c] for c in answers.sets[i].nonzero()[:, 0].tolist()]
        if cfg.unknown and answers.familiarity is not None:
            record["familiarity"] = float(answers.familiarity[i])
        records.append(record | {"probabilities": dict(zip(names, row, strict=True))})
    return records


def warn_of_images(support: Support, images: Tensor, predictor: Predictor, new: bool) -> None:
    """Warn of queries that are copies of examples, and of images unlike those in training; examples only if `new`."""
    known = {*pictures(support.images)}
    if copies := sum(picture in known for picture in pictures(images)):
        text = "copies of support images; their labels say nothing about the model"
        warn(f"query: {copies} of {len(images)} images are {text}")
    kinds = {"the query images": images} | ({"the support images": support.images} if new else {})
    found = (unlike(kind, own, predictor.checkpoint, predictor.dataset) for kind, own in kinds.items())
    if odd := next(filter(None, found), None):
        warn(odd)


def read_support(folder: Path, dataset: Dataset, fewest: int = 2) -> Support:
    """Read a support set from a folder with a folder per class; UserError for a class without images, or fewer than
    `fewest` classes."""
    if not folder.is_dir():
        raise UserError(f"support={folder}: there is no such folder")
    folders = folders_in(folder)
    if len(folders) < fewest:
        text = f"has {plural(len(folders), 'folder')}: it needs one for each class, and at least {fewest}"
        raise UserError(f"support={folder} {text}")
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


def labels_of_folders(queries: list[Path], place: Path, classes: tuple[str, ...], unknown: bool) -> list[str]:
    """Return the class of each query, if all are in folders named after classes; otherwise an empty list.

    With `unknown` some folders may have other names, and their images are of unknown classes.
    """
    if not place.is_dir():
        return []
    inside = [query.relative_to(place).parts for query in queries]
    names = [printable(parts[0]) if len(parts) > 1 else "" for parts in inside]
    if unknown and "" not in names and {*names} & {*classes}:
        return [name if name in classes else UNKNOWN for name in names]
    return names if {*names} <= {*classes} else []


def picture(images: Tensor, predictions: Predictions, support: Support, truth: list[str]) -> bytes:
    """Draw examples of each class and the queries as PNG, framed green or red if the true class is known."""
    captions = {name: legible(str(name), f"class {i}") for i, name in enumerate(support.classes, start=1)}
    captions[UNKNOWN] = captions.get(UNKNOWN, UNKNOWN)
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
    captioned_picture(sections).save(content, "png", compress_level=1)  # four times as fast, and hardly larger
    return content.getvalue()


def count_correct(predictions: Predictions, truth: list[str]) -> tuple[int, int]:
    """Return how many images of known classes have the right label, and how many such images there are."""
    known = [(one["label"], own) for one, own in zip(predictions, truth, strict=True) if own in one["probabilities"]]
    return sum(label == own for label, own in known), len(known)


def write(folder: Path, predictions: Predictions, support: Support, checkpoint: Checkpoint, truth: list[str]) -> None:
    sets = "label_set" in predictions[0]
    heading = [
        "file",
        "label",
        "probability",
        *["label_set"] * sets,
        *["familiarity"] * ("familiarity" in predictions[0]),
    ]
    table: list[list[object]] = [[*heading, *(f"P({name})" for name in support.classes)]]
    for one in predictions:
        own = one | {"label_set": " | ".join(one["label_set"])} if sets else one
        table.append([*(own[name] for name in heading), *one["probabilities"].values()])
    content: dict[str, Any] = {
        "checkpoint": str(checkpoint.path),
        "checkpoint_sha256": checkpoint.sha256,
        "support": dict(zip(support.classes, support.shots, strict=True)),
        "predictions": predictions,
    }
    if truth:
        correct, count = count_correct(predictions, truth)
        content["accuracy"] = correct / count
        content["predictions"] = [one | {"truth": own} for one, own in zip(predictions, truth, strict=True)]
    write_bytes_atomically(folder / "predictions.csv", csv_bytes(table))
    write_bytes_atomically(folder / "predictions.json", (json.dumps(content, indent=1) + "\n").encode())


def show(
    folder: Path,
    predictions: Predictions,
    truth: list[str],
    cfg: PredictConfig,
    predictor: Predictor,
    calibration: Calibration | None,
) -> None:
    """Print the labels, the accuracy if the true classes are known, the calibration, and the files written."""
    base = user_path(str(cfg.query))
    names = [printable(relpath(one["file"], base) if base.is_dir() else one["file"]) for one in predictions]
    shown = zip(names[:LINES], predictions, strict=False)
    print(aligned([[name, one["label"], f"{100 * one['probability']:5.1f} %"] for name, one in shown]))
    if len(predictions) > LINES:
        print(f"... and {len(predictions) - LINES} more")
    if truth:
        correct, count = count_correct(predictions, truth)
        print(f"accuracy {100 * correct / count:.2f} %: {correct} of {count}, by the names of their folders")
    if calibration:
        print_reliability(predictions, truth, cfg, calibration)
    if predictor.algorithm.uses_query_set:
        head = class_name(predictor.config.head)
        print(f"head {head}: each label depends on all query images, in both batch_norm modes")
    elif predictor.config.batch_norm == "transductive":
        print("batch_norm=transductive: each label depends on all query images; batch_norm=inductive labels each alone")
    for kind in ("csv", "json", "png", "html"):
        print(f"{'written:' if kind == 'csv' else '':<8} {folder / f'predictions.{kind}'}")


def print_reliability(predictions: Predictions, truth: list[str], cfg: PredictConfig, calibration: Calibration) -> None:
    """Print how the model was calibrated, and what the known labels say of label sets and of unknown images."""
    images = plural(calibration.images, "example")
    print(f"calibrated on {images} by leave-one-out: temperature {calibration.temperature:.3g}")
    most = calibration.images / (calibration.images + 1)
    if cfg.coverage and cfg.coverage > most:
        warn(f"coverage={cfg.coverage}: {images} in classes of two or more allow {100 * most:.0f} % at most")
    known = [(one, own) for one, own in zip(predictions, truth, strict=False) if own in one["probabilities"]]
    if cfg.coverage:
        size = sum(len(one["label_set"]) for one in predictions) / len(predictions)
        covered = [own in one["label_set"] for one, own in known]
        having = f"; {100 * sum(covered) / len(covered):.1f} % have the true class" if covered else ""
        print(f"label sets for {100 * cfg.coverage:.4g} % of the images: {size:.2f} labels on average{having}")
    if cfg.unknown:
        called = sum(one["label"] == UNKNOWN for one in predictions)
        kept = f"{100 * calibration.kept:.3g} % of images of the classes shall be kept"
        print(f"unknown: {called} of {len(predictions)} images; {kept}")
        others = [one for one, own in zip(predictions, truth, strict=False) if own == UNKNOWN]
        if known and others:
            found = sum(one["label"] == UNKNOWN for one in others)
            lost = sum(one["label"] == UNKNOWN for one, _ in known)
            familiar = [
                torch.tensor([one["familiarity"] for one in own]) for own in ([one for one, _ in known], others)
            ]
            print(f"  {found} of {len(others)} images of other folders, {lost} of {len(known)} of the classes' folders")
            print(f"  AUROC {auroc(*familiar):.3f}")
