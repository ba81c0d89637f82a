"""`metacv COMMAND --help`: choices, settings and comments from the YAML files."""

import re
import shutil
import textwrap

import yaml

from metacv import CONFIG_DIR
from metacv.words import choices as choices_of
from metacv.words import groups

WIDTH = 100  # columns of a line at most
COMMANDS = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))  # each has a function of its name in metacv/


def help_text(command: str, words: list[str]) -> str:
    """Return a description of the command, a line for every choice, and the settings of the chosen files."""
    text = (CONFIG_DIR / f"{command}.yaml").read_text("utf-8")
    content = yaml.safe_load(text)
    settings = [readable(text.partition("\n\n")[2].partition("\nhydra:")[0])]
    choices = []
    for group, chosen in _chosen(command, words).items():
        files = {name: CONFIG_DIR / group / f"{name}.yaml" for name in choices_of(group)}
        texts = {f"{group}={name}": about(path.read_text("utf-8")) for name, path in files.items()}
        choices += [in_two_columns(texts, "  "), ""]
        if chosen not in files:
            continue
        text = files[chosen].read_text("utf-8")
        if text.startswith("# @package"):
            settings.append(f"# {group}={chosen}, which overrides the settings above\n{readable(text)}")
        else:
            settings.append("\n  ".join([f"# {group}={chosen}\n{group}:", *readable(text).splitlines()]))
    template: str = content["hydra"]["help"]["template"]
    return template.replace("$CHOICES", "\n".join(choices).rstrip()).replace("$CONFIG", "\n\n".join(settings).rstrip())


def about(text: str) -> str:
    """Return the first comment of a YAML file, which describes it in one line."""
    lines = [line for line in text.splitlines() if not line.startswith("# @package")]
    return "".join(lines[:1]).lstrip("# ")


def in_two_columns(texts: dict[str, str], start: str = "") -> str:
    """Format names and their texts, wrapped to the terminal."""
    width = max(map(len, texts)) + 2
    indent = len(start) + width
    columns = max(min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns), indent + 20)
    wrap = textwrap.TextWrapper(columns, start, " " * indent, break_on_hyphens=False)
    return "\n".join(wrap.fill(f"{name:<{width}}{text}") for name, text in texts.items())


def _chosen(command: str, words: list[str]) -> dict[str, str | None]:
    """Return the choice in each group: from the command line, from the algorithm or experiment, or the default."""
    from metacv.config import composed

    own = groups(command)
    given = {name: value for name, _, value in (word.partition("=") for word in words) if name in own}
    known = [name for name in ("algo", "experiment") if (CONFIG_DIR / name / f"{given.get(name)}.yaml").is_file()]
    chosen = composed(command, [f"{name}={given[name]}" for name in known]).hydra.runtime.choices
    return {group: given.get(group, chosen[group]) for group in own}


def readable(text: str) -> str:
    """Return the settings of a YAML file without lines that only Hydra needs."""
    text = re.sub(r"^defaults: \[(.*)\]", r"# as \1, except:", text, flags=re.MULTILINE)
    text = re.sub(r"^defaults:\n( .*\n)+\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(# @package| *_target_:).*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^\w+:\n(?=\w|\Z)", "", text, flags=re.MULTILINE).strip()  # a class only
