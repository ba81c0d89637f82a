"""`metacv COMMAND [overrides]`: takes one word off the command line and hands the rest to Hydra."""

import contextlib
import importlib
import io
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

USAGE = """\
metacv: meta-learning for few-shot image classification

  metacv train [algo=maml way=5 shot=1 ...]       train, validating as it goes
  metacv train -m algo=maml,protonet shot=1,5     train every combination
  torchrun --nproc-per-node=4 -m metacv train ... on several processes
  metacv evaluate checkpoint=RUN [shot=5 ...]     accuracy of a checkpoint over episodes, with its interval
  metacv compare RUN RUN ...                      differences between runs on the same episodes, with their interval
  metacv report DIR ...                           a table and a page about all runs in there
  metacv predict checkpoint=RUN support=EXAMPLES query=PHOTOS
                                                  labels images after a few examples of each class

  metacv COMMAND --help                           its choices and settings
  metacv COMMAND ... --cfg job                    the settings that it would run with
  eval "$(metacv -sc install=bash)"               tab completion

HYDRA_FULL_ERROR=1 shows the traceback of an error.
"""
COMMANDS = ("train", "evaluate", "predict", "compare", "report")
PATHS = {"checkpoint", "support", "adapted", "query", "save", "resume", "data_dir"}
PATHS |= {"dataset.root", "dataset.split_file", "hydra.run.dir", "hydra.sweep.dir"}


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # in a terminal that has no ±
    try:
        _dispatch(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has gone, as in `metacv --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _dispatch(arguments: list[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
    elif arguments and arguments[0] == "--version":
        from metacv import __version__

        print(f"metacv {__version__}")
    elif arguments and arguments[0] in ("-sc", "--shell-completion"):
        from metacv.completion import complete

        complete(arguments[1:])
    elif not arguments or arguments[0] not in COMMANDS:
        said = f"there is no command {arguments[0]!r}" if arguments else "no command given"
        print(f"metacv: {said}; one of: {', '.join(COMMANDS)}; metacv --help", file=sys.stderr)
        sys.exit(2)
    elif arguments[0] != "train" and _processes() > 1:
        print(f"metacv: {arguments[0]} is one process's work: call it without torchrun", file=sys.stderr)
        sys.exit(1)
    elif _rank() > 0:
        import tempfile

        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            elsewhere = [f"hydra.{kind}.dir={quoted(folder)}" for kind in ("run", "sweep")]
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                _run("train", [*arguments[1:], *elsewhere])
    else:
        _run(arguments[0], arguments[1:])


def _rank() -> int:
    """Of the processes that torchrun started for one training; the first alone writes and speaks for them."""
    return int(os.environ.get("RANK", "0")) if _processes() > 1 else 0


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _adjusted(command: str, words: list[str]) -> list[str]:
    """The command line as Hydra is to see it."""
    sweeps = not {"-m", "--multirun"}.isdisjoint(words)
    named = [os.path.expanduser(_unquoted(word[14:])) for word in words if word.startswith("hydra.run.dir=")]
    resumed = [folder for word in words if (folder := _resumed_folder(word))]
    if command in ("compare", "report"):
        flags = [i for i, word in enumerate(words) if word.startswith("-")]
        values = {i + 1 for i in flags if words[i] in ("-c", "--cfg", "-p", "--package")}
        places = [i for i, word in enumerate(words) if "=" not in word or os.path.exists(word)]
        runs = [i for i in places if i not in {*flags, *values}]
        named_runs = f"runs=[{','.join(quoted(words[i]) for i in runs)}]"
        words = [word for i, word in enumerate(words) if i not in runs] + [named_runs] * bool(runs)
    paths = PATHS if command == "predict" else PATHS - {"query"}  # which is a number elsewhere
    words = [_with_its_path_quoted(word, paths, sweeps) for word in words]
    if command != "train" and named and any(Path(named[-1]).glob("*.pt")):  # before Hydra writes its config there
        print(f"metacv: hydra.run.dir={named[-1]} holds a training run: {command} elsewhere", file=sys.stderr)
        sys.exit(1)
    if command != "train" or any(word.startswith("resume=") and word != "resume=false" for word in words):
        # laid over what was trained: Hydra does not know its keys
        words = [f"++{word}" if word.startswith(("algo.", "dataset.")) else word for word in words]
    if command == "train" and not named:
        words = words + [f"hydra.run.dir={quoted(folder)}" for folder in resumed]
    return words


def _help(command: str, words: list[str]) -> str:
    """What the command does, a line on every choice, and the settings with the comments that the YAML files have."""
    import yaml

    from metacv.completion import overridden
    from metacv.config_dir import config_dir

    text = (config_dir() / f"{command}.yaml").read_text()
    content = yaml.safe_load(text)
    choices, settings = [], [_readable(text.partition("\n\n")[2].partition("\nhydra:")[0])]
    groups = {group: name for default in content["defaults"] if isinstance(default, dict)
              for group, name in default.items() if "/" not in group}  # fmt: skip
    given = {name: value for name, _, value in (word.partition("=") for word in words)}
    chosen = groups | given
    for group in ("algo", "experiment"):
        chosen |= overridden(config_dir() / group / f"{chosen.get(group)}.yaml")
    chosen |= given
    for group in groups:
        files = sorted((config_dir() / group).rglob("*.yaml"))
        names = [file.relative_to(config_dir() / group).with_suffix("").as_posix() for file in files]
        for name, file in zip(names, files, strict=True):
            about = next((line for line in file.read_text().splitlines() if not line.startswith("# @package")), "")
            choices.append(f"  {f'{group}={name}':<{len(group) + 2 + max(map(len, names))}} {about.lstrip('# ')}")
            if name == chosen[group]:
                own = _readable(file.read_text())
                if file.read_text().startswith("# @package"):
                    settings.append(f"# {group}={name}, which goes before what is above\n{own}")
                else:
                    settings.append("\n  ".join([f"# {group}={name}\n{group}:", *own.splitlines()]))
        choices.append("")
    template = content["hydra"]["help"]["template"]
    return template.replace("$CHOICES", "\n".join(choices).rstrip()).replace("$CONFIG", "\n\n".join(settings).rstrip())


def _readable(text: str) -> str:
    """The settings of a YAML file without what only the program needs."""
    text = re.sub(r"^defaults: \[(.*)\]", r"# as \1, but for:", text, flags=re.MULTILINE)
    text = re.sub(r"^defaults:\n( .*\n)+\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"^(# @package| *_target_:).*\n", "", text, flags=re.MULTILINE).strip()


def _with_its_path_quoted(word: str, paths: set[str], sweeps: bool) -> str:
    """A setting that names a file or folder, of any characters, as Hydra takes it."""
    name, _, value = word.partition("=")
    if name.lstrip("+") not in paths or value in ("", "null") or _unquoted(value) != value:
        return word
    if name == "resume" and value.lower() in ("true", "false"):
        return word
    if re.search(r"\$\{|[,(]" if sweeps else r"\$\{", value) and not os.path.exists(os.path.expanduser(value)):
        return word  # an interpolation, or several values of a sweep
    return f"{name}={quoted(os.path.expanduser(value))}"


def _resumed_folder(word: str) -> str | None:
    """resume=RUN goes on in RUN: its folder, or None for any other setting."""
    name, _, value = word.partition("=")
    if name != "resume" or value.lower() in ("true", "false", ""):
        return None
    path = Path(_unquoted(value)).expanduser()
    folder = path if path.is_dir() else path.parent
    return str(folder) if (folder / "last.pt").is_file() else None


def setting(name: str, value: Path) -> str:
    """`name=value` as it can be typed into a shell, where `name` is one of PATHS."""
    return shlex.quote(f"{name}={value}")


def _unquoted(value: str) -> str:
    """What `quoted` was given, or a path as it was typed."""
    inner = re.fullmatch(r"(['\"])(.*)\1", value, re.DOTALL)
    return inner[2].replace(f"\\{inner[1]}", inner[1]) if inner else value


def quoted(value: str) -> str:
    """As Hydra takes text of any characters."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), value)
    return "'" + escaped.replace("${", "\\${") + "'"


def _run(command: str, words: list[str]) -> None:
    if {"--help", "-h"} & {*words}:
        print(_help(command, words))
        return
    sys.argv = [f"metacv {command}", *_adjusted(command, words)]
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from metacv.config import CompareConfig, EvaluateConfig, PredictConfig, ReportConfig, TrainConfig
    from metacv.config_dir import config_dir

    store = ConfigStore.instance()
    for node in (TrainConfig, EvaluateConfig, PredictConfig, CompareConfig, ReportConfig):
        store.store(name=f"{node.__name__.removesuffix('Config').lower()}_schema", node=node)

    traceback_asked = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")

    told: list[Exception] = []

    def job(cfg: DictConfig) -> Any:
        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        if folder.is_relative_to(Path.cwd()):
            folder = folder.relative_to(Path.cwd())
        try:
            if command == "train":
                from metacv.train import train

                return train(cfg, folder, list(hydra_config.overrides.task))
            # The function `evaluate` of the module metacv.evaluate, and so on.
            return getattr(importlib.import_module(f"metacv.{command}"), command)(cfg, folder)
        except Exception as error:
            if traceback_asked or isinstance(error, BrokenPipeError):
                raise
            _tell(error)
            if hydra_config.mode != RunMode.MULTIRUN:
                sys.exit(1)
            told.append(error)
            raise  # Hydra goes on with the other jobs, and raises this one in the end

    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises its errors, and they are told here in one line
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=command)(job)()
    except BrokenPipeError:
        raise
    except Exception as error:
        if traceback_asked:
            raise
        if error not in told:
            _tell(error)
        sys.exit(1)


def _tell(error: Exception) -> None:
    from metacv import clean

    line = f"metacv: {clean(one_line(error))}"
    if _rank() == 0:
        print(line, file=sys.stderr)
    elif line.endswith("traceback)") or isinstance(error, OSError):  # what the first process does not know
        print(line, file=sys.__stderr__)


def one_line(error: Exception) -> str:
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    from metacv import MetacvError

    if isinstance(error, MissingMandatoryValue):
        return f"Missing mandatory value: {error.full_key or error.key}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        lines = str(error).splitlines()
        if isinstance(error.__cause__, OmegaConfBaseException):
            lines += str(error.__cause__).splitlines()
        noise = ("full_key:", "object_type=", "reference_type=", "To append to", "provider=", "Config search path")
        kept = dict.fromkeys(" ".join(line.split()) for line in lines if not line.strip().startswith(noise))
        text = " ".join(line for line in kept if line)
        if extra := re.search(r"hydra/(?:launcher|sweeper)/(?:submitit_)?(joblib|slurm|ray|optuna)", text):
            return f"the extra {extra[1]} is not installed; in a checkout: pip install '.[{extra[1]}]'"
        return f"{error.override}: {text}" if isinstance(error, OverrideParseException) else text
    text = " ".join(str(error).split())
    if isinstance(error, MetacvError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text[:200]} (HYDRA_FULL_ERROR=1 shows the traceback)"
