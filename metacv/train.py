"""The outer loop: one plain loop for every algorithm."""

import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from metacv import __version__
from metacv.algorithms.base import Algorithm
from metacv.backbones.base import Backbone
from metacv.backbones.batch_norm import running_statistics
from metacv.config import TrainConfig, to_dict
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.data.transforms import Augment
from metacv.distributed import Ranks, connect
from metacv.drawing import episode_picture
from metacv.errors import UserError
from metacv.evaluate import evaluate_episodes
from metacv.files import write_bytes_atomically
from metacv.logger import Logger
from metacv.model import build, build_dataset, build_optimizer, describe_device, pick_device, save_checkpoint
from metacv.precision import check_precision, keep_freed_memory, precision
from metacv.results import Result, ResultFile, summary
from metacv.run import Run, Start, Stopped, StopSignals, lock_folder, start, warn_of_few_test_classes
from metacv.text import percent, setting

DIAGNOSED_TASKS = 20
PROJECTED_IMAGES = 1000


def train(cfg: DictConfig, folder: Path, overrides: list[str]) -> float:
    """Train, write checkpoints and logs into `folder`, and return the best accuracy in validation.

    `overrides` are the settings that the command line changed; the checkpoint keeps them.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> Start:
            stack.enter_context(lock_folder(folder))
            return start(cfg, folder, overrides)

        ranks = connect()
        begun = ranks.run_on_rank_zero(begin)
        run, validation = ranks.on_every_rank(lambda: prepare(begun, ranks))
        if begun.source is not None:
            run.load(begun.source)
        else:
            ranks.on_every_rank(lambda: load_pretrained(run.algorithm))
        if run.splits:
            write_bytes_atomically(folder / "split.json", json.dumps(run.splits, indent=1).encode())
        if ranks.rank:  # random draws in training, such as DropBlock's masks, differ between ranks
            torch.manual_seed(int(torch.randint(2**62, (ranks.rank,))[-1]))
        logger = stack.enter_context(Logger(folder, run.step, run.validated))
        signals = stack.enter_context(StopSignals())
        bar = stack.enter_context(tqdm(total=run.steps, initial=run.step, unit="step", disable=None))
        since = time.perf_counter(), run.step
        while not run.finished:
            if run.validation_due:
                check_finite(run, folder, ranks)
                validate(run, validation, folder, logger, signals, ranks)
                since = time.perf_counter(), run.step
            else:
                run.window.append(training_step(run, ranks))
                bar.update()
                if run.step % run.config.log_every == 0:
                    check_finite(run, folder, ranks)
                    speed = (run.step - since[1]) * run.config.meta_batch / (time.perf_counter() - since[0])
                    bar.set_postfix_str(log_window(run, logger, speed))
                    since = time.perf_counter(), run.step
            if (received := ranks.maximum(signals.received)) and not run.finished:
                check_finite(run, folder, ranks)
                if ranks.rank == 0:
                    run.save(folder, logger)
                bar.close()
                print(f"stopped at step {run.step}; continue with: metacv train {setting('resume', folder)}")
                raise SystemExit(128 + received)
        finish(run, validation, logger)
    report(run, folder)
    if signals.received:  # after the last step
        raise SystemExit(128 + signals.received)
    return run.best["accuracy"]


def training_step(run: Run, ranks: Ranks) -> dict[str, Tensor]:
    """One outer update; returns the scalars of the algorithm, averaged over the tasks of all ranks."""
    assert run.optimizer is not None
    assert run.schedule is not None
    config, algorithm = run.config, run.algorithm
    algorithm.train()
    run.optimizer.zero_grad()
    own = ranks.share(config.meta_batch)
    tasks = run.sampler.sample(config.meta_batch, own)
    with precision(config.precision, run.sampler.device):
        scalars = algorithm.training_step(tasks)
    gradients = [p.grad for p in algorithm.parameters() if p.grad is not None]
    ranks.average([*gradients, *scalars.values()], (own.stop - own.start) / config.meta_batch)
    clip(algorithm, config.clip_norm, config.clip_value)
    run.optimizer.step()
    scalars["lr"] = torch.tensor(float(run.optimizer.param_groups[0]["lr"]))
    run.schedule.step()
    run.step += 1
    return scalars


def log_window(run: Run, logger: Logger, speed: float) -> str:
    """Log the means over the steps since the last line, and return them as text for the progress bar."""
    columns = {name: torch.stack([scalars[name] for scalars in run.window]) for name in run.window[0]}
    means = {name: float(values.float().mean()) for name, values in columns.items()}
    means["lr"] = float(run.window[-1]["lr"])
    run.window = []
    tags = {f"train/{name}": value for name, value in means.items()}
    logger.scalars(run.step, tags | {"train/tasks_per_second": speed})
    shown = [f"{name} {means[name]:.3f}" for name in ("loss", "accuracy") if name in means]
    return ", ".join([*shown, f"{speed:.3g} tasks/s"])


def validate(
    run: Run, validation: EpisodeList, folder: Path, logger: Logger, signals: StopSignals, ranks: Ranks
) -> None:
    """Evaluate on the validation episodes, keep the best weights, and save. A signal interrupts it without effect."""
    mode = run.config.batch_norm
    accuracy = torch.zeros(len(validation), dtype=torch.float64)
    own = ranks.share(len(validation))
    diagnostics: dict[str, float] = {}
    try:
        accuracy[own] = evaluate_episodes(run.algorithm, validation.part(own), mode, "validating", signals.check)
        if ranks.rank == 0:
            (some,) = validation.part(slice(DIAGNOSED_TASKS)).batches(DIAGNOSED_TASKS)
            diagnostics = run.algorithm.diagnostics(some, mode)
    except Stopped:
        accuracy += torch.nan  # which the sum passes on to the other ranks
    if ranks.sum(accuracy).isnan().any():
        return
    measured = summary(accuracy)
    better = measured["accuracy"] > run.best["accuracy"]
    run.validated = run.step
    run.best, run.since_best = (measured | {"step": run.step}, 0) if better else (run.best, run.since_best + 1)
    if ranks.rank > 0:
        return
    logger.scalars(run.step, {f"val/{name}": value for name, value in measured.items()})
    episode = next(validation.batches(1))
    logger.picture(run.step, "val/episode", episode_picture(episode, run.algorithm.predict(episode, mode)))
    if diagnostics:
        logger.scalars(run.step, diagnostics)
    if better:
        save_checkpoint(folder / "best.pt", run.weights() | {"validation": run.best})
    run.save(folder, logger)


def finish(run: Run, validation: EpisodeList, logger: Logger) -> None:
    """Write TensorBoard's table of runs, and features for its projector if the settings ask for them."""
    logger.hparams(to_dict(run.config), run.step, **{"val/best_accuracy": run.best["accuracy"]})
    if run.config.projector:
        bank = validation.sampler.bank
        # Shuffled, so that batch statistics are those of many classes.
        order = torch.randperm(len(bank.images), generator=torch.Generator().manual_seed(0))
        rows = order[:PROJECTED_IMAGES]
        names = [bank.class_names[c] for c in torch.bucketize(rows, bank.offsets[1:], right=True)]
        images = bank.images[rows].float().div(255)
        features = backbone_features(run.algorithm, images.to(run.sampler.device)).cpu()
        side = min(32, *images.shape[2:])  # TensorBoard draws all of them into one picture
        logger.embedding(run.step, features, names, F.interpolate(images, (side, side), mode="area"))


