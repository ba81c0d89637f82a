"""`metacv train`: one training loop for every algorithm."""

import contextlib
import json
import math
import os
import random
import shlex
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from metacv import seen
from metacv.algorithms.base import Algorithm
from metacv.algorithms.heads.base import WithHead
from metacv.backbones.batch_norm import running_statistics
from metacv.config import TrainConfig, class_name, network_name, to_dict
from metacv.data.sampler import MOST, EpisodeList, EpisodeSampler, ImageSampler
from metacv.data.transforms import Augment
from metacv.distributed import Ranks, connect
from metacv.drawing import episode_picture
from metacv.dry_run import dry_run
from metacv.episodes import evaluate_episodes
from metacv.errors import UserError
from metacv.evaluate import centre, learning_rates, record
from metacv.files import write_bytes_atomically
from metacv.logger import Logger, errors_of_threads_once
from metacv.look import look_of
from metacv.model import (
    Checkpoint,
    Training,
    build,
    build_dataset,
    build_optimizer,
    describe_device,
    load_checkpoint,
    pick_device,
    target_class,
    uses_query_set,
    with_head,
)
from metacv.precision import check_precision, keep_freed_memory, precision, random_state_kept
from metacv.progress import header
from metacv.results import ResultFile, method_text, shape_text, summary, warn_at_chance
from metacv.run import Run, Stopped, StopSignals, lock_folder, remove_unused, start, warn_of_few_test_classes
from metacv.terminal import progress_bar, warn, world_size
from metacv.text import duration, in_bytes, percent, plural, setting, significant
from metacv.unusual import unusual

DIAGNOSED_TASKS = 20  # validation tasks for `Algorithm.diagnostics`
LINE_EVERY = 30  # seconds between lines of train.log, and of an output without a progress bar
SAVE_EVERY = 300  # seconds between two saves of last.pt, or a little more
PROJECTED_IMAGES = 1000
RUNNING = {"running_mean", "running_var", "num_batches_tracked"}  # statistics of batch norm
MOST_PROCESSES = 8  # that the header suggests; each loads the data set


def train(cfg: DictConfig, folder: Path, overrides: list[str]) -> float:
    """Train with checkpoints and logs in `folder`; return the best validation accuracy, from 0 to 1."""
    with contextlib.ExitStack() as stack:
        ranks = connect()
        if cfg.dry_run:
            stack.callback(remove_unused, folder)  # after the lock is released
        ranks.on_every_rank(lambda: stack.enter_context(lock_folder(folder)))  # ranks other than 0 use a temporary one
        config, words, source = ranks.run_on_rank_zero(lambda: start(cfg, folder, overrides))
        run, validation = ranks.on_every_rank(lambda: prepare(config, words, ranks, new=source is None))
        ranks.on_every_rank(lambda: set_state(run, source))
        if run.splits:
            write_bytes_atomically(folder / "split.json", json.dumps(run.splits, indent=1).encode())
        if config.dry_run:
            print(header([about(run, validation, folder)]))
            print("\n".join(dry_run(run, model_to_test(run), validation, lambda: training_step(run, ranks))))
            return math.nan
        stack.enter_context(errors_of_threads_once())
        logger = stack.enter_context(Logger(folder, run.step, run.validated))
        announce(run, validation, folder, logger)
        signals = stack.enter_context(StopSignals())
        bar = stack.enter_context(progress_bar(run.steps, "step", start=run.step))
        progress = StepProgress(run, folder if ranks.rank == 0 else None, logger, bar)
        while not run.finished:
            if run.validation_due:
                check_finite(run, folder, ranks)
                validate(run, validation, folder, logger, signals, ranks)
                progress.restart()
            else:
                scalars = training_step(run, ranks)
                if run.window and not run.window[0].keys() <= scalars.keys():  # in a damaged last.pt
                    raise UserError(f"resume: the last steps had {', '.join(run.window[0])}, not {', '.join(scalars)}")
                run.window.append(scalars)
                bar.update()
                if run.step % run.config.log_every == 0:
                    check_finite(run, folder, ranks)
                    progress.log()
            if (received := ranks.maximum(signals.received)) and not run.finished:
                check_finite(run, folder, ranks)
                if ranks.rank == 0:
                    run.save(folder, logger)
                bar.close()
                print(f"stopped at step {run.step}; continue with: metacv train {setting('resume', folder)}")
                raise SystemExit(128 + received)
        if "step" not in run.best:
            text = f"every validation had predictions that are not finite{learning_rates(run.config)}"
            raise UserError(f"{text}; there is no best.pt, and {folder / 'last.pt'} has the last weights")
        finish(run, validation, logger)
        report(run, validation, folder, logger)
    if signals.received:  # after the last step
        raise SystemExit(128 + signals.received)
    return run.best["accuracy"]


