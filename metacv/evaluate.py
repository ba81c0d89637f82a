"""Evaluate a model on episodes: accuracy with a 95 % interval. Implements `metacv evaluate`, and validation."""

import dataclasses
import io
import math
import sys
import time
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metacv import CONFIG_DIR, seen, version
from metacv.algorithms.base import Algorithm, evaluating
from metacv.algorithms.heads.base import WithHead
from metacv.algorithms.heads.finetune import RATES, Tuned
from metacv.config import (
    BatchNormMode,
    EvaluateConfig,
    TestConfig,
    TrainConfig,
    class_name,
    merged,
    network_name,
    validation_protocol,
)
from metacv.confusion import Predictions, confusion
from metacv.data.bank import Dataset, ImageBank, fitted
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.episodes import FEATURES_AT_ONCE, SharedFeatures, embed_rows, predict_episodes
from metacv.errors import UserError
from metacv.feature_cache import feature_cache
from metacv.features import DEFAULT_HEAD, evaluate_features
from metacv.files import user_path, write_bytes_atomically, written_or_refused
from metacv.look import warn_if_unlike
from metacv.model import (
    Checkpoint,
    build_dataset,
    describe_device,
    load_checkpoint,
    pick_device,
    settings,
    uses_query_set,
    with_head,
)
from metacv.precision import keep_freed_memory
from metacv.pretrained import checkpoint_or_pretrained
from metacv.progress import Progress, header
from metacv.reliability import VALIDATION_EPISODES, alone, measure
from metacv.results import (
    UNBALANCED,
    Result,
    ResultFile,
    method_text,
    summary,
    task_text,
    warn_at_chance,
)
from metacv.terminal import say, warn
from metacv.text import aligned, percent, plural, printable, shortened

