"""Writes docs/cli.md, all commands and settings, from the YAML files in configs/.

python scripts/docs_cli.py
"""

import re
from pathlib import Path

import yaml

from metacv import CONFIG_DIR
from metacv.help import COMMANDS, readable
from metacv.words import choices

PAGE = Path(__file__).resolve().parent.parent / "docs/cli.md"
GROUPS = ["algo", "backbone", "head", "dataset", "optimizer", "schedule", "launcher", "sweeper", "experiment"]
ORDER = ["train", "evaluate", "compare", "report", "predict"]
START = """\
# Commands and settings

<!-- by scripts/docs_cli.py, from configs/ -->

This page has what `metacv COMMAND --help` prints: each command, its settings with their defaults, and the choices for
each group. A setting is a word `name=value` on the command line, in [Hydra](https://hydra.cc)'s syntax.
`metacv COMMAND ... --cfg job` prints the settings that a command would run with, and does nothing else.
"""
CHOICES = """
## Choices

`GROUP=CHOICE` takes a file of `configs/GROUP/`. The settings of `algo`, `launcher`, `sweeper` and `experiment` override
those of the command; the settings of another group have its name in front, as in `optimizer.lr=0.01`.
"""


def main() -> None:
    PAGE.write_text(page())


def page() -> str:
    commands = sorted(COMMANDS, key=lambda name: (name not in ORDER, name in ORDER and ORDER.index(name), name))
    return "".join([START, *map(command, commands), CHOICES, *map(group, GROUPS)])


def command(name: str) -> str:
    """The section of a command: the paragraphs of its help."""
    text = (CONFIG_DIR / f"{name}.yaml").read_text()
    settings = readable(text.partition("\n\n")[2].partition("\nhydra:")[0])
    parts = [f"\n## metacv {name}\n"]
    help_text = yaml.safe_load(text)["hydra"]["help"]["template"].removeprefix(f"metacv {name}: ")
    help_text = re.sub(r"(?:[^\n]+\n)*[^\n]+:\n\n\$CHOICES", "$CHOICES", help_text)
    for paragraph in help_text.strip().split("\n\n"):
        if paragraph.strip() == "$CONFIG":
            parts.append(f"```yaml\n{settings}\n```\n" if settings else "None.\n")
        elif paragraph.strip() == "$CHOICES":
            parts.append("The groups and their choices are [below](#choices).\n")
        elif all(line.startswith("  ") for line in paragraph.splitlines()):
            parts.append("```text\n" + "\n".join(line[2:] for line in paragraph.splitlines()) + "\n```\n")
        else:
            parts.append(plain(paragraph[0].upper() + paragraph[1:]) + "\n")
    return "\n".join(parts)


def group(name: str) -> str:
    """The section of a group: what each choice is, and its settings."""
    parts = [f"\n### {name}\n"]
    for choice in choices(name):
        text = readable((CONFIG_DIR / name / f"{choice}.yaml").read_text())
        comment, _, settings = text.partition("\n")
        parts.append(f"**`{name}={choice}`** {plain(comment.lstrip('# '))}\n")
        if settings.strip() and name != "experiment":
            parts.append(f"```yaml\n{settings.strip()}\n```\n")
    return "\n".join(parts)


def plain(prose: str) -> str:
    """Prose whose signs mean nothing in Markdown."""
    return re.sub(r"([*_<`])", r"\\\1", prose)


if __name__ == "__main__":
    main()