def announce(run: Run, validation: EpisodeList, folder: Path, logger: Logger) -> None:
    """Print the header, and a warning for each unusual setting."""
    for line in header([about(run, validation, folder)]).splitlines():
        logger.line(line)
    for text in unusual(run.config):
        warn(text)


def about(run: Run, validation: EpisodeList, folder: Path) -> dict[str, str]:
    """Return method, data, network, device, steps and folder, for the header on the terminal."""
    config, size = run.config, "x".join(map(str, run.sampler.bank.image_shape))
    trained = f"on batches of {plural(config.meta_batch, 'image')}"
    if isinstance(run.sampler, EpisodeSampler):
        shape = shape_text(config.train_way, config.train_shot, config.train_vary)
        trained = f"on {shape} tasks, {config.meta_batch} per step"
    banks = {"train": run.sampler.bank, "val": validation.sampler.bank}
    splits = (f"{name} {len(b.sizes):,} classes ({len(b.images):,} images)" for name, b in banks.items())
    parameters = sum(parameter.numel() for parameter in run.algorithm.parameters())
    start = f", from step {run.step:,}" if run.step else ""
    return {
        "method": f"{method(config)}, trained {trained}",
        "data": f"{class_name(config.dataset)}, {size}: {', '.join(splits)}",
        "network": f"{network_name(config.backbone)}, {parameters:,} parameters",
        "device": ", ".join([run.here, *([config.precision] if config.precision != "fp32" else [])])
        + (f" (processes={count} may be faster)" if (count := faster_processes(run)) > 1 else ""),
        "steps": f"{run.steps:,}{start}, validated every {config.eval_every:,} on {len(validation):,} "
        f"{shape_text(config.way, config.shot, config.vary)} tasks",
        "folder": str(folder),
    }


def faster_processes(run: Run) -> int:
    """Return how many processes may train faster than one, which computes each task on all cores; 1 if none. Measured
    on two cores: methods with an inner loop gain most, batches of images nothing."""
    by_tasks = isinstance(run.sampler, EpisodeSampler) and not run.algorithm.sequential_because and run.optimizer
    if not by_tasks or run.sampler.device.type != "cpu" or world_size() > 1 or "OMP_NUM_THREADS" in os.environ:
        return 1
    most = min(torch.get_num_threads(), run.config.eval_episodes, MOST_PROCESSES)
    return max(n for n in range(1, most + 1) if run.config.meta_batch % n == 0)


def method(config: TrainConfig) -> str:
    return method_text(class_name(config.algo), class_name(config.head))


def title(config: TrainConfig) -> str:
    return f"{method(config)} on {class_name(config.dataset)}, {shape_text(config.way, config.shot, config.vary)}"


def training_step(run: Run, ranks: Ranks) -> dict[str, Tensor]:
    """Make one outer update; return the algorithm's scalars, averaged over the tasks of all ranks."""
    assert run.optimizer is not None
    assert run.schedule is not None
    config, algorithm = run.config, run.algorithm
    if ranks.rank:  # its random draws, such as DropBlock's masks: other than those of rank 0, and equal after a resume
        torch.manual_seed(((config.seed * 1_000_003 + run.step) * 1_000_003 + ranks.rank) % 2**63)
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
    if run.average:
        run.average.update_parameters(algorithm)
    scalars["lr"] = torch.tensor(float(run.optimizer.param_groups[0]["lr"]))
    run.schedule.step()
    run.step += 1
    return scalars


def log_window(run: Run, logger: Logger, speed: float) -> str:
    """Log the means over the steps since the last log entry; return them as text for the progress bar."""
    columns = {name: torch.stack([scalars[name] for scalars in run.window]) for name in run.window[0]}
    means = {name: float(values.float().mean()) for name, values in columns.items()}
    means["lr"] = float(run.window[-1]["lr"])
    run.window = []
    tags = {f"train/{name}": value for name, value in means.items()}
    logger.scalars(run.step, tags | {"train/tasks_per_second": speed})
    shown = [f"loss {means['loss']:.3f}"] * ("loss" in means)
    shown += [f"accuracy {100 * means['accuracy']:.1f} %"] * ("accuracy" in means)
    return ", ".join(
        [*shown, f"{significant(speed)} {'tasks' if isinstance(run.sampler, EpisodeSampler) else 'images'}/s"]
    )


