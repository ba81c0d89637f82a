"""From a checkpoint, or a model in training, to an accuracy and its 95 % interval over episodes."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from metacv import MetacvError, checkpoint
from metacv.algorithms.base import Algorithm, Norm, accuracies
from metacv.cli import setting
from metacv.config import EvaluateConfig
from metacv.data.bank import ImageBank, check_split
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.files import write_bytes_atomically
from metacv.model import build_algorithm, build_dataset, check_settings, describe_device, pick_device
from metacv.precision import keep_freed_memory
from metacv.upgrade import upgrade

NORMS: tuple[Norm, ...] = ("inductive", "transductive")
IMAGES_AT_ONCE = 1024


def evaluate_episodes(
    algorithm: Algorithm,
    episodes: EpisodeList,
    norm: Norm,
    label: str = "evaluating",
    go_on: Callable[[], None] = lambda: None,
) -> Tensor:
    """The accuracy of each episode, [episodes], with a progress bar on a terminal.

    `go_on` is called now and then; what it raises ends the evaluation.
    """
    tasks_at_once = max(1, IMAGES_AT_ONCE // episodes.rows[0].numel())
    results = []
    with tqdm(total=len(episodes), desc=label, unit="task", leave=False, disable=None) as bar:
        for tasks in episodes.batches(tasks_at_once):
            go_on()
            results.append(accuracies(algorithm.predict(tasks, norm), tasks.query_y))
            bar.update(len(tasks))
    return torch.cat(results).double().cpu()


def interval(accuracy: Tensor) -> float:
    """Half the 95 % interval of the mean over episodes [E]: 1.96 * std(ddof=1) / sqrt(E)."""
    return float(1.96 * accuracy.std(correction=1) / len(accuracy) ** 0.5)


def summary(accuracy: Tensor) -> dict[str, float]:
    return {"accuracy": float(accuracy.mean()), "ci95": interval(accuracy)}


def check_norm(norm: str, choices: tuple[str, ...] = NORMS) -> None:
    if norm not in choices:
        raise MetacvError(f"norm={norm}: one of {', '.join(choices)}")


def evaluate(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Rebuilds the model from its checkpoint, evaluates it and writes result.json into `folder`."""
    check_settings(cfg, EvaluateConfig)
    given: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    results = {found["norm"]: found for _, found in measure(cfg.checkpoint, given)}
    result = results if len(results) > 1 else next(iter(results.values()))
    write_result(folder, result)
    for found in results.values():
        print(describe(found))
    print(f"result: {folder / 'result.json'}")
    return result


def measure(place: str, given: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """For each way of batch norm the accuracies of the episodes, [E], and what is to be said of them.

    `given` is laid over the config of the checkpoint at `place`.
    """
    path = checkpoint.find(place, "best.pt")
    saved = checkpoint.load(path)
    config = with_changes(saved["config"], given, path)
    check_split(config["split"])
    check_norm(config["norm"], (*NORMS, "both"))
    device = pick_device(config["device"])

    dataset = build_dataset(config, config["data_dir"])
    bank = dataset.load(config["split"])
    if list(bank.image_shape) != list(saved["image_shape"]):
        raise MetacvError(
            f"{bank.name} has images of {_by(bank.image_shape)} but {path} was trained on {_by(saved['image_shape'])}"
        )
    if config["split"] == "test":
        check_unseen(bank, config, saved, path)
    rotation = dataset.rotation(config["split"])
    sampler = EpisodeSampler(bank, config["way"], config["shot"], config["query"], rotation, config["seed"], device)
    episodes = EpisodeList(sampler, config["episodes"])
    algorithm = build_algorithm(config, bank.image_shape)
    checkpoint.load_weights(algorithm, saved, path)
    algorithm.to(device)
    if device.type == "cpu":
        keep_freed_memory()

    common = {
        "algorithm": type(algorithm).__name__,
        "algo": {
            name: value
            for name, value in config["algo"].items()
            if value != upgrade(saved["config"])["algo"].get(name) and name not in ("task_batching", "task_chunk")
        },  # what was changed since the training, and changes what comes out
        "dataset": type(dataset).__name__,
        "split": config["split"],
        "rotation": rotation,
        "episodes": len(episodes),
        "way": config["way"],
        "shot": config["shot"],
        "query": config["query"],
        "seed": config["seed"],
        "episodes_sha256": episodes.fingerprint,
        "checkpoint": str(path),
        "checkpoint_sha256": checkpoint.file_hash(path),
        "step": saved["step"],
        "device": describe_device(device),
        "torch": torch.__version__,
    }
    for norm in NORMS if config["norm"] == "both" else (config["norm"],):
        start = time.perf_counter()
        accuracy = evaluate_episodes(algorithm, episodes, norm)
        seconds = time.perf_counter() - start
        yield accuracy, summary(accuracy) | {"norm": norm} | common | {"tasks_per_second": len(accuracy) / seconds}


def write_result(folder: Path, result: dict[str, Any]) -> None:
    try:
        write_bytes_atomically(folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    except OSError as error:
        raise MetacvError(f"{folder / 'result.json'} cannot be written: {error.strerror}") from error


def check_unseen(bank: ImageBank, config: dict[str, Any], saved: dict[str, Any], path: Path) -> None:
    """Refuses test classes of a user's folder that were among those of training, before it changed or was moved."""
    trained = saved.get("splits")
    if not trained or config["dataset"]["_target_"] != saved["config"]["dataset"]["_target_"]:
        return
    if seen := sorted({*trained["train"], *trained["val"]} & {*bank.class_names}):
        split_file = setting("dataset.split_file", path.with_name("split.json"))
        raise MetacvError(
            f"{bank.name}: {len(seen)} of its classes ({seen[0]}, ...) bear names that were trained or validated on; "
            f"{split_file} keeps to the split of then, and what are other classes must be renamed"
        )


def describe(result: dict[str, Any]) -> str:
    return (
        f"accuracy {100 * result['accuracy']:.2f} ± {100 * result['ci95']:.2f} %: {result['algorithm']}, "
        f"{result['way']}-way {result['shot']}-shot, {result['query']} queries a class, {result['episodes']} episodes "
        f"of {result['dataset']} {result['split']}, {result['norm']} ({result['tasks_per_second']:.0f} tasks/s)"
    )


def with_changes(saved: dict[str, Any], given: dict[str, Any], path: Path) -> dict[str, Any]:
    """The trained config with what the command line gave, and did not leave null, laid over it."""
    saved = upgrade(saved)
    config = saved | {name: value for name, value in given.items() if value is not None}
    for group in ("algo", "dataset"):
        changes = given.get(group) or {}
        if "_target_" in changes:
            config[group] = changes
            continue
        if unknown := changes.keys() - saved[group].keys():
            raise MetacvError(f"{group}.{min(unknown)}: {path} has no such setting")
        config[group] = OmegaConf.to_container(OmegaConf.merge(saved[group], changes))
    return config


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
