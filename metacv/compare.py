"""Which of several runs is better: their accuracies on the same episodes, and the differences episode by episode."""

import math
import os
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from metacv import MetacvError, checkpoint
from metacv.config import CompareConfig
from metacv.evaluate import check_norm, describe, measure, with_changes, write_result
from metacv.model import check_settings

SAME = ("way", "shot", "query", "episodes", "norm")


def compare(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Evaluates every run on one list of episodes and writes accuracies and paired differences into `folder`."""
    check_settings(cfg, CompareConfig)
    given: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    if OmegaConf.is_missing(cfg, "runs"):
        raise MetacvError("give the runs to compare: metacv compare RUN RUN ...")
    places = without_plain_files(given.pop("runs"))
    paths = [checkpoint.find(place, "best.pt") for place in places]
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise MetacvError(f"compare {' '.join(places)}: give two runs or more, each once")
    if given["norm"]:
        check_norm(given["norm"])
    check_same_tasks(places, [with_changes(checkpoint.load(path)["config"], given, path) for path in paths])
    accuracies: list[Tensor] = []
    results: list[dict[str, Any]] = []
    for place, path in zip(places, paths, strict=True):
        for accuracy, found in measure(str(path), given):
            if results and found["episodes_sha256"] != results[0]["episodes_sha256"]:
                raise MetacvError(f"{place} is tested on other images than {places[0]}: say dataset=...")
            accuracies.append(accuracy)
            results.append(found)
            print(describe(found))

    names = shortened(places)
    pairs = list(combinations(range(len(names)), 2))
    differences: list[dict[str, Any]] = [
        difference(accuracies[a], accuracies[b], len(pairs)) | {"of": names[a], "less": names[b]} for a, b in pairs
    ]
    wide = max(len(f"{one['of']} - {one['less']}") for one in differences)
    together = f", which hold together for all {len(pairs)} pairs (Bonferroni)" if len(pairs) > 1 else ""
    print(f"\nthe same {len(accuracies[0])} episodes, differences with their 95 % intervals{together}:")
    for one in differences:
        shown = "" if abs(one["mean"]) > one["ci95"] > 0 else "   may be chance"
        pair = f"{one['of']} - {one['less']}"
        print(f"{pair:<{wide}}  {100 * one['mean']:+6.2f} ± {100 * one['ci95']:.2f} %{shown}")
    print("(over the draw of episodes from these images, for these trained models: other seeds of training may differ)")
    result = {"runs": dict(zip(names, results, strict=True)), "differences": differences}
    write_result(folder, result)
    print(f"result: {folder / 'result.json'}")
    return result


def difference(one: Tensor, other: Tensor, pairs: int = 1) -> dict[str, float]:
    """Of accuracies [E] on the same episodes: the mean of the E differences with its 95 % interval.

    Episodes that are hard for both cancel out, so that smaller differences can be told from chance than by
    comparing two intervals. Of several `pairs` all intervals hold in 95 % of cases (Bonferroni).
    """
    return {"mean": float((one - other).mean()), "ci95": t_interval(one - other, 0.05 / pairs)}


def t_interval(values: Tensor, beyond: float = 0.05) -> float:
    """Half the interval of the mean of a few values [E] by Student's t, which misses with probability `beyond`."""
    return t_quantile(beyond, len(values) - 1) * float(values.std(correction=1)) / len(values) ** 0.5


@cache
def t_quantile(beyond: float, freedom: int) -> float:
    """What |t| exceeds with probability `beyond`, to about 1e-3 of it or better.

    With t = sqrt(freedom) * tan(angle) the angle has the density cos(angle) ** (freedom - 1), which is summed up here.
    """
    angles = (torch.arange(10**6, dtype=torch.float64) + 0.5) * (math.pi / 2 / 10**6)
    below = (angles.cos() ** (freedom - 1)).cumsum(0)
    return freedom**0.5 * math.tan(angles[torch.searchsorted(below, (1 - beyond) * below[-1])])


def without_plain_files(places: list[str]) -> list[str]:
    """What else lies beside the runs of a sweep, as the shell's * gives it."""
    folders = any(Path(place).expanduser().is_dir() for place in places)
    return [place for place in places if not (folders and Path(place).suffix != ".pt" and Path(place).is_file())]


def check_same_tasks(places: list[str], configs: list[dict[str, Any]]) -> None:
    """What the runs do not agree on, and nobody has said, makes no common task."""
    for place, config in zip(places, configs, strict=True):
        for name in SAME:
            if config[name] != configs[0][name]:
                raise MetacvError(
                    f"{place} is tested with {name}={config[name]}, {places[0]} with {name}={configs[0][name]}: "
                    f"say {name}=..."
                )


def shortened(places: Sequence[str | Path]) -> list[str]:
    """Without the folders that all of them lie in."""
    whole = [os.path.abspath(place) for place in places]
    common = os.path.commonpath([os.path.dirname(place) for place in whole])
    return [os.path.relpath(place, common) for place in whole]
