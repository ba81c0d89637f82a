"""Writes RESULTS.md, and the measured lines at the head of each experiment, from the files in outputs/reference alone.

python scripts/results_table.py
"""

import json
import re
import shlex
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from metacv import MetacvError, checkpoint
from metacv.config import TrainConfig
from metacv.run import plain

ROOT = Path(__file__).resolve().parent.parent
CELLS = {"omniglot": ["5w1s", "5w5s", "20w1s", "20w5s"], "miniimagenet": ["5w1s", "5w5s"]}
METHODS = {
    "maml": "MAML",
    "fomaml": "FOMAML",
    "reptile": "Reptile",
    "protonet": "ProtoNet",
    "relationnet": "RelationNet",
}
EXPERIMENTS = [f"{data}/{method}_{cell}" for data, cells in CELLS.items() for cell in cells for method in METHODS]
REFERENCE = Path("outputs/reference")
PAPER = ["method", "task", "protocol", "paper", "ours", "difference", "reproduced", "steps", "time", "hardware"]
SCALES = ["method", "steps", "with the mean", "with the sum", "difference"]
# runs that differ in the inner loss alone: with the mean, with the sum
LOSS_SCALE = {
    "MAML": ("maml_5w1s", "loss_scale/maml_sum"),
    "FOMAML": ("fomaml_5w1s", "loss_scale/fomaml_sum"),
    "FOMAML, begun as its authors do": ("fomaml_5w1s", "loss_scale/fomaml_authors"),
}
COMMON_EPISODES = 2000
FILES = ["best.pt", "config.yaml", "metrics.jsonl", "train.json", "common.json", "result.json"]
MEASURED = re.compile(r"# (measured|trained|command) ")  # the lines of a head that are written here
ELSEWHERE = {"experiment", "data_dir", "device", "resume"}  # overrides that a command is shown without


class Kept:
    """A folder of outputs/reference: one trained model and what it was measured to be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __bool__(self) -> bool:
        return self.whole

    @cached_property
    def whole(self) -> bool:
        """Whether all is there, and both evaluations are of this checkpoint."""
        if not all((self.folder / name).exists() for name in FILES):
            return False
        digest = checkpoint.file_hash(self.folder / "best.pt")
        return all(found["checkpoint_sha256"] == digest for found in [*self.paper.values(), self.common])

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name).read_text())
        except ValueError:
            raise MetacvError(f"{self.folder / name} is damaged") from None

    @cached_property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    @cached_property
    def paper(self) -> dict[str, dict[str, Any]]:
        """By batch norm mode, under the paper's protocol."""
        return by_norm(self._json("result.json"))

    @cached_property
    def common(self) -> dict[str, Any]:
        return self._json("common.json")

    @cached_property
    def train(self) -> dict[str, Any]:
        return self._json("train.json")

    @property
    def changes(self) -> list[str]:
        """What was set otherwise than the experiment says."""
        words = {word.split("=")[0]: word for word in self.train["overrides"]}
        return [word for name, word in words.items() if name not in ELSEWHERE]


class Experiment:
    """One file of configs/experiment/DATASET, and what is kept of it."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.name = name
        self.path = ROOT / f"configs/experiment/{name}.yaml"
        self.lines = self.path.read_text().splitlines()
        self.kept = Kept(ROOT / REFERENCE / name)
        self.config = config

    @property
    def published(self) -> dict[str, tuple[str, str]]:
        """Mean and interval ("" if none) by batch norm mode, of `# paper     98.7 ± 0.4 %; inductive 95.4 ± 0.1 %`."""
        (line,) = [line for line in self.lines if line.startswith("# paper ")]
        found = re.findall(r"(inductive )?(\d+\.\d+)(?: ± (\d+\.\d+))? %", line)
        return {norm.strip() or self.config["norm"]: (mean, around) for norm, mean, around in found}

    @property
    def budget(self) -> str:
        done, full = self.kept.train["steps"], self.config["steps"]
        return f"{done}" if done == full else f"{done} of {full}"

    @property
    def shared(self) -> str:
        """Of an experiment that trains in just the same way, and whose run served this one too."""
        return f", the run of {name}" if (name := self.kept.train.get("run_of")) else ""

    @property
    def time(self) -> str:
        return f"{self.kept.train['seconds'] / 60:.0f} min"

    def text(self) -> str:
        """The file with its measured lines as they ought to be."""
        command = f"# command   python scripts/reproduce.py {self.name}"
        lines = ["# measured  not run", command]
        if self.kept:
            own, *others = self.published
            found = [percent(self.kept.paper[own]), *(f"{norm} {percent(self.kept.paper[norm])}" for norm in others)]
            lines = [
                f"# measured  {'; '.join(found)}; under the common protocol {shared(self.kept.common)}",
                f"# trained   {self.budget} steps in {self.time}, {self.kept.train['device']}{self.shared}",
                command + (f" -- {shlex.join(self.kept.changes)}" if self.kept.changes else ""),
            ]
        head = [line for line in self.lines if not MEASURED.match(line)]
        below = next(i for i, line in enumerate(head) if line.startswith("# paper ")) + 1
        return "\n".join([*head[:below], *lines, *head[below:]]) + "\n"

    def rows(self) -> list[list[str]]:
        """Of the table under the papers' protocols: one for each published number."""
        return [self._row(norm, mean, around) for norm, (mean, around) in self.published.items()]

    def _row(self, norm: str, mean: str, around: str) -> list[str]:
        method, cell = self.name.split("/")[1].split("_")
        tested = self.kept.config if self.kept else self.config
        protocol = (
            f"{tested['query']} quer{'y' if tested['query'] == 1 else 'ies'} a class, {norm}, "
            f"rotation {tested['dataset']['test_rotation']}, {tested['episodes']} episodes"
        )
        start = [METHODS[method], cell, protocol, f"{mean} ± {around}" if around else mean]
        if not self.kept:
            return [*start, "not run", *[""] * 5]
        found = self.kept.paper[norm]
        ours, ci95 = 100 * found["accuracy"], 100 * found["ci95"]
        return [
            *start,
            f"[{ours:.2f} ± {ci95:.2f}]({REFERENCE / self.name})",
            f"{ours - float(mean):+.2f}",
            "yes" if ours >= float(mean) - (float(around) if around else rounding(mean) + ci95) else "no",
            self.budget + self.shared,
            self.time,
            self.kept.train["device"],
        ]


