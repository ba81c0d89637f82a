"""`metacv --help`, and `metacv COMMAND --help` with choices, settings and their comments from the YAML files."""

import re
from pathlib import Path
from typing import Any

import yaml

from metacv import CONFIG_DIR

USAGE = """\
metacv: meta-learning for few-shot image classification

  metacv train [algo=maml way=5 shot=1 ...]       train, with validation
  metacv train -m algo=maml,protonet shot=1,5     train every combination
  torchrun --nproc-per-node=4 -m metacv train ... train with several processes
  metacv evaluate checkpoint=RUN [shot=5 ...]     accuracy of a checkpoint over episodes, with its interval
  metacv compare RUN RUN ...                      differences between runs on the same episodes, with their interval
  metacv report DIR ...                           a table and a page about all runs in these folders
  metacv predict checkpoint=RUN support=EXAMPLES query=PHOTOS
                                                  label images after a few examples of each class

  metacv COMMAND --help                           choices and settings of a command
  metacv COMMAND ... --cfg job                    the settings that a command would run with
  eval "$(metacv -sc install=bash)"               tab completion

HYDRA_FULL_ERROR=1 shows the traceback of an error.
"""
COMMANDS = ("train", "evaluate", "predict", "compare", "report")


def help_text(command: str, words: list[str]) -> str:
    """What the command does, a line for every choice, and the settings of the chosen files."""
    text = (CONFIG_DIR / f"{command}.yaml").read_text()
    content = yaml.safe_load(text)
    settings = [_readable(text.partition("\n\n")[2].partition("\nhydra:")[0])]
    choices = []
    for group, chosen in _chosen(command, content["defaults"], words).items():
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


def _chosen(command: str, defaults: list[Any], words: list[str]) -> dict[str, str | None]:
    """The choice in each group. Hydra makes it, unless the command line chooses nothing: importing Hydra takes time."""
    chosen: dict[str, str | None] = {
        group: name for default in defaults if isinstance(default, dict) for group, name in default.items()
    }
    chosen = {group: name for group, name in chosen.items() if "/" not in group and " " not in group}
    given = [word for word in words if word.partition("=")[0] in chosen]
    if given:
        from hydra import compose, initialize_config_dir

        from metacv import config

        config.register()
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            cfg = compose(command, given, return_hydra_config=True)
        return {group: cfg.hydra.runtime.choices.get(group) for group in chosen}
    if algo := chosen.get("algo"):
        content = yaml.safe_load((CONFIG_DIR / "algo" / f"{algo}.yaml").read_text())
        for default in content.get("defaults", []):
            chosen |= {group.removeprefix("override /"): name for group, name in default.items()}
    return chosen


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