CHANGEABLE = ("way", "shot", "query", "vary", "episodes", "batch_norm", "seed")
CLASSES = {"dataset": "dataset", "method": "algo", "head": "head"}  # field of a result -> group of settings
DETAILS = ("classes.csv", "confusion.png", "embedding.png")  # written for one model in one batch-norm mode
CENTRED_ON = 2000  # training images for the mean feature
RATED_ON = 10  # validation episodes to choose a learning rate on; the authors of P>M>F use 3 to 5


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
    shared: SharedFeatures  # with other evaluations of the same backbone
    chosen: dict[str, Any] = dataclasses.field(default_factory=dict)  # as Result has it

    @property
    def changes(self) -> dict[str, Any]:
        """Settings of algorithm and head that differ from training, except those that change speed only."""
        found = self.checkpoint.changes(self.config)
        return {name: now for name, now in found.items() if name not in self.algorithm.execution_settings}

    @property
    def about(self) -> dict[str, str]:
        """The method, data, episodes and device, for the header on the terminal."""
        config, sampler = self.config, self.episodes.sampler
        method, head, data = (class_name(getattr(config, group)) for group in ("algo", "head", "dataset"))
        bank, rotation = sampler.bank, f", rotation {sampler.rotation}" * (sampler.rotation != "none")
        images = f"{len(bank.class_names):,} classes, {len(bank.images):,} images"
        size = getattr(self.algorithm.embedding, "size", None)
        resized = f", resized to {size}x{size}" * (size not in (None, bank.image_shape[1]))
        return {
            "method": task_text(method, head, sampler.way, sampler.shot, sampler.query, sampler.vary),
            "network": network_name(config.backbone),
            "data": f"{data} {self.split}: {images}; {'x'.join(map(str, bank.image_shape))}{resized}{rotation}",
            "episodes": f"{len(self.episodes):,}",
            "device": describe_device(sampler.device),
        }

    def variants(self, given: EvaluateConfig) -> "list[Evaluation]":
        """Return this evaluation for each balance of the queries and, for a head that uses the whole query set, also
        for the nearest class mean, which does not."""
        heads = [self]
        if isinstance(self.algorithm, WithHead) and self.algorithm.uses_query_set:
            node = DEFAULT_HEAD | {"augment": self.algorithm.copies, "flip": self.algorithm.classify.flip}
            config = dataclasses.replace(self.config, head=node)
            heads.append(dataclasses.replace(self, config=config, algorithm=with_head(self.algorithm, config)))
        balances = given.balances(self.algorithm.uses_query_set, self.config.vary)
        lists = [self.episodes.balanced_as(balance) for balance in balances]
        shared = SharedFeatures(lists, self.shared.cache)
        return [dataclasses.replace(one, episodes=episodes, shared=shared) for one in heads for episodes in lists]

    def run_and_print(self, batch_norm: str, name: str) -> tuple[Tensor, Result]:
        """Run the evaluation of the run called `name` and print its result; return accuracies [E] and the result."""
        predictions, result = self.run(batch_norm, f"evaluating {name}")
        say(f"{printable(name)}: {result.describe()}")
        warn_at_chance(result, name)
        return predictions.accuracy, result

    def run(self, batch_norm: str, label: str = "evaluating") -> tuple[Predictions, Result]:
        """Run the evaluation; return predictions and the result. UserError if predictions are not finite."""
        if isinstance(self.algorithm, Tuned) and self.algorithm.lr == "auto":
            return self.with_rate(batch_norm).run(batch_norm, label)
        start = time.perf_counter()
        progress = Progress(label, lines=True)
        features = self.shared.get(self.algorithm, batch_norm, progress)
        cause = learning_rates(self.config)
        predictions = predict_episodes(self.algorithm, self.episodes, batch_norm, progress, features, cause)
        seconds = time.perf_counter() - start
        accuracy = predictions.accuracy
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
            chosen=self.chosen,
            checkpoint=str(self.checkpoint.path),
            checkpoint_sha256=self.checkpoint.sha256,
            step=self.checkpoint.step,
            **self.checkpoint.training.result_fields(),
            device=describe_device(self.episodes.sampler.device),
            tasks_per_second=len(accuracy) / seconds,
            uses_query_set=self.algorithm.uses_query_set,
            **summary(accuracy, self.episodes.rounds),
        )

    def with_rate(self, batch_norm: str) -> "Evaluation":
        """Choose the learning rate of a head that tunes the network on validation episodes."""
        try:
            episodes = self.validation_episodes(RATED_ON)
        except UserError as error:
            text = "the rate is chosen on validation episodes; set a number, such as head.lr=0.0001"
            raise UserError(f"head.lr=auto: {error}; {text}") from None
        found: dict[float, tuple[Tensor, Evaluation]] = {}
        for rate in RATES:
            config = dataclasses.replace(self.config, head=self.config.head | {"lr": rate})
            one = dataclasses.replace(self, config=config, algorithm=with_head(self.algorithm, config))
            progress = Progress(f"trying head.lr={rate:g}", lines=True)
            found[rate] = predict_episodes(one.algorithm, episodes, batch_norm, progress).accuracy.nan_to_num(0), one
        best = best_rate({rate: accuracy for rate, (accuracy, _) in found.items()})
        accuracies = {f"{rate:g}": float(accuracy.mean()) for rate, (accuracy, _) in found.items()}
        tried = ", ".join(f"{rate}: {100 * accuracy:.1f} %" for rate, accuracy in accuracies.items())
        say(f"{batch_norm}: head.lr={best:g}, chosen on {len(episodes)} validation episodes ({tried})")
        chosen = {"head.lr": best, "split": "val", "episodes": len(episodes), "accuracy": accuracies}
        return dataclasses.replace(found[best][1], chosen=chosen)

    def validation_episodes(self, count: int = VALIDATION_EPISODES) -> EpisodeList:
        """Return episodes of the same task from the validation classes that the model was not trained on; UserError if
        the test has validation classes."""
        if self.split == "val":
            raise UserError("split=val: the test must not have the classes of the validation episodes")
        own = self.episodes.sampler
        bank = seen.unseen(self.dataset, self.dataset.load("val"), "val", [self.checkpoint], only=True)
        bank = dataclasses.replace(bank, images=fitted(bank.images, own.bank.image_shape))
        task = own.way, own.shot, own.query, self.dataset.rotation("val"), self.config.seed, own.device
        return EpisodeList(EpisodeSampler(bank, *task, vary=own.vary), count)

    def calibration(self, result: Result, validation: EpisodeList | None) -> dict[str, Any]:
        """Return the fields of a result on calibration, by leave-one-out without `validation`. Images that the
        evaluation embedded are not embedded again."""
        algorithm = alone(self.algorithm, result.batch_norm, "calibrate")
        own, device = self.episodes.sampler, self.episodes.sampler.device
        before = self.shared.get(self.algorithm, result.batch_norm, Progress("calibrating", lines=True))

        def embed(sampler: EpisodeSampler, rows: Tensor, copies: bool) -> Tensor:
            known, values = torch.empty(0, dtype=torch.long), torch.empty(0)
            if sampler.bank is own.bank and before:
                known, values = before.of_copies if copies else (before.rows, before.features)
            missing = ~torch.isin(rows, known)
            with Progress("calibrating", lines=True).track(int(missing.sum()), "image") as done:
                new = embed_rows(algorithm, sampler, rows[missing], algorithm.copies * copies, done)
            if new is None:
                raise UserError("calibrate: the features take too much memory; use fewer episodes")
            if not len(known):
                return new
            found = values[torch.searchsorted(known, rows).clamp_max(len(known) - 1)]
            if missing.any():
                found[missing.to(found.device)] = new.to(found.device)
            return found

        with evaluating(algorithm, result.batch_norm, device):
            fields = measure(algorithm, self.episodes, validation, embed, FEATURES_AT_ONCE)
        return fields | {"calibrated": "val" if validation else "loo"}