class StepProgress:
    """Progress between validations: the bar, lines in train.log, and saves of last.pt in `folder`, if given."""

    def __init__(self, run: Run, folder: Path | None, logger: Logger, bar: tqdm) -> None:
        self.run, self.folder, self.logger, self.bar = run, folder, logger, bar
        self.restart()
        self.last_line = -math.inf  # the first line is written after the first log_every steps

    def restart(self) -> None:
        """Start again after a validation."""
        self.since = self.last_line = self.saved = time.perf_counter()
        self.step = self.run.step

    def log(self) -> None:
        """Log the last log_every steps, and save if the last save is old."""
        run, now = self.run, time.perf_counter()
        speed = (run.step - self.step) * run.config.meta_batch / (now - self.since)
        self.bar.set_postfix_str(text := log_window(run, self.logger, speed))
        if now - self.last_line > LINE_EVERY:
            line = f"step {run.step} of {run.steps}: {text}{remaining(run)}"
            self.logger.line(line, self.bar.disable or self.last_line < 0)
            self.last_line = now
        if self.folder and now - self.saved > SAVE_EVERY:
            run.save(self.folder, self.logger)
            self.saved = now
        self.since, self.step = time.perf_counter(), run.step


def remaining(run: Run) -> str:
    """Estimate the time for the remaining steps and validations from the speed so far."""
    left = run.seconds * (run.steps - run.step) / max(1, run.step)
    besides = " plus validation" if run.validated < 0 else ""
    return f", {duration(left)} left{besides}" if run.step < run.steps else ""


def validate(run: Run, episodes: EpisodeList, folder: Path, logger: Logger, signals: StopSignals, ranks: Ranks) -> None:
    """Evaluate on the validation episodes and save; a new best becomes best.pt. A signal aborts without effect."""
    mode = run.config.batch_norm
    accuracy = torch.zeros(len(episodes), dtype=torch.float64)
    own = ranks.share(len(episodes))
    try:
        tested = model_to_test(run)
        accuracy[own] = evaluate_episodes(tested, episodes.part(own), mode, "validating", signals.check)
    except Stopped:
        accuracy += torch.inf  # tells the other ranks, through the sum
    if ranks.sum(accuracy).isposinf().any():
        return
    measured = summary(accuracy)
    better = measured["accuracy"] > run.best["accuracy"]  # False for NaN, if adaptation diverged
    diverged = int(accuracy.isnan().sum())
    run.validated = run.step
    run.best, run.since_best = (measured | {"step": run.step}, 0) if better else (run.best, run.since_best + 1)
    if ranks.rank > 0:
        return
    if diverged:
        text = f"validation at step {run.step}: predictions are not finite in {diverged} of {len(accuracy)} episodes"
        warn(f"{text}{learning_rates(run.config)}")
        measured = {"diverged": diverged / len(accuracy)}
    else:
        text = f"validation {percent(measured['accuracy'], measured['ci95'])} %{', best so far' if better else ''}"
        logger.line(f"step {run.step} of {run.steps}: {text}{remaining(run)}")
        logger.points(run.step, {"val/best_accuracy": run.best["accuracy"]})
    logger.scalars(run.step, {f"val/{name}": value for name, value in measured.items()})
    episode = next(episodes.batches(1))
    logger.picture(run.step, "val/episode", episode_picture(episode, tested.predict(episode, mode)))
    some = next(episodes.part(slice(DIAGNOSED_TASKS)).batches(DIAGNOSED_TASKS))
    diagnostics = run.tested.diagnostics(some, mode)
    if finite := {name: value for name, value in diagnostics.items() if math.isfinite(value)}:
        logger.scalars(run.step, finite)
    run.save(folder, logger, better)
    logger.curves(title(run.config))


def model_to_test(run: Run) -> Algorithm:
    """Return the model to validate: the method, or its backbone with the head in the settings."""
    tested = with_head(run.tested, run.config)
    if isinstance(tested, WithHead) and tested.needs_centre:
        run.centre = centre(tested, run.sampler.bank, run.sampler.device)
    return tested


