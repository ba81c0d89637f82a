"""Meta-learning for few-shot image classification, from the command line."""

from pathlib import Path

__version__ = "0.2.0.dev0"

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent / "configs"
# configs/ of the checkout, otherwise the copy inside the installed package.
CONFIG_DIR = _CHECKOUT if (_CHECKOUT / "train.yaml").is_file() else _PACKAGE / "configs"