def main() -> None:
    for path, text in files().items():
        path.write_text(text)
        print(path.relative_to(ROOT))


def files() -> dict[Path, str]:
    """Every file that this script writes, with what belongs in it."""
    configs = compose_all([[f"experiment={name}"] for name in EXPERIMENTS])
    experiments = {name: Experiment(name, config) for name, config in zip(EXPERIMENTS, configs, strict=True)}
    return {e.path: e.text() for e in experiments.values()} | {ROOT / "RESULTS.md": results(experiments)}


def compose_all(overrides: list[list[str]]) -> list[dict[str, Any]]:
    """The config of each training that is asked for."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return [plain(compose("train", words)) for words in overrides]


def results(experiments: dict[str, Experiment]) -> str:
    sections = {}
    for data, cells in CELLS.items():
        own = [e for name, e in experiments.items() if name.startswith(f"{data}/")]
        common = {e.name: shared(e.kept.common) if e.kept else "not run" for e in own}
        rows = [[title, *(common[f"{data}/{method}_{cell}"] for cell in cells)] for method, title in METHODS.items()]
        changes = [f"- `{e.name}`: `{shlex.join(e.kept.changes)}`" for e in own if e.kept and e.kept.changes]
        sections |= {
            data: table(PAPER, [row for e in own for row in e.rows()]),
            f"{data}_common": table(["method", *cells], rows),
            f"{data}_changes": "\n".join(changes) or "Nothing.",
        }
    return PAGE.format(**sections, scales=loss_scale())


def loss_scale() -> str:
    """MAML and FOMAML with either inner loss, at the steps at which both were validated."""
    rows = []
    for method, folders in LOSS_SCALE.items():
        kept = [ROOT / REFERENCE / "omniglot" / folder for folder in folders]
        if all((folder / "metrics.jsonl").exists() for folder in kept):
            mean, summed = (validations(folder) for folder in kept)
            for step in sorted(mean.keys() & summed.keys()):
                gain = summed[step]["accuracy"] - mean[step]["accuracy"]
                ci95 = (summed[step]["ci95"] ** 2 + mean[step]["ci95"] ** 2) ** 0.5
                row = [method, f"{step}", percent(mean[step]), percent(summed[step])]
                rows.append([*row, f"{100 * gain:+.2f} ± {100 * ci95:.2f}"])
    return table(SCALES, rows) if rows else "Not run."


def validations(folder: Path) -> dict[int, dict[str, float]]:
    """Accuracy and interval by step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {
        line["step"]: {"accuracy": line["val/accuracy"], "ci95": line["val/ci95"]}
        for line in lines
        if "val/accuracy" in line
    }


def rounding(number: str) -> float:
    """The most that a number as printed may lie above what was measured: 0.05 for 98.9."""
    return 0.5 * 10 ** -len(number.partition(".")[2])


