"""The outer loop: one plain loop for every algorithm."""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hydra import compose
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from metacv import MetacvError, checkpoint
from metacv.algorithms.base import Algorithm
from metacv.build import build_algorithm, build_dataset, build_optimizer, pick_device
from metacv.data.episodes import EpisodeList, EpisodeSampler
from metacv.evaluate import check_norm, evaluate_episodes, summary
from metacv.files import write_bytes_atomically
from metacv.logger import Logger
from metacv.picture import episode_picture

# What may change when a run goes on: none of it changes what a step computes.
RESUMABLE = {"resume", "steps", "eval_every", "patience", "log_every", "device", "data_dir"}


def train(cfg: DictConfig, folder: Path, overrides: list[str]) -> float:
    """Trains as `cfg` says, writes into `folder`, and gives the best accuracy in validation.

    `overrides` is what the command line changed: a resumed run is composed of its own and then of these.
    """
    with only_run_in(folder):
        config, state, overrides = _resume(cfg, folder, overrides)
        _check(config)
        device = pick_device(config["device"])
        torch.manual_seed(config["seed"])
        dataset = build_dataset(config, config["data_dir"])
        train_bank, val_bank = dataset.load("train"), dataset.load("val")
        sampler = EpisodeSampler(
            train_bank, config["train_way"], config["train_shot"], config["train_query"],
            dataset.rotation("train"), config["seed"], device,
        )  # fmt: skip
        validation = EpisodeList(
            EpisodeSampler(
                val_bank, config["way"], config["shot"], config["query"], dataset.rotation("val"), device=device
            ),
            config["eval_episodes"],
        )
        algorithm = build_algorithm(config, train_bank.image_shape).to(device)
        optimizer, schedule = build_optimizer(config, algorithm)
        step, best, since_best = 0, {"accuracy": -1.0}, 0
        window: list[torch.Tensor] = []  # loss and accuracy of the steps since the last line of metrics
        if state is not None:
            checkpoint.load_weights(algorithm, state, folder)
            optimizer.load_state_dict(state["optimizer"])
            if schedule is not None:
                schedule.load_state_dict(state["schedule"])
            sampler.load_state_dict(state["sampler"])
            checkpoint.set_random_states(state["random"])
            step, best, since_best = state["step"], state["best"], state["since_best"]
            window = list(state["window"].to(device))

        def weights(validated: dict[str, float]) -> dict[str, Any]:
            return {
                "config": config, "image_shape": list(train_bank.image_shape), "step": step,
                "algorithm": algorithm.state_dict(), "validation": validated,
            }  # fmt: skip

        def save_last() -> None:
            _stop_if_not_finite(window, step, folder)
            logger.sync()
            checkpoint.save(
                folder / "last.pt",
                weights(best) | {
                    "overrides": overrides, "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict() if schedule is not None else None,
                    "sampler": sampler.state_dict(), "random": checkpoint.random_states(),
                    "best": best, "since_best": since_best,
                    "window": torch.stack(window).cpu() if window else torch.zeros(0, 2),
                },
            )  # fmt: skip

        patience = config["patience"] or math.inf
        with (
            Logger(folder, step) as logger,
            StopSignals() as stop,
            tqdm(total=config["steps"], initial=step, unit="step", disable=None) as bar,
        ):
            since = time.perf_counter(), step
            while step < config["steps"] and since_best < patience:
                algorithm.train()
                optimizer.zero_grad()
                metrics = algorithm.backward(sampler.sample(config["meta_batch"]))
                clip(algorithm, config["clip_norm"], config["clip_value"])
                optimizer.step()
                if schedule is not None:
                    schedule.step()
                step += 1
                bar.update()
                window.append(torch.stack([metrics["loss"], metrics["accuracy"]]))

                if step % config["log_every"] == 0:
                    _stop_if_not_finite(window, step, folder)
                    loss, accuracy = torch.stack(window).mean(0).tolist()
                    speed = (step - since[1]) * config["meta_batch"] / (time.perf_counter() - since[0])
                    values = {"loss": loss, "accuracy": accuracy, "tasks_per_second": speed}
                    values["lr"] = optimizer.param_groups[0]["lr"]
                    logger.scalars(step, {f"train/{name}": value for name, value in values.items()})
                    bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}, {speed:.0f} tasks/s")
                    window, since = [], (time.perf_counter(), step)

                if step % config["eval_every"] == 0 or step == config["steps"]:
                    _stop_if_not_finite(window, step, folder)
                    found = summary(evaluate_episodes(algorithm, validation, config["norm"], "validating"))
                    logger.scalars(step, {f"val/{name}": value for name, value in found.items()})
                    shown = next(validation.batches(1))
                    logger.picture(
                        step, "val/episode", episode_picture(shown, algorithm.predict(shown, config["norm"]))
                    )
                    since_best += 1
                    if found["accuracy"] > best["accuracy"]:
                        best, since_best = found | {"step": step}, 0
                        checkpoint.save(folder / "best.pt", weights(best))
                    save_last()
                    since = time.perf_counter(), step
                if stop.received:
                    save_last()
                    bar.close()
                    print(f"stopped at step {step}; go on with: metacv train resume={folder}")
                    raise SystemExit(128 + stop.received)
    _report(config, best, folder)
    return best["accuracy"]