def best_rate(accuracies: dict[float, Tensor]) -> float:
    """Return the rate with the largest mean gain over rate 0, among those whose gain exceeds its standard error; 0 if
    there is none. `accuracies` [E] are of the same episodes."""
    gains = {rate: own - accuracies[0.0] for rate, own in accuracies.items()}
    sure = [rate for rate, own in gains.items() if own.mean() > own.std() / len(own) ** 0.5]
    return max(sure, key=lambda rate: float(gains[rate].mean()), default=0.0)


def record(config: TrainConfig, episodes: EpisodeList, **measured: Any) -> Result:
    """Build the Result of an evaluation: `measured` fields, and those given by settings, episodes and versions."""
    names = ("way", "shot", "query", "rotation", "query_balance", "vary")
    known = {name: getattr(episodes.sampler, name) for name in names}
    known["disjoint"] = episodes.rounds > 0
    known |= {name: class_name(getattr(config, group)) for name, group in CLASSES.items()}
    known |= {"backbone": network_name(config.backbone), "torch": str(torch.__version__), "metacv": version()}
    return Result(**known, **measured, episodes=len(episodes))


def evaluate(cfg: EvaluateConfig, folder: Path) -> None:
    """Evaluate checkpoints, all runs below a folder, a network or features; and write the results into `folder`."""
    if not cfg.checkpoint and not cfg.features and not cfg.backbone:
        choices = "checkpoint=RUN, backbone=NAME for a pre-trained network, or features=FILE.npz"
        raise UserError(f"evaluate needs a model: {choices}")
    if cfg.datasets and (cfg.features or cfg.backbone or cfg.dataset):
        text = f"dataset.{next(iter(cfg.dataset))}" if cfg.dataset else "features" if cfg.features else "backbone"
        raise UserError(f"{text}: cannot be set together with several data sets")
    if not cfg.features and not cfg.backbone:
        given = cfg.checkpoint if isinstance(cfg.checkpoint, list) else [cfg.checkpoint]
        folders = [(place, runs_below(place)) for place in map(user_path, map(str, given))]
        if len(given) > 1 or cfg.datasets or any(below for _, below in folders):
            if cfg.calibrate:
                raise UserError(f"calibrate={cfg.calibrate}: takes one checkpoint and one data set")
            places = dict.fromkeys(path for place, below in folders for path in below or [place])
            return evaluate_runs(cfg, folder, [*places])
        cfg = dataclasses.replace(cfg, checkpoint=given[0])
    measured = evaluate_features(cfg) if cfg.features else evaluate_checkpoint(cfg)
    write_evaluation(folder, [(predictions.accuracy, result) for predictions, result in measured])
    for _, result in measured:
        print(result.describe())
        warn_at_chance(result)
    if len({result.query_balance for _, result in measured}) > 1:
        print(balances_side_by_side([result for _, result in measured]))
    if len({result.batch_norm for _, result in measured}) == 1 and not measured[0][1].vary:
        write_details(folder, *measured[0], with_pictures=cfg.pictures)
    print(f"result: {folder / 'result.json'}")