def by_norm(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `metacv evaluate` wrote, of one batch norm mode or of both, by mode."""
    return {result["norm"]: result} if "norm" in result else result


def percent(found: dict[str, Any]) -> str:
    return f"{100 * found['accuracy']:.2f} ± {100 * found['ci95']:.2f} %"


def shared(found: dict[str, Any]) -> str:
    """Under the common protocol, with the number of episodes where it is not the usual one."""
    return percent(found) + (f" ({found['episodes']} episodes)" if found["episodes"] != COMMON_EPISODES else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


PAGE = """\
# Results

Written by `python scripts/results_table.py`: every accuracy, time and step count comes from a file in
outputs/reference. Each folder linked below holds a checkpoint with its config, the metrics of its training (train.json
says how far it went) and its results; `metacv evaluate checkpoint=outputs/reference/omniglot/protonet_5w1s` gives the
number of its row again (with `norm=both` for the two rows of Reptile). Accuracies are in %, with 1.96 standard errors
over episodes on each side.

## Omniglot, each method under its paper's protocol

`python scripts/reproduce.py NAME` trains and tests a row from nothing. *Steps* are those that were run, of those that
the experiment names. *Time* is that of training with its validations; runs of 1 thread shared a 2-core machine with
other work, and alone are faster. *Reproduced* means a mean at or above the lower end of the paper's interval or, where
the paper gives none, an interval of ours that reaches its number (printed as 98.9, that is 98.85 and up). *The run of*
another experiment served where both train in just the same way, as Prototypical Networks do for 5-way and 20-way
(`--run-of`): its last weights were validated once more, on this experiment's tasks, and the time is that of the
training.

{omniglot}

These numbers cannot be compared between methods: each paper tests in its own way. What was set otherwise than the
experiment says, to fit the budget:

{omniglot_changes}

The experiments depart from the papers in this:

- Classes: the test characters are the same 423 for all, drawn by `dataset.split_seed`; the papers drew their own,
  Prototypical Networks from a published list. Reptile and Relation Networks trained on all other 1200 and chose no
  checkpoint, or chose it on test characters; here 100 of the 1200 are for choosing. Prototypical Networks were trained
  once more on train and val together; here they are not.
- Images are resized with `dataset.resample=lanczos`. The code of MAML, Reptile and Prototypical Networks asks Pillow
  for that or for nothing, but Pillow resizes the one-bit files of Omniglot by nearest neighbour whatever it is asked,
  so those networks saw black and white (`dataset.resample=nearest`). Relation Networks' code also shifts and scales the
  pixels, which batch norm undoes.
- MAML's inner loss is scaled otherwise, as said at the end. The first-order numbers are those of Reptile's paper, which
  ran the code of MAML's authors.
- Weights begin as torch has it. MAML's and Reptile's code begins with Xavier's uniform ones and biases of 0, but for
  MAML's head, which has a standard deviation of 1 (here 0.07). Relation Networks' has normal ones, and biases of 1 in
  its linear layers.
- Batch norm adds 1e-5 to the variance. TensorFlow, and with it the code of MAML and Reptile, adds 1e-3.
- The Reptile runs kept here drew their inner batches from one stream; now those of each task are drawn anew, so that
  the command does the same with other draws.

## Omniglot, all methods under one protocol

The same models on the same tasks, of characters that no experiment trains or selects on: 2000 episodes, 15 queries a
class, no rotations, and inductive batch norm (no query sees another). Each model is as far trained, and set, as above:
how far a row can be compared with another is a matter of their steps too.

{omniglot_common}

## miniImageNet, each method under its paper's protocol

As for Omniglot. All papers use the split of Ravi & Larochelle: 64, 16 and 20 classes.

{miniimagenet}

What was set otherwise than the experiment says, to fit the budget (`algo.temperature` divides the squared distances,
which in 1600 dimensions are too far apart for the softmax to learn from at first):

{miniimagenet_changes}

The experiments depart from the papers in this: Reptile does not validate, and Relation Networks' code chooses its model
on the test classes; here best.pt is chosen on 600 fixed tasks of the validation classes. Relation Networks' code tests
15 queries a class by 3 or 5 at a time, each with batch norm of its own; here all 15 go together. MAML's clipping of
the outer gradient at 10 is scaled as its outer loss is. Inner loss, weights and batch norm are as for Omniglot.

## miniImageNet, all methods under one protocol

2000 episodes of the test classes, 15 queries a class, inductive batch norm.

{miniimagenet_common}

## The scale of MAML's inner loss

The paper says 0.4 for the inner learning rate of 5-way Omniglot. Its code sums the loss over classes where other
implementations take the mean (`algo.inner_loss`), which makes its step `way` times as long, as 2.0 would with the mean.
In validation after as many steps, 5-way 1-shot, all else equal and 0.4 with both (of the runs that are not above,
outputs/reference/omniglot/loss_scale has the config and the metrics, as far as they went):

{scales}

So the sum is no gain at these budgets: second-order MAML is as good with either when a few thousand steps are done, and
learns faster with the mean until then; first-order MAML learns much faster with the mean. In the last rows the run with
the sum also had the initial weights and the batch norm of the authors' code, as said above, by a change of the program
that is not among its settings. As far as these runs go, neither they nor the scale of the loss are why first-order MAML
falls short of its paper.
"""


if __name__ == "__main__":
    try:
        main()
    except (MetacvError, OSError) as error:
        sys.exit(f"results_table: {error}")
