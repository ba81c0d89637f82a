"""A training run: its state, its folder, and how it stops and resumes."""

import contextlib
import copy
import errno
import random
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from hydra import compose
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from metacv import limits
from metacv.algorithms.base import Algorithm
from metacv.bounds import NotNegative, checked
from metacv.config import (
    TrainConfig,
    absolute,
    class_name,
    differences,
    flat,
    from_dict,
    is_path,
    is_resumable,
    to_dict,
    typed,
    with_paths,
)
from metacv.data.bank import Look
from metacv.data.sampler import EpisodeSampler, ImageSampler
from metacv.errors import UserError
from metacv.files import copy_atomically, write_bytes_atomically
from metacv.logger import Logger
from metacv.model import (
    Checkpoint,
    Training,
    checkpoint_path,
    execution_settings,
    load_checkpoint,
    save_checkpoint,
    settings,
)
from metacv.pickles import check_extent
from metacv.terminal import warn
from metacv.text import first_line, printable, setting, shortened_in_the_middle
from metacv.words import in_words

THEN = ", then "  # between the hardware of the parts of a run
STATE = ("overrides", "optimizer", "schedule", "sampler", "random", "validated", "best", "since_best", "window")


@dataclass
class Run:
    """The state of a training run, all of which a checkpoint must hold."""

    config: TrainConfig
    overrides: list[str]  # name=value, from the command line
    algorithm: Algorithm
    optimizer: Optimizer | None  # None if nothing is trained
    schedule: LRScheduler | None
    sampler: EpisodeSampler | ImageSampler
    here: str  # hardware of this process
    splits: dict[str, list[str]] | None  # classes of each split; None if the settings alone determine them
    trained_on: list[str] = field(default_factory=list)  # identities of classes, see Dataset.identities
    validated_on: list[str] = field(default_factory=list)
    look: Look = field(default_factory=dict)  # statistics of the training images, see look.py
    flops: float = 0.0  # per step
    average: AveragedModel | None = None  # moving average of the algorithm, if `ema` is set
    centre: Tensor | None = None  # mean feature of training images, for heads that subtract it
    earlier: Training = field(default_factory=Training)  # runs whose weights or predictions this one uses
    before: str = ""  # hardware up to the step `resumed`
    resumed: int = 0
    step: int = 0
    validated: int = -1  # the step of the last validation
    best: dict[str, float] = field(default_factory=lambda: {"accuracy": -1.0})
    since_best: int = 0  # validations since the best one
    window: list[dict[str, Tensor]] = field(default_factory=list)  # scalars of the steps since the last log line
    began: float = field(default_factory=time.perf_counter)

    @property
    def tested(self) -> Algorithm:
        """The algorithm that is validated and kept in best.pt: the moving average, if any."""
        if self.average is None:
            return self.algorithm
        assert isinstance(self.average.module, Algorithm)
        return self.average.module

    @property
    def steps(self) -> int:
        return self.config.steps if self.optimizer else 0

    @property
    def seconds(self) -> float:
        """Seconds of training, without the time between a stop and a resume."""
        return time.perf_counter() - self.began

    @property
    def hardware(self) -> str:
        """The hardware of each part of the training, in order."""
        if self.before and (self.step == self.resumed or self.before.split(THEN)[-1] == self.here):
            return self.before
        if not self.before or not self.resumed:
            return self.here
        return shortened_in_the_middle(f"{self.before} to step {self.resumed}{THEN}{self.here}", limits.HARDWARE)

    @property
    def validation_due(self) -> bool:
        regular = self.step > 0 and self.step % self.config.eval_every == 0
        return self.step > self.validated and (regular or self.step >= self.steps)

    @property
    def finished(self) -> bool:
        out_of_patience = self.config.patience is not None and self.since_best >= self.config.patience
        return out_of_patience or (self.step >= self.steps and not self.validation_due)

    @property
    def training(self) -> Training:
        """Cost and data of training so far, including earlier runs."""
        return Training(
            classes=self.sampler.classes,
            images=self.step * self.config.meta_batch * self.sampler.images_each,
            flops=self.step * self.flops,
            seconds=round(self.seconds, 1),
            trained_on=self.trained_on,
            validated_on=self.validated_on,
            look=self.look,
        ).after(self.earlier)

    def record_earlier_run(self, first: Checkpoint, role: str = "") -> None:
        """Record that weights or a teacher come from another run; each earlier run is counted once."""
        what = f"{role}{class_name(first.config.algo)} on {class_name(first.config.dataset)}, step {first.step}"
        known = any(first.sha256[:16] in stage for stage in self.earlier.stages)
        own = Training(stages=[f"{what}, sha256 {first.sha256[:16]}"]).after(Training() if known else first.training)
        self.earlier = own.after(self.earlier)
        if both := {*first.training.trained_on} & {*self.validated_on}:
            text = f"{first.path} was trained on {len(both)} classes of this run's validation ({min(both)}, ...)"
            warn(f"{text}; accuracies on them are not those of new classes")

    def weights(self) -> dict[str, Any]:
        """Return the part of a checkpoint that evaluation needs."""
        return {
            "config": to_dict(self.config),
            "image_shape": list(self.sampler.bank.image_shape),
            "step": self.step,
            "algorithm": self.tested.state_dict(),
            "splits": self.splits,
            "training": asdict(self.training),
        } | ({"centre": self.centre} if self.centre is not None else {})

    def state(self) -> dict[str, Any]:
        """Return the content of last.pt, which a run resumes from."""
        plain = ("overrides", "validated", "best", "since_best", "seconds", "hardware")
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        names = self.window[0] if self.window else ()
        own = {
            "config": to_dict(self.config, with_local=True),
            "earlier": asdict(self.earlier),
            "algorithm": self.algorithm.state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "optimizer": self.optimizer.state_dict() if self.optimizer else {},
            "schedule": self.schedule.state_dict() if self.schedule else {},
            "sampler": self.sampler.state_dict(),
            "random": {"python": random.getstate(), "cpu": torch.get_rng_state(), "cuda": cuda},
            "window": {name: torch.stack([scalars[name] for scalars in self.window]) for name in names},
        }
        weights = {name: value for name, value in self.weights().items() if name != "centre"}  # of an earlier step
        return weights | {name: getattr(self, name) for name in plain} | own

    def load(self, source: Checkpoint) -> None:
        """Load a last.pt; UserError if it does not fit the settings, or the data set is split differently."""
        source.load_weights(self.algorithm)
        state, path = source.content, source.path
        known = state.get("splits")
        if known != self.splits and (known or "sets" not in self.config.dataset):  # older runs on several have none
            advice = "its folders must have the classes that they had at the start"
            if "split_file" in self.config.dataset:
                advice = f"add {setting('dataset.split_file', path.with_name('split.json'))}"
            raise UserError(f"{path}: the data set is now split differently from this run; {advice}")
        try:
            if self.optimizer and self.schedule:
                self.optimizer.load_state_dict(state["optimizer"])
                self.schedule.load_state_dict(state["schedule"])
            if self.average:
                self.average.load_state_dict(state["average"])
            self.sampler.load_state_dict(state["sampler"])
            random.setstate(state["random"]["python"])
            torch.set_rng_state(state["random"]["cpu"])
            if (cuda := state["random"]["cuda"]) and len(cuda) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(cuda)
            used, self.earlier = self.earlier, from_dict(Training, state.get("earlier", {}))
            self.step, self.validated = int(state["step"]), int(state["validated"])
            self.before, self.resumed = state.get("hardware", ""), self.step
            if not isinstance(self.before, str) or not self.before.isprintable() or len(self.before) > limits.HARDWARE:
                raise ValueError("hardware: not a short text")
            if not -1 <= self.validated <= self.step:
                raise ValueError(f"validated at step {self.validated} of {self.step}")
            self.best, self.since_best = dict(state["best"]), int(state["since_best"])
            self.began = time.perf_counter() - checked("seconds", state.get("seconds", 0), NotNegative)
            columns = {name: values.to(self.sampler.device) for name, values in state["window"].items()}
            if any(values.dim() != 1 or values.is_complex() for values in columns.values()):
                raise ValueError("window: not a number for each step")
            self.window = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            if self.step < self.steps:
                self.try_step()
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, AssertionError) as e:
            raise UserError(f"{path}: its state does not fit its config ({first_line(e)})") from e
        if not {*used.stages} <= {*self.earlier.stages}:  # the path may now be another run
            text = f"is not the run that {path} learned from; set it to that run"
            raise UserError(f"algo.teacher={self.config.algo['teacher']} {text}")
        if self.step > self.config.steps:
            raise UserError(f"steps={self.config.steps}: must be at least {self.step}, the step of {path}")

    def try_step(self) -> None:
        """Step a copy of optimizer and schedule: they check a loaded state only when they step."""
        optimizer, schedule = copy.deepcopy((self.optimizer, self.schedule))
        for group in optimizer.param_groups if optimizer else ():
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the order of steps of a copy
            if optimizer and schedule:
                optimizer.step()
                schedule.step()

    def save(self, folder: Path, logger: Logger, is_best: bool = False) -> None:
        if is_best:
            save_checkpoint(folder / "best.pt", self.weights() | {"validation": self.best})
        logger.sync()  # before last.pt, because a resumed run needs the metrics up to its checkpoint
        save_checkpoint(folder / "last.pt", self.state())
        show_config(folder, to_dict(self.config, with_local=True), self.overrides)


