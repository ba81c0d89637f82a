"""Which of several runs is better: their accuracies on the same episodes, and the differences per episode."""

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from scipy import stats
from torch import Tensor

from metacv.config import CompareConfig
from metacv.errors import UserError
from metacv.evaluate import prepare, with_changes, write_evaluation
from metacv.files import user_path
from metacv.model import Checkpoint, load_checkpoint
from metacv.results import Result, ResultFile
from metacv.text import plural

SAME = ("way", "shot", "query", "episodes", "batch_norm")


def compare(cfg: CompareConfig, folder: Path) -> ResultFile:
    """Evaluate every run on one list of episodes, and write accuracies and paired differences into `folder`."""
    places = without_plain_files(cfg.runs)
    checkpoints = [load_checkpoint(place) for place in places]
    if len({checkpoint.path.resolve() for checkpoint in checkpoints}) < max(2, len(checkpoints)):
        raise UserError(f"compare {' '.join(places)}: name two runs or more, each once")
    check_same_tasks(places, checkpoints, cfg)
    accuracies: list[Tensor] = []
    results: list[Result] = []
    for place, checkpoint in zip(places, checkpoints, strict=True):
        evaluation = prepare(checkpoint, cfg)
        if results and evaluation.episodes.fingerprint != results[0].episodes_sha256:
            raise UserError(f"{place} is tested on other images than {places[0]}: set dataset=...")
        accuracy, result = evaluation.run(evaluation.config.batch_norm)
        accuracies.append(accuracy)
        results.append(result)
        print(result.describe())
    names = shortened(places)
    pairs = list(combinations(range(len(names)), 2))
    differences: list[dict[str, Any]] = [
        difference(accuracies[a], accuracies[b], len(pairs)) | {"of": names[a], "less": names[b]} for a, b in pairs
    ]
    show(differences, len(accuracies[0]))
    file = ResultFile(results, differences=differences)
    write_evaluation(folder, file, accuracies)
    print(f"result: {folder / 'result.json'}")
    return file


def show(differences: list[dict[str, Any]], episodes: int) -> None:
    """Print a line for each pair of runs."""
    pairs = len(differences)
    together = f", simultaneous for {plural(pairs, 'pair')} (Bonferroni)" if pairs > 1 else ""
    print(f"\ndifferences on the same {episodes} episodes, with 95 % intervals{together}:")
    width = max(len(f"{one['of']} - {one['less']}") for one in differences)
    for one in differences:
        note = "" if abs(one["mean"]) > one["ci95"] > 0 else "   not significant"
        pair = f"{one['of']} - {one['less']}"
        print(f"{pair:<{width}}  {100 * one['mean']:+6.2f} ± {100 * one['ci95']:.2f} %{note}")
    print("(The intervals cover the choice of episodes from these images, for these models. They do not cover other")
    print("training seeds or other images.)")


def difference(one: Tensor, other: Tensor, pairs: int = 1) -> dict[str, float]:
    """Mean and 95 % interval of the differences of accuracies [E] on the same episodes.

    What is hard for both models cancels out, so smaller differences become significant than between two separate
    intervals. With several `pairs`, all intervals hold simultaneously in 95 % of cases (Bonferroni).
    """
    return {"mean": float((one - other).mean()), "ci95": t_interval(one - other, 0.05 / pairs)}


def t_interval(values: Tensor, alpha: float = 0.05) -> float:
    """Half the interval of the mean of a few values [E] by Student's t, which misses with probability `alpha`."""
    quantile = float(stats.t.ppf(1 - alpha / 2, len(values) - 1))
    return quantile * float(values.std(correction=1)) / len(values) ** 0.5


def without_plain_files(places: list[str]) -> list[str]:
    """The places without what lies beside the runs of a sweep, where the shell's * names everything."""
    folders = any(user_path(place).is_dir() for place in places)
    return [place for place in places if not (folders and Path(place).suffix != ".pt" and Path(place).is_file())]


def check_same_tasks(places: list[str], checkpoints: list[Checkpoint], cfg: CompareConfig) -> None:
    """Refuse runs that were trained to be tested on different tasks, unless the command says which task to use."""
    configs = [with_changes(checkpoint, cfg) for checkpoint in checkpoints]
    for place, config in zip(places, configs, strict=True):
        for name in SAME:
            first, own = getattr(configs[0], name), getattr(config, name)
            if own != first:
                raise UserError(f"{place} is tested with {name}={own}, {places[0]} with {name}={first}: set {name}=...")


def shortened(places: Sequence[str | Path]) -> list[str]:
    """Paths without the folders that all of them share."""
    whole = [os.path.abspath(place) for place in places]
    common = os.path.commonpath([os.path.dirname(place) for place in whole])
    return [os.path.relpath(place, common) for place in whole]
