"""Evaluate a model on episodes: accuracy with a 95 % interval. Implements `metacv evaluate`, and validation."""

import dataclasses
import io
import math
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metacv import seen, version
from metacv.algorithms.base import Algorithm, MetricMethod, evaluating, predicted
from metacv.algorithms.heads.base import WithHead
from metacv.config import (
    BatchNormMode,
    EvaluateConfig,
    TestConfig,
    TrainConfig,
    class_name,
    differences,
    merged,
    validation_protocol,
)
from metacv.confusion import Predictions
from metacv.data.bank import Dataset, ImageBank
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.errors import UserError
from metacv.features import evaluate_features
from metacv.files import user_path, write_bytes_atomically, written_or_refused
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
from metacv.progress import Progress, header
from metacv.reliability import VALIDATION_EPISODES, alone, measure
from metacv.results import Result, ResultFile, check_accuracies, summary, task_text, warn_at_chance
from metacv.terminal import say
from metacv.text import aligned, percent, plural, printable, shortened

CHANGEABLE = ("way", "shot", "query", "episodes", "batch_norm", "seed")
CLASSES = {"dataset": "dataset", "method": "algo", "head": "head"}  # field of a result -> group of settings
IMAGES_AT_ONCE = 1024
CENTRED_ON = 2000  # training images for the mean feature
FEATURES_AT_ONCE = 2**24  # numbers in the features of a batch of episodes: 64 MB
FEATURES_KEPT = 2**29  # maximum of numbers in the cached features: 2 GB


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint and the episodes to evaluate it on."""

    checkpoint: Checkpoint
    config: TrainConfig  # settings of the checkpoint, with changes from the command line
    episodes: EpisodeList
    split: str
    algorithm: Algorithm
    dataset: Dataset
    left_out: int  # number of classes of the split that are left out

    @property
    def changes(self) -> dict[str, Any]:
        """Settings of algorithm and head that differ from training, except those that change speed only."""
        own, trained = self.config, self.checkpoint.config
        of_algo = {name: now for name, now, _ in differences(own.algo, trained.algo)}
        of_head = {f"head.{name}": now for name, now, _ in differences(own.head, trained.head)}
        if of_head.pop("head._target_", None):
            of_head = {"head": class_name(own.head), **of_head}
        return {name: now for name, now in of_algo.items() if name not in self.algorithm.execution_settings} | of_head

    @property
    def about(self) -> dict[str, str]:
        """The method, data, episodes and device, for the header on the terminal."""
        config, sampler = self.config, self.episodes.sampler
        method, head, data = (class_name(getattr(config, group)) for group in ("algo", "head", "dataset"))
        bank, rotation = sampler.bank, f", rotation {sampler.rotation}" * (sampler.rotation != "none")
        images = f"{len(bank.class_names):,} classes, {len(bank.images):,} images"
        return {
            "method": task_text(method, head, sampler.way, sampler.shot, sampler.query),
            "data": f"{data} {self.split}: {images}; {'x'.join(map(str, bank.image_shape))}{rotation}",
            "episodes": f"{len(self.episodes):,}",
            "device": describe_device(sampler.device),
        }

    def run_and_print(self, batch_norm: str, name: str) -> tuple[Tensor, Result]:
        """Run the evaluation of the run called `name` and print its result; return accuracies [E] and the result."""
        predictions, result = self.run(batch_norm, f"evaluating {name}")
        say(f"{printable(name)}: {result.describe()}")
        warn_at_chance(result, name)
        return predictions.accuracy, result

    def run(self, batch_norm: str, label: str = "evaluating") -> tuple[Predictions, Result]:
        """Run the evaluation; return predictions and the result. UserError if predictions are not finite."""
        start = time.perf_counter()
        predictions = predict_episodes(self.algorithm, self.episodes, batch_norm, Progress(label, lines=True))
        seconds = time.perf_counter() - start
        accuracy = predictions.accuracy
        check_accuracies(accuracy, learning_rates(self.config))
        return predictions, record(
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
            **self.checkpoint.training.result_fields(),
            device=describe_device(self.episodes.sampler.device),
            tasks_per_second=len(accuracy) / seconds,
            **summary(accuracy),
        )

    def calibration(self, cfg: EvaluateConfig, predictions: Predictions, result: Result) -> dict[str, Any]:
        """Return the fields of a result on calibration; images that `predictions` has features of are not embedded."""
        algorithm, validation = alone(self.algorithm, result.batch_norm, "calibrate"), None
        own, device = self.episodes.sampler, self.episodes.sampler.device
        if cfg.calibrate == "val":
            task = own.way, own.shot, own.query, self.dataset.rotation("val"), self.config.seed, device
            sampler = EpisodeSampler(self.dataset.load("val"), *task)
            validation = EpisodeList(sampler, VALIDATION_EPISODES)

        def embed(sampler: EpisodeSampler, rows: Tensor, copies: bool) -> Tensor:
            known, values = torch.empty(0, dtype=torch.long), torch.empty(0)
            if sampler.bank is own.bank:
                before = (predictions.supports, predictions.copies), (predictions.rows, predictions.features)
                known, values = before[0] if copies else before[1]
            missing = ~torch.isin(rows, known)
            with Progress("calibrating", lines=True).track(int(missing.sum()), "image") as done:
                new = embed_rows(algorithm, sampler, rows[missing], algorithm.copies * copies, done)
            if new is None:
                raise UserError("calibrate: the features take too much memory; use fewer episodes")
            if not len(known):
                return new
            found = values[torch.searchsorted(known, rows).clamp_max(len(known) - 1)]
            if missing.any():
                found[missing.to(found.device)] = new
            return found

        with evaluating(algorithm, result.batch_norm, device):
            fields = measure(algorithm, self.episodes, validation, embed, FEATURES_AT_ONCE)
        return fields | {"calibrated": cfg.calibrate}


def record(config: TrainConfig, episodes: EpisodeList, **measured: Any) -> Result:
    """Build the Result of an evaluation: `measured` fields, and those given by settings, episodes and versions."""
    known = {name: getattr(episodes.sampler, name) for name in ("way", "shot", "query", "rotation")}
    known |= {name: class_name(getattr(config, group)) for name, group in CLASSES.items()}
    return Result(**known, **measured, episodes=len(episodes), torch=str(torch.__version__), metacv=version())


def evaluate(cfg: EvaluateConfig, folder: Path) -> None:
    """Evaluate a checkpoint, all runs below a folder, or features; and write the results into `folder`."""
    if not cfg.checkpoint and not cfg.features:
        raise UserError("checkpoint is missing; set checkpoint=RUN, or features=FILE.npz")
    if not cfg.features and (below := runs_below(user_path(str(cfg.checkpoint)))):
        if cfg.calibrate:
            raise UserError(f"calibrate={cfg.calibrate}: takes one checkpoint, not a folder of runs")
        return evaluate_runs(cfg, folder, below)
    measured = [evaluate_features(cfg)] if cfg.features else evaluate_checkpoint(cfg)
    write_evaluation(folder, [(predictions.accuracy, result) for predictions, result in measured])
    for _, result in measured:
        print(result.describe())
        warn_at_chance(result)
    if len(measured) == 1:
        from metacv.pictures import write_pictures  # matplotlib is slow to import, and training does not need it

        write_pictures(folder, *measured[0])
    print(f"result: {folder / 'result.json'}")


def evaluate_checkpoint(cfg: EvaluateConfig) -> list[tuple[Predictions, Result]]:
    """Evaluate one checkpoint; return predictions and the result for each requested batch-norm mode."""
    modes = batch_norm_modes(cfg)
    given = dataclasses.replace(cfg, batch_norm=modes[0])
    evaluation = prepare(load_checkpoint(str(cfg.checkpoint)), given)
    names = [mode or evaluation.config.batch_norm for mode in modes]
    if cfg.calibrate:
        for name in names:
            alone(evaluation.algorithm, name, f"calibrate={cfg.calibrate}")
    say(header([evaluation.about]))
    measured = [evaluation.run(name) for name in names]
    if not cfg.calibrate:
        return measured
    return [(own, dataclasses.replace(result, **evaluation.calibration(cfg, own, result))) for own, result in measured]


def evaluate_runs(cfg: EvaluateConfig, folder: Path, places: list[Path]) -> None:
    """Evaluate the runs in `places` with the same settings; UserError at the end if some of them failed."""
    modes, failed = batch_norm_modes(cfg), []
    evaluations: dict[str, Evaluation] = {}
    measured: dict[tuple[str, str], tuple[Tensor, Result]] = {}

    @contextmanager
    def continue_after_error(name: str) -> Iterator[None]:
        """Print the error of a run instead of raising it."""
        try:
            yield
        except UserError as error:
            failed.append(name)
            print(f"metacv: {printable(f'{name}: {error}')}", file=sys.stderr)

    for place, name in zip(places, shortened(places), strict=True):
        with continue_after_error(name):
            evaluations[name] = prepare(load_checkpoint(place), dataclasses.replace(cfg, batch_norm=modes[0]))
    if evaluations:
        say(header([evaluation.about for evaluation in evaluations.values()]))
    for name, evaluation in evaluations.items():
        with continue_after_error(name):
            for mode in (mode or evaluation.config.batch_norm for mode in modes):
                measured[name, mode] = evaluation.run_and_print(mode, name)
    if measured:
        write_evaluation(folder, [*measured.values()])
        own = [(evaluations[name].checkpoint, name, result) for (name, _), (_, result) in measured.items()]
        print(f"\n{ranking(own)}\nresult: {folder / 'result.json'}")
    if failed:
        raise UserError(f"{len(failed)} of {plural(len(places), 'run')} could not be evaluated: {', '.join(failed)}")


def ranking(measured: list[tuple[Checkpoint, str, Result]]) -> str:
    """Format a table of runs with their test accuracies, sorted by validation accuracy: the best of many test
    accuracies is high partly by chance. Runs that were validated in different ways are not sorted."""
    validations = [checkpoint.content.get("validation") for checkpoint, *_ in measured]
    ways = {str(validation_protocol(checkpoint.config)) for checkpoint, *_ in measured}
    lines, numbers = [["run", "validation", measured[0][2].split, ""]], []
    for validation, (_, name, result) in zip(validations, measured, strict=True):
        best: list[Any] = (
            [validation.get(name) for name in ("accuracy", "ci95")] if isinstance(validation, dict) else []
        )
        known = [number for number in best if isinstance(number, float) and math.isfinite(number)]
        shown = f"{percent(*known)} %" if len(known) == 2 else ""
        numbers.append(known[0] if shown else math.nan)
        lines.append([printable(name), shown, f"{percent(result.accuracy, result.ci95)} %", result.batch_norm])
    ranked = len(ways) == 1 and not any(map(math.isnan, numbers))
    order = sorted(range(len(numbers)), key=lambda i: -numbers[i]) if ranked else range(len(numbers))
    title = "runs, the best in validation first:" if ranked else "runs, in order of their names (not all were validated"
    title += "" if ranked else " on the same tasks):"
    return f"{title}\n{aligned([lines[0], *(lines[i + 1] for i in order)])}"


def runs_below(place: Path) -> list[Path]:
    """Return the runs below a folder; empty if the folder is a run itself."""
    if not place.is_dir() or (place / "best.pt").exists():
        return []
    return sorted(path.parent for path in place.rglob("best.pt"))


def batch_norm_modes(cfg: EvaluateConfig) -> tuple[BatchNormMode | None, ...]:
    return typing.get_args(BatchNormMode) if cfg.batch_norm == "both" else (cfg.batch_norm,)


def prepare(checkpoint: Checkpoint, given: TestConfig, others: Iterable[Checkpoint] = ()) -> Evaluation:
    """Load data and model; UserError if the images do not fit the model, or classes were used in training.

    `others` are evaluated on the same episodes, so the classes must be new to them too.
    """
    config = with_changes(checkpoint, given)
    device = pick_device(given.device)
    dataset = build_dataset(config.dataset, given.data_dir)
    if given.dataset.get("_target_"):
        dataset.prepare_like(build_dataset(checkpoint.config.dataset, given.data_dir))
    bank = dataset.load(given.split)
    if bank.image_shape != checkpoint.image_shape:
        own, trained = ("x".join(map(str, shape)) for shape in (bank.image_shape, checkpoint.image_shape))
        raise UserError(f"{bank.name} has images of {own}, but {checkpoint.path} was trained on {trained}")
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
    return Evaluation(checkpoint, config, episodes, given.split, algorithm, dataset, left_out)


def centre(algorithm: WithHead, bank: ImageBank, device: torch.device) -> Tensor:
    """Set and return the mean feature [D] of training images for a head that subtracts it."""
    some = torch.randperm(len(bank.images), generator=torch.Generator().manual_seed(0))[:CENTRED_ON].sort().values
    return algorithm.centre(bank.images[some].to(device).float().div_(255))


def evaluate_episodes(
    algorithm: Algorithm,
    episodes: EpisodeList,
    batch_norm: str,
    label: str = "evaluating",
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the accuracy of each episode, float64 [E]. Shows a progress bar; `check` is called after every batch and
    may raise."""
    return predict_episodes(algorithm, episodes, batch_norm, Progress(label, check)).accuracy


