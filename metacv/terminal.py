"""What reaches the terminal: errors in one line, and nothing from ranks other than 0."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from metacv.errors import UserError
from metacv.text import printable


def world_size() -> int:
    """The number of processes that torchrun started for this run."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[list[Exception]]:
    """Print an error in one line, unless a traceback is asked for or the error is in the yielded list."""
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises its errors instead of printing them
    reported: list[Exception] = []
    try:
        yield reported
    except BrokenPipeError:
        raise
    except Exception as error:
        if traceback_wanted:
            raise
        if error not in reported:
            report_error(error)


@contextlib.contextmanager
def silent_unless_rank_zero() -> Iterator[str | None]:
    """On every rank but 0: no output, and a temporary folder for the run."""
    if rank() == 0:
        yield None
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield folder


def error_line(error: Exception) -> str:
    """What the command line prints of an error: one line, without what only the program's authors need."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key or error.key} is missing"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {text}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        lines = str(error).splitlines()
        if isinstance(error.__cause__, OmegaConfBaseException):
            lines += str(error.__cause__).splitlines()
        noise = ("full_key:", "object_type=", "reference_type=", "To append to", "provider=", "Config search path")
        kept = dict.fromkeys(" ".join(line.split()) for line in lines if not line.strip().startswith(noise))
        text = " ".join(line for line in kept if line)
        if "hydra/launcher" in text or "hydra/sweeper" in text:
            for extra in ("joblib", "slurm", "ray", "optuna"):
                if f"{extra}'" in text.partition("Available")[0]:
                    return f"the extra {extra} is not installed; in a checkout: pip install '.[{extra}]'"
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text[:200]} (HYDRA_FULL_ERROR=1 shows the traceback)"


def report_error(error: Exception) -> None:
    """Print an error in one line. Ranks other than 0 print only what rank 0 does not know."""
    line = f"metacv: {printable(error_line(error))}"
    if rank() == 0:
        print(line, file=sys.stderr)
    elif line.endswith("traceback)") or isinstance(error, OSError):
        print(line, file=sys.__stderr__)
