"""The outer loop: one plain loop for every algorithm."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from metacv import MetacvError, checkpoint
from metacv.algorithms.base import Algorithm, Norm, running_statistics
from metacv.backbones.base import Backbone
from metacv.cli import setting
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.data.transforms import Augment
from metacv.distributed import Processes, processes
from metacv.drawing import episode_picture
from metacv.evaluate import check_norm, evaluate_episodes, summary
from metacv.files import write_bytes_atomically
from metacv.logger import Logger
from metacv.model import build_algorithm, build_dataset, build_optimizer, describe_device, pick_device
from metacv.precision import check_precision, keep_freed_memory, precision
from metacv.run import Run, Stopped, StopSignals, begin_or_resume, only_run_in

INNER_STEPS_SHOWN, TASKS_SHOWN = (1, 2, 3, 5, 10, 20, 50, 100), 20
IMAGES_PROJECTED = 1000


def train(cfg: DictConfig, folder: Path, overrides: list[str]) -> float:
    """Trains as `cfg` says, writes into `folder`, and gives the best accuracy in validation.

    `overrides` is what the command line changed, for the checkpoint to keep.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> tuple[dict[str, Any], tuple[dict[str, Any], Path] | None, list[str]]:
            stack.enter_context(only_run_in(folder))
            return begin_or_resume(cfg, folder, overrides)

        here = processes()
        config, resumed, words = here.of_first(begin)
        run, validation = here.each(lambda: prepare(config, words, here))
        part = here.share(config["meta_batch"])
        if resumed is not None:
            run.load(*resumed)
        else:
            here.each(lambda: load_pretrained(run.algorithm))
        if run.splits:
            write_bytes_atomically(folder / "split.json", json.dumps(run.splits, indent=1).encode())
        if here.rank:  # what is drawn in training, such as DropBlock's masks, is not the same in all
            torch.manual_seed(int(torch.randint(2**62, (here.rank,))[-1]))
        with (
            Logger(folder, run.step, run.validated) as logger,
            StopSignals() as stop,
            tqdm(total=config["steps"], initial=run.step, unit="step", disable=None) as bar,
        ):
            since = time.perf_counter(), run.step
            while not run.finished:
                if run.validation_due:
                    check(run, folder, here)
                    validate(run, validation, folder, logger, stop, here)
                    since = time.perf_counter(), run.step
                else:
                    run.algorithm.train()
                    run.optimizer.zero_grad()
                    tasks = run.sampler.sample(config["meta_batch"], part)
                    with precision(config["precision"], run.sampler.device):
                        metrics = run.algorithm.backward(tasks)
                    learned = [p.grad for p in run.algorithm.parameters() if p.grad is not None]
                    here.average([*learned, *metrics.values()], (part.stop - part.start) / config["meta_batch"])
                    clip(run.algorithm, config["clip_norm"], config["clip_value"])
                    run.optimizer.step()
                    lr = run.optimizer.param_groups[0]["lr"]
                    run.schedule.step()
                    run.step += 1
                    run.window.append(torch.stack([metrics["loss"], metrics["accuracy"]]))
                    bar.update()
                    if run.step % config["log_every"] == 0:
                        check(run, folder, here)
                        loss, accuracy = torch.stack(run.window).mean(0).tolist()
                        speed = (run.step - since[1]) * config["meta_batch"] / (time.perf_counter() - since[0])
                        logger.scalars(run.step, "train", loss=loss, accuracy=accuracy, tasks_per_second=speed, lr=lr)
                        bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}, {speed:.0f} tasks/s")
                        run.window, since = [], (time.perf_counter(), run.step)
                if (received := here.largest(stop.received)) and not run.finished:
                    check(run, folder, here)
                    if here.rank == 0:
                        run.save(folder, logger)
                    bar.close()
                    print(f"stopped at step {run.step}; go on with: metacv train {setting('resume', folder)}")
                    raise SystemExit(128 + received)
            finish(run, validation, logger)
    if run.step < config["steps"]:
        print(f"stopped at step {run.step}: no new best in {run.since_best} validations (patience)")
    report(run, folder)
    if stop.received:  # as all was done
        raise SystemExit(128 + stop.received)
    return run.best["accuracy"]


def validate(
    run: Run, validation: EpisodeList, folder: Path, logger: Logger, stop: StopSignals, here: Processes
) -> None:
    """Measures, keeps the best, saves; on a signal leaves all as it was."""
    norm = run.config["norm"]
    accuracy = torch.zeros(len(validation), dtype=torch.float64)
    part = here.share(len(validation))
    try:
        accuracy[part] = evaluate_episodes(run.algorithm, validation.part(part), norm, "validating", stop.check)
        along = along_adaptation(run.algorithm, validation, norm, stop) if here.rank == 0 else {}
    except Stopped:
        accuracy += torch.nan  # tells the others
    if here.sum(accuracy).isnan().any():
        return
    found = summary(accuracy)
    better = found["accuracy"] > run.best["accuracy"]
    run.validated = run.step
    run.best, run.since_best = (found | {"step": run.step}, 0) if better else (run.best, run.since_best + 1)
    if here.rank > 0:
        return
    logger.scalars(run.step, "val", **found)
    shown = next(validation.batches(1))
    logger.picture(run.step, "val/episode", episode_picture(shown, run.algorithm.predict(shown, norm)))
    if along:
        logger.scalars(run.step, "inner_steps", **along)
    if better:
        checkpoint.save(folder / "best.pt", run.weights() | {"validation": run.best})
    run.save(folder, logger)


