"""`metacv compare`: accuracies of several runs on the same episodes, and the paired differences between runs."""

from itertools import combinations, product
from pathlib import Path
from typing import Any

from torch import Tensor

from metacv.config import CompareConfig
from metacv.errors import UserError
from metacv.evaluate import prepare, with_changes, write_evaluation
from metacv.files import user_path
from metacv.model import Checkpoint, load_checkpoint
from metacv.progress import header
from metacv.results import Result, independent, t_interval
from metacv.terminal import say
from metacv.text import plural, printable, shortened

SAME = ("way", "shot", "query", "vary", "episodes", "batch_norm")


def compare(cfg: CompareConfig, folder: Path) -> None:
    """Evaluate every run on the same list of episodes; write accuracies and paired differences into `folder`."""
    places = without_plain_files(cfg.runs)
    checkpoints = {place: load_checkpoint(place) for place in places}
    if len({checkpoint.path.resolve() for checkpoint in checkpoints.values()}) < max(2, len(places)):
        raise UserError(f"compare {' '.join(places)}: give two or more different runs, each once")
    check_same_tasks(checkpoints, cfg)
    measured: list[tuple[Tensor, Result]] = []
    evaluations = {place: prepare(checkpoint, cfg, checkpoints.values()) for place, checkpoint in checkpoints.items()}
    for place, evaluation in evaluations.items():
        if evaluation.episodes.fingerprint != evaluations[places[0]].episodes.fingerprint:
            raise UserError(f"{place} and {places[0]} are tested on different images; set dataset=NAME for all runs")
    names = shortened(places)
    say(header([evaluation.about for evaluation in evaluations.values()]))
    for name, evaluation in zip(names, evaluations.values(), strict=True):
        measured.append(evaluation.run_and_print(evaluation.config.batch_norm, name))
    accuracies = [accuracy for accuracy, _ in measured]
    rounds = evaluations[places[0]].episodes.rounds
    pairs = list(combinations(zip(names, accuracies, strict=True), 2))
    differences: list[dict[str, Any]] = [
        difference(one, other, len(pairs), rounds) | {"of": name, "less": other_name}
        for (name, one), (other_name, other) in pairs
    ]
    show(differences, len(accuracies[0]), measured[0][1].disjoint)
    write_evaluation(folder, measured, differences)
    print(f"result: {folder / 'result.json'}")


def show(differences: list[dict[str, Any]], episodes: int, disjoint: bool) -> None:
    """Print the difference of each pair of runs in a line."""
    pairs = len(differences)
    together = f", simultaneous for {plural(pairs, 'pair')} (Bonferroni)" if pairs > 1 else ""
    print(f"\ndifferences on the same {episodes} episodes, with 95 % intervals{together}:")
    width = max(len(f"{one['of']} - {one['less']}") for one in differences)
    for one in differences:
        equal = one["mean"] == one["ci95"] == 0
        note = "   equal" if equal else "" if abs(one["mean"]) > one["ci95"] > 0 else "   not significant"
        pair = printable(f"{one['of']} - {one['less']}")
        print(f"{pair:<{width}}  {100 * one['mean']:+6.2f} ± {100 * one['ci95']:.2f} %{note}")
    covered = "the choice of these images of the classes" if disjoint else "the choice of episodes from these images"
    print(f"(The intervals cover {covered}, for these models.")
    print(f"They do not cover other training seeds or other {'classes' if disjoint else 'images'}.)")


def difference(one: Tensor, other: Tensor, pairs: int = 1, rounds: int = 0) -> dict[str, float]:
    """Return mean and half the 95 % interval of the differences of two accuracies [E] by episode.

    The interval is simultaneous for `pairs` comparisons (Bonferroni). It is narrower than separate intervals suggest,
    because the difficulty of an episode, which both models share, cancels out. `rounds`: as in results.summary.
    """
    return {"mean": float((one - other).mean()), "ci95": t_interval(independent(one - other, rounds), 0.05 / pairs)}


def without_plain_files(places: list[str]) -> list[str]:
    """Drop plain files if there are folders: `SWEEP/*` in a shell also matches the files beside the runs."""
    folders = any(user_path(place).is_dir() for place in places)
    return [place for place in places if not (folders and Path(place).suffix != ".pt" and Path(place).is_file())]


def check_same_tasks(checkpoints: dict[str, Checkpoint], cfg: CompareConfig) -> None:
    """Raise UserError if the runs' settings define different test tasks, unless the command line sets the task."""
    configs = {place: with_changes(checkpoint, cfg) for place, checkpoint in checkpoints.items()}
    first, *others = configs
    for place, name in product(others, SAME):
        own, expected = getattr(configs[place], name), getattr(configs[first], name)
        if own != expected:
            raise UserError(f"{place} has {name}={own}, {first} has {name}={expected}; set {name}=VALUE for all runs")
