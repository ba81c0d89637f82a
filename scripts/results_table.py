"""Writes RESULTS.md from the files in outputs/reference and the papers' numbers in configs/experiment.

python scripts/results_table.py
"""

import json
import shlex
import sys
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from metacv import CONFIG_DIR
from metacv.algorithms.heads.finetune import STEPS
from metacv.config import TrainConfig, class_name, from_dict, typed
from metacv.errors import UserError
from metacv.experiments import Published, published
from metacv.files import sha256
from metacv.results import Result, ResultFile, read_results, t_interval
from metacv.text import percent
from metacv.upgrade import upgrade_config

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "outputs/reference"
TRANSDUCTIVE = ROOT / "outputs/transductive"
BLOCKS_RUNS = ROOT / "outputs/blocks"
EMA = ROOT / "outputs/ema"
FINETUNE = ROOT / "outputs/finetune"
FASTER_RUNS = REFERENCE / "omniglot/faster"
CELLS = {"omniglot": ["5w1s", "5w5s", "20w1s", "20w5s"], "miniimagenet": ["5w1s", "5w5s"], "cifar_fs": ["5w1s", "5w5s"]}
CELLS |= {"fc100": CELLS["cifar_fs"]}
PAPERS = {"omniglot", "miniimagenet"}  # data sets with all of the methods, and a protocol that they share
METHODS = {
    "maml": "MAML",
    "fomaml": "FOMAML",
    "fomaml_fast": "FOMAML, fast",
    "anil": "ANIL",
    "boil": "BOIL",
    "meta_sgd": "Meta-SGD",
    "mamlpp": "MAML++",
    "protomaml": "ProtoMAML",
    "reptile": "Reptile",
    "protonet": "ProtoNet",
    "relationnet": "RelationNet",
    "relationnet_fast": "RelationNet, fast",
    "classifier": "Classifier",
    "meta_baseline": "Meta-Baseline",
    "r2d2": "R2D2",
    "maml_init": "MAML after a classifier",
    "fomaml_init": "FOMAML after a classifier",
    "protonet_init": "ProtoNet after a classifier",
}
EXPERIMENTS = [
    name
    for data, cells in CELLS.items()
    for cell in cells
    for name in (f"{data}/{method}_{cell}" for method in METHODS)
    if (CONFIG_DIR / "experiment" / f"{name}.yaml").exists()
] + ["quick/cifar_fs"]
COLUMNS = ["method", "task", "protocol", "paper", "ours", "difference", "reproduced", "steps", "time", "hardware"]
# Folders of outputs/reference/omniglot with runs that differ in the inner loss: with the mean, with the sum.
LOSS_SCALE = {
    "MAML": ("maml_5w1s", "loss_scale/maml_sum"),
    "FOMAML": ("loss_scale/fomaml_mean", "loss_scale/fomaml_sum"),
    "FOMAML, authors' initialization": ("loss_scale/fomaml_mean", "loss_scale/fomaml_authors"),
}
# Folders of outputs/transductive are named after these and a cell of CIFAR-FS.
QUERY_SET_HEADS = {"soft_kmeans": "soft k-means", "laplacian": "LaplacianShot", "tim": "TIM", "pt_map": "PT-MAP"}
# outputs/blocks has trained networks, named after these and AUGMENTED, and a folder of results for each head and cell.
BLOCKS = {
    "rfs": ("none", "mean"),
    "rfsflat": ("none", "flattened"),
    "poolmean": ("max pool", "mean"),
    "poolflat": ("max pool", "flattened"),
}
AUGMENTED = {"plain": "none", "augmented": "crop, flip"}
BLOCK_HEADS = {
    "ncm": "nearest mean",
    "cl2n": "nearest centred mean",
    "logistic": "logistic",
    "augmented": "logistic, augmented",
}
# Folders of outputs/finetune, each with a result and that of the nearest class mean on the same episodes.
TUNED = {"conv4_5w1s": "Conv4", "conv4_5w5s": "Conv4"}
# Folders of outputs/reference/omniglot/faster are named after these and a seed from 0.
FASTER = {
    "base": "none",
    "lr3": "three times the outer learning rate",
    "onecycle_lr3": "three times the outer learning rate, with warm-up and decay",
    "mb8": "8 tasks per step instead of 32, four times the steps",
    "q5": "5 queries per class in training instead of 1",
    "ema": "averaged weights",
}
COMMON_EPISODES = 2000
METHODS_PAGE = ROOT / "docs/methods.md"
COSTS = "<!-- by scripts/results_table.py -->", "<!-- end -->"
FILES = ["best.pt", "config.yaml", "metrics.jsonl", "train.json", "common.json", "result.json"]
# Overrides that differ between these runs, but are not the change.
FASTER_ALIKE = {"seed", "eval_every", "log_every"}
# Overrides that do not change what an experiment trains.
NOT_SHOWN = {"experiment", "data_dir", "device", "resume", "compile"}


