"""`metacv COMMAND name=value ...`: train uses the command line of Hydra, the other commands use its compose API."""

import importlib
import os
import re
import shlex
import sys
import traceback
from pathlib import Path

from metacv import CONFIG_DIR, __version__
from metacv.completion import complete
from metacv.errors import UserError
from metacv.help import COMMANDS, help_text
from metacv.processes import processes_to_start, train_in_processes
from metacv.terminal import prepare_process, report_error, silent_unless_rank_zero, world_size
from metacv.words import IN_ITS_FOLDER, hydra_overrides, quoted


def main() -> None:
    prepare_process()
    try:
        code = _with_errors_in_one_line(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except OSError as error:  # on output: the reader has exited, as in `metacv --help | head`, or the disk is full
        code = 141 if isinstance(error, BrokenPipeError) else 1
        if code == 1:
            print(f"metacv: the output cannot be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _with_errors_in_one_line(arguments: list[str]) -> int:
    """Run a command, print an error in one line unless a traceback is requested, and return the exit code."""
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    reported: list[Exception] = []
    try:
        return _dispatch(arguments, reported)
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            raise
        if traceback_wanted:
            traceback.print_exc()
        elif error not in reported:
            report_error(error, arguments)
        return 1


def _dispatch(arguments: list[str], reported: list[Exception]) -> int:
    """Run a command and return the exit code."""
    command, words = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("-h", "--help", "help"):
        print((CONFIG_DIR / "usage.txt").read_text("utf-8"), end="")
    elif command == "--version":
        print(f"metacv {__version__}")
    elif command in ("-sc", "--shell-completion"):
        return complete(words)
    elif command not in COMMANDS:
        problem = f"unknown command {command!r}" if command else "no command given"
        print(f"metacv: {problem}; use one of: {', '.join(COMMANDS)}; see metacv --help", file=sys.stderr)
        return 2
    elif {"--help", "-h"} & {*words}:
        print(help_text(command, words))
    elif command != "train" and world_size() > 1:
        print(f"metacv: {command} runs in one process; start it without torchrun", file=sys.stderr)
        return 1
    elif command == "train" and processes_to_start(words) > 1:
        return train_in_processes(words)
    else:
        with silent_unless_rank_zero() as folder:
            elsewhere = [f"hydra.{kind}.dir={quoted(folder)}" for kind in ("run", "sweep")] if folder else []
            return _train([*words, *elsewhere], reported) if command == "train" else _run(command, words)
    return 0


def _run(command: str, words: list[str]) -> int:
    """Run any command but train: compose its settings and call the function of the same name."""
    from omegaconf import OmegaConf, open_dict

    from metacv import config

    cfg = config.composed(command, hydra_overrides(command, words))
    folder = Path(cfg.hydra.run.dir)
    with open_dict(cfg):
        del cfg["hydra"]
    if {"-c", "--cfg"} & {*words}:
        print(OmegaConf.to_yaml(cfg), end="")
        return 0
    if any(folder.glob("*.pt")):
        raise UserError(f"hydra.run.dir={folder} holds a training run; {command} needs another folder")
    settings = config.typed(cfg, getattr(config, f"{command.capitalize()}Config"))
    getattr(importlib.import_module(f"metacv.{command}"), command)(settings, folder)
    return 0


def _train(words: list[str], reported: list[Exception]) -> int:
    """Let Hydra compose the settings, create the run's folder, and run every job of a sweep."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from metacv import sweep

    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises its errors instead of printing them
    overrides = hydra_overrides("train", words)
    sweep.Folder.started = None
    overrides.sort(key=lambda word: word not in ("-m", "--multirun"))  # argparse rejects an option between settings
    sys.argv = ["metacv train", *overrides]
    failed: list[Exception] = []

    def job(cfg: DictConfig) -> float:
        from metacv.run import remove_unused
        from metacv.train import train

        hydra_config = HydraConfig.get()
        if hydra_config.job.chdir:  # resolve paths in the folder of the command
            os.chdir(hydra_config.runtime.cwd)
        folder = Path(hydra_config.runtime.output_dir)
        folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        try:
            return train(cfg, folder, list(hydra_config.overrides.task))
        except Exception as error:
            remove_unused(folder)
            if hydra_config.mode == RunMode.MULTIRUN:  # Hydra runs the other jobs first, then raises this
                reported.append(error)
                report_error(error, hydra_config.overrides.task)
                raise
            failed.append(error)  # re-raised below, so that Hydra does not print it too
            return float("nan")

    if not any(word.startswith("-") and word not in ("-m", "--multirun") for word in overrides):
        print(f"metacv {__version__}: train {shlex.join(words)}", flush=True)  # importing torch takes seconds
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")(job)()
    except OSError as error:
        if error.filename or not error.strerror or error in reported:
            raise  # the others are Hydra's, which name no file
        named = (re.fullmatch(r"(?:hydra\.(?:run|sweep)\.dir|resume)=(.+)", word) for word in words)
        folder = next((found[1] for found in named if found and found[1] not in IN_ITS_FOLDER), "outputs")
        raise UserError(f"{folder}: Hydra cannot write the settings of the run there: {error.strerror}") from error
    finally:
        sweep.finish()
    if failed:
        raise failed[0]
    return 0
