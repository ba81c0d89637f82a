"""A training run: its state, its folder, how it is stopped and how it goes on."""

import contextlib
import signal
import threading
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
from metacv.data.episodes import EpisodeSampler

# What may change when a run goes on: none of it changes what a step computes.
RESUMABLE = {"resume", "steps", "eval_every", "patience", "log_every", "device", "data_dir"}


@dataclass
class Run:
    """All that changes in training, and so all that a checkpoint must hold."""

    config: dict[str, Any]
    overrides: list[str]
    algorithm: Algorithm
    optimizer: Optimizer
    schedule: LRScheduler | None
    sampler: EpisodeSampler
    step: int = 0
    best: dict[str, float] = field(default_factory=lambda: {"accuracy": -1.0})
    since_best: int = 0  # validations
    window: list[Tensor] = field(default_factory=list)  # loss and accuracy of the steps not logged yet

    def weights(self) -> dict[str, Any]:
        """What it takes to evaluate."""
        return {
            "config": self.config,
            "image_shape": list(self.sampler.bank.image_shape),
            "step": self.step,
            "algorithm": self.algorithm.state_dict(),
        }

    def state(self) -> dict[str, Any]:
        """What it takes to go on."""
        return self.weights() | {
            "overrides": self.overrides,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
            "sampler": self.sampler.state_dict(),
            "random": checkpoint.random_states(),
            "best": self.best,
            "since_best": self.since_best,
            "window": torch.stack(self.window).cpu() if self.window else torch.zeros(0, 2),
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        checkpoint.load_weights(self.algorithm, state, path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(state["schedule"])
            self.sampler.load_state_dict(state["sampler"])
            checkpoint.set_random_states(state["random"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise MetacvError(f"{path}: its state does not fit its config ({error})") from None
        self.step, self.best, self.since_best = state["step"], state["best"], state["since_best"]
        self.window = list(state["window"].to(self.sampler.device))

    def stop_if_not_finite(self, folder: Path) -> None:
        """Looks at all steps since the last line of metrics at once: to look at each would hold a GPU up."""
        finite = torch.stack(self.window)[:, 0].isfinite().tolist() if self.window else []
        if not all(finite):
            at = self.step - len(finite) + 1 + finite.index(False)
            last = folder / "last.pt"
            good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been saved"
            raise MetacvError(f"the loss is not finite at step {at}; {good}")


class StopSignals:
    """Takes down SIGINT and SIGTERM, to be obeyed between two steps; a second one ends the program at once."""

    received = 0

    def __enter__(self) -> "StopSignals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()

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
        except OSError:
            raise MetacvError(f"hydra.run.dir={folder}: another run is writing there") from None
        yield


def begin_or_resume(
    cfg: DictConfig, folder: Path, overrides: list[str]
) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """The config to train, the state to go on from if there is one, and the overrides that the config comes from.

    A resumed run is composed of its own overrides and then of those given now, and must come out as it was trained
    but for what is RESUMABLE.
    """
    last = folder / "last.pt"
    if not cfg.resume:
        if last.exists():
            _show_config(folder, checkpoint.load(last, checkpoint.STATE))
            raise MetacvError(f"hydra.run.dir={folder} holds a run: resume=true goes on with it")
        return plain(cfg), None, overrides
    if cfg.resume is True and not last.exists():
        raise MetacvError(f"resume=true but {folder} holds no last.pt: give hydra.run.dir=RUN or resume=RUN")
    path = last if cfg.resume is True else checkpoint.find(cfg.resume, "last.pt")
    if last.exists() and not path.samefile(last):
        raise MetacvError(f"resume={cfg.resume} but {folder} holds another run")
    state = checkpoint.load(path, checkpoint.STATE)
    overrides = state["overrides"] + overrides
    config = plain(compose("train", overrides))
    _show_config(folder, {"config": config, "overrides": overrides})
    for name, here, there in _differences(config, state["config"]):
        if name.split(".")[0] not in RESUMABLE:
            raise MetacvError(f"resume: {name} is {here} but {path} was trained with {there}")
    return config, state, overrides


def plain(cfg: DictConfig) -> dict[str, Any]:
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    return config


def _differences(here: Any, there: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(here, dict) and isinstance(there, dict):
        for key in sorted(here.keys() | there.keys()):
            yield from _differences(here.get(key), there.get(key), f"{name}.{key}" if name else key)
    elif here != there:
        yield name, here, there


def _show_config(folder: Path, content: dict[str, Any]) -> None:
    """Puts right what Hydra wrote into the run's folder before the checkpoint could be asked."""
    shown = folder / ".hydra"
    if shown.is_dir():
        OmegaConf.save(content["config"], shown / "config.yaml")
        OmegaConf.save(content["overrides"], shown / "overrides.yaml")
