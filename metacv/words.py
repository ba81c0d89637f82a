"""Translate the words of a command line for Hydra. Paths may have any characters, without Hydra's quotes."""

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

IN_ITS_FOLDER = ("true", "false", "auto")  # values of `resume` that are not paths
# Paths that a run reads again when it is resumed or evaluated, perhaps from another folder. Does not match init, which
# is read only once, nor dataset.split_dir, which is in data_dir unless absolute.
KEPT_PATHS = re.compile(r"data_dir|[\w.]+\.(teacher|root|\w+_file)")
PATHS = re.compile(
    r"\+*(checkpoint|features|init|support|adapted|save|file|resume|hydra\.(run|sweep)\.dir|dataset\.\w+_dir"
    rf"|{KEPT_PATHS.pattern})"
)
NO_NAME = re.compile(r"true|false|[+-]?([\d.]+(e[+-]?\d+)?|inf|nan)", re.IGNORECASE)  # unlikely as a file's name
POSITIONAL = {"compare": "runs", "report": "runs", "info": "runs", "list": "what"}  # the setting for words without =
OPTIONS_WITH_VALUE = {"-c", "--cfg", "-p", "--package", "-cd", "--config-dir"}
OPTIONS = re.compile(  # Hydra's, which train accepts
    r"-(c|p|m|r|i|cp|cn|cd)|--(cfg|package|multirun|run|info|resolve|hydra-help|version|config-(path|name|dir)|"
    r"experimental-rerun)(=.*)?"
)


def hydra_overrides(command: str, words: list[str]) -> list[str]:
    """Return Hydra overrides for the words after the command; UserError for a word that the command does not accept."""
    for word in words:
        name, equals, _ = word.partition("=")
        if equals and (new := RENAMED.get(name.lstrip("+~"))):
            raise UserError(f"{word}: this setting is now called {new}")
    own_files = any(word.partition("=")[0] in ("-cd", "--config-dir") for word in words)
    words = [_choice(command, word, own_files) for word in words]
    given = dict.fromkeys(word for word in words if (CONFIG_DIR / word.partition("=")[0]).is_dir())
    for group in (word.partition("=")[0] for word in given):
        if len(own := [word for word in given if word.startswith(f"{group}=")]) > 1:
            raise UserError(f"{' and '.join(own)}: give {group} only once")
    sweeps = not {"-m", "--multirun"}.isdisjoint(words)
    if command in POSITIONAL:  # `compare A B` becomes `compare runs=[A,B]`
        runs = [i for i in _plain(words) if "=" not in words[i] or os.path.exists(words[i])]
        setting = f"{POSITIONAL[command]}=[{','.join(quoted(words[i]) for i in runs)}]"
        words = [word for i, word in enumerate(words) if i not in runs] + [setting] * bool(runs)
    if command == "train":
        for word in words:
            if word.startswith("-") and not OPTIONS.fullmatch(word):
                raise UserError(f"{word}: there is no such option; train has -m, --cfg job and --help")
    else:
        if sweeps:
            raise UserError("-m: only train supports sweeps")
        words = _without_options(command, words)
    for i in _plain(words):
        if "=" not in words[i] and not words[i].startswith("~"):
            raise UserError(f"{words[i]}: give settings as name=value")
    words = [own for word in words for own in _several_data_sets(command, word)]
    if command == "train":
        words = [word for word in _named(words, sweeps) if not word.startswith("processes=")]
    overrides = [_quoted_path(command, word, sweeps) for word in words]
    if command != "train" or any(
        word.startswith("resume=") and word not in ("resume=false", "resume=auto") for word in words
    ):
        # ++ since Hydra does not know the keys in algo, dataset and head of a trained model
        kept = ("algo.", "dataset.", "head.", *(("backbone.",) if command != "train" else ()))
        overrides = [f"++{word}" if word.startswith(kept) else word for word in overrides]
    if command == "train" and not any(word.startswith("hydra.run.dir=") for word in words):
        overrides += [f"hydra.run.dir={quoted(folder)}" for word in words if (folder := _resumed_folder(word))]
    for i in _plain(overrides):
        _parsed(overrides[i])
    return overrides


def _named(words: list[str], sweep: bool) -> list[str]:
    """Replace `name=NAME` by the folder that it stands for."""
    names = [word for word in words if word.lstrip("+").startswith("name=") and not word.endswith("name=null")]
    if not names:
        return words
    setting, folder = ("hydra.sweep.dir", "outputs/sweep") if sweep else ("hydra.run.dir", "outputs/train")
    others = [word for word in words if word not in names]
    if clash := [*names[1:], *(word for word in others if word.startswith(f"{setting}="))]:
        raise UserError(f"{names[0]} and {clash[0]}: give only one of them")
    if not (name := _unquoted(names[0].partition("=")[2])):
        raise UserError("name is empty; give a name for the run, or leave out name")
    place = Path(name)
    if not name.isprintable() or place.is_absolute() or not place.parts or ".." in place.parts:
        raise UserError(f"name={printable(name)}: not a folder in {folder}; {setting}=FOLDER takes any folder")
    whole = f"{folder}/{name}"
    return [*others, f"{setting}={whole if '${' in whole else quoted(whole)}"]