def predict_episodes(algorithm: Algorithm, episodes: EpisodeList, batch_norm: str, progress: Progress) -> Predictions:
    """Predict the class of each query. Each image is embedded only once if its features depend on no other image."""
    if isinstance(algorithm, MetricMethod) and algorithm.embeds_each_image_alone(batch_norm):
        cached = _from_features(algorithm, episodes, batch_norm, progress)
        if cached is not None:
            return cached
    results = []
    with progress.track(len(episodes), "task") as done:
        for tasks in episodes.batches(max(1, IMAGES_AT_ONCE // episodes.rows[0].numel())):
            results.append(predicted(algorithm.predict(tasks, batch_norm)))
            done(len(tasks))
    return Predictions(episodes, torch.cat(results).cpu())


def _from_features(
    algorithm: MetricMethod, episodes: EpisodeList, batch_norm: str, progress: Progress
) -> Predictions | None:
    """Predict as `predict_episodes`, with each image embedded once; None if features would take too much memory."""
    sampler, device = episodes.sampler, episodes.sampler.device
    rows, index = episodes.rows.unique(return_inverse=True)
    supports, support_index = episodes.rows[:, :, : sampler.shot].unique(return_inverse=True)
    passes = len(rows) + algorithm.copies * len(supports)
    results = []
    with evaluating(algorithm, batch_norm, device):
        with progress.track(passes, "image") as done:
            features = embed_rows(algorithm, sampler, rows, 0, done)
            copied = embed_rows(algorithm, sampler, supports, algorithm.copies, done) if algorithm.copies else None
        if features is None or (algorithm.copies and copied is None):
            return None
        support = algorithm.copies * support_index[0].numel()  # augmented copies in an episode
        numbers = max((index[0].numel() + support) * features[0].numel(), support**2)  # per episode
        batches = (part.split(max(1, FEATURES_AT_ONCE // numbers)) for part in (episodes.rows, index, support_index))
        with progress.track(len(episodes), "task") as done:
            for some, places, support_places in zip(*batches, strict=True):
                tasks = sampler.tasks(features, some, places.to(device))
                if copied is not None:
                    tasks = tasks.with_copies(copied[support_places.to(device)].flatten(1, 3))
                results.append(predicted(algorithm.head(tasks)))
                done(len(tasks))
    copies = {} if copied is None else {"supports": supports, "copies": copied}
    return Predictions(episodes, torch.cat(results).cpu(), rows, features, **copies)


def embed_rows(
    algorithm: MetricMethod, sampler: EpisodeSampler, rows: Tensor, copies: int, done: Callable[[int], None]
) -> Tensor | None:
    """Embed the images at `rows` [R]: features [R, ...], or [R, copies, ...] of augmented copies; None if they would
    take too much memory."""
    features, step = torch.empty(0), max(1, IMAGES_AT_ONCE // (4 + 4 * copies))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        images = sampler.images_at(some)
        own = algorithm.embed_copies(images, some.tolist()) if copies else algorithm.embed(images)
        if start == 0:
            if len(rows) * own[0].numel() > FEATURES_KEPT:
                return None
            features = own.new_empty(len(rows), *own.shape[1:])
        features[start : start + len(some)] = own
        done(len(some) * max(1, copies))
    return features


def learning_rates(config: TrainConfig) -> str:
    """Return the end of an error on diverged predictions: the learning rates of adaptation; empty without any."""
    group = "head" if config.head else "algo"
    rates = [f"{group}.{name}={value}" for name, value in getattr(config, group).items() if name.endswith("lr")]
    return f": adaptation diverged with {', '.join(rates)}" if rates else ""


def with_changes(checkpoint: Checkpoint, given: Any, names: tuple[str, ...] = CHANGEABLE) -> TrainConfig:
    """Return the settings of a checkpoint, with those of `names`, algo, dataset and head that `given` changes."""
    changes = {name: value for name in names if (value := getattr(given, name, None)) is not None}
    if "_target_" in given.algo:
        raise UserError("algo._target_: the method of a checkpoint cannot be changed")
    for group in ("algo", "dataset", "head"):
        changed = getattr(given, group)
        trained = changed if "_target_" in changed else getattr(checkpoint.config, group)  # a new data set or head
        if unknown := changed.keys() - trained.keys():
            raise UserError(f"{group}.{min(unknown)}: {checkpoint.path} has no such setting")
        changes[group] = merged(trained, changed)
    return dataclasses.replace(checkpoint.config, **changes)


def write_evaluation(
    folder: Path, measured: list[tuple[Tensor, Result]], differences: list[dict[str, Any]] | None = None
) -> None:
    """Write result.json, and accuracies.npy [results, E] with the accuracy of every episode.

    Rows are in the order of the results; those with fewer episodes are padded with NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    rows = [accuracy for accuracy, _ in measured]
    numpy.save(content, pad_sequence(rows, batch_first=True, padding_value=math.nan).numpy())
    with written_or_refused(folder / "accuracies.npy"):
        write_bytes_atomically(folder / "accuracies.npy", content.getvalue())
    ResultFile([result for _, result in measured], differences=differences).write(folder / "result.json")
