"""`metacv list`: what there is to choose from, by the first comments of the YAML files and the kept results."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import yaml

from metacv import CONFIG_DIR, KEPT_DIR
from metacv.config import ListConfig
from metacv.errors import UserError
from metacv.experiments import published, under_its_protocol
from metacv.help import about
from metacv.text import aligned, percent
from metacv.words import choices, nearest

GROUPS = {"methods": "algo", "datasets": "dataset", "backbones": "backbone", "heads": "head"}  # in configs/
GROUPS |= {"experiments": "experiment"}
WIDTH = 100  # of a line
NOTE = """\
ours: the accuracy of a kept model, often after fewer steps than the paper took (see RESULTS.md).
metacv evaluate checkpoint=NAME gives it again."""


def table_of(group: str) -> str:
    """A line or two for each file of a group."""
    names = choices(group)
    indent = max(map(len, names)) + 2
    texts = ((name, about((CONFIG_DIR / group / f"{name}.yaml").read_text("utf-8"))) for name in names)
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
    return "\n".join(wrap.fill(f"{name:<{indent}}{text}") for name, text in texts)


def experiment_rows() -> Iterator[tuple[str, ...]]:
    """Name, batch-norm mode, the paper's accuracy, ours and the paper of each published number."""
    for name in choices("experiment"):
        paper = published(yaml.safe_load((CONFIG_DIR / f"experiment/{name}.yaml").read_text("utf-8")).get("paper", []))
        kept = KEPT_DIR / name / "result.json"
        records = json.loads(kept.read_text("utf-8"))["results"] if kept.is_file() else []
        ours = under_its_protocol(SimpleNamespace(**record) for record in records)
        texts = {mode: percent(result.accuracy, result.ci95) for mode, result in ours.items()}
        if not paper:
            yield name, "".join([*texts][:1]), "", "".join([*texts.values()][:1]), ""
        for number in paper:
            yield name, number.batch_norm, str(number), texts.get(number.batch_norm, ""), number.source.split(",")[0]


def experiments() -> str:
    """A line for each published number."""
    head = ("", "batch norm", "paper %", "ours %", "published in")
    return f"{aligned([[*row] for row in (head, *experiment_rows())])}\n{NOTE}"


def list(config: ListConfig, folder: Path) -> None:
    """Print the tables that `config.what` names, or all of them."""
    for what in config.what or GROUPS:
        if what not in GROUPS:
            raise UserError(f"{what}: there is no such list{nearest(what, [*GROUPS])}")
        group = GROUPS[what]
        print(f"{what}: metacv train {group}=NAME\n{experiments() if group == 'experiment' else table_of(group)}\n")