def along_adaptation(algorithm: Algorithm, validation: EpisodeList, norm: Norm, stop: StopSignals) -> dict[str, float]:
    """The accuracy on the first tasks of validation after fewer inner steps, if there are any."""
    every, found = algorithm.eval_inner_steps, {}
    some = validation.part(slice(TASKS_SHOWN))
    try:
        for steps in [steps for steps in INNER_STEPS_SHOWN if steps < every] + [every] * bool(every):
            algorithm.eval_inner_steps = steps
            accuracy = evaluate_episodes(algorithm, some, norm, "along the inner steps", stop.check)
            found[f"accuracy_{steps:03d}"] = float(accuracy.mean())
    finally:
        algorithm.eval_inner_steps = every
    return found


def finish(run: Run, validation: EpisodeList, logger: Logger) -> None:
    """TensorBoard's table of runs, and its projector where asked for."""
    logger.hparams(run.config, run.step, **{"val/best_accuracy": run.best["accuracy"]})
    if run.config["projector"]:
        bank = validation.sampler.bank
        # Shuffled, so that batch statistics are those of many classes.
        order = torch.randperm(len(bank.images), generator=torch.Generator().manual_seed(0))
        rows = order[:IMAGES_PROJECTED]
        names = [bank.class_names[c] for c in torch.bucketize(rows, bank.offsets[1:], right=True)]
        images = bank.images[rows].float().div(255)
        features = backbone_features(run.algorithm, images.to(run.sampler.device)).cpu()
        side = min(32, *images.shape[2:])  # TensorBoard draws them all into one picture
        logger.embedding(run.step, features, names, F.interpolate(images, (side, side), mode="area"))


def backbone_features(algorithm: Algorithm, images: Tensor) -> Tensor:
    """[B, D], of images [B, C, H, W]."""
    (backbone, *_) = (part for part in algorithm.modules() if isinstance(part, Backbone))
    algorithm.eval()
    with torch.no_grad():
        return torch.cat([backbone(part).flatten(1) for part in images.split(100)])


def check(run: Run, folder: Path, here: Processes) -> None:
    """Stops what has diverged, after the processes' running statistics have become one."""
    here.average(running_statistics(run.algorithm), 1 / here.size)
    run.stop_if_not_finite(folder)


def prepare(config: dict[str, Any], overrides: list[str], here: Processes) -> tuple[Run, EpisodeList]:
    """A run at step 0, and the episodes that it is validated on."""
    for name in ("steps", "meta_batch", "eval_every", "log_every", "patience", "clip_norm", "clip_value"):
        if config[name] is not None and not 0 < config[name] < 2**31:
            raise MetacvError(f"{name}={config[name]}: must be positive, and below 2**31")
    check_norm(config["norm"])
    for name in ("meta_batch", "eval_episodes"):
        if config[name] < here.size:
            raise MetacvError(f"{name}={config[name]} is too few to share out between {here.size} processes")
    device = pick_device(here.device(config["device"]))
    check_precision(config["precision"], device)
    dataset = build_dataset(config, config["data_dir"])

    def sampler(split: str, prefix: str, seed: int, augment: Augment | None) -> EpisodeSampler:
        way, shot, query = (config[f"{prefix}{name}"] for name in ("way", "shot", "query"))
        rotation = dataset.rotation(split)
        return EpisodeSampler(dataset.load(split), way, shot, query, rotation, seed, device, prefix, augment)

    augment = Augment(**config["augment"], seed=config["seed"])
    training = sampler("train", "train_", config["seed"], augment)
    validation = EpisodeList(sampler("val", "", 0, None), config["eval_episodes"], "eval_episodes")
    if device.type == "cpu":
        keep_freed_memory()  # from here on: a data set that was just decoded has left much
    torch.manual_seed(config["seed"])
    algorithm = build_algorithm(config, training.bank.image_shape).to(device)
    if here.size > 1 and algorithm.one_process_because:
        raise MetacvError(f"{algorithm.one_process_because}, and so cannot have {here.size} processes")
    if config["compile"]:
        algorithm.compile_steps()
    optimizer, schedule = build_optimizer(config, algorithm)
    hardware = describe_device(device)
    run = Run(config, overrides, algorithm, optimizer, schedule, training, hardware, dataset.splits())
    return run, validation


def load_pretrained(algorithm: Algorithm) -> None:
    for part in algorithm.modules():
        if isinstance(part, Backbone):
            part.load_pretrained()


def clip(algorithm: Algorithm, norm: float | None, value: float | None) -> None:
    """Of each network of the algorithm (backbone, relation module, ...) for itself, as Relation Networks do."""
    networks = [list(network.parameters()) for network in algorithm.children()]
    own = list(algorithm.parameters(recurse=False))
    for parameters in [*networks, own] if own else networks:
        if norm is not None:
            nn.utils.clip_grad_norm_(parameters, norm)
        if value is not None:
            nn.utils.clip_grad_value_(parameters, value)


def report(run: Run, folder: Path) -> None:
    config, best = run.config, run.best
    result = (
        {"split": "val"}
        | best
        | {name: config[name] for name in ("norm", "way", "shot", "query", "eval_episodes", "seed")}
        | {"steps": run.step, "seconds": round(run.seconds, 1), "device": run.hardware}
        | {"torch": torch.__version__, "overrides": run.overrides}
    )
    write_bytes_atomically(folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    print(
        f"best in validation: {100 * best['accuracy']:.2f} ± {100 * best['ci95']:.2f} % at step {best['step']} "
        f"({config['way']}-way {config['shot']}-shot, {config['eval_episodes']} episodes, {config['norm']})\n"
        f"checkpoint: {folder / 'best.pt'}\n"
        f"on test:    metacv evaluate {setting('checkpoint', folder)}\n"
        f"curves:     tensorboard --logdir {folder}"
    )
