"""Tab completion: Hydra's, extended by the choices in YAML comments and in folders of configs/."""

import contextlib
import glob
import os
import re
import sys
from typing import Any

from metacv import CONFIG_DIR
from metacv.help import COMMANDS
from metacv.words import PATHS, POSITIONAL, choices, groups

CHOICES = re.compile(r"#\s*(\S+(?: \| [^\s|:,]+)+)")  # a | b | c in a comment


def complete(arguments: list[str]) -> int:
    """Print a script for the shell to evaluate (`install=SHELL`), or the candidates for $COMP_LINE (`query=SHELL`)."""
    action, _, shell = (arguments[0] if arguments else "").partition("=")
    if len(arguments) != 1 or action not in ("install", "query") or shell not in ("bash", "zsh", "fish"):
        print("metacv: use -sc install=SHELL, where SHELL is bash, zsh or fish", file=sys.stderr)
        return 2
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        hydra: Any = GlobalHydra.instance().hydra
        plugin = hydra.get_shell_to_plugin_map(hydra.config_loader)[shell][0]
        if action == "install":
            plugin.install()
            return 0
        with contextlib.suppress(Exception):  # a line that cannot be composed has no candidates
            print((" " if shell != "fish" else "\n").join(candidates(os.environ.get("COMP_LINE", ""), plugin)))
    return 0


def candidates(line: str, plugin: Any) -> list[str]:
    """Return completions of the last word of the line; `plugin` is Hydra's CompletionPlugin for the shell."""
    words = line.split()[1:] + ([""] if line.endswith(" ") else [])
    if len(words) <= 1:
        return [command for command in COMMANDS if command.startswith(words[0] if words else "")]
    command, last = words[0], words[-1]
    if command not in COMMANDS:
        return []
    name, equals, value = last.partition("=")
    possible = values(command, name) if equals else []
    if possible or (equals and (CONFIG_DIR / name).is_dir()):  # Hydra also suggests groups of other commands
        earlier = value[: value.rfind(",") + 1]  # values of a sweep, such as a,b,
        return [word for choice in possible if (word := f"{name}={earlier}{choice}").startswith(last)]
    if equals and PATHS.fullmatch(name):
        return [f"{name}={path}" for path in paths(value)]
    settings = [word for word in words[1:-1] if command not in POSITIONAL or "=" in word]
    found = [word for word in plugin._query(command, " ".join([*settings, last])) if not word.endswith("._target_=")]
    found = list(dict.fromkeys([*found, *(["hydra.run.dir="] if "hydra.run.dir=".startswith(last) else [])]))
    others = {path.name for path in CONFIG_DIR.iterdir() if path.is_dir()} - groups(command).keys()
    own = {*COMMANDS, "hydra"}  # other commands are not settings
    found = [word for word in found if (name := word.rstrip(".=/")) not in own | others or (last and name in own)]
    if command in POSITIONAL:  # whose plain words are runs, or what to list
        plain = values(command, POSITIONAL[command]) or paths(last)
        found = [word for word in found if word.rstrip(".=") != POSITIONAL[command]]
        return found + [word for word in plain if word.startswith(last)]
    return found


def paths(start: str) -> list[str]:
    """Return the files and folders whose path begins with `start`, folders with a slash."""
    return sorted(path + "/" * os.path.isdir(path) for path in glob.glob(f"{glob.escape(start)}*"))


def values(command: str, name: str) -> list[str]:
    """Return the choices of a group, or of a setting whose comment lists them."""
    if name in groups(command):
        return choices(name)
    group_name, _, setting = name.rpartition(".")
    files = (CONFIG_DIR / group_name).glob("*.yaml") if group_name else [CONFIG_DIR / f"{command}.yaml"]
    lines = (line.strip() for path in files for line in path.open())
    comments = [line.partition("#")[2] for line in lines if line.startswith(f"{setting}:")]
    found = [match[1].split(" | ") for comment in comments if (match := CHOICES.search(f"#{comment}"))]
    return list(dict.fromkeys(found[0])) if found else []