def backbone_features(algorithm: Algorithm, images: Tensor) -> Tensor:
    """Features [B, D] of images [B, C, H, W]."""
    (backbone, *_) = (module for module in algorithm.modules() if isinstance(module, Backbone))
    algorithm.eval()
    with torch.no_grad():
        return torch.cat([backbone.features(some) for some in images.split(100)])


def check_finite(run: Run, folder: Path, ranks: Ranks) -> None:
    """Stop a run that diverged. Before, the running statistics of the ranks are averaged."""
    ranks.average(running_statistics(run.algorithm), 1 / ranks.size)
    run.stop_if_not_finite(folder)


def prepare(begun: Start, ranks: Ranks) -> tuple[Run, EpisodeList]:
    """A run at step 0, and the episodes that it is validated on."""
    config = begun.config
    check_counts(config, ranks)
    device = pick_device(ranks.device(config.device))
    check_precision(config.precision, device)
    dataset = build_dataset(config.dataset, config.data_dir)
    augment = Augment(config.augment.crop, config.augment.flip, config.augment.jitter, seed=config.seed)
    way, shot, query = config.train_way, config.train_shot, config.train_query
    bank, rotation = dataset.load("train"), dataset.rotation("train")
    training = EpisodeSampler(bank, way, shot, query, rotation, config.seed, device, "train_", augment)
    bank, rotation = dataset.load("val"), dataset.rotation("val")
    unseen = EpisodeSampler(bank, config.way, config.shot, config.query, rotation, device=device)
    validation = EpisodeList(unseen, config.eval_episodes, "eval_episodes")
    if device.type == "cpu":
        keep_freed_memory()  # only now: decoding a data set frees much memory
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    algorithm = build(config, training.bank.image_shape).to(device)
    if ranks.size > 1 and algorithm.sequential_because:
        raise UserError(f"algo.{algorithm.sequential_because}, which {ranks.size} processes cannot share")
    if config.compile:
        algorithm.compile_training()
    optimizer, schedule = build_optimizer(config, algorithm) or (None, None)
    splits = dataset.splits()
    warn_of_few_test_classes(config, splits)
    hardware = describe_device(device)
    return Run(config, begun.overrides, algorithm, optimizer, schedule, training, hardware, splits), validation


