"""Where configs/ lies. (Nothing is imported here: <TAB> waits for it.)"""

from pathlib import Path


def config_dir() -> Path:
    """configs/ of the checkout, else the copy inside the installed package."""
    here = Path(__file__).resolve().parent
    checkout = here.parent / "configs"
    return checkout if (checkout / "train.yaml").is_file() else here / "configs"