class Stopped(Exception):
    """Raised when a signal arrives during work that can be repeated."""


class StopSignals:
    """Record SIGINT, SIGTERM and SIGHUP, to stop between two steps. A second signal ends the program at once."""

    received = 0

    def __enter__(self) -> "StopSignals":
        names = ("SIGINT", "SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.before = {number: signal.signal(number, self._record) for number in numbers}
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()

    def check(self) -> None:
        if self.received:
            raise Stopped

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a run's folder and remove temporary files of a killed run; UserError if another process has the lock."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"hydra.run.dir={folder}: another process is writing there; choose another folder") from None
    except (NotImplementedError, OSError) as error:  # the file system has no locks
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise
    try:
        for temporary in (*folder.glob(".*.tmp"), *folder.glob(".hydra/.*.tmp")):
            temporary.unlink()
        yield
    finally:
        lock.release()


def remove_unused(folder: Path) -> None:
    """Remove the folder of a command that failed before training, unless another process is writing there."""
    with contextlib.suppress(UserError, OSError), lock_folder(folder):
        if {path.name for path in folder.iterdir()} <= {".hydra", ".lock", "split.json"}:
            shutil.rmtree(folder)


def start(cfg: DictConfig, folder: Path, overrides: list[str]) -> tuple[TrainConfig, list[str], Checkpoint | None]:
    """Return a run's settings, its overrides, and the last.pt to continue from, if any; UserError if they conflict."""
    last = folder / "last.pt"
    own = load_state(last) if last.exists() else None
    if own:
        show_config(folder, own.content["config"], own.content["overrides"])
    resume = own is not None if cfg.resume == "auto" else cfg.resume
    if resume is not True and not isinstance(resume, str):  # false, or an invalid value
        if own:
            raise UserError(f"hydra.run.dir={folder} holds a run; resume=auto continues it")
        return typed(cfg, TrainConfig), [word for word in overrides if word != "resume=auto"], None
    if resume is True and not own:
        raise UserError(f"resume=true, but {folder} has no last.pt: use resume=RUN, or add hydra.run.dir=RUN")
    path = last if resume is True else checkpoint_path(str(resume), "last.pt")
    if own and not (path.exists() and path.samefile(last)):
        load_state(path)  # raises if the file is missing or holds weights only
        raise UserError(f"resume={resume}, but hydra.run.dir={folder} holds another run; choose another folder")
    source = own or load_state(path)
    config, merged = resumed(source, overrides)
    if path.parent.resolve() != folder.resolve():
        for name in ("best.pt", "metrics.jsonl", "events.out.tfevents.*"):
            for file in filter(Path.is_file, path.parent.glob(name)):
                copy_atomically(file, folder / file.name)
    return config, merged, source


def resumed(source: Checkpoint, overrides: list[str]) -> tuple[TrainConfig, list[str]]:
    """Merge a run's settings and overrides with new ones; UserError if a change affects training."""
    own = [without_interpolation(word, source) for word in source.content["overrides"]]
    once = {"resume", *(word for word in own if word[0] in "+~")}  # Hydra adds or deletes a key only once
    given = {word.split("=")[0]: word for word in overrides if {word, word.split("=")[0]}.isdisjoint(once)}
    merged = [word for word in own if word.split("=")[0] not in given] + list(given.values())
    config = typed(compose("train", merged), TrainConfig)
    asked = {name.lstrip("+") for name in given}
    if "data_dir" not in {word.split("=")[0].lstrip("+") for word in own}:
        asked.add("data_dir")  # from the environment of this command
    kept = {**dict(flat(vars(source.config))), "data_dir": source.config.data_dir}

    def as_it_began(name: str, path: str) -> str:
        return path if name in asked else absolute(str(kept.get(name) or path))

    config = TrainConfig(**with_paths(vars(config), as_it_began))
    for name, value in config.dataset.items():  # null now, but earlier versions had other defaults
        if value is None and f"dataset.{name}" not in asked:
            config.dataset[name] = source.config.dataset.get(name)
    execution = execution_settings(config.algo)
    for name, now, before in differences(settings(config), settings(source.config)):
        group = name.partition(".")[0]
        moved = is_path(name) and (now or group == "dataset")
        if not (is_resumable(group) or name in execution or moved):
            raise UserError(f"resume: {name} is {now}, but {source.path} was trained with {before}")
    return config, merged


def without_interpolation(word: str, source: Checkpoint) -> str:
    """Replace an interpolation in a run's override by its value at that time; `${...}` in files is never resolved."""
    if "${" not in word:
        return word
    name = word.partition("=")[0]
    value: Any = to_dict(source.config, with_local=True)
    try:
        for part in name.lstrip("+").split("."):
            value = value[part]
    except (KeyError, TypeError):
        raise UserError(f"{source.path}: {printable(word)} is not one of its settings") from None
    return f"{name}={in_words(value)}"


def load_state(path: Path) -> Checkpoint:
    source = load_checkpoint(path)
    if missing := [name for name in STATE if name not in source.content]:
        raise UserError(f"{path} holds weights only, without {', '.join(missing)}: use last.pt")
    overrides, best = source.content["overrides"], source.content["best"]
    words_are_text = isinstance(overrides, list) and all(isinstance(word, str) and word for word in overrides)
    try:
        check_extent(overrides, limits.WORDS)
    except ValueError as error:
        raise UserError(f"{path}: the overrides of its command line are invalid ({error})") from None
    if not words_are_text or not is_measured(best):
        raise UserError(f"{path} is damaged")
    return source


def is_measured(best: Any) -> bool:
    """Whether this is a valid `Run.best`: of a validation, or the initial value."""
    numbers = isinstance(best, dict) and all(type(value) in (int, float) for value in best.values())
    return numbers and best.keys() in ({"accuracy"}, {"accuracy", "ci95", "step"})


def show_config(folder: Path, config: dict[str, Any], overrides: list[str]) -> None:
    """Rewrite config.yaml and overrides.yaml in .hydra: Hydra overwrites them before a command is checked."""
    hydra = folder / ".hydra"
    if hydra.is_dir():
        write_bytes_atomically(hydra / "config.yaml", OmegaConf.to_yaml(config).encode())
        write_bytes_atomically(hydra / "overrides.yaml", OmegaConf.to_yaml(overrides).encode())


def warn_of_few_test_classes(config: TrainConfig, splits: dict[str, list[str]] | None) -> None:
    """Print a warning if the test split has too few classes for evaluation."""
    rotations = 4 if config.dataset.get("test_rotation") == "as_classes" else 1
    if splits and "fractions" in config.dataset and (classes := rotations * len(splits["test"])) < config.way:
        text = f"way={config.way}, but the test split has only {classes} classes; dataset.fractions can give it more"
        warn(text)
