"""From a trained model, or one in training, to its accuracy over episodes with a 95 % interval."""

import dataclasses
import io
import time
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from metacv import seen, version
from metacv.algorithms.base import Algorithm, MetricMethod, accuracies, evaluating
from metacv.algorithms.heads.base import WithHead
from metacv.config import BatchNormMode, EvaluateConfig, TestConfig, TrainConfig, class_name, differences, merged
from metacv.data.bank import ImageBank
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.errors import UserError
from metacv.features import evaluate_features
from metacv.files import write_bytes_atomically, written_or_refused
from metacv.look import warn_if_unlike
from metacv.model import (
    Checkpoint,
    build_dataset,
    describe_device,
    load_checkpoint,
    pick_device,
    with_head,
)
from metacv.precision import keep_freed_memory
from metacv.results import Result, ResultFile, check_accuracies, summary

CHANGEABLE = ("way", "shot", "query", "episodes", "batch_norm", "seed")
CLASSES = {"dataset": "dataset", "method": "algo", "head": "head"}  # fields of a result: groups of the settings
IMAGES_AT_ONCE = 1024
CENTRED_ON = 2000  # training images
FEATURES_AT_ONCE = 2**24  # numbers in the features of a batch of episodes, 64 MB
FEATURES_KEPT = 2**29  # numbers at most in the cached features, 2 GB


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint and the episodes that it is evaluated on."""

    checkpoint: Checkpoint
    config: TrainConfig  # of the checkpoint, with what the command line changed
    episodes: EpisodeList
    split: str
    algorithm: Algorithm
    left_out: int  # classes of the split

    @property
    def changes(self) -> dict[str, Any]:
        """Settings of algorithm and head that differ from those of training, without those that change speed only."""
        own, trained = self.config, self.checkpoint.config
        of_algo = {name: now for name, now, _ in differences(own.algo, trained.algo)}
        of_head = {f"head.{name}": now for name, now, _ in differences(own.head, trained.head)}
        if of_head.pop("head._target_", None):
            of_head = {"head": class_name(own.head), **of_head}
        return {name: now for name, now in of_algo.items() if name not in self.algorithm.execution_settings} | of_head

    def run(self, batch_norm: str) -> tuple[Tensor, Result]:
        """The accuracy of each episode, [E], and the record of the evaluation."""
        start = time.perf_counter()
        accuracy = evaluate_episodes(self.algorithm, self.episodes, batch_norm)
        seconds = time.perf_counter() - start
        check_accuracies(accuracy, learning_rates(self.config))
        return accuracy, record(
            self.config,
            self.episodes,
            batch_norm=batch_norm,
            split=self.split,
            left_out=self.left_out,
            seed=self.config.seed,
            episodes_sha256=self.episodes.fingerprint,
            images_sha256=self.episodes.sampler.bank.fingerprint,
            changes=self.changes,
            checkpoint=str(self.checkpoint.path),
            checkpoint_sha256=self.checkpoint.sha256,
            step=self.checkpoint.step,
            **self.checkpoint.training.of_result(),
            device=describe_device(self.episodes.sampler.device),
            tasks_per_second=len(accuracy) / seconds,
            **summary(accuracy),
        )


def record(config: TrainConfig, episodes: EpisodeList, **measured: Any) -> Result:
    """The record of an accuracy on `episodes`: `measured`, with what the other arguments and this program say of it."""
    known = {name: getattr(episodes.sampler, name) for name in ("way", "shot", "query", "rotation")}
    known |= {name: class_name(getattr(config, group)) for name, group in CLASSES.items()}
    return Result(**known, **measured, episodes=len(episodes), torch=str(torch.__version__), metacv=version())


def evaluate(cfg: EvaluateConfig, folder: Path) -> None:
    """Evaluate a checkpoint or features, and write result.json and accuracies.npy into `folder`."""
    measured = [evaluate_features(cfg)] if cfg.features else evaluate_checkpoint(cfg)
    write_evaluation(folder, measured)
    for _, result in measured:
        print(result.describe())
    print(f"result: {folder / 'result.json'}")


def evaluate_checkpoint(cfg: EvaluateConfig) -> list[tuple[Tensor, Result]]:
    """Accuracies and record for each batch-norm mode that is asked for."""
    if not cfg.checkpoint:
        raise UserError("checkpoint is missing")
    modes = typing.get_args(BatchNormMode) if cfg.batch_norm == "both" else (cfg.batch_norm,)
    evaluation = prepare(load_checkpoint(cfg.checkpoint), dataclasses.replace(cfg, batch_norm=modes[0]))
    return [evaluation.run(mode or evaluation.config.batch_norm) for mode in modes]


def prepare(checkpoint: Checkpoint, given: TestConfig, others: Iterable[Checkpoint] = ()) -> Evaluation:
    """Load data and model; UserError if the data set does not fit, or has classes that training used.

    `others` are evaluated on the same episodes, whose classes must be new to them too.
    """
    config = with_changes(checkpoint, given)
    device = pick_device(given.device)
    dataset = build_dataset(config.dataset, given.data_dir)
    if given.dataset.get("_target_"):
        dataset.prepare_like(build_dataset(checkpoint.config.dataset, given.data_dir))
    bank = dataset.load(given.split)
    if bank.image_shape != checkpoint.image_shape:
        own, trained = ("x".join(map(str, shape)) for shape in (bank.image_shape, checkpoint.image_shape))
        raise UserError(f"{bank.name} has images of {own} but {checkpoint.path} was trained on {trained}")
    unseen = seen.unseen(dataset, bank, given.split, (checkpoint, *others), given.unseen_only)
    left_out, bank = len(bank.class_names) - len(unseen.class_names), unseen
    warn_if_unlike(f"the images of {bank.name}", bank.images, checkpoint, dataset)
    task = config.way, config.shot, config.query, dataset.rotation(given.split)
    episodes = EpisodeList(EpisodeSampler(bank, *task, config.seed, device), config.episodes)
    algorithm = with_head(checkpoint.build(config), config, checkpoint.centre).to(device)
    if isinstance(algorithm, WithHead) and algorithm.needs_centre:
        same = config.dataset["_target_"] == checkpoint.config.dataset["_target_"]
        source = dataset if same else build_dataset(checkpoint.config.dataset, given.data_dir)
        centre(algorithm, source.load("train"), device)
    if device.type == "cpu":
        keep_freed_memory()
    return Evaluation(checkpoint, config, episodes, given.split, algorithm, left_out)


def centre(algorithm: WithHead, bank: ImageBank, device: torch.device) -> Tensor:
    """Give a centred head the mean feature of training images, and return it."""
    some = torch.randperm(len(bank.images), generator=torch.Generator().manual_seed(0))[:CENTRED_ON].sort().values
    return algorithm.centre(bank.images[some].to(device).float().div_(255))


def evaluate_episodes(
    algorithm: Algorithm,
    episodes: EpisodeList,
    batch_norm: str,
    label: str = "evaluating",
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """The accuracy of each episode, float64 [E], with a progress bar on a terminal.

    `check` is called now and then, and may raise. Each image passes once if its features depend on no other image.
    """
    if isinstance(algorithm, MetricMethod) and algorithm.embeds_each_image_alone(batch_norm):
        cached = _from_features(algorithm, episodes, batch_norm, label, check)
        if cached is not None:
            return cached
    results = []
    with tqdm(total=len(episodes), desc=label, unit="task", leave=False, disable=None) as bar:
        for tasks in episodes.batches(max(1, IMAGES_AT_ONCE // episodes.rows[0].numel())):
            check()
            results.append(accuracies(algorithm.predict(tasks, batch_norm), tasks.query_y))
            bar.update(len(tasks))
    return torch.cat(results).double().cpu()


def _from_features(
    algorithm: MetricMethod, episodes: EpisodeList, batch_norm: str, label: str, check: Callable[[], None]
) -> Tensor | None:
    """`evaluate_episodes` with each image embedded once; None if the features would take too much memory."""
    sampler, device = episodes.sampler, episodes.sampler.device
    rows, index = episodes.rows.unique(return_inverse=True)
    supports, support_index = episodes.rows[:, :, : sampler.shot].unique(return_inverse=True)
    passes = len(rows) + algorithm.copies * len(supports)
    results = []
    with (
        evaluating(algorithm, batch_norm, device),
        tqdm(total=passes, desc=label, unit="image", leave=False, disable=None) as bar,
    ):

        def embedded(rows: Tensor, copies: int) -> Tensor | None:
            """Features [R, ...] of the images at `rows`, or of copies of each [R, copies, ...]."""
            features, step = torch.empty(0), max(1, IMAGES_AT_ONCE // (4 + 4 * copies))
            for start in range(0, len(rows), step):
                check()
                some = rows[start : start + step]
                images = sampler.images_at(some)
                own = algorithm.embed_copies(images, some.tolist()) if copies else algorithm.embed(images)
                if start == 0:
                    if len(rows) * own[0].numel() > FEATURES_KEPT:
                        return None
                    features = own.new_empty(len(rows), *own.shape[1:])
                features[start : start + len(some)] = own
                bar.update(len(some) * max(1, copies))
            return features

        features = embedded(rows, 0)
        copied = embedded(supports, algorithm.copies) if algorithm.copies else None
        if features is None or (algorithm.copies and copied is None):
            return None
        support = algorithm.copies * support_index[0].numel()  # copies in an episode
        each = max((index[0].numel() + support) * features[0].numel(), support**2)
        batches = (part.split(max(1, FEATURES_AT_ONCE // each)) for part in (episodes.rows, index, support_index))
        for some, places, support_places in zip(*batches, strict=True):
            check()
            tasks = sampler.tasks(features, some, places.to(device))
            if copied is not None:
                tasks = tasks.with_copies(copied[support_places.to(device)].flatten(1, 3))
            results.append(accuracies(algorithm.head(tasks), tasks.query_y))
    return torch.cat(results).double().cpu()


def learning_rates(config: TrainConfig) -> str:
    """For messages that predictions are not finite: the rates by which evaluation adapts to a task, if it does."""
    group = "head" if config.head else "algo"
    rates = [f"{group}.{name}={value}" for name, value in getattr(config, group).items() if name.endswith("lr")]
    return f": adaptation diverged with {', '.join(rates)}" if rates else ""


def with_changes(checkpoint: Checkpoint, given: Any, names: tuple[str, ...] = CHANGEABLE) -> TrainConfig:
    """The settings of a checkpoint, with those of `names`, algo and dataset that `given` does not leave null."""
    changes = {name: value for name in names if (value := getattr(given, name, None)) is not None}
    if "_target_" in given.algo:
        raise UserError("algo._target_: the method of a checkpoint cannot be changed")
    for group in ("algo", "dataset", "head"):
        changed = getattr(given, group)
        trained = changed if "_target_" in changed else getattr(checkpoint.config, group)  # another data set or head
        if unknown := changed.keys() - trained.keys():
            raise UserError(f"{group}.{min(unknown)}: {checkpoint.path} has no such setting")
        changes[group] = merged(trained, changed)
    return dataclasses.replace(checkpoint.config, **changes)


def write_evaluation(
    folder: Path, measured: list[tuple[Tensor, Result]], differences: list[dict[str, Any]] | None = None
) -> None:
    """result.json, and accuracies.npy [results, E]: the accuracy of every episode, in the order of the results."""
    folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    numpy.save(content, torch.stack([accuracy for accuracy, _ in measured]).numpy())
    with written_or_refused(folder / "accuracies.npy"):
        write_bytes_atomically(folder / "accuracies.npy", content.getvalue())
    ResultFile([result for _, result in measured], differences=differences).write(folder / "result.json")
