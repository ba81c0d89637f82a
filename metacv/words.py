"""The words of a command line as Hydra takes them. Paths are typed as they are, with any characters."""

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml

from metacv import CONFIG_DIR
from metacv.errors import UserError
from metacv.text import printable
from metacv.upgrade import RENAMED

IN_ITS_FOLDER = ("true", "false", "auto")  # values of `resume` that are no path
# Paths that a run reads again when it is resumed or evaluated, perhaps from another folder. Not among them:
# init, which is read only once, and dataset.split_dir, which is in data_dir unless absolute.
KEPT_PATHS = re.compile(r"data_dir|\w+\.(teacher|root|\w+_file)")
PATHS = re.compile(
    r"\+*(checkpoint|features|init|support|adapted|save|resume|hydra\.(run|sweep)\.dir|dataset\.\w+_dir"
    rf"|{KEPT_PATHS.pattern})"
)
NO_NAME = re.compile(r"true|false|[+-]?([\d.]+(e[+-]?\d+)?|inf|nan)", re.IGNORECASE)  # hardly a file's
POSITIONAL = {"compare": "runs", "report": "runs", "info": "runs", "list": "what"}  # settings that plain words fill
OPTIONS_WITH_VALUE = {"-c", "--cfg", "-p", "--package", "-cd", "--config-dir"}
OPTIONS = re.compile(  # of train, which are Hydra's
    r"-(c|p|m|r|i|cp|cn|cd)|--(cfg|package|multirun|run|info|resolve|hydra-help|version|config-(path|name|dir)|"
    r"experimental-rerun)(=.*)?"
)


def hydra_overrides(command: str, words: list[str]) -> list[str]:
    """The words after the command, for Hydra; UserError for an old name of a setting or an option of train only."""
    for word in words:
        name, equals, _ = word.partition("=")
        if equals and (new := RENAMED.get(name.lstrip("+~"))):
            raise UserError(f"{word}: this setting is called {new} now")
    own_files = any(word.partition("=")[0] in ("-cd", "--config-dir") for word in words)
    words = [_choice(command, word, own_files) for word in words]
    given = dict.fromkeys(word for word in words if (CONFIG_DIR / word.partition("=")[0]).is_dir())
    for group in (word.partition("=")[0] for word in given):
        if len(own := [word for word in given if word.startswith(f"{group}=")]) > 1:
            raise UserError(f"{' and '.join(own)}: give {group} once")
    sweeps = not {"-m", "--multirun"}.isdisjoint(words)
    if command in POSITIONAL:  # `compare A B` becomes `compare runs=[A,B]`
        runs = [i for i in _plain(words) if "=" not in words[i] or os.path.exists(words[i])]
        setting = f"{POSITIONAL[command]}=[{','.join(quoted(words[i]) for i in runs)}]"
        words = [word for i, word in enumerate(words) if i not in runs] + [setting] * bool(runs)
    if command == "train":
        for word in words:
            if word.startswith("-") and not OPTIONS.fullmatch(word):
                raise UserError(f"{word}: there is no such option; -m, --cfg job and --help are")
    else:
        if sweeps:
            raise UserError("-m: sweeps work with train only")
        words = _without_options(command, words)
    for i in _plain(words):
        if "=" not in words[i] and not words[i].startswith("~"):
            raise UserError(f"{words[i]}: settings are given as name=value")
    if command == "train":
        words = _named(words, sweeps)
    overrides = [_quoted_path(command, word, sweeps) for word in words]
    if command != "train" or any(
        word.startswith("resume=") and word not in ("resume=false", "resume=auto") for word in words
    ):
        # algo, dataset and head of a trained model: Hydra does not know their keys
        overrides = [f"++{word}" if word.startswith(("algo.", "dataset.", "head.")) else word for word in overrides]
    if command == "train" and not any(word.startswith("hydra.run.dir=") for word in words):
        overrides += [f"hydra.run.dir={quoted(folder)}" for word in words if (folder := _resumed_folder(word))]
    for i in _plain(overrides):
        _parsed(overrides[i])
    return overrides


def _named(words: list[str], sweep: bool) -> list[str]:
    """The words with the folder that `name=NAME` stands for in its place."""
    names = [word for word in words if word.lstrip("+").startswith("name=") and not word.endswith("name=null")]
    if not names:
        return words
    setting, folder = ("hydra.sweep.dir", "outputs/sweep") if sweep else ("hydra.run.dir", "outputs/train")
    others = [word for word in words if word not in names]
    if clash := [*names[1:], *(word for word in others if word.startswith(f"{setting}="))]:
        raise UserError(f"{names[0]} and {clash[0]}: give one of them")
    if not (name := _unquoted(names[0].partition("=")[2])):
        raise UserError("name is empty")
    place = Path(name)
    if not name.isprintable() or place.is_absolute() or not place.parts or ".." in place.parts:
        raise UserError(f"name={printable(name)}: not a folder in {folder}; {setting}=FOLDER takes any folder")
    whole = f"{folder}/{name}"
    return [*others, f"{setting}={whole if '${' in whole else quoted(whole)}"]