def finish(run: Run, validation: EpisodeList, logger: Logger) -> None:
    """Write TensorBoard's table of runs and, if projector=true, features for its projector."""
    logger.hparams(to_dict(run.config))
    logger.curves(title(run.config), often=True)
    if run.config.projector:
        bank = validation.sampler.bank
        # Shuffled, so that batch statistics come from many classes.
        rows = torch.randperm(len(bank.images), generator=torch.Generator().manual_seed(0))[:PROJECTED_IMAGES]
        names = [bank.class_names[c] for c in torch.bucketize(rows, bank.offsets[1:], right=True)]
        images = bank.images[rows].float().div(255)
        backbone = run.algorithm.embedding.eval()
        with torch.no_grad():
            features = torch.cat([backbone.features(some.to(run.sampler.device)).cpu() for some in images.split(100)])
        side = min(32, *images.shape[2:])  # TensorBoard stores all of them in one image
        small = F.interpolate(images, (side, side), mode="area")
        logger.features(run.step, "val/features", features, names, small)


def check_finite(run: Run, folder: Path, ranks: Ranks) -> None:
    """Average running statistics over ranks; UserError if weights, or scalars since the last log, are not finite."""
    ranks.average(running_statistics(run.algorithm), 1 / ranks.size)
    if run.average:
        ranks.average(running_statistics(run.average), 1 / ranks.size)
    finite = [all(value.isfinite() for value in scalars.values()) for scalars in run.window]
    if not all(finite):
        what = f"the loss is not finite at step {run.step - len(finite) + 1 + finite.index(False)}"
    elif not all(value.isfinite().all() for value in run.algorithm.state_dict().values()):
        what = f"the weights are not finite after step {run.step}"
    else:
        return
    last = folder / "last.pt"
    good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been saved"
    raise UserError(f"{what}; {good}")


def prepare(config: TrainConfig, overrides: list[str], ranks: Ranks, new: bool = True) -> tuple[Run, EpisodeList]:
    """Build a run at step 0, and its validation episodes."""
    check_counts(config, ranks)
    device = pick_device(ranks.device(config.device))
    if new:
        check_precision(config.precision, device)
    dataset = build_dataset(config.dataset, config.data_dir)
    augment = Augment(**vars(config.augment), seed=config.seed)
    task = config.train_way, config.train_shot, config.train_query, dataset.rotation("train")
    training: EpisodeSampler | ImageSampler
    if target_class("algo", config.algo, Algorithm).batches == "images":
        training = ImageSampler(dataset.load("train"), task[3], config.seed, device, augment)
    else:
        bank = dataset.load("train")
        training = EpisodeSampler(bank, *task, config.seed, device, "train_", augment, vary=config.train_vary)
    task = config.way, config.shot, config.query, dataset.rotation("val")
    unseen = EpisodeSampler(dataset.load("val"), *task, device=device, vary=config.vary)
    validation = EpisodeList(unseen, config.eval_episodes, "eval_episodes")
    known = seen.names(dataset, training.bank), seen.names(dataset, unseen.bank), look_of(training.bank.images)
    if device.type == "cpu":
        keep_freed_memory()  # only now, because decoding a data set frees much memory
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    algorithm = build(config, training.bank.image_shape, training.classes).to(device)
    if ranks.size > 1 and algorithm.sequential_because:
        raise UserError(f"algo.{algorithm.sequential_because}, which {ranks.size} processes cannot share; use one")
    optimizer, schedule = build_optimizer(config, algorithm) or (None, None)
    learned = load_checkpoint(teacher) if (teacher := config.algo.get("teacher")) else None
    if learned:
        if learned.image_shape != training.bank.image_shape:
            expected = training.bank.image_shape
            raise UserError(f"algo.teacher={teacher}: trained on images {learned.image_shape}, must be {expected}")
        algorithm.learn_from(learned.build().to(device))
    if with_head(algorithm, config).tunes_network:  # raises errors in its settings before training
        raise UserError("head.adapt=backbone: is for evaluate and predict, because it tunes the network for each task")
    flops = flops_of_a_step(algorithm, training, config.meta_batch, ranks) if optimizer else 0.0
    if config.compile and config.train_vary:
        raise UserError(f"compile=true: cannot be used with train_vary={config.train_vary}, which changes all shapes")
    if config.compile:
        algorithm.compile_training()
    splits = dataset.splits()
    warn_of_few_test_classes(config, splits)
    average = averaged(algorithm, config.ema)
    here = describe_device(device)
    run = Run(config, overrides, algorithm, optimizer, schedule, training, here, splits, *known, flops, average)
    if learned:
        run.record_earlier_run(learned, "learned from ")
    return run, validation


