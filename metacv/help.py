"""`metacv COMMAND --help`: choices, settings and their comments from the YAML files."""

import re
from pathlib import Path
from typing import Any

import yaml

from metacv import CONFIG_DIR

COMMANDS = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))  # each has a function of its name in metacv/


def help_text(command: str, words: list[str]) -> str:
    """What the command does, a line for every choice, and the settings of the chosen files."""
    text = (CONFIG_DIR / f"{command}.yaml").read_text()
    content = yaml.safe_load(text)
    settings = [_readable(text.partition("\n\n")[2].partition("\nhydra:")[0])]
    choices = []
    for group, chosen in _chosen(content["defaults"], words).items():
        folder = CONFIG_DIR / group
        files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
        width = len(group) + 2 + max(map(len, files))
        for name, path in files.items():
            choices.append(f"  {f'{group}={name}':<{width}} {_title(path)}")
        choices.append("")
        if chosen in files:
            settings.append(_chosen_settings(group, chosen, files[chosen].read_text()))
    template: str = content["hydra"]["help"]["template"]
    return template.replace("$CHOICES", "\n".join(choices).rstrip()).replace("$CONFIG", "\n\n".join(settings).rstrip())


def _chosen(defaults: list[Any], words: list[str]) -> dict[str, str | None]:
    """The choice in each group: that of the command line, of the algorithm or experiment, or the default."""
    chosen: dict[str, str | None] = {}
    for default in defaults:
        if isinstance(default, dict):
            chosen |= {group: name for group, name in default.items() if " " not in group}
    given = {name: value for name, _, value in (word.partition("=") for word in words) if name in chosen}
    for group in ("algo", "experiment"):
        chosen |= _overridden(CONFIG_DIR / group / f"{(chosen | given)[group]}.yaml") if group in chosen else {}
    return chosen | given


def _overridden(path: Path) -> dict[str, str]:
    """The choices that a YAML file, or one that it extends, makes in other groups."""
    choices: dict[str, str] = {}
    content = yaml.safe_load(path.read_text()) if path.is_file() else {}
    for default in content.get("defaults", []):
        if isinstance(default, str) and not default.startswith("_"):
            folder = CONFIG_DIR if default.startswith("/") else path.parent
            choices |= _overridden(folder / f"{default.lstrip('/')}.yaml")
        elif isinstance(default, dict):
            choices |= {group.removeprefix("override /"): name for group, name in default.items()}
    return choices


def _title(path: Path) -> str:
    """The first line of a YAML file that is a comment for readers."""
    lines = path.read_text().splitlines()
    return next((line for line in lines if not line.startswith("# @package")), "").lstrip("# ")


def _chosen_settings(group: str, name: str, text: str) -> str:
    if text.startswith("# @package"):
        return f"# {group}={name}, which overrides the settings above\n{_readable(text)}"
    return "\n  ".join([f"# {group}={name}\n{group}:", *_readable(text).splitlines()])


def _readable(text: str) -> str:
    """The settings of a YAML file without what only the program needs."""
    text = re.sub(r"^defaults: \[(.*)\]", r"# as \1, except:", text, flags=re.MULTILINE)
    text = re.sub(r"^defaults:\n( .*\n)+\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"^(# @package| *_target_:).*\n", "", text, flags=re.MULTILINE).strip()