def write_details(folder: Path, predictions: Predictions, result: Result, with_pictures: bool) -> None:
    """Write classes.csv and the pictures; print the hardest pairs and the files written."""
    found = confusion(predictions)
    files = {"classes.csv": found.csv()}
    if with_pictures:
        from metacv.pictures import pictures  # matplotlib is slow to import, and training does not need it

        files |= pictures(predictions, result, found)
    for name, content in files.items():
        with written_or_refused(folder / name):
            write_bytes_atomically(folder / name, content)
    if text := found.describe():
        print(text)
    print(f"written: {folder}/{', '.join(files)}")


def evaluate_checkpoint(cfg: EvaluateConfig) -> list[tuple[Predictions, Result]]:
    """Evaluate one checkpoint; return predictions and results for each requested batch-norm mode and query balance."""
    modes = batch_norm_modes(cfg)
    given = dataclasses.replace(cfg, batch_norm=modes[0])
    evaluation = prepare(checkpoint_or_pretrained(cfg, cfg.checkpoint), given)
    names = [mode or evaluation.config.batch_norm for mode in modes]
    validation = None
    if cfg.calibrate:
        if evaluation.config.vary:
            raise UserError(f"calibrate={cfg.calibrate}: cannot be set together with vary={evaluation.config.vary}")
        for name in names:
            alone(evaluation.algorithm, name, f"calibrate={cfg.calibrate}")
        if cfg.calibrate == "val":
            validation = evaluation.validation_episodes()
        elif evaluation.config.shot < 2:
            raise UserError("calibrate=loo: needs shot=2 or more, to classify each image by others of its class")
    cases = [*product(names, evaluation.variants(cfg))]
    say(header([evaluation.about]))
    measured = [(one, *one.run(name)) for name, one in cases]
    if not cfg.calibrate:
        return [(predictions, result) for _, predictions, result in measured]
    return [(own, dataclasses.replace(result, **one.calibration(result, validation))) for one, own, result in measured]


def evaluate_runs(cfg: EvaluateConfig, folder: Path, places: list[Path]) -> None:
    """Evaluate the runs in `places` with the same settings, on each data set; UserError at the end if some failed."""
    modes, failed = batch_norm_modes(cfg), []
    evaluations: dict[tuple[str, str], Evaluation] = {}
    measured: list[tuple[str, str, Tensor, Result]] = []
    runs = [*zip(places, shortened(places), strict=True)]

    @contextmanager
    def continue_after_error(name: str, data: str) -> Iterator[str]:
        """Yield the name of a run on a data set; print its error instead of raising it."""
        whole = f"{name} on {data}" if data else name
        try:
            yield whole
        except UserError as error:
            failed.append(whole)
            print(f"metacv: {printable(f'{whole}: {error}')}", file=sys.stderr)

    for (place, name), (data, node) in product(runs, (cfg.datasets or {"": cfg.dataset}).items()):
        with continue_after_error(name, data):
            checkpoint = load_checkpoint(place)
            if data and node.get("_target_") == checkpoint.config.dataset.get("_target_"):
                node = changed_settings(data, node)  # its own data set, prepared as in training
            given = dataclasses.replace(cfg, batch_norm=modes[0], dataset=node)
            evaluations[name, data] = prepare(checkpoint, given)
    if evaluations:
        say(header([evaluation.about for evaluation in evaluations.values()]))
    for (name, data), evaluation in evaluations.items():
        with continue_after_error(name, data) as whole:
            for mode, one in product(modes, evaluation.variants(cfg)):
                measured.append((name, data, *one.run_and_print(mode or evaluation.config.batch_norm, whole)))
    if measured:
        write_evaluation(folder, [(accuracy, result) for *_, accuracy, result in measured])
        own = [(evaluations[name, data].checkpoint, name, result) for name, data, _, result in measured]
        table = across_data_sets([*cfg.datasets], measured) if cfg.datasets else ranking(own)
        print(f"\n{table}\nresult: {folder / 'result.json'}")
    if failed:
        count = len(runs) * max(1, len(cfg.datasets))
        raise UserError(f"{len(failed)} of {plural(count, 'run')} could not be evaluated: {', '.join(failed)}")


