"""Which of several runs is better: their accuracies on the same episodes, and the differences episode by episode."""

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from metacv import MetacvError, checkpoint
from metacv.build import check_settings
from metacv.config import CompareConfig
from metacv.evaluate import check_norm, describe, interval, measure, with_changes, write_result

SAME = ("split", "way", "shot", "query", "episodes", "norm", "seed")


def compare(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Evaluates every run on one list of episodes and writes accuracies and paired differences into `folder`."""
    check_settings(cfg, CompareConfig)
    given: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    if OmegaConf.is_missing(cfg, "runs"):
        raise MetacvError("give the runs to compare: metacv compare RUN RUN ...")
    places = given.pop("runs")
    if len({checkpoint.find(place, "best.pt").resolve() for place in places}) < max(2, len(places)):
        raise MetacvError(f"compare {' '.join(places)}: give two runs or more, each once")
    if given["norm"]:
        check_norm(given["norm"])
    check_same_tasks(places, given)
    accuracies: list[Tensor] = []
    results: list[dict[str, Any]] = []
    for place in places:
        for accuracy, found in measure(place, given):
            if results and found["episodes_sha256"] != results[0]["episodes_sha256"]:
                raise MetacvError(f"{place} is tested on other images than {places[0]}: say dataset=...")
            accuracies.append(accuracy)
            results.append(found)
            print(describe(found))

    names = shortened(places)
    differences: list[dict[str, Any]] = [
        difference(accuracies[a], accuracies[b]) | {"of": names[a], "less": names[b]}
        for a, b in combinations(range(len(places)), 2)
    ]
    wide = max(len(f"{one['of']} - {one['less']}") for one in differences)
    print(f"\nthe same {len(accuracies[0])} episodes, differences with their 95 % interval:")
    for one in differences:
        shown = "" if abs(one["mean"]) > one["ci95"] else "   may be chance"
        pair = f"{one['of']} - {one['less']}"
        print(f"{pair:<{wide}}  {100 * one['mean']:+6.2f} ± {100 * one['ci95']:.2f} %{shown}")
    result = {"runs": dict(zip(names, results, strict=True)), "differences": differences}
    write_result(folder, result)
    print(f"result: {folder / 'result.json'}")
    return result


def difference(one: Tensor, other: Tensor) -> dict[str, float]:
    """Of accuracies [E] on the same episodes: the mean of the E differences with its 95 % interval.

    Episodes that are hard for both cancel out, so that smaller differences can be told from chance than by
    comparing two intervals.
    """
    return {"mean": float((one - other).mean()), "ci95": interval(one - other)}


def check_same_tasks(places: list[str], given: dict[str, Any]) -> None:
    """What the runs do not agree on, and nobody has said, makes no common task."""
    configs = []
    for place in places:
        path = checkpoint.find(place, "best.pt")
        configs.append(with_changes(checkpoint.load(path)["config"], given, path))
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