def check_counts(config: TrainConfig, ranks: Ranks) -> None:
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed={config.seed}: must be from 0 to 2**63 - 1")
    for name in ("steps", "meta_batch", "eval_every", "log_every", "patience", "clip_norm", "clip_value"):
        value = getattr(config, name)
        if value is not None and not 0 < value < 2**31:
            raise UserError(f"{name}={value}: must be positive, and below 2**31")
    for name in ("meta_batch", "eval_episodes"):
        if getattr(config, name) < ranks.size:
            raise UserError(f"{name}={getattr(config, name)} is too few for {ranks.size} processes")


def load_pretrained(algorithm: Algorithm) -> None:
    for module in algorithm.modules():
        if isinstance(module, Backbone):
            module.load_pretrained()


def clip(algorithm: Algorithm, norm: float | None, value: float | None) -> None:
    """Clip the gradients of each network of the algorithm (backbone, relation module, ...) by itself."""
    networks = [list(network.parameters()) for network in algorithm.children()]
    own = list(algorithm.parameters(recurse=False))
    for parameters in [*networks, own] if own else networks:
        if norm is not None:
            nn.utils.clip_grad_norm_(parameters, norm)
        if value is not None:
            nn.utils.clip_grad_value_(parameters, value)


def report(run: Run, folder: Path) -> None:
    """Write result.json, and print the best validation and the next commands."""
    config, best = run.config, run.best
    task: dict[str, Any] = {name: getattr(config, name) for name in ("way", "shot", "query", "batch_norm")}
    result = Result(
        **task,
        accuracy=best["accuracy"],
        ci95=best["ci95"],
        dataset=config.dataset["_target_"].rpartition(".")[2],
        split="val",
        rotation=config.dataset.get("test_rotation", "none"),
        episodes=config.eval_episodes,
        seed=0,
        method=type(run.algorithm).__name__,
        step=int(best["step"]),
        device=run.hardware,
        torch=str(torch.__version__),
        metacv=__version__,
    )
    training = {"steps": run.step, "seconds": round(run.seconds, 1), "seed": config.seed, "overrides": run.overrides}
    ResultFile([result], training).write(folder / "result.json")
    if run.steps == 0:
        print("all parameters are frozen: the initial weights were validated, and nothing was trained")
    elif run.step < run.steps:
        print(f"stopped at step {run.step}: no new best in {run.since_best} validations (patience)")
    print(
        f"best in validation: {percent(best['accuracy'], best['ci95'])} % at step {best['step']} "
        f"({config.way}-way {config.shot}-shot, {config.eval_episodes} episodes, {config.batch_norm})\n"
        f"checkpoint: {folder / 'best.pt'}\n"
        f"on test:    metacv evaluate {setting('checkpoint', folder)}\n"
        f"curves:     tensorboard --logdir {folder}"
    )
