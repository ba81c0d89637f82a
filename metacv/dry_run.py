"""What a training run will take, measured on a few of its steps: `metacv train dry_run=true`."""

import sys
import time
from collections.abc import Callable

import torch

from metacv.algorithms.base import Algorithm, MetricMethod
from metacv.data.sampler import EpisodeList
from metacv.evaluate import evaluate_episodes
from metacv.run import Run
from metacv.text import duration, in_bytes

STEPS, TASKS = 2, 20


def dry_run(run: Run, tested: Algorithm, validation: EpisodeList, step: Callable[[], object]) -> list[str]:
    """Time STEPS steps, and `tested` on TASKS validation tasks; returns lines with the run's time and memory."""
    mode, device = run.config.batch_norm, run.sampler.device
    few = validation.part(slice(TASKS))
    seconds = timed(lambda: evaluate_episodes(tested, few, mode), 1, device)
    each = seconds * images(tested, validation, mode) / images(tested, few, mode)
    count, left = max(1, -(-(run.steps - run.step) // run.config.eval_every)), run.steps - run.step
    of_step = timed(step, STEPS, device) if left else 0.0
    return [
        f"training  {duration(left * of_step)}, {of_step:.3g} s per step",
        f"val       {duration(count * each)}, {duration(each)} per validation",
        f"total     {duration(left * of_step + count * each)}, at most {in_bytes(peak_memory(device))} of memory",
    ]


def timed(work: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds that a call of `work` takes, the mean of `count` calls after a first one, which takes longer."""
    for calls in (1, count):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / count


def images(algorithm: Algorithm, episodes: EpisodeList, batch_norm: str) -> int:
    """How many images pass through the network in evaluation, up to those of inner steps and augmented copies."""
    once = isinstance(algorithm, MetricMethod) and algorithm.embeds_each_image_alone(batch_norm)
    return episodes.rows.unique().numel() if once else episodes.rows.numel()


def peak_memory(device: torch.device) -> int:
    """The most bytes of memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where metacv has not been tried

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
