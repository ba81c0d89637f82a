"""`metacv evaluate features=FILE.npz`: evaluate a head on precomputed features."""

import time
import zipfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import torch

from metacv import version
from metacv.algorithms.heads.base import Head
from metacv.config import EvaluateConfig, NormalizeConfig, class_name
from metacv.confusion import Predictions
from metacv.data.bank import ImageBank
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.episodes import predicted_classes
from metacv.errors import UserError
from metacv.files import check_growth, size_of, user_path
from metacv.model import beyond_defaults, build_node, describe_device, pick_device
from metacv.progress import Progress, header
from metacv.results import Result, summary, task_text
from metacv.terminal import say
from metacv.text import first_line

DEFAULT_HEAD = {"_target_": "metacv.algorithms.heads.ncm.NearestMean"}
TASK = {"way": 5, "shot": 1, "query": 15, "episodes": 600}  # defaults of settings that are null
TASKS_AT_ONCE = 100


def evaluate_features(cfg: EvaluateConfig) -> list[tuple[Predictions, Result]]:
    """Evaluate a head on a file of features, as a checkpoint's features are; return predictions and results. UserError
    if a setting is invalid."""
    names = ("checkpoint", "backbone", "batch_norm", "calibrate", "vary", "algo", "dataset")
    given = {name: getattr(cfg, name) for name in names} | {"normalize": cfg.normalize != NormalizeConfig()}
    if wrong := [name for name, value in given.items() if value] + ["split"] * (cfg.split != "test"):
        raise UserError(f"{wrong[0]}: cannot be set together with features, which have no {wrong[0]}")
    node = cfg.head if "_target_" in cfg.head else DEFAULT_HEAD | cfg.head
    head = build_node("head", node, Head)
    if head.needs_images:
        needing = "augment, flip, cl2n and adapt=backbone"
        raise UserError(f"head: {needing} need images, which features do not have; choose another head")
    task = {name: value if (own := getattr(cfg, name)) is None else own for name, value in TASK.items()}
    bank, device = read_features(user_path(str(cfg.features))), pick_device(cfg.device)
    sampler = EpisodeSampler(bank, task["way"], task["shot"], task["query"], seed=cfg.seed, device=device)
    episodes = EpisodeList(sampler, task["episodes"])
    about = {
        "method": task_text("features", class_name(node), task["way"], task["shot"], task["query"]),
        "data": f"{bank.name}: {len(bank.class_names):,} classes, {len(bank.images):,} images",
        "episodes": f"{len(episodes):,}",
        "device": describe_device(device),
    }
    say(header([about]))
    nodes = [node, DEFAULT_HEAD] if head.uses_query_set else [node]
    cases = product(nodes, cfg.balances(head.uses_query_set))
    return [measure(own, episodes.balanced_as(balance), cfg) for own, balance in cases]


def measure(node: dict[str, Any], episodes: EpisodeList, cfg: EvaluateConfig) -> tuple[Predictions, Result]:
    """Evaluate the head that `node` describes; return predictions and the result."""
    head, sampler = build_node("head", node, Head), episodes.sampler
    start = time.perf_counter()
    batches = (tasks.map(lambda features: features.flatten(2)) for tasks in episodes.batches(TASKS_AT_ONCE))
    answers = ((tasks, head(tasks)) for tasks in batches)
    with torch.no_grad():
        found = predicted_classes(answers, episodes, Progress(lines=True), f": {class_name(node)} diverged")
    predictions = Predictions(episodes, found, torch.arange(len(sampler.bank.images)), sampler.bank.images)
    accuracy = predictions.accuracy
    known = {name: getattr(sampler, name) for name in ("way", "shot", "query", "query_balance")}
    known |= summary(accuracy, episodes.rounds)
    return predictions, Result(
        **known,
        episodes=len(episodes),
        disjoint=episodes.rounds > 0,
        uses_query_set=head.uses_query_set,
        dataset=str(cfg.features),
        split="test",
        rotation="none",
        seed=cfg.seed,
        batch_norm="inductive",
        episodes_sha256=episodes.fingerprint,
        images_sha256=sampler.bank.fingerprint,
        method="features",
        head=class_name(node),
        changes=beyond_defaults("head", node, Head),
        device=describe_device(sampler.device),
        tasks_per_second=len(accuracy) / (time.perf_counter() - start),
        torch=str(torch.__version__),
        metacv=version(),
    )


def read_features(path: Path) -> ImageBank:
    """Read `features` [M, D] and `labels` [M] of an .npz file into a bank with float images [M, D, 1, 1]."""
    try:
        size_of(path)  # rejects devices
        with zipfile.ZipFile(path) as zipped:
            check_growth(path, sum(entry.file_size for entry in zipped.infolist()))
        with numpy.load(path, allow_pickle=False) as file:
            features, labels = torch.from_numpy(file["features"]), torch.from_numpy(file["labels"])
            features = features.float() if features.is_floating_point() else features
        if features.dim() != 2 or labels.shape != features.shape[:1] or not features.is_floating_point():
            raise ValueError(f"features {tuple(features.shape)} and labels {tuple(labels.shape)}, not [M, D] and [M]")
        if labels.is_floating_point() or not features.isfinite().all():
            raise ValueError("labels must be integers, and features finite")
    except Exception as error:  # a damaged or foreign file may raise any error
        raise UserError(f"features={path} cannot be used ({first_line(error)})") from None
    classes, labels = labels.unique(return_inverse=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), labels.bincount().cumsum(0)])
    images = features[labels.argsort(stable=True)].view(*features.shape, 1, 1)
    return ImageBank(path.name, images, offsets, tuple(map(str, classes.tolist())))
