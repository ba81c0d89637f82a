"""A training run: its state, its folder, how it is stopped and how it goes on."""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hydra import compose
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metacv import MetacvError, checkpoint
from metacv.algorithms.base import Algorithm
from metacv.cli import setting
from metacv.config import TrainConfig
from metacv.data.sampler import EpisodeSampler
from metacv.files import write_bytes_atomically
from metacv.logger import Logger
from metacv.model import check_settings
from metacv.upgrade import upgrade

# What may change when a run goes on: none of it changes what a step computes, but for the last bits on another device.
RESUMABLE = {"resume", "steps", "eval_every", "patience", "log_every", "projector", "device", "compile", "data_dir"}
RESUMABLE |= {"algo.task_batching", "algo.task_chunk", "algo.gradient_checkpointing"}
RESUMABLE |= {"dataset.split_file", "dataset.root"}


@dataclass
class Run:
    """All that changes in training, and so all that a checkpoint must hold."""

    config: dict[str, Any]
    overrides: list[str]
    algorithm: Algorithm
    optimizer: Optimizer
    schedule: LRScheduler
    sampler: EpisodeSampler
    hardware: str
    splits: dict[str, list[str]] | None  # the classes of each, of a user's own images
    step: int = 0
    validated: int = 0  # the step of the last validation
    best: dict[str, float] = field(default_factory=lambda: {"accuracy": -1.0})
    since_best: int = 0  # validations
    window: list[Tensor] = field(default_factory=list)  # loss and accuracy of the steps not logged yet
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.splits is None:
            return
        turns = 4 if self.config["dataset"].get("test_rotation") == "as_classes" else 1
        way, classes = self.config["way"], turns * len(self.splits["test"])
        if classes < way:  # which evaluation will refuse
            said = f"way={way} but the test split has only {classes} classes"
            print(f"metacv: {said}: dataset.fractions may give it more", file=sys.stderr)

    @property
    def seconds(self) -> float:
        """Of work, without the time between a stop and a resume."""
        return time.perf_counter() - self.began

    @property
    def validation_due(self) -> bool:
        last = self.step >= self.config["steps"]
        return self.step > self.validated and (self.step % self.config["eval_every"] == 0 or last)

    @property
    def finished(self) -> bool:
        patience = self.config["patience"]
        if patience is not None and self.since_best >= patience:
            return True
        return self.step >= self.config["steps"] and not self.validation_due

    def weights(self) -> dict[str, Any]:
        """What it takes to evaluate."""
        return {
            "config": checkpoint.without_places(self.config),
            "image_shape": list(self.sampler.bank.image_shape),
            "step": self.step,
            "algorithm": self.algorithm.state_dict(),
            "splits": self.splits,
        }

    def state(self) -> dict[str, Any]:
        """What it takes to go on."""
        return self.weights() | {
            "config": self.config,
            "overrides": self.overrides,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "sampler": self.sampler.state_dict(),
            "random": checkpoint.random_states(),
            "validated": self.validated,
            "best": self.best,
            "since_best": self.since_best,
            "seconds": self.seconds,
            "hardware": self.hardware,
            "window": torch.stack(self.window).cpu() if self.window else torch.zeros(0, 2),
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        checkpoint.load_weights(self.algorithm, state, path)
        if state.get("splits") != self.splits:
            split_file = setting("dataset.split_file", path.with_name("split.json"))
            raise MetacvError(f"{path}: the classes are dealt out otherwise now; {split_file} keeps to its split")
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.sampler.load_state_dict(state["sampler"])
            checkpoint.set_random_states(state["random"])
            self.step, self.validated = int(state["step"]), int(state["validated"])
            self.best, self.since_best = dict(state["best"]), int(state["since_best"])
            self.began = time.perf_counter() - float(state.get("seconds", 0))
            self.window = list(state["window"].to(self.sampler.device))
            if self.finished:  # and so is not trained any more on what it is looked at with
                self.hardware = str(state.get("hardware", self.hardware))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise MetacvError(f"{path}: its state does not fit its config ({error})") from error
        if self.step > self.config["steps"]:
            raise MetacvError(f"steps={self.config['steps']} but {path} is at step {self.step}")

    def save(self, folder: Path, logger: Logger) -> None:
        logger.sync()  # first: a resumed run counts on the metrics up to its checkpoint
        checkpoint.save(folder / "last.pt", self.state())
        show_config(folder, self.config, self.overrides)

    def stop_if_not_finite(self, folder: Path) -> None:
        """Looks at the loss of all steps since the last line of metrics, and at the weights that they led to."""
        finite = torch.stack(self.window)[:, 0].isfinite().tolist() if self.window else []
        if all(finite):
            if all(value.isfinite().all() for value in self.algorithm.state_dict().values()):
                return
            what = f"the weights are not finite after step {self.step}"
        else:
            what = f"the loss is not finite at step {self.step - len(finite) + 1 + finite.index(False)}"
        last = folder / "last.pt"
        good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been saved"
        raise MetacvError(f"{what}; {good}")


class Stopped(Exception):
    """A signal came in the middle of something that can be done again."""


class StopSignals:
    """Takes down SIGINT, SIGTERM and SIGHUP, to be obeyed between two steps; a second one ends the program at once."""

    received = 0

    def __enter__(self) -> "StopSignals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
            self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()

    def check(self) -> None:
        if self.received:
            raise Stopped

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Two runs that write the same checkpoints would both be lost."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MetacvError(f"hydra.run.dir={folder}: another run is writing there") from None
        except OSError:  # a file system without locks
            pass
        for left in folder.glob(".*.tmp"):  # by a run that was killed as it saved
            left.unlink()
        yield


def begin_or_resume(
    cfg: DictConfig, folder: Path, overrides: list[str]
) -> tuple[dict[str, Any], tuple[dict[str, Any], Path] | None, list[str]]:
    """The config to train, the state to go on from with its file, and the overrides that the config comes from.

    A resumed run is composed of its own overrides and then of those given now, and must come out as it was trained
    but for what is RESUMABLE.
    """
    last = folder / "last.pt"
    here = checkpoint.load(last, checkpoint.STATE) if last.exists() else None
    if here is not None:
        show_config(folder, here["config"], here["overrides"])
    if cfg.resume is False:
        if here is not None:
            raise MetacvError(f"hydra.run.dir={folder} holds a run: resume=true goes on with it")
        return plain(cfg), None, overrides
    if cfg.resume is True and here is None:
        raise MetacvError(f"resume=true but {folder} holds no last.pt: give resume=RUN, or hydra.run.dir=RUN too")
    path = last if cfg.resume is True else checkpoint.find(str(cfg.resume), "last.pt")
    state = here if path == last and here is not None else checkpoint.load(path, checkpoint.STATE)
    if here is not None and not path.samefile(last):
        raise MetacvError(f"resume={cfg.resume} but hydra.run.dir={folder} holds another run")
    own = state["overrides"]
    again = {"resume", *(word for word in own if word[0] in "+~")}  # a key is added or deleted only once
    given = {word.split("=")[0]: word for word in overrides if {word, word.split("=")[0]}.isdisjoint(again)}
    overrides = [word for word in own if word.split("=")[0] not in given] + list(given.values())
    config = plain(compose("train", overrides))
    asked = {name.lstrip("+") for name in given}
    trained_on = state["config"]["dataset"].items()
    config["dataset"] |= {k: v for k, v in trained_on if k in checkpoint.FOLDERS and f"dataset.{k}" not in asked}
    for name, given, trained in differences(config, upgrade(state["config"])):
        if RESUMABLE.isdisjoint({name, name.split(".")[0]}):
            raise MetacvError(f"resume: {name} is {given} but {path} was trained with {trained}")
    if path.parent.resolve() != folder.resolve():
        for name in ("best.pt", "metrics.jsonl"):
            if (path.parent / name).exists():
                shutil.copy(path.parent / name, folder / name)
    return config, (state, path), overrides


def plain(cfg: DictConfig) -> dict[str, Any]:
    check_settings(cfg, TrainConfig)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    for name in checkpoint.FOLDERS & config["dataset"].keys():  # so that it is found from any folder
        if isinstance(place := config["dataset"][name], str):
            config["dataset"][name] = os.path.abspath(os.path.expanduser(place))
    return config


def show_config(folder: Path, config: dict[str, Any], overrides: list[str]) -> None:
    """Puts right what Hydra writes into .hydra of a run's folder before this program can refuse a command."""
    shown = folder / ".hydra"
    if shown.is_dir():
        write_bytes_atomically(shown / "config.yaml", OmegaConf.to_yaml(config).encode())
        write_bytes_atomically(shown / "overrides.yaml", OmegaConf.to_yaml(overrides).encode())


def differences(here: Any, there: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(here, dict) and isinstance(there, dict):
        for key in sorted(here.keys() | there.keys()):
            yield from differences(here.get(key), there.get(key), f"{name}.{key}" if name else key)
    elif here != there:
        yield name, here, there
