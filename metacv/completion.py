"""Tab completion, read off configs/ without Hydra so that <TAB> answers at once."""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from metacv.cli import COMMANDS
from metacv.config_dir import config_dir

# The shell's word begins after the last `=`, so only what follows it is answered; fish replaces the whole word.
BASH = """\
_metacv() {
    local IFS=$'\\n'
    COMPREPLY=($(COMP_LINE="${COMP_LINE:0:$COMP_POINT}" metacv -sc query=bash 2>/dev/null))
}
complete -o nospace -o default -F _metacv metacv
"""
INSTALL = {
    "bash": BASH,
    "zsh": f"autoload -U +X bashcompinit && bashcompinit\n{BASH}",
    "fish": "complete -c metacv -f -a '(COMP_LINE=(commandline -cp | string collect) metacv -sc query=fish)'\n",
}


def complete(arguments: list[str]) -> None:
    """`install=SHELL` prints what the shell evaluates, `query=SHELL` the candidates for $COMP_LINE."""
    action, _, shell = (arguments[0] if arguments else "").partition("=")
    if len(arguments) != 1 or action not in ("install", "query") or shell not in INSTALL:
        print("metacv: -sc install=SHELL with one of " + ", ".join(INSTALL), file=sys.stderr)
        sys.exit(2)
    if action == "install":
        print(INSTALL[shell], end="")
        return
    found = candidates(os.environ.get("COMP_LINE", ""))
    if shell != "fish":
        found = [word.partition("=")[2] or word for word in found]
    print("\n".join(found))


def candidates(line: str) -> list[str]:
    """What the last word of `line` may become, as whole words."""
    words = line.split()[1:] + ([""] if line.endswith(" ") else [])
    last = words[-1] if words else ""
    if len(words) <= 1:
        return [word for word in COMMANDS if word.startswith(last)]
    command, root = words[0], config_dir()
    if command not in COMMANDS:
        return []
    path = root / f"{command}.yaml"
    defaults = _defaults(path)
    choices = {
        group.name: sorted(file.relative_to(group).with_suffix("").as_posix() for file in group.rglob("*.yaml"))
        for group in root.iterdir()
        if group.is_dir() and any(isinstance(default, dict) and group.name in default for default in defaults)
    }
    key, equals, value = last.partition("=")
    if equals:
        before = value[: value.rfind(",") + 1]  # of a sweep: algo=maml,protonet
        return [word for c in choices.get(key, []) if (word := f"{key}={before}{c}").startswith(last)]
    given = dict(word.split("=", 1) for word in words[1:-1] if "=" in word)
    config = _read(path)
    chosen = overridden(root / "experiment" / f"{given.get('experiment')}.yaml") | given
    for default in defaults:
        group, name = next(iter(default.items())) if isinstance(default, dict) else ("", None)
        name = chosen.get(group, name)
        if name and group in choices:
            content = _read(root / group / f"{name}.yaml")
            _merge(config, content if group in content or group == "experiment" else {group: content})
    keys = [f"{group}=" for group in choices] + _keys(config)
    rests = {word[len(last) :] for word in keys if word.startswith(last)}
    return sorted(last + rest for rest in rests if rest and "." not in rest[:-1])


def _read(path: Path) -> dict[str, Any]:
    """The settings of a file and of those that it builds on."""
    result: dict[str, Any] = {}
    for base in _bases(path):
        _merge(result, _read(base))
    _merge(result, {key: value for key, value in _content(path).items() if key not in ("defaults", "hydra")})
    return result


def overridden(path: Path) -> dict[str, str]:
    """The choices that an experiment, or one that it builds on, makes in other groups."""
    found: dict[str, str] = {}
    for base in _bases(path):
        found |= overridden(base)
    for default in _defaults(path):
        if isinstance(default, dict):
            found |= {key.removeprefix("override /"): name for key, name in default.items()}
    return found


def _bases(path: Path) -> list[Path]:
    names = [name for name in _defaults(path) if isinstance(name, str) and not name.startswith("_")]
    return [(config_dir() if name.startswith("/") else path.parent) / f"{name.lstrip('/')}.yaml" for name in names]


def _defaults(path: Path) -> list[str | dict[str, str]]:
    return _content(path).get("defaults", [])


@functools.cache
def _content(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError):
        return {}


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value)
        else:
            into[key] = value


def _keys(config: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        found.append(f"{prefix}{key}." if nested else f"{prefix}{key}=")
        if nested:
            found += _keys(value, f"{prefix}{key}.")
    return [key for key in found if "_target_" not in key]
