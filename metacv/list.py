"""`metacv list`: the available methods, data sets, networks, heads and experiments, with our results."""

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from metacv import CONFIG_DIR, KEPT_DIR
from metacv.config import ListConfig
from metacv.errors import UserError
from metacv.experiments import published
from metacv.help import about, in_two_columns
from metacv.text import aligned, percent
from metacv.words import choices, nearest

GROUPS = {"methods": "algo", "datasets": "dataset", "backbones": "backbone", "heads": "head"}  # folders in configs/
GROUPS |= {"experiments": "experiment"}
NOTE = """\
ours: accuracy of the model that comes with metacv, often trained for fewer
steps than the paper's. metacv evaluate checkpoint=NAME repeats it. RESULTS.md
names the papers."""


def table_of(group: str) -> str:
    """Format the names and first comments of a group's files, one or two lines each."""
    return in_two_columns(
        {name: about((CONFIG_DIR / group / f"{name}.yaml").read_text("utf-8")) for name in choices(group)}
    )


def experiment_rows() -> Iterator[tuple[str, ...]]:
    """Yield name, batch-norm mode, published accuracy and our accuracy, for each published number."""
    for name in choices("experiment"):
        paper = published(yaml.safe_load((CONFIG_DIR / f"experiment/{name}.yaml").read_text("utf-8")).get("paper", []))
        kept = KEPT_DIR / name / "result.json"
        records = json.loads(kept.read_text("utf-8"))["results"] if kept.is_file() else []
        texts = {record["batch_norm"]: percent(record["accuracy"], record["ci95"]) for record in records}
        if not paper:
            yield name, "".join([*texts][:1]), "", "".join([*texts.values()][:1])
        for number in paper:
            yield name, number.batch_norm, str(number), texts.get(number.batch_norm, "")


def experiments() -> str:
    """Format a table with a line for each published number."""
    head = ("", "batch norm", "paper %", "ours %")
    return f"{aligned([[*row] for row in (head, *experiment_rows())])}\n{NOTE}"


def list(config: ListConfig, folder: Path) -> None:
    """Print the tables that `config.what` names, or all of them."""
    for what in config.what or GROUPS:
        if what not in GROUPS:
            raise UserError(f"{what}: there is no such list{nearest(what, [*GROUPS])}")
        group = GROUPS[what]
        print(f"{what}: metacv train {group}=NAME\n{experiments() if group == 'experiment' else table_of(group)}\n")