class Kept:
    """A folder of outputs/reference: a trained model with its results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def complete(self) -> bool:
        """Whether all files exist, and both evaluations are of this checkpoint."""
        if not all((self.folder / name).exists() for name in FILES):
            return False
        digest = sha256(self.folder / "best.pt")
        return all(result.checkpoint_sha256 == digest for result in [*self.results.values(), self.common])

    @cached_property
    def config(self) -> TrainConfig:
        return from_dict(TrainConfig, upgrade_config(yaml.safe_load((self.folder / "config.yaml").read_text())))

    @cached_property
    def results(self) -> dict[str, Result]:
        """Under the paper's protocol, by batch-norm mode."""
        return {result.batch_norm: result for result in read_results(self.folder / "result.json").results}

    @cached_property
    def common(self) -> Result:
        """Under the protocol that all methods share."""
        return read_results(self.folder / "common.json").results[0]

    @cached_property
    def trained(self) -> ResultFile:
        return read_results(self.folder / "train.json")

    @property
    def training(self) -> dict[str, Any]:
        assert self.trained.training is not None
        return self.trained.training

    @property
    def overrides(self) -> list[str]:
        """Overrides that change what is trained; of several for one setting, the last."""
        words = {word.split("=")[0]: word for word in self.training["overrides"]}
        return [word for name, word in words.items() if name not in NOT_SHOWN]


class Experiment:
    """A file of configs/experiment/DATASET, and what outputs/reference has of it."""

    def __init__(self, name: str, config: TrainConfig) -> None:
        self.name = name
        self.config = config
        self.kept = Kept(REFERENCE / name)

    @property
    def changes(self) -> str:
        """The overrides of the run that differ from the experiment."""
        own = OmegaConf.create(asdict(self.config))
        other = OmegaConf.merge(own, asdict(self.kept.config))  # settings that older files lack are those of today
        names = {word: word.split("=")[0] for word in self.kept.overrides}
        return shlex.join(
            word for word, name in names.items() if OmegaConf.select(own, name) != OmegaConf.select(other, name)
        )

    def rows(self) -> list[list[str]]:
        """Rows of the table under the papers' protocols, one for each published number."""
        return [self._row(paper) for paper in published(self.config.paper)]

    def _row(self, paper: Published) -> list[str]:
        method = self.name.split("/")[1].rpartition("_")[0]
        tested = self.kept.config if self.kept.complete else self.config
        head = f", head {tested.head['_target_'].rpartition('.')[2]}" if tested.head else ""
        protocol = (
            f"{tested.query} {'query' if tested.query == 1 else 'queries'} per class, {paper.batch_norm}, "
            f"rotation {tested.dataset['test_rotation']}, {tested.episodes} episodes{head}"
        )
        title = METHODS.get(method) or class_name(self.config.algo)
        start = [title, f"{self.config.way}w{self.config.shot}s", protocol, str(paper)]
        before = self._with_pre_training(paper) if self.name.startswith("miniimagenet") else []
        if not self.kept.complete:
            return [*start, "not run", *[""] * 5, *before]
        result, training = self.kept.results[paper.batch_norm], self.kept.training
        done, full = training["steps"], self.config.steps
        shared = f", the run of {name}" if (name := training.get("run_of")) else ""
        yes = "with pre-training" if "without pre-training" in paper.source else "yes"
        return [
            *start,
            f"[{percent(result.accuracy, result.ci95)}]({self.kept.folder.relative_to(ROOT)})",
            f"{100 * result.accuracy - paper.accuracy:+.2f}",
            yes if paper.reproduced_by(result.accuracy, result.ci95) else "no",
            (f"{done}" if done == full else f"{done} of {full}") + shared,
            f"{training['seconds'] / 60:.0f} min",
            self.kept.trained.results[0].device,
            *before,
        ]

    def _with_pre_training(self, paper: Published) -> list[str]:
        """The accuracy of this method after a first stage, and whether it reaches the paper's."""
        kept = Kept(self.kept.folder.with_name("_init_".join(self.kept.folder.name.rsplit("_", 1))))
        if not kept.complete or paper.batch_norm not in kept.results:
            return [""]
        result = kept.results[paper.batch_norm]
        reached = "reached" if paper.reproduced_by(result.accuracy, result.ci95) else "not reached"
        return [f"{percent(result.accuracy, result.ci95)}, {reached}"]

    def common(self) -> str:
        """The cell of the table under the common protocol."""
        if not self.kept.complete:
            return "not run"
        result = self.kept.common
        note = f" ({result.episodes} episodes)" if result.episodes != COMMON_EPISODES else ""
        return f"{percent(result.accuracy, result.ci95)} %{note}"


