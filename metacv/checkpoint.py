"""Checkpoints: one dict of tensors and plain values, so that loading one runs no code of whoever wrote it.

last.pt holds all that a run needs to go on exactly; best.pt the weights alone. Both carry the resolved config.
"""

import hashlib
import random
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metacv import MetacvError
from metacv.algorithms.base import Algorithm
from metacv.files import read_checked, write_atomically

FORMAT = 1
WEIGHTS = {"format", "config", "image_shape", "step", "algorithm"}
FOLDERS = {"root", "split_file"}  # settings of a data set that name files of this machine
STATE = WEIGHTS | {
    "overrides",
    "optimizer",
    "schedule",
    "sampler",
    "random",
    "validated",
    "best",
    "since_best",
    "window",
}


def save(path: Path, content: dict[str, Any]) -> None:
    """Replaces `path` in one step; on an error the old file stays."""
    try:
        write_atomically(path, content | {"format": FORMAT})
    except OSError as error:
        raise MetacvError(f"{path} cannot be written: {error.strerror}") from error


def load(path: Path, keys: set[str] = WEIGHTS) -> dict[str, Any]:
    """The checkpoint at `path`, on the CPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on pickles that are not its own
            content = read_checked(path)
    except FileNotFoundError:
        raise MetacvError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise MetacvError(f"{path} is a folder, not a checkpoint") from None
    except PermissionError as error:
        raise MetacvError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # torch has many words for a file that is cut short, foreign or holds code
        raise MetacvError(f"{path} is not a checkpoint of metacv, or is damaged") from error
    if not isinstance(content, dict) or WEIGHTS - content.keys():
        raise MetacvError(f"{path} is not a checkpoint of metacv")
    if content["format"] != FORMAT:
        raise MetacvError(f"{path} has format {content['format']}; this version reads {FORMAT}")
    if not _well_formed(content):
        raise MetacvError(f"{path} is not a checkpoint of metacv, or is damaged")
    if missing := keys - content.keys():
        raise MetacvError(f"{path} holds weights only, no {', '.join(sorted(missing))}: give last.pt")
    return content


def _well_formed(content: dict[str, Any]) -> bool:
    kinds = {"config": dict, "image_shape": list, "step": int, "algorithm": dict}
    if not all(isinstance(content[name], kind) for name, kind in kinds.items()):
        return False
    config_kinds = {"algo": dict, "backbone": dict, "dataset": dict, "way": int, "shot": int, "query": int, "norm": str}
    config = content["config"]
    normalize = config.get("normalize", {"mean": [], "std": []})
    return (
        isinstance(normalize, dict)
        and all(type(value) is float for name in ("mean", "std") for value in normalize.get(name, [""]))
        and all(isinstance(config.get(name), kind) for name, kind in config_kinds.items())
        and [type(side) for side in content["image_shape"]] == [int] * 3
        and all(isinstance(value, Tensor) and not value.is_complex() for value in content["algorithm"].values())
    )


def load_weights(algorithm: Algorithm, content: dict[str, Any], path: Path) -> None:
    try:
        algorithm.load_state_dict(content["algorithm"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise MetacvError(
            f"{path}: its weights do not fit its config ({str(error).splitlines()[-1].strip()})"
        ) from error


def without_places(config: dict[str, Any]) -> dict[str, Any]:
    """What it takes to evaluate, here or elsewhere: so not where this machine keeps its data."""
    return {name: value for name, value in config.items() if name not in ("data_dir", "resume")}


def without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """What it takes to label images, which needs nothing of the trained data set but how its pictures are prepared."""
    dataset = config["dataset"]
    return config | {"dataset": dataset | dict.fromkeys(FOLDERS & dataset.keys())}


def find(place: str, name: str) -> Path:
    """`place` itself if it is a file, else the checkpoint `name` of the run in that folder."""
    path = Path(place).expanduser()
    if path.is_dir():
        if not (path / name).is_file():
            raise MetacvError(f"{path} holds no {name}")
        return path / name
    return path


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def random_states() -> dict[str, Any]:
    """Of Python, torch's CPU and every GPU."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
