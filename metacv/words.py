"""The words of a command line as Hydra takes them. Paths are typed as they are, with any characters."""

import os
import re
from pathlib import Path

from metacv.errors import UserError
from metacv.upgrade import renamed

PATHS = {"checkpoint", "support", "adapted", "save", "resume", "data_dir", "hydra.run.dir", "hydra.sweep.dir"}
DATASET_PATHS = re.compile(r"dataset\.(root|\w+_dir|\w+_file)")
FLAGS_WITH_VALUE = {"-c", "--cfg", "-p", "--package"}


class Words:
    """A command line without the command.

    Raises UserError if a setting has another name now, or an option belongs to train only.
    """

    def __init__(self, command: str, words: list[str]) -> None:
        self.command = command
        self.sweeps = not {"-m", "--multirun"}.isdisjoint(words)
        self.shows_config = False
        for word in words:
            name = word.partition("=")[0].lstrip("+~")
            if "=" in word and (new := renamed(name)):
                raise UserError(f"{word}: this setting is called {new} now")
        if command in ("compare", "report"):
            words = self._with_runs(words)
        if command != "train":
            words = self._without_flags(words)
        for i in _plain(words):
            if "=" not in words[i] and not words[i].startswith("~"):
                raise UserError(f"{words[i]}: settings are given as name=value")
        resumes = any(word.startswith("resume=") and word != "resume=false" for word in words)
        overrides = [self._quoted(word) for word in words]
        if command != "train" or resumes:  # algo and dataset of a trained model: Hydra does not know their keys
            overrides = [f"++{word}" if word.startswith(("algo.", "dataset.")) else word for word in overrides]
        if command == "train" and not any(word.startswith("hydra.run.dir=") for word in words):
            overrides += [f"hydra.run.dir={quoted(folder)}" for word in words if (folder := _resumed_folder(word))]
        self.overrides = overrides

    def _with_runs(self, words: list[str]) -> list[str]:
        """The runs of `compare A B` as the setting `runs`."""
        runs = [i for i in _plain(words) if "=" not in words[i] or os.path.exists(words[i])]
        setting = f"runs=[{','.join(quoted(words[i]) for i in runs)}]"
        return [word for i, word in enumerate(words) if i not in runs] + [setting] * bool(runs)

    def _without_flags(self, words: list[str]) -> list[str]:
        flags = [word for word in words if word.startswith("-")]
        if self.sweeps:
            raise UserError("-m: sweeps work with train only")
        if flags and (
            len(flags) > 1 or flags[0] not in ("-c", "--cfg") or words[words.index(flags[0]) + 1 :][:1] != ["job"]
        ):
            raise UserError(f"{flags[-1]}: not an option of {self.command}; --help and --cfg job are")
        self.shows_config = bool(flags)
        return [word for word in words if not (self.shows_config and word in (*flags, "job"))]

    def _quoted(self, word: str) -> str:
        """A setting that is a path, in Hydra's quotes."""
        name, _, value = word.partition("=")
        bare = name.lstrip("+")
        is_path = bare in PATHS or DATASET_PATHS.fullmatch(bare) or (bare == "query" and self.command == "predict")
        if not is_path or value in ("", "null") or (_unquoted(value) != value and not os.path.exists(value)):
            return word
        if name == "resume" and value.lower() in ("true", "false"):
            return word
        special = ("${", ",", "(") if self.sweeps else ("${",)
        if any(mark in value for mark in special) and not os.path.exists(os.path.expanduser(value)):
            return word  # an interpolation, or several values of a sweep
        return f"{name}={quoted(os.path.expanduser(value))}"


def _plain(words: list[str]) -> list[int]:
    """Places of the words that are neither flags nor values of flags."""
    values = {i + 1 for i, word in enumerate(words) if word in FLAGS_WITH_VALUE}
    return [i for i, word in enumerate(words) if not word.startswith("-") and i not in values]


def quoted(value: str) -> str:
    """Text of any characters, in Hydra's quotes."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), value)
    return "'" + escaped.replace("${", "\\${") + "'"


def _unquoted(value: str) -> str:
    inner = re.fullmatch(r"(['\"])(.*)\1", value, re.DOTALL)
    return inner[2].replace(f"\\{inner[1]}", inner[1]) if inner else value


def _resumed_folder(word: str) -> str | None:
    """The folder of RUN in resume=RUN, where the run continues; None for any other word."""
    name, _, value = word.partition("=")
    if name != "resume" or value.lower() in ("true", "false", ""):
        return None
    path = Path(os.path.expanduser(_unquoted(value)))
    folder = path if path.is_dir() else path.parent
    return str(folder) if (folder / "last.pt").is_file() else None