def main() -> None:
    (ROOT / "RESULTS.md").write_text(page())
    METHODS_PAGE.write_text(with_costs(METHODS_PAGE.read_text()))


def with_costs(text: str) -> str:
    """docs/methods.md with a table of the accuracies under the common protocol, and of what the training cost."""
    start, end = COSTS
    own = {name: run for name, run in kept_runs(EXPERIMENTS).items() if not run.training.get("run_of")}
    before, rest = text.split(start)
    return f"{before}{start}\n{cost_table(own)}\n{end}{rest.split(end)[1]}"


def kept_runs(experiments: list[str]) -> dict[str, Kept]:
    """The kept runs of these experiments."""
    runs = {name: Kept(REFERENCE / name) for name in experiments}
    return {name: run for name, run in runs.items() if run.complete}


def cost_table(runs: dict[str, Kept]) -> str:
    """Accuracy under the common protocol and cost of the training, of each experiment's run."""
    rows = []
    for name, kept in runs.items():
        result = kept.common
        cost = [f"{result.train_images:,}", f"{result.train_flops / 1e15:.2f}"] if result.train_images else ["", ""]
        seconds = result.train_seconds or kept.training["seconds"]
        accuracy = percent(result.accuracy, result.ci95)
        device = kept.trained.results[0].device
        rows.append([f"`experiment={name}`", accuracy, *cost, f"{seconds / 60:.0f} min", device])
    return table(["", "accuracy, %", "training images", "PFLOP", "time", "hardware"], rows)