def _parsed(word: str) -> Any:
    """The value in Hydra's grammar; UserError if the word does not follow it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        raise UserError(f"{word}: cannot be read; special characters need quotes, as in \"name='a=b'\"") from None
    name, value = override.key_or_group, override.value()
    if not name:
        raise UserError(f"{word}: settings are given as name=value")
    if name.split("/")[0] == "hydra" and isinstance(value, bool | int | float):
        raise UserError(f"{word}: not the name of a file")
    return value


def _choice(command: str, word: str, own_files: bool) -> str:
    """The word, or `~GROUP` for GROUP=null where no choice is the default; UserError for what names no file."""
    group, equals, _ = word.partition("=")
    if not group or not equals or not (CONFIG_DIR / group).is_dir():
        return word
    from hydra.core.override_parser.types import ChoiceSweep

    value = _parsed(word)
    names = value if isinstance(value, list) else value.list if isinstance(value, ChoiceSweep) else [value]
    if value is None and groups(command).get(group, "") is None:
        return f"~{group}"
    if not names or any(isinstance(name, bool | int | float | dict | list | None) for name in names):
        raise UserError(f"{word}: not the name of a file in configs/{group}")
    known = choices(group)
    missing = [str(name) for name in names if str(name) not in known and "${" not in str(name)]
    if missing and known and not own_files:
        raise UserError(f"{group}={missing[0]}: there is no such file in configs/{group}{nearest(missing[0], known)}")
    return word


def groups(command: str) -> dict[str, str | None]:
    """The groups of configs/ that a command has, and the default choice in each."""
    defaults = yaml.safe_load((CONFIG_DIR / f"{command}.yaml").read_text("utf-8"))["defaults"]
    pairs = [pair for default in defaults if isinstance(default, dict) for pair in default.items()]
    return {group: choice for group, choice in pairs if " " not in group}  # but for `override`


def choices(group: str) -> list[str]:
    """The names of the files in configs/GROUP."""
    folder = CONFIG_DIR / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def nearest(name: str, known: list[str], most: int = 3, cutoff: float = 0.7) -> str:
    """Which of the known names may be meant, as the end of an error; all of them if they are few and none is near."""
    near = [own for own in known if own.endswith(f"/{name}")]
    near = near or difflib.get_close_matches(name, known, most, cutoff)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; one of: {', '.join(known)}" if len(known) < 30 else ""


def settings() -> list[str]:
    """The names of all settings in configs/."""
    names: dict[str, None] = {}
    for path in sorted(CONFIG_DIR.rglob("*.yaml")):
        text, place = path.read_text("utf-8"), path.relative_to(CONFIG_DIR).parent.as_posix()
        prefix = "" if place == "." or "@package _global_" in text else f"{place}."
        content = yaml.safe_load(text) or {}
        pairs = [(prefix + str(name), value) for name, value in content.items() if name not in ("defaults", "hydra")]
        while pairs:
            name, value = pairs.pop()
            pairs += [(f"{name}.{key}", own) for key, own in value.items()] if isinstance(value, dict) else []
            names[name] = None
    return list(names)


def _without_options(command: str, words: list[str]) -> list[str]:
    """The words without `--cfg job`; UserError for every other option."""
    options = [word for word in words if word.startswith("-")]
    if not options:
        return words
    i = words.index(options[0])
    if len(options) > 1 or options[0] not in ("-c", "--cfg") or words[i + 1 : i + 2] != ["job"]:
        raise UserError(f"{options[-1]}: not an option of {command}; --help and --cfg job are")
    return words[:i] + words[i + 2 :]


def _quoted_path(command: str, word: str, sweeps: bool) -> str:
    """The word, in Hydra's quotes if it sets a path."""
    name, _, value = word.partition("=")
    place = os.path.expanduser(value)
    if not PATHS.fullmatch(name) and (command, name.lstrip("+")) != ("predict", "query"):
        return word
    if _unquoted(value) == "":
        raise UserError(f"{name} is empty: it must be a path")
    if value == "null" or (name == "resume" and value.lower() in IN_ITS_FOLDER):
        return word
    if _unquoted(value) != value and not os.path.exists(value):
        return word
    special = ("${", ",", "(") if sweeps else ("${",)  # an interpolation, or several values of a sweep
    if any(mark in value for mark in special) and not os.path.exists(place):
        return word
    if NO_NAME.fullmatch(value) and not os.path.exists(place):
        raise UserError(f"{word}: not a path; ./{value} is one")
    return f"{name}={quoted(place)}"


def _plain(words: list[str]) -> list[int]:
    """Places of the words that are neither options nor values of options."""
    values = {i + 1 for i, word in enumerate(words) if word in OPTIONS_WITH_VALUE}
    return [i for i, word in enumerate(words) if not word.startswith("-") and i not in values]


def quoted(value: str) -> str:
    """Text of any characters, in Hydra's quotes."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), value)
    return "'" + escaped.replace("${", "\\${") + "'"


def in_words(value: Any) -> str:
    """A plain value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{in_words(own)}" for name, own in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(in_words, value))}]"
    return quoted(value) if isinstance(value, str) else "null" if value is None else str(value).lower()


def _unquoted(value: str) -> str:
    inner = re.fullmatch(r"(['\"])(.*)\1", value, re.DOTALL)
    return inner[2].replace(f"\\{inner[1]}", inner[1]) if inner else value


def _resumed_folder(word: str) -> str | None:
    """The folder of RUN in resume=RUN, where the run continues; None for any other word."""
    name, _, value = word.partition("=")
    if name != "resume" or value.lower() in (*IN_ITS_FOLDER, ""):
        return None
    path = Path(os.path.expanduser(_unquoted(value)))
    folder = path if path.is_dir() else path.parent
    return str(folder) if (folder / "last.pt").is_file() else None