def clip(algorithm: Algorithm, norm: float | None, value: float | None) -> None:
    """Of each network of the algorithm (backbone, relation module, ...) for itself, as Relation Networks do."""
    for network in algorithm.children():
        if norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), norm)
        if value is not None:
            nn.utils.clip_grad_value_(network.parameters(), value)


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


def _resume(
    cfg: DictConfig, folder: Path, overrides: list[str]
) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """The config to train, the state to go on from, and the overrides that both come from."""
    last = folder / "last.pt"
    if not cfg.resume:
        if last.exists():
            _show_config(folder, checkpoint.load(last, checkpoint.STATE))
            raise MetacvError(f"hydra.run.dir={folder} holds a run: resume=true goes on with it")
        return _plain(cfg), None, overrides
    if cfg.resume is True and not last.exists():
        raise MetacvError(f"resume=true but {folder} holds no last.pt: give hydra.run.dir=RUN or resume=RUN")
    path = last if cfg.resume is True else checkpoint.find(cfg.resume, "last.pt")
    if path != last and last.exists():
        raise MetacvError(f"resume={cfg.resume} but {folder} holds another run")
    state = checkpoint.load(path, checkpoint.STATE)
    overrides = state["overrides"] + overrides
    config = _plain(compose("train", overrides))
    _show_config(folder, {"config": config, "overrides": overrides})
    for name, here, there in _differences(config, state["config"]):
        if name.split(".")[0] not in RESUMABLE:
            raise MetacvError(f"resume: {name} is {here} but {path} was trained with {there}")
    return config, state, overrides


def _plain(cfg: DictConfig) -> dict[str, Any]:
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


def _check(config: dict[str, Any]) -> None:
    for name in ("steps", "meta_batch", "eval_every", "log_every", "patience", "clip_norm", "clip_value"):
        if config[name] is not None and not 0 < config[name] < math.inf:
            raise MetacvError(f"{name}={config[name]}: must be positive")
    check_norm(config["norm"])


def _stop_if_not_finite(window: list[torch.Tensor], step: int, folder: Path) -> None:
    if not window:
        return
    finite = torch.stack(window)[:, 0].isfinite().tolist()
    if not all(finite):
        at = step - len(window) + 1 + finite.index(False)
        last = folder / "last.pt"
        good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been saved"
        raise MetacvError(f"the loss is not finite at step {at}; {good}")


def _report(config: dict[str, Any], best: dict[str, float], folder: Path) -> None:
    result = (
        best | {"split": "val"} | {name: config[name] for name in ("norm", "way", "shot", "query", "eval_episodes")}
    )
    write_bytes_atomically(folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    print(
        f"best in validation: {100 * best['accuracy']:.2f} ± {100 * best['ci95']:.2f} % at step {best['step']:.0f} "
        f"({config['way']}-way {config['shot']}-shot, {config['eval_episodes']} episodes, {config['norm']})\n"
        f"checkpoint: {folder / 'best.pt'}\n"
        f"on test:    metacv evaluate checkpoint={folder}\n"
        f"curves:     tensorboard --logdir {folder}"
    )