def compose_all(overrides: list[list[str]]) -> list[TrainConfig]:
    """The settings of `metacv train` for each list of overrides."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return [typed(compose("train", words), TrainConfig) for words in overrides]


@cache
def experiment_configs() -> dict[str, TrainConfig]:
    """The settings of every experiment, by its name."""
    return dict(zip(EXPERIMENTS, compose_all([[f"experiment={name}"] for name in EXPERIMENTS]), strict=True))


def page() -> str:
    """The text of RESULTS.md."""
    experiments = {name: Experiment(name, config) for name, config in experiment_configs().items()}
    sections: dict[str, str] = {}
    for data, cells in [*CELLS.items(), ("quick", [])]:
        own = [experiment for name, experiment in experiments.items() if name.startswith(f"{data}/")]
        common = [
            [title, *(one.common() if (one := experiments.get(f"{data}/{method}_{cell}")) else "" for cell in cells)]
            for method, title in METHODS.items()
            if data in PAPERS and any(f"{data}/{method}_{cell}" in experiments for cell in cells)
        ]
        changes = [
            f"- `{experiment.name}`: `{changes}`"
            for experiment in own
            if experiment.kept.complete and (changes := experiment.changes)
        ]
        sections |= {
            data: table(
                [*COLUMNS, *(["with pre-training"] if data == "miniimagenet" else [])],
                [row for experiment in own for row in experiment.rows()],
            ),
            f"{data}_common": table(["method", *cells], common),
            f"{data}_changes": "\n".join(changes) or "None.",
        }
    own = {
        "loss_scale": loss_scale(),
        "second_seed": other_run("cifar_fs/seed1"),
        "five_shot": other_run("omniglot/fomaml_5shot_tasks"),
        "boil_10000_steps": other_run("cifar_fs/boil_10000_steps"),
        "relationnet_mse": other_run("cifar_fs/relationnet_mse"),
        "query_set": query_set(),
        "tuned": tuned(),
        "faster": faster(),
        "blocks": blocks(),
        "averaging": averaging(),
        "second_stage": second_stage(),
    }
    one_shot = [name for name in EXPERIMENTS if name.startswith("cifar_fs/") and name.endswith("5w1s")]
    own |= {"equal_steps": compared("omniglot/equal_steps"), "boil_maml": compared("cifar_fs/boil_maml")}
    own |= {"cifar_fs_costs": cost_table(kept_runs(one_shot))}
    return PAGE.format(**sections, **own)


def compared(name: str) -> str:
    """Accuracies in % of two models on the same tasks, and their paired difference in points."""
    path = REFERENCE / name / "result.json"
    if not path.exists():
        return "not run"
    _, (one, other), gained = paired(path)
    return f"{one} and {other}, a difference of {gained} points"


def paired(path: Path) -> tuple[list[Result], list[str], str]:
    """Two results on the same tasks, their accuracies in %, and the paired difference in points."""
    file = read_results(path)
    (gain,) = file.differences or []
    shown = [percent(result.accuracy, result.ci95) for result in file.results]
    return file.results, shown, percent_with_sign(gain["mean"], gain["ci95"])


def second_stage() -> str:
    """Accuracies in % after the second stage and after the first on the same tasks, and the paired differences."""
    rows = []
    for path in sorted((REFERENCE / "cifar_fs/second_stage").glob("seed*/result.json")):
        (second, _), shown, gained = paired(path)
        rows.append([path.parent.name[4], f"{second.way}w{second.shot}s", *shown, gained])
    return table(["seed", "task", "second stage", "first stage", "difference"], rows)


def other_run(name: str) -> str:
    """Accuracies in % of a run that has no row of its own."""
    path = REFERENCE / name / "result.json"
    results = read_results(path).results if path.exists() else []
    return " and ".join(percent(result.accuracy, result.ci95) for result in results) or "not run"


def query_set() -> str:
    """Accuracies in % of the heads that use the whole query set, and of the nearest class mean on the same episodes,
    with balanced and unbalanced queries."""
    cells = CELLS["cifar_fs"]
    lines: dict[str, list[str]] = {title: [] for title in ("nearest class mean", *QUERY_SET_HEADS.values())}
    for cell in cells:
        measured = {}
        for head in QUERY_SET_HEADS:
            path = TRANSDUCTIVE / f"{head}_{cell}/result.json"
            results = read_results(path).results if path.exists() else []
            measured[head] = {(result.uses_query_set, result.query_balance): result for result in results}
            lines[QUERY_SET_HEADS[head]] += beside_unbalanced(measured[head], True)
        lines["nearest class mean"] += beside_unbalanced(next(filter(None, measured.values()), {}), False)
    columns = [f"{cell}, {kind}" for cell in cells for kind in ("balanced", "unbalanced", "difference")]
    return table(["head", *columns], [[title, *line] for title, line in lines.items()])


def blocks() -> str:
    """Validation accuracies in % of classifiers whose last block, augmentation in training, or head differs."""
    cells = [(cell, head) for cell in CELLS["cifar_fs"] for head in BLOCK_HEADS]
    measured = {}
    for cell, head in cells:
        path = BLOCKS_RUNS / f"{head}_{cell}/result.json"
        for result in read_results(path).results if path.exists() else []:
            measured[Path(result.checkpoint).parent.name, cell, head] = f"{100 * result.accuracy:.2f}"
    rows = [
        [*block, augmented, *(measured.get((f"{name}_{key}", cell, head), "") for cell, head in cells)]
        for name, block in BLOCKS.items()
        for key, augmented in AUGMENTED.items()
    ]
    columns = ["pool in block 4", "features", "augmentation", *(f"{cell}, {BLOCK_HEADS[head]}" for cell, head in cells)]
    return table(columns, rows)


def averaging() -> str:
    """Validation accuracies in % of classifiers with and without averaged weights on the same tasks, and the paired
    differences."""
    file = read_results(EMA / "result.json")
    *averages, last = file.results
    gains = {gain["of"]: gain for gain in file.differences or [] if gain["less"] == "blocks/rfs_augmented/best.pt"}
    rows = [["none", percent(last.accuracy, last.ci95), ""]]
    for result in averages:
        gain = gains[result.checkpoint.removeprefix("outputs/")]
        decay = Path(result.checkpoint).parent.name.removeprefix("decay_")
        shown = percent_with_sign(gain["mean"], gain["ci95"])
        rows.append([decay, percent(result.accuracy, result.ci95), shown])
    return table(["`ema`", "accuracy", "difference"], rows)


def tuned() -> str:
    """Accuracies in % with networks that are tuned on each task, and with the nearest class mean on the same tasks."""
    columns = ["network", "task", "episodes", "rate, steps", "nearest class mean", "tuned", "difference"]
    rows = []
    for name, network in TUNED.items():
        path = FINETUNE / name / "result.json"
        if not path.exists():
            rows.append([network, name.rpartition("_")[2], "not run", *[""] * 4])
            continue
        (result, _), (own, plain), gained = paired(path)
        rate, steps = (result.changes[f"head.{setting}"] for setting in ("lr", "steps"))
        how = f"{rate:g}, {STEPS['backbone'] if steps == 'auto' else steps}"
        rows.append([network, f"{result.way}w{result.shot}s", f"{result.episodes}", how, plain, own, gained])
    return table(columns, rows)


def faster() -> str:
    """Validation accuracies in % of short trainings of FOMAML by seed, and their mean gain, paired by seed, over the
    trainings without a change."""
    runs = {name: {path.parent.name[-1]: read_results(path) for path in paths(name)} for name in FASTER}
    accuracies = {
        name: {seed: 100 * run.results[0].accuracy for seed, run in own.items()} for name, own in runs.items()
    }
    base, rows = accuracies["base"], []
    for name, own in accuracies.items():
        if not base or own.keys() != base.keys():
            continue
        words = {word.split("=")[0]: word for word in (next(iter(runs[name].values())).training or {})["overrides"]}
        changed = " ".join(f"`{word}`" for key, word in words.items() if key not in NOT_SHOWN | FASTER_ALIKE)
        gains = torch.tensor([own[seed] - base[seed] for seed in own])
        gain = f"{gains.mean():+.2f} ± {t_interval(gains):.2f}" if name != "base" else ""
        mean = f"{sum(own.values()) / len(own):.2f}"
        rows.append([FASTER[name], changed, *(f"{accuracy:.2f}" for accuracy in own.values()), mean, gain])
    columns = ["change", "settings", *(f"seed {seed}" for seed in base), "mean", "gain"]
    return table(columns, rows) if rows else "Not run."


def paths(name: str) -> list[Path]:
    """Results of the short trainings with one change, one for each seed."""
    return sorted(FASTER_RUNS.glob(f"{name}_[0-9]/result.json"))


def beside_unbalanced(results: dict[tuple[bool, str], Result], uses_query_set: bool) -> list[str]:
    """The accuracies of a head with balanced and unbalanced queries, and their difference."""
    if not results:
        return ["not run", "", ""]
    one, other = (results[uses_query_set, balance] for balance in ("balanced", "dirichlet"))
    shown = [percent(result.accuracy, result.ci95) for result in (one, other)]
    return [*shown, f"{100 * (other.accuracy - one.accuracy):+.2f}"]


def loss_scale() -> str:
    """Validation accuracy of MAML and FOMAML with either inner loss, at the steps at which both were validated."""
    rows = []
    for method, folders in LOSS_SCALE.items():
        kept = [REFERENCE / "omniglot" / folder for folder in folders]
        if all((folder / "metrics.jsonl").exists() for folder in kept):
            mean, summed = (validations(folder) for folder in kept)
            for step in sorted(mean.keys() & summed.keys()):
                (accuracy, ci95), (other, other_ci95) = mean[step], summed[step]
                difference = percent_with_sign(other - accuracy, (other_ci95**2 + ci95**2) ** 0.5)
                own = [f"{percent(accuracy, ci95)} %", f"{percent(other, other_ci95)} %"]
                rows.append([method, f"{step}", *own, difference])
    return table(["method", "steps", "with the mean", "with the sum", "difference"], rows) if rows else "Not run."


def validations(folder: Path) -> dict[int, tuple[float, float]]:
    """Accuracy and interval by step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: (line["val/accuracy"], line["val/ci95"]) for line in lines if "val/accuracy" in line}


