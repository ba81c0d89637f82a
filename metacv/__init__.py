"""Meta-learning for few-shot image classification: the command line, and `load` and `FewShotClassifier` for Python."""

import importlib
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

__version__ = "0.2.0.dev0"

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent / "configs"
# configs/ of the checkout, otherwise the copy inside the installed package.
CONFIG_DIR = _CHECKOUT if (_CHECKOUT / "train.yaml").is_file() else _PACKAGE / "configs"
# Kept models, which have a name: those of the checkout, otherwise the few inside the installed package.
KEPT_DIR = _PACKAGE.parent / "outputs" / "reference" if CONFIG_DIR == _CHECKOUT else _PACKAGE / "kept"


@cache
def version() -> str:
    """Return `__version__`, in a git checkout with the commit, such as 0.2.0+3462cd0."""
    if CONFIG_DIR != _CHECKOUT or not (_PACKAGE.parent / ".git").exists():
        return __version__
    try:
        command = ["git", "-C", str(_PACKAGE.parent), "describe", "--always", "--dirty", "--exclude=*"]
        return f"{__version__}+{subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit
        return __version__


def __getattr__(name: str) -> Any:
    """Import `load` and `FewShotClassifier` from metacv/api.py at first use, because importing torch takes seconds."""
    if name not in ("load", "FewShotClassifier"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("metacv.api"), name)