def changed_settings(data: str, node: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a data set that the command line changes."""
    known = yaml.safe_load((CONFIG_DIR / "dataset" / f"{data}.yaml").read_text("utf-8"))
    return {name: value for name, value in node.items() if value != known.get(name)}


def across_data_sets(datasets: list[str], measured: list[tuple[str, str, Tensor, Result]]) -> str:
    """Format a table of accuracies with a line for each run and way to evaluate it, and a column for each data set."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, data, _, result in measured:
        row = cells.setdefault((printable(name), result.conditions), {})
        row[data] = f"{percent(result.accuracy, result.ci95)} %"
    lines = [[name, *(own.get(data, "") for data in datasets), how] for (name, how), own in cells.items()]
    return aligned([[measured[0][3].split, *datasets, ""], *lines])


def ranking(measured: list[tuple[Checkpoint, str, Result]]) -> str:
    """Format a table of runs with their test accuracies, sorted by validation accuracy: the best of many test
    accuracies is high partly by chance. Runs that were validated in different ways are not sorted."""
    validations = [checkpoint.content.get("validation") for checkpoint, *_ in measured]
    ways = {str(validation_protocol(own.config)) + str(uses_query_set(own.config)) for own, *_ in measured}
    lines, numbers = [["run", "validation", measured[0][2].split, ""]], []
    for validation, (_, name, result) in zip(validations, measured, strict=True):
        best: list[Any] = (
            [validation.get(name) for name in ("accuracy", "ci95")] if isinstance(validation, dict) else []
        )
        known = [number for number in best if isinstance(number, float) and math.isfinite(number)]
        shown = f"{percent(*known)} %" if len(known) == 2 else ""
        numbers.append(known[0] if shown else math.nan)
        lines.append([printable(name), shown, f"{percent(result.accuracy, result.ci95)} %", result.conditions])
    ranked = len(ways) == 1 and not any(map(math.isnan, numbers))
    order = sorted(range(len(numbers)), key=lambda i: -numbers[i]) if ranked else range(len(numbers))
    title = "runs, the best in validation first:" if ranked else "runs, in order of their names (not all were validated"
    title += "" if ranked else " on the same tasks):"
    return f"{title}\n{aligned([lines[0], *(lines[i + 1] for i in order)])}"


def balances_side_by_side(results: list[Result]) -> str:
    """Format a table with a line for each model, and a column for each balance of the queries."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        model = method_text(result.method, result.head), result.conditions.removesuffix(UNBALANCED)
        cells.setdefault(model, {})[result.query_balance] = f"{percent(result.accuracy, result.ci95)} %"
    columns = [*next(iter(cells.values()))]
    lines = [["queries:", *columns, ""], *([name, *own.values(), how] for (name, how), own in cells.items())]
    return f"{aligned(lines)}\n(dirichlet: random numbers of queries per class, with the same support images)"


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
    with checkpoint.blamed(config):
        dataset = build_dataset(config.dataset, given.data_dir)
    if given.dataset.get("_target_"):
        dataset.prepare_like(build_dataset(checkpoint.config.dataset, given.data_dir))
    bank = dataset.load(given.split)
    if given.dataset.get("_target_") and bank.image_shape != checkpoint.image_shape:
        own, trained = ("x".join(map(str, shape)) for shape in (bank.image_shape, checkpoint.image_shape))
        warn(f"the images of {bank.name} are resized from {own} to {trained}, as the model takes them")
        bank = dataclasses.replace(bank, images=fitted(bank.images, checkpoint.image_shape))
    if bank.image_shape != checkpoint.image_shape:
        own, trained = ("x".join(map(str, shape)) for shape in (bank.image_shape, checkpoint.image_shape))
        raise UserError(f"{bank.name} has images of {own}, but {checkpoint.path} was trained on {trained}")
    unseen = seen.unseen(dataset, bank, given.split, (checkpoint, *others), given.unseen_only)
    left_out, bank = len(bank.class_names) - len(unseen.class_names), unseen
    if config.dataset != checkpoint.config.dataset:
        warn_if_unlike(f"the images of {bank.name}", bank.images, checkpoint, dataset)
    task = config.way, config.shot, config.query, dataset.rotation(given.split)
    sampler = EpisodeSampler(bank, *task, config.seed, device, vary=config.vary)
    episodes = EpisodeList(sampler, config.episodes)
    network = checkpoint.build(config)
    with checkpoint.blamed(config):
        algorithm = with_head(network, config, checkpoint.centre).to(device)
    if isinstance(algorithm, WithHead) and algorithm.needs_centre:
        centre(algorithm, training_images(checkpoint, dataset, given.data_dir), device)
    if device.type == "cpu":
        keep_freed_memory()
    cache = feature_cache(user_path(given.data_dir), algorithm, config, episodes.sampler)
    shared = SharedFeatures([episodes], cache)
    return Evaluation(checkpoint, config, episodes, given.split, algorithm, dataset, left_out, shared)


def training_images(checkpoint: Checkpoint, tested: Dataset, data_dir: str) -> ImageBank:
    """Return the training images of a checkpoint; UserError if they are not there, nor in the data set `tested`."""
    try:
        return build_dataset(checkpoint.config.dataset, data_dir).load("train")
    except UserError as error:
        if (splits := checkpoint.content.get("splits")) and splits == tested.splits():  # the folder was moved
            return tested.load("train")
        raise UserError(f"head: needs the mean feature of the training images ({error}); choose another head") from None


def centre(algorithm: WithHead, bank: ImageBank, device: torch.device) -> Tensor:
    """Set and return the mean feature [D] of training images for a head that subtracts it."""
    some = torch.randperm(len(bank.images), generator=torch.Generator().manual_seed(0))[:CENTRED_ON].sort().values
    return algorithm.centre(bank.images[some].to(device).float().div_(255))


def learning_rates(config: TrainConfig) -> str:
    """Return the end of an error on diverged predictions: the learning rates of adaptation; empty without any."""
    group = "head" if config.head else "algo"
    rates = [f"{group}.{name}={value}" for name, value in getattr(config, group).items() if name.endswith("lr")]
    return f": adaptation diverged with {', '.join(rates)}" if rates else ""


def with_changes(checkpoint: Checkpoint, given: Any, names: tuple[str, ...] = CHANGEABLE) -> TrainConfig:
    """Return the settings of a checkpoint, with those of `names`, algo, dataset and head that `given` changes."""
    changes = {name: value for name in names if (value := getattr(given, name, None)) is not None}
    if changes.get("vary") == "none":
        changes["vary"] = None
    if "_target_" in given.algo:
        raise UserError("algo._target_: the method of a checkpoint cannot be changed")
    known = settings(checkpoint.config)
    for group in ("algo", "dataset", "head"):
        changed = getattr(given, group)
        if "_target_" not in changed:  # no new data set or head
            if unknown := changed.keys() - known[group].keys():
                raise UserError(f"{group}.{min(unknown)}: {checkpoint.path} has no such setting")
            changed = merged(getattr(checkpoint.config, group), changed)
        changes[group] = changed
    return dataclasses.replace(checkpoint.config, **changes)


def write_evaluation(
    folder: Path, measured: list[tuple[Tensor, Result]], differences: list[dict[str, Any]] | None = None
) -> None:
    """Write result.json, and accuracies.npy [results, E] with the accuracy of every episode.

    Rows are in the order of the results; those with fewer episodes are padded with NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in DETAILS:  # of an earlier evaluation
        (folder / name).unlink(missing_ok=True)
    content = io.BytesIO()
    rows = [accuracy for accuracy, _ in measured]
    numpy.save(content, pad_sequence(rows, batch_first=True, padding_value=math.nan).numpy())
    with written_or_refused(folder / "accuracies.npy"):
        write_bytes_atomically(folder / "accuracies.npy", content.getvalue())
    ResultFile([result for _, result in measured], differences=differences).write(folder / "result.json")