def _several_data_sets(command: str, word: str) -> list[str]:
    """Return the words that `dataset=[A,B]` stands for: a mixture for training, one after the other in evaluation."""
    if command not in ("train", "evaluate") or not word.startswith("dataset=["):
        return [word]
    place, names = "datasets" if command == "evaluate" else "dataset.sets", _parsed(word)
    if len({*names}) < len(names):
        raise UserError(f"{word}: give each data set once")
    return ["dataset=mixture"] * (command == "train") + [f"+dataset@{place}.{name}={name}" for name in names]


def _parsed(word: str) -> Any:
    """Parse a word by Hydra's grammar and return its value; UserError if it is invalid."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        raise UserError(f"{word}: cannot be read; special characters need quotes, as in \"name='a=b'\"") from None
    name, value = override.key_or_group, override.value()
    if not name:
        raise UserError(f"{word}: give settings as name=value")
    if name.split("/")[0] == "hydra" and isinstance(value, bool | int | float):
        raise UserError(f"{word}: must be the name of a file")
    return value


def _choice(command: str, word: str, own_files: bool) -> str:
    """Return the word, or `~GROUP` for GROUP=null where the default is no choice; UserError if no such file exists."""
    group, equals, _ = word.partition("=")
    if not group or not equals or not (CONFIG_DIR / group).is_dir():
        return word
    from hydra.core.override_parser.types import ChoiceSweep

    value = _parsed(word)
    names = value if isinstance(value, list) else value.list if isinstance(value, ChoiceSweep) else [value]
    if value is None and groups(command).get(group, "") is None:
        return f"~{group}"
    if not names or any(isinstance(name, bool | int | float | dict | list | None) for name in names):
        raise UserError(f"{word}: must be the name of a file in configs/{group}")
    known = choices(group)
    missing = [str(name) for name in names if str(name) not in known and "${" not in str(name)]
    if missing and known and not own_files:
        raise UserError(f"{group}={missing[0]}: there is no such file in configs/{group}{nearest(missing[0], known)}")
    return word


def groups(command: str) -> dict[str, str | None]:
    """Return the groups of configs/ that a command has, with the default choice of each."""
    defaults = yaml.safe_load((CONFIG_DIR / f"{command}.yaml").read_text("utf-8"))["defaults"]
    pairs = [pair for default in defaults if isinstance(default, dict) for pair in default.items()]
    return {group: choice for group, choice in pairs if " " not in group}  # not `override ...`


def choices(group: str) -> list[str]:
    """Return the names of the files in configs/GROUP."""
    folder = CONFIG_DIR / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def nearest(name: str, known: list[str], most: int = 3, cutoff: float = 0.7) -> str:
    """Return the end of an error: names similar to an unknown one, or all if none is similar and they are few."""
    near = [own for own in known if own.endswith(f"/{name}")]
    near = near or difflib.get_close_matches(name, known, most, cutoff)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; one of: {', '.join(known)}" if len(known) < 30 else ""


def settings() -> list[str]:
    """Return the names of all settings in configs/."""
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
    """Remove `--cfg job`; UserError for every other option."""
    options = [word for word in words if word.startswith("-")]
    if not options:
        return words
    i = words.index(options[0])
    if len(options) > 1 or options[0] not in ("-c", "--cfg") or words[i + 1 : i + 2] != ["job"]:
        raise UserError(f"{options[-1]}: there is no such option; {command} has --help and --cfg job")
    return words[:i] + words[i + 2 :]


def _quoted_path(command: str, word: str, sweeps: bool) -> str:
    """Quote the value for Hydra if the word sets a path."""
    name, _, value = word.partition("=")
    place = os.path.expanduser(value)
    if (command, name) == ("evaluate", "checkpoint") and re.fullmatch(r"\[.*\]", value) and not os.path.exists(place):
        paths = [os.path.expanduser(_unquoted(own.strip())) for own in value[1:-1].split(",")]
        if not all(paths):  # an empty path is the current folder
            raise UserError(f"{word}: must be a list of paths")
        return f"{name}=[{','.join(map(quoted, paths))}]"
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
        raise UserError(f"{word}: must be a path; for a file of that name use ./{value}")
    return f"{name}={quoted(place)}"


def _plain(words: list[str]) -> list[int]:
    """Return the indices of words that are neither options nor values of options."""
    values = {i + 1 for i, word in enumerate(words) if word in OPTIONS_WITH_VALUE}
    return [i for i, word in enumerate(words) if not word.startswith("-") and i not in values]


def quoted(value: str) -> str:
    """Quote text of any characters for Hydra."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), value)
    return "'" + escaped.replace("${", "\\${") + "'"


def in_words(value: Any) -> str:
    """Write a plain value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{in_words(own)}" for name, own in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(in_words, value))}]"
    return quoted(value) if isinstance(value, str) else "null" if value is None else str(value).lower()


def _unquoted(value: str) -> str:
    inner = re.fullmatch(r"(['\"])(.*)\1", value, re.DOTALL)
    return inner[2].replace(f"\\{inner[1]}", inner[1]) if inner else value


def _resumed_folder(word: str) -> str | None:
    """Return the folder of RUN for resume=RUN, where the run continues; None for any other word."""
    name, _, value = word.partition("=")
    if name != "resume" or value.lower() in (*IN_ITS_FOLDER, ""):
        return None
    path = Path(os.path.expanduser(_unquoted(value)))
    folder = path if path.is_dir() else path.parent
    return str(folder) if (folder / "last.pt").is_file() else None
