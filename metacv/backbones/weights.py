"""Load weights that others have trained: read a file safely, and match its names with those of a network."""

import difflib
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metacv.errors import UserError
from metacv.files import check_file, read_checked, sha256
from metacv.limits import WEIGHTS
from metacv.terminal import warn
from metacv.text import first_line, printable, short

Weights = dict[str, Tensor]
FORMATS = "it must be safetensors, or a state dict that torch.save wrote"
WRAPPERS = ("state_dict", "model", "state", "params", "model_state_dict", "teacher", "net")  # a file's dict of weights
DEPTH = 3  # of wrappers
COUNTER = "num_batches_tracked"  # of batch norm, which only training uses; old files lack it


def load_weights(
    network: nn.Module, title: str, place: str, removed: Iterable[str] = (), renamed: Callable[[str], str] = str
) -> str:
    """Load the weights in the file `place`; return a line for results about them. UserError if they do not fit.

    `title`: the name of the network, for messages.
    `removed`: the names of modules, such as the last layer, whose weights are ignored. `renamed` maps a name in the
    file to one of the network.
    """
    path = Path(place)
    label = printable(f"backbone.weights_file={path}")
    found = {renamed(name): value for name, value in read_weights(path, label).items()}
    try:
        fitting, by_name = matched(network.state_dict(), found, tuple(f"{name}." for name in removed))
    except ValueError as error:
        raise UserError(f"{label} does not fit {title}: {error}") from None
    if not by_name:
        text = "has other names than the network, so its tensors were matched by their order; check the accuracy"
        warn(f"{label} {text}")
    network.load_state_dict(fitting, strict=False)
    return (
        f"weights of {printable(path.name)}, sha256 {sha256(path)[:16]}, trained elsewhere, "
        "perhaps on classes of the test: most such files are trained on ImageNet"
    )


def read_weights(path: Path, label: str) -> Weights:
    """Read a safetensors file, or a state dict that torch.save wrote; UserError if it holds anything else."""
    content: Any
    try:
        check_file(path, WEIGHTS)
        if path.suffix == ".safetensors":
            content = _read_safetensors(path)
        elif zipfile.is_zipfile(path):
            content = read_checked(path)
        else:
            content = _read_old_format(path)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        for _ in range(DEPTH):
            content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
        found = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    except UserError as error:
        raise UserError(f"backbone.weights_file: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{label}: there is no such file") from None
    except Exception as error:  # a damaged or foreign file may raise any error
        known = isinstance(error, ValueError | pickle.UnpicklingError)
        reason = printable(short(first_line(error))) if known else "damaged, or of another format"
        raise UserError(f"{label} cannot be used ({reason}): {FORMATS}") from None
    if not found:
        raise UserError(f"{label} has no tensors: {FORMATS}")
    if odd := [name for name, value in found.items() if not _is_plain(value)]:
        raise UserError(f"{label}: {printable(short(odd[0]))} has values that are not finite numbers")
    return found


def _is_plain(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_complex() and bool(value.isfinite().all())


def _read_old_format(path: Path) -> Any:
    """Read a file of torch before 1.6, which is not a zip archive."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles by other programs
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch's text advises to run the file's code
        raise ValueError("damaged, of another format, or with more than tensors and plain values") from None


def _read_safetensors(path: Path) -> Weights:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path.name} needs safetensors, which is not installed: pip install safetensors") from None
    return load_file(path)


def matched(own: Weights, found: Weights, removed: tuple[str, ...] = ()) -> tuple[Weights, bool]:
    """Return the tensors in `found` under the names in `own`, and whether they were matched by name.

    ValueError if a tensor is missing, has another shape, or belongs to a part that the network lacks, as in a deeper
    network. Other tensors are ignored: those of `removed` parts, and of modules that the network does not have.
    """
    own, found = _without_counters(own), _without_counters(found)
    prefixes = {name.removesuffix(key) for key in [*own][:1] for name in found if f".{name}".endswith(f".{key}")}
    prefix = max(sorted(prefixes), key=lambda start: sum(start + name in found for name in own), default="")
    if prefix:  # such as `module.` or `encoder.`
        found = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    if not own.keys() & found.keys() and (ordered := _in_order(own, found)):
        return ordered, False
    shown = {name: printable(short(name)) for name in found}
    for name, value in own.items():
        if name not in found:
            near = difflib.get_close_matches(name, [*found][:5000], 3, 0.4) or [*found][:3]
            raise ValueError(f"it has no {name}; its nearest names are {', '.join(shown[one] for one in near)}")
        if found[name].shape != value.shape:
            shapes = f"{tuple(found[name].shape)}, not {tuple(value.shape)}"
            raise ValueError(f"its {name} has the shape {shapes}")
    parts = {name.partition(".")[0] for name in own}
    surplus = [name for name in found if name not in own and not name.startswith(removed)]
    if extra := [name for name in surplus if name.partition(".")[0] in parts]:
        statistics = extra[0].endswith(("running_mean", "running_var"))
        cause = "set backbone.running_stats=true" if statistics else "it may be of a deeper network"
        raise ValueError(f"it has {shown[extra[0]]}, which the network does not have: {cause}")
    return {name: found[name] for name in own}, True


def _without_counters(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if not name.endswith(COUNTER)}


def _in_order(own: Weights, found: Weights) -> Weights | None:
    """Match tensors by their order, if all agree in kind (weight, bias, ...) and shape; None if they do not.

    The file may have a last layer more. Names in alphabetical order, as in safetensors, say nothing about the network.
    """

    def kinds(weights: Weights) -> list[tuple[str, torch.Size]]:
        return [(name.rpartition(".")[2], value.shape) for name, value in weights.items()]

    left = len(found) - len(own)
    fits = 0 <= left <= 2 and kinds(found)[: len(own)] == kinds(own) and [*found] != sorted(found)
    return dict(zip(own, found.values(), strict=False)) if fits else None