def flops_of_a_step(algorithm: Algorithm, sampler: EpisodeSampler | ImageSampler, count: int, ranks: Ranks) -> float:
    """Count the floating-point operations of a training step of all ranks, forward and backward."""
    own, state = ranks.share(count), sampler.state_dict()
    if (size := 4 * count * sampler.images_each * math.prod(sampler.bank.image_shape)) > MOST:
        text = f"the images of a step take {in_bytes(size)}, above {in_bytes(MOST)}; reduce it"
        raise UserError(f"meta_batch={count}: {text}")
    batch = sampler.sample(count, own)
    sampler.load_state_dict(state)
    with random_state_kept(sampler.device), FlopCounterMode(display=False) as counter:
        algorithm.copy_for_counting().train().training_step(batch)
    return counter.get_total_flops() * count / (own.stop - own.start)


def averaged(algorithm: Algorithm, decay: float | None) -> AveragedModel | None:
    """Build the exponential moving average of all weights and buffers; None without decay."""
    return AveragedModel(algorithm, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None


def check_counts(config: TrainConfig, ranks: Ranks) -> None:
    if config.processes != 1:
        raise UserError(f"processes={config.processes}: give it on the command line, not in a file")
    for name in ("meta_batch", "eval_episodes"):
        if getattr(config, name) < ranks.size:
            raise UserError(f"{name}={getattr(config, name)}: must be at least {ranks.size}, the number of processes")


def set_state(run: Run, source: Checkpoint | None) -> None:
    """Load a last.pt, or initialize a new run; UserError if steps are left and this device lacks the precision."""
    if not source:
        return initialize(run)
    run.load(source)
    if run.step < run.steps and not run.finished:
        check_precision(run.config.precision, run.sampler.device)


def initialize(run: Run) -> None:
    """Load initial weights of a new run, if any: pre-trained ones, or the backbone of another run."""
    backbone = run.algorithm.embedding
    if source := backbone.load_pretrained():
        run.earlier = Training(stages=[source]).after(run.earlier)
    if run.config.init:
        first = load_checkpoint(run.config.init)
        if first.config.normalize != run.config.normalize:
            raise UserError(f"init={run.config.init}: set normalize as in its training, {first.config.normalize}")
        own = backbone.state_dict()  # without statistics, if running_stats=false
        try:
            weights = first.build().embedding.state_dict().items()
            used = {name: value for name, value in weights if name in own or name.rpartition(".")[2] not in RUNNING}
            backbone.load_state_dict(used)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"init={run.config.init}: its backbone does not fit this run's ({reason})") from None
        run.record_earlier_run(first)
    if source or run.config.init:
        run.algorithm.start_from_backbone()
    if run.average:
        run.average = averaged(run.algorithm, run.config.ema)


def clip(algorithm: Algorithm, norm: float | None, value: float | None) -> None:
    """Clip gradients, separately for each network of the algorithm (backbone, relation module, ...)."""
    groups = [*(network.parameters() for network in algorithm.children()), algorithm.parameters(recurse=False)]
    for parameters in filter(None, map(list, groups)):
        if norm is not None:
            nn.utils.clip_grad_norm_(parameters, norm)
        if value is not None:
            nn.utils.clip_grad_value_(parameters, value)


def report(run: Run, validation: EpisodeList, folder: Path, logger: Logger) -> None:
    """Write result.json; print the best validation, the files written and the next commands."""
    config, best = run.config, run.best
    images = validation.sampler.bank.fingerprint
    known = {"split": "val", "seed": 0, "batch_norm": config.batch_norm, "device": run.hardware}
    whole = uses_query_set(config)
    result = record(
        config, validation, **known, **best, **run.training.result_fields(), images_sha256=images, uses_query_set=whole
    )
    training = {"steps": run.step, "seconds": round(run.seconds, 1), "seed": config.seed, "overrides": run.overrides}
    ResultFile([result], training).write(folder / "result.json")
    warn_at_chance(result)
    if run.steps == 0:
        logger.line("all parameters are frozen: the initial weights were validated, and nothing was trained")
    elif run.step < run.steps:
        logger.line(f"stopped at step {run.step}: no new best in {run.since_best} validations (patience)")
    for line in (
        f"best in validation: {percent(best['accuracy'], best['ci95'])} % at step {best['step']} "
        f"({shape_text(config.way, config.shot, config.vary)}, {config.eval_episodes} episodes, {result.conditions})",
        f"checkpoint: {folder / 'best.pt'}",
        f"curves:     {folder / 'results.png'}, or: tensorboard --logdir {shlex.quote(str(folder))}",
        f"to test:    metacv evaluate {setting('checkpoint', folder)}",
    ):
        logger.line(line)
