"""`metacv train dry_run=true`: estimate time and memory of a training run from a few of its steps."""

import sys
import time
from collections.abc import Callable

import torch

from metacv.algorithms.base import Algorithm, MetricMethod
from metacv.data.sampler import EpisodeList
from metacv.episodes import evaluate_episodes
from metacv.run import Run
from metacv.text import duration, in_bytes

STEPS, TASKS = 2, 20


def dry_run(run: Run, tested: Algorithm, validation: EpisodeList, step: Callable[[], object]) -> list[str]:
    """Time STEPS training steps, and `tested` on TASKS validation tasks; return lines with its time and memory."""
    mode, device = run.config.batch_norm, run.sampler.device
    few = validation.part(slice(TASKS))
    seconds = timed(lambda: evaluate_episodes(tested, few, mode), 1, device)
    per_validation = seconds * images(tested, validation, mode) / images(tested, few, mode)
    left = run.steps - run.step
    count = max(0 if run.finished else 1, -(-left // run.config.eval_every))
    per_step = timed(step, STEPS, device) if left else 0.0
    training, val = left * per_step, count * per_validation
    return [
        f"training  {duration(training)}, {per_step:.3g} s per step",
        f"val       {duration(val)}, {per_validation:.3g} s per validation",
        f"total     {duration(training + val)}, at most {in_bytes(peak_memory(device))} of memory",
    ]


def timed(work: Callable[[], object], count: int, device: torch.device) -> float:
    """Return the mean seconds of `count` calls of `work`, after a first call to warm up."""
    for calls in (1, count):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / count


def images(algorithm: Algorithm, episodes: EpisodeList, batch_norm: str) -> int:
    """Return how many images pass through the network in evaluation, not counting inner steps and augmented copies."""
    once = isinstance(algorithm, MetricMethod) and algorithm.embeds_each_image_alone(batch_norm)
    return episodes.rows.unique().numel() if once else episodes.rows.numel()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # does not exist on Windows, where metacv is untested

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