def percent_with_sign(difference: float, ci95: float) -> str:
    return f"{100 * difference:+.2f} ± {100 * ci95:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


PAGE = """\
# Results

`python scripts/results_table.py` writes this file. Accuracies, times and numbers of steps come from outputs/reference,
the papers' numbers from configs/experiment. Each linked folder holds a checkpoint, its settings, the metrics of its
training and its results. To repeat the result of a row, run `metacv evaluate checkpoint=omniglot/protonet_5w1s` with
the name of the folder (for both rows of Reptile, add `batch_norm=both`). Accuracies are in %, ± 1.96 standard errors
over episodes.

## Omniglot, each method under its paper's protocol

`python scripts/reproduce.py NAME` trains and tests a row from scratch.

- *Steps*: how many of the experiment's steps we trained.
- *Time*: training and validation. Runs with 1 thread shared a 2-core machine with other work; alone they are faster. On
  the H100, seven runs of Omniglot shared the GPU; alone they are several times as fast.
- *Reproduced*: our mean is not below the paper's interval. If the paper gives no interval, our interval must reach the
  smallest number that rounds to the paper's (98.85 for 98.9). *With pre-training*: so, but the paper's network had no
  earlier stage.
- *The run of* another experiment: both experiments train in the same way, so one run served both (`--run-of`). This
  holds for Prototypical Networks in 5-way and 20-way, for example. The run's last weights were validated on this
  experiment's tasks, and the time is that of the shared run.

{omniglot}

Do not compare methods by these numbers: each paper has its own protocol. But MAML++ and MAML were also trained alike
on 20-way 1-shot tasks, 1500 steps of 8 tasks, and tested on the same 600 tasks: {equal_steps}
(outputs/reference/omniglot/equal_steps; for MAML++, `algo.multi_step_loss_steps=400`).

We trained with less compute than the papers, so these settings differ from those of the experiments:

{omniglot_changes}

The experiments differ from the papers as follows:

- Classes: all our experiments have the same 423 test characters, set by `dataset.split_seed`. Each paper has its own
  random split, except Prototypical Networks, which use a published list. Reptile and Relation Networks train on all
  other 1200 characters; Reptile selects no checkpoint, and Relation Networks select it on test characters. Our
  experiments use 100 of the 1200 for validation. Prototypical Networks finally train on training and validation
  characters together; ours do not.
- Images: we resize with `dataset.resample=lanczos`. The code of MAML, Reptile and Prototypical Networks asks Pillow for
  this filter or for none, but Pillow always resizes one-bit images such as Omniglot's by nearest neighbour. So those
  networks saw only black and white (`dataset.resample=nearest`). The code of Relation Networks also shifts and scales
  the pixels, which batch norm undoes.
- The scale of MAML's inner loss differs; see the last section. The first-order numbers are those of Reptile's paper,
  which ran the code of MAML's authors.
- Initial weights are PyTorch's defaults. The code of MAML and Reptile uses Xavier-uniform weights and biases of 0,
  except for MAML's head, whose weights have a standard deviation of 1 (ours: 0.07). Relation Networks' code uses normal
  weights, and biases of 1 in its linear layers.
- Batch norm adds 1e-5 to the variance. TensorFlow, and so the code of MAML and Reptile, adds 1e-3.
- The Reptile runs in this table come from an earlier version, in which all tasks drew their inner batches from one
  random stream. Now each task has its own stream, so the same command draws other batches.

## Omniglot, faster training

Rows marked *fast* are tested as in the paper, but trained in our own way: see their files in configs/experiment.
*FOMAML, fast* has three times the outer learning rate and a cosine schedule, and in 5-way also 5 queries per class in
training and 8 tasks per step. In 5-way, one run on 1-shot tasks is tested in both rows; it was chosen in validation. A
run on 5-shot tasks, with 32 tasks per step (`experiment=omniglot/fomaml_5w5s schedule=cosine optimizer.lr=3e-3
steps=12000 eval_every=2000`), has {five_shot} % in 5-way 5-shot (outputs/reference/omniglot/fomaml_5shot_tasks).
*RelationNet, fast* trains on 20-way tasks of shifted images, where each rotation of a character is a class, with 3
queries and a cosine schedule.

Separately, we compared short trainings of FOMAML (`experiment=omniglot/fomaml_5w1s`): 9600 tasks each, three seeds,
with and without a change. The table has the accuracy on 600 validation tasks in %; each has an interval of about 1
point. *Gain*: mean over the seeds, with Student's interval. The results are in outputs/reference/omniglot/faster.

{faster}

At this length, a larger outer learning rate helps, as do more outer steps with fewer tasks each, and 5 queries per
class, although a task then has three times the images. With warm-up and decay the gain is smaller, and its interval
includes zero. Weight averaging has no measurable effect. The experiment *FOMAML, fast*, 5w1s, combines the three
changes that help.

## Omniglot, all methods under one protocol

The same models on the same tasks: 2000 episodes of characters that no experiment trains or selects on, 15 queries per
class, no rotations, and inductive batch norm (no query affects another). Steps and settings are those of the table
above, so differences between methods also reflect how long each was trained.

{omniglot_common}

## miniImageNet, each method under its paper's protocol

As for Omniglot. All papers use the split of Ravi & Larochelle: 64, 16 and 20 classes. *With pre-training*: the
accuracy of the same method as a second stage after our classifier, with the classifier's network, and whether it
reaches the paper's number. These stages have rows of their own, such as `experiment=miniimagenet/protonet_init_5w1s`.
The second stage of MAML and FOMAML has only 40 steps at a learning rate of 1e-5, because the validation accuracy fell
with ten times this rate (one trial). Their head starts at zero.

{miniimagenet}

We trained with less compute than the papers, so these settings differ from those of the experiments (`algo.temperature`
divides the squared distances, which in 1600 dimensions are so large that the softmax saturates at the start of
training):

{miniimagenet_changes}

The experiments differ from the papers as follows. Reptile does not validate, and the code of Relation Networks selects
its model on the test classes; ours select best.pt on 600 fixed episodes of the validation classes. Relation Networks'
code tests the 15 queries per class in batches of 3 or 5, each with its own batch statistics; ours tests all 15 in one
batch. MAML's code clips the gradient of its outer loss at 10. That loss is 75 times ours for 1-shot and 15 times for
5-shot, so we clip at 10/75 and 10/15. Inner loss, initial weights and batch norm differ as on Omniglot. The classifier
is trained as on CIFAR-FS, for 40 epochs instead of RFS's 100.

## miniImageNet, all methods under one protocol

2000 episodes of the test classes, 15 queries per class, inductive batch norm.

{miniimagenet_common}

## CIFAR-FS

A classifier of the 64 training classes, tested with a head on its features (`algo=classifier`, `head=...`), as in RFS
(Tian et al. 2020). The column *paper* has RFS's numbers for the same network. We chose the head and its settings on the
validation classes. One run served both rows of the classifier. The classifier with `seed=1`
(outputs/reference/cifar_fs/seed1) reaches {second_seed}. Seeds differ by more than the intervals, which cover the
choice of episodes only.

Meta-Baseline is a second stage after the classifier: 1500 steps of four 20-way 1-shot tasks. We compare both stages on
the same tasks, each with its own head: nearest class mean after the second stage, logistic regression after the first
(outputs/reference/cifar_fs/second_stage). The second stage is better at the number of shots that it was trained on. It
was not trained for five shots.

{second_stage}

MAML and its relatives are trained alike, on 10,000 steps of 4 tasks with a Conv4 of 32 channels, except for BOIL: its
inner loop has one step instead of five, and we trained it on 30,000 steps. BOIL and MAML then reach, on the same tasks,
{boil_maml}
(outputs/reference/cifar_fs/boil_maml). After 10,000 steps BOIL reaches {boil_10000_steps}
(outputs/reference/cifar_fs/boil_10000_steps). For all of these methods, the column *paper* has the published
accuracy of MAML. MAML++ has the highest accuracy.

ProtoNet, R2D2 and RelationNet are trained on cropped and flipped images, with a cosine schedule: ProtoNet on 7500
20-way 5-shot tasks and R2D2 on 15,000 10-way 5-shot tasks, one run each for both rows; RelationNet on 15,000 10-way
1-shot tasks by cross-entropy, and on 14,000 10-way 5-shot tasks by the paper's squared error. In 1-shot, cross-entropy
had the higher validation accuracy (one run each); with the squared error (`algo.loss=mse`) the test accuracy is
{relationnet_mse} (outputs/reference/cifar_fs/relationnet_mse). ProtoNet divides distances by 16. The *paper* column of
the three has the numbers of Bertinetto et al. 2019, where R2D2 has a wider network. R2D2's time includes long waits for
other work on the machine.

{cifar_fs}

All 1-shot models under one protocol, 2000 episodes of the test classes, 15 queries per class, inductive batch norm,
with what the training cost, first stages included:

{cifar_fs_costs}

The same training as that of the classifier with fewer steps, `experiment=quick/cifar_fs`:

{quick}

## CIFAR-FS, last block, augmentation and head

RFS's Conv4 has no pool in its last block and averages over the map, which gives 64 features. Others pool and flatten.
Which matters? Four last blocks, each trained with and without augmentation, give eight classifiers
(`experiment=quick/cifar_fs steps=1200`, 4 epochs, one seed). Four heads are tested on each: accuracies in % on 2000
episodes of the validation classes, 15 queries per class; the 95 % intervals are ± 0.4 to 0.5. *Logistic, augmented*:
with five augmented copies of each support image, and features averaged with those of the mirror image
(`head.augment=5 head.flip=true`). The copies are made as in training, so networks trained without augmentation have
none. The networks and results are in outputs/blocks.

{blocks}

- The mean over the map is better than the flattened map, by 1.2 to 4.3 points with one shot and 0.3 to 2.2 with five,
  for the three heads without augmentation. With it, by 1.2 to 1.6 with one shot; with five there is no clear
  difference (-0.6 and +0.3).
- A pool in block 4 is better with the flattened map (0.6 to 2.1 points), and with the mean after training with
  augmentation (0.7 to 1.5). Without augmentation it makes no difference to the mean (-0.5 to +0.3).
- The three heads without augmentation are within 0.7 points of each other. Augmented copies and the mirror image
  together add 0.4 to 1.4 points to logistic regression.
- Augmentation in training loses 0.9 to 1.2 points without a pool and with the mean, and changes the others by -0.1 to
  +1.1 (heads without augmentation).

All this is after 4 epochs and says nothing about longer training. Two seeds of the full training differ by 1.8 and 1.2
points in test (one and five shots), so a single smaller difference between rows may be chance. The heads were compared
on the same networks and tasks.

## CIFAR-FS, weight averaging

The same training with and without `ema` (`experiment=quick/cifar_fs steps=1200 head=ncm`, one seed): accuracies in % on
the same 2000 episodes of the validation classes, 5-way 1-shot. The networks and results are in outputs/ema; the one
without is outputs/blocks/rfs_augmented.

{averaging}

The learning rate of this training ends at zero, and averaging adds nothing to that. A decay of 0.999 is too large for
1200 steps: the weights after the first step still have a share of 30 %.

## CIFAR-FS, heads that use the whole query set

The classifier of the section above (outputs/reference/cifar_fs/classifier_5w1s) with heads that label the queries of a
task together, `metacv evaluate head=NAME head.augment=5 head.flip=true`. Do not compare these numbers with those of the
section above, where each query is labelled by itself, as it is here by the nearest class mean. Batch norm is inductive
in both, which concerns the network only.

*Balanced*: 15 queries of each class, which most papers test on, and which these heads profit from. *Unbalanced*: the
same tasks and support images with 75 queries, whose shares per class follow a Dirichlet distribution with alpha 2
(Veilleux et al. 2021). 2000 episodes. We chose settings that are not the papers' on the validation classes. The
results are in outputs/transductive.

{query_set}

## CIFAR-FS, networks that are tuned on each task

`metacv evaluate head=finetune head.adapt=backbone head.steps=10` with the classifier of the sections above
(outputs/reference/cifar_fs/classifier_5w5s), and the rate `head.lr` that had the highest accuracy on ten validation
episodes. (With `head.lr=auto`, `evaluate` now keeps the network unchanged unless a rate gains more than its standard
error.) The nearest class mean (`head=ncm`) classifies the same test tasks. The difference is paired. The
results are in outputs/finetune.

{tuned}

Tuning gains nothing here, and with one shot it loses. The network was trained on similar classes with the same
augmentation, so it labels nearly all augmented support images right before any tuning. The loss is small from the start
and says little about new images.

## FC100

As for CIFAR-FS, with the 60 training classes of FC100.

{fc100}

## The scale of MAML's inner loss

MAML's paper gives an inner learning rate of 0.4 for 5-way Omniglot. Its code sums the loss over classes where other
implementations take the mean (`algo.inner_loss`). Each inner step is therefore `way` times as long, which corresponds
to a learning rate of 2.0 with the mean. The table shows validation accuracies after the same number of steps for 5-way
1-shot, with a learning rate of 0.4 for both and all other settings equal. The settings and metrics of the runs that are
not in the tables above are in outputs/reference/omniglot/loss_scale.

{loss_scale}

So the sum has no advantage at these budgets. Second-order MAML reaches the same accuracy with both after a few thousand
steps, and learns faster with the mean until then. First-order MAML learns much faster with the mean. In the rows with
the authors' initialization, the run with the sum also used the initial weights and the batch norm of the authors' code
(see above), through a change of the program that is not among its settings. In these runs, neither of these nor the
scale of the loss explains why first-order MAML stays below its published accuracy.
"""


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"results_table: {error}")
