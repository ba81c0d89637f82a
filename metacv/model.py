"""Build models, data sets and optimizers from settings; load and save checkpoints.

A checkpoint holds tensors and plain values only, so that loading one cannot run code of its author.
"""

import copy
import importlib
import inspect
import os
import pickle
import platform
import re
import typing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from metacv import KEPT_DIR, limits
from metacv.algorithms.base import Algorithm
from metacv.algorithms.heads.base import Head
from metacv.backbones.base import Backbone
from metacv.backbones.batch_norm import batch_norms
from metacv.bounds import TORCH, checked
from metacv.config import NormalizeConfig, TrainConfig, class_name, differences, from_dict, to_dict
from metacv.data.bank import Dataset, Look
from metacv.errors import UserError
from metacv.files import read_checked, sha256, user_path, write_atomically, written_or_refused
from metacv.pickles import check_extent
from metacv.text import first_line, plural
from metacv.upgrade import complete_config, upgrade_checkpoint
from metacv.words import nearest

T = TypeVar("T")
FORMAT = 2
WEIGHTS = {"config", "image_shape", "step", "algorithm"}
EVALUATED = ("dataset", "backbone", "algo", "head", "way", "shot", "query", "episodes")  # settings for evaluation
UNNAMED = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
OPTIONAL = {"training", "centre"}  # may be missing: older checkpoints lack both, and not every head needs a centre


@dataclass(frozen=True)
class Training:
    """Cost and data of a training run, including the earlier runs whose weights or predictions it used."""

    classes: int = 0  # in training
    images: int = 0  # drawn in training
    flops: float = 0.0  # floating-point operations, forward and backward
    seconds: float = 0.0
    stages: list[str] = field(default_factory=list)  # the earlier runs
    trained_on: list[str] = field(default_factory=list)  # names of classes, see Dataset.identities
    validated_on: list[str] = field(default_factory=list)
    look: Look = field(default_factory=dict)  # statistics of the last stage's images; empty in older checkpoints

    def after(self, earlier: "Training") -> "Training":
        """Add the cost and data of an earlier run."""
        return replace(
            self,
            images=earlier.images + self.images,
            flops=earlier.flops + self.flops,
            seconds=earlier.seconds + self.seconds,
            stages=earlier.stages + self.stages,
            trained_on=sorted({*earlier.trained_on, *self.trained_on}),
            validated_on=sorted({*earlier.validated_on, *self.validated_on}),
            look=self.look or earlier.look,
        )

    def result_fields(self) -> dict[str, Any]:
        """Return the fields of a Result."""
        cost = {f"train_{name}": getattr(self, name) for name in ("images", "flops", "seconds")}
        return cost | {"stages": self.stages}


@dataclass(frozen=True)
class Checkpoint:
    """A trained model on disk: its settings and weights, and in last.pt also the state that a run resumes from."""

    path: Path
    config: TrainConfig
    image_shape: tuple[int, int, int]  # C, H, W
    step: int
    training: Training
    centre: Tensor | None  # mean feature [D] of training images, for heads that subtract it
    content: dict[str, Any]  # all of the file

    @cached_property
    def sha256(self) -> str:
        return sha256(self.path)

    def build(self, config: TrainConfig | None = None) -> Algorithm:
        """Build the trained model on the CPU, with the settings of `config` if given; UserError if one is invalid."""
        given = config or self.config, self.image_shape, self.training.classes
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that nothing is copied
            with self.blamed(given[0]):
                sketch = build(*given)  # first without memory: settings of a file may ask for any amount
            self.load_weights(sketch)
        algorithm = build(*given)
        self.load_weights(algorithm)
        return algorithm

    @contextmanager
    def blamed(self, config: TrainConfig) -> Iterator[None]:
        """Name the file in an error about a setting whose value in `config` is that of the file."""
        try:
            yield
        except UserError as error:
            group, _, name = re.split("[:=]", str(error))[0].partition(".")
            now, trained = (getattr(one, group, {}) for one in (config, self.config))
            if not isinstance(trained, dict) or name not in trained or now.get(name) != trained[name]:
                raise
            raise UserError(f"{self.path}: {error}") from None

    def changes(self, config: TrainConfig) -> dict[str, Any]:
        """Return the settings of algorithm and head in `config` that differ from those of the training."""
        own, trained = settings(config), settings(self.config)
        of_algo = {name: now for name, now, _ in differences(own["algo"], trained["algo"])}
        of_head = {f"head.{name}": now for name, now, _ in differences(own["head"], trained["head"])}
        if of_head.pop("head._target_", None):
            of_head = {"head": class_name(config.head), **of_head}
        return of_algo | of_head

    def load_weights(self, algorithm: Algorithm) -> None:
        try:
            algorithm.load_state_dict(self.content["algorithm"])
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{self.path}: its weights do not fit its config ({reason})") from error


def load_checkpoint(place: str | Path, name: str = "best.pt") -> Checkpoint:
    """Load the file `place`, or the file `name` of the run in that folder; UserError if it is missing or damaged."""
    path = checkpoint_path(place, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that are not its own
            content = read_checked(path)
    except UserError:
        raise
    except FileNotFoundError:
        kept = [file.parent.relative_to(KEPT_DIR).as_posix() for file in sorted(KEPT_DIR.rglob(name))]
        near = nearest(str(place), kept, cutoff=0.55)  # lists all names if none is similar
        raise UserError(f"{path}: there is no such file{near if near.startswith('; did') else ''}") from None
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # torch raises errors of many types for a file that is truncated, foreign or holds code
        raise _damaged(path, error) from error
    if not isinstance(content, dict) or WEIGHTS - content.keys() or "format" not in content:
        raise UserError(f"{path} is not a checkpoint of metacv")
    if type(content["format"]) is not int or content["format"] not in (1, FORMAT):
        raise UserError(f"{path} has format {content['format']}; this version reads 1 to {FORMAT}")
    try:
        if content["format"] == 1:
            content = upgrade_checkpoint(content)
        check_extent(content["config"], limits.SETTINGS)
        content |= {"config": complete_config(content["config"])}
        check_numbers({name: content["config"].get(name) for name in EVALUATED})
        config = from_dict(TrainConfig, content["config"])
        channels, height, width = content["image_shape"]
        step, tensors = content["step"], content["algorithm"].values()
        training, centre = from_dict(Training, content.get("training", {})), content.get("centre")
        if centre is not None and not (isinstance(centre, Tensor) and centre.dim() == 1 and centre.isfinite().all()):
            raise ValueError
        if max(training.classes, training.images, training.flops, training.seconds) > 1e24:
            raise ValueError
        if any(len(quantiles) != 3 for quantiles in training.look.values()):
            raise ValueError
        whole = all(type(number) is int and number >= 0 for number in (channels, height, width, step))
        if not whole or channels * height * width > limits.IMAGE:
            raise ValueError(f"image_shape is {content['image_shape']}")
        if any(not isinstance(value, Tensor) or value.is_complex() for value in tensors):
            raise ValueError
    except (UserError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise _damaged(path, error) from error
    return Checkpoint(path, config, (channels, height, width), step, training, centre, content)


def check_numbers(config: Any, name: str = "") -> None:
    """Raise ValueError if an integer is far larger than evaluation needs. Seeds may have any size."""
    if isinstance(config, dict):
        for key, value in config.items():
            check_numbers(value, key)
    elif isinstance(config, list):
        for value in config:
            check_numbers(value, name)
    elif type(config) is int and abs(config) > limits.SETTING and not name.endswith("seed"):
        raise ValueError(f"{name}={config} is above {limits.SETTING}")


def _damaged(path: Path, error: Exception) -> UserError:
    reason = f" ({first_line(error)})" if isinstance(error, ValueError | pickle.UnpicklingError) else ""
    return UserError(f"{path} is not a checkpoint of metacv, or is damaged{reason}")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Replace `path` atomically, with all tensors on the CPU, so that it loads on any machine.

    After an error the old file remains. UserError if the file cannot be written.
    """
    with written_or_refused(path):
        write_atomically(path, on_cpu(content) | {"format": FORMAT})


def on_cpu(value: Any) -> Any:
    """Copy tensors in dictionaries, lists and tuples to the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        moved = copy.copy(value)  # keeps the versions of modules, an attribute of their state
        moved.update({name: on_cpu(own) for name, own in value.items()})
        return moved
    return type(value)(map(on_cpu, value)) if isinstance(value, list | tuple) else value


def checkpoint_path(place: str | Path, name: str = "best.pt") -> Path:
    """Return `place` if it is a file, otherwise the file `name` of the run in that folder, or of a kept model."""
    path = user_path(place)
    if not path.exists() and (KEPT_DIR / place / name).is_file():
        path = KEPT_DIR / place
    if not path.is_dir():
        return path
    if not (path / name).is_file():
        raise UserError(f"{path} has no {name}: it is not the folder of a run")
    return path / name


def build(config: TrainConfig, image_shape: tuple[int, int, int], classes: int = 0) -> Algorithm:
    """Build the algorithm of `config` with initial weights, for images [C, H, W] and `classes` training classes.

    Raises UserError if a setting is invalid.
    """
    backbone = build_node("backbone", config.backbone, Backbone, image_shape=image_shape)
    if config.normalize != NormalizeConfig():
        for name, values in asdict(config.normalize).items():
            if len(values) not in (1, image_shape[0]):
                channels = plural(image_shape[0], "channel")
                raise UserError(f"normalize.{name}={values}: must have one value, or one for each of {channels}")
        try:
            backbone.set_normalization(config.normalize.mean, config.normalize.std)
        except ValueError as error:
            raise UserError(f"normalize: {error}") from None
    given: dict[str, Any] = {"backbone": backbone}
    if "classes" in parameters_of(target_class("algo", config.algo, Algorithm)):
        given["classes"] = classes
    return build_node("algo", config.algo, Algorithm, **given)


def with_head(algorithm: Algorithm, config: TrainConfig, centre: Tensor | None = None) -> Algorithm:
    """Return the model that classifies in evaluation: the method, or its backbone with the head in the settings.

    `centre`: the mean feature [D] of training images, for heads that subtract it.
    """
    if "_target_" not in config.head:  # head=null; an experiment may have left settings of its head
        return algorithm
    head = build_node("head", config.head, Head)
    alone = config.batch_norm == "inductive" and any(n.running_mean is None for n in batch_norms(algorithm.embedding))
    if head.uses_query_set and alone:  # features of the support set would differ for each query
        text = "uses the whole query set, but batch_norm=inductive passes each query alone through a network without"
        raise UserError(f"head={class_name(config.head)} {text} running statistics; set batch_norm=transductive")
    if centre is not None and head.centred:
        if len(centre) != algorithm.embedding.features_dim:
            raise UserError(f"head: the mean feature has {len(centre)} numbers: the checkpoint is damaged")
        head.centre = centre
    try:
        return head.on(algorithm, config.augment)
    except ValueError as error:
        raise UserError(f"head.{error}") from None


def uses_query_set(config: TrainConfig) -> bool:
    """Whether the head in the settings labels the queries of a task together; False for an unknown head."""
    try:
        return "_target_" in config.head and target_class("head", config.head, Head).uses_query_set
    except UserError:
        return False


def build_dataset(node: dict[str, Any], data_dir: str) -> Dataset:
    if not data_dir:
        raise UserError("data_dir is empty; set data_dir=FOLDER, a folder for data sets and their cache")
    given: dict[str, Any] = {"data_dir": user_path(data_dir)}
    if isinstance(sets := node.get("sets"), dict):
        given["sets"] = {name: build_dataset(own, data_dir) for name, own in sets.items()}
        node = {name: value for name, value in node.items() if name != "sets"}
    return build_node("dataset", node, Dataset, **given)


def build_optimizer(config: TrainConfig, algorithm: Algorithm) -> tuple[Optimizer, LRScheduler] | None:
    """Build the optimizer and its schedule; return None if no parameter of the algorithm is trained."""
    parameters = [parameter for parameter in algorithm.parameters() if parameter.requires_grad]
    if not parameters:
        return None
    optimizer = build_node("optimizer", config.optimizer, Optimizer, params=parameters)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError(
            "optimizer: LBFGS is not supported: it calls the loss several times a step; use another optimizer"
        )
    schedule = build_node("schedule", config.schedule, LRScheduler, optimizer=optimizer)
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError("schedule: ReduceLROnPlateau is not supported: it needs a metric; use another schedule")
    if (total := getattr(schedule, "total_steps", config.steps)) < config.steps:
        raise UserError(f"schedule.total_steps={total}: must be at least steps={config.steps}")
    return optimizer, schedule


def target_class(name: str, node: dict[str, Any], base: type[T]) -> type[T]:
    """Import the class that `_target_` of a config node names.

    The author of a checkpoint chose the targets in its config. So a target must be a subclass of `base` in a module of
    metacv or torch.optim, or in a package that the user lists in METACV_METHODS: nothing else is imported or called.
    """
    target = str(node.get("_target_"))
    module, _, attribute = target.rpartition(".")
    own = [package.strip() for package in os.environ.get("METACV_METHODS", "").split(",") if package.strip()]
    if not target.startswith(tuple(f"{package}." for package in ("metacv", "torch.optim", *own))):
        text = "must be a class of metacv or torch.optim, or of a package listed in METACV_METHODS"
        raise UserError(f"{name}._target_={target}: {text}")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError) as error:  # TypeError: of METACV_METHODS=.
        raise UserError(f"{name}._target_={target}: there is no such class ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(f"{name}._target_={target}: must be a subclass of {base.__name__}")
    return cls


def settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as plain values, with defaults for settings that are newer than the checkpoint."""
    content = to_dict(config)
    for group, base in (("algo", Algorithm), ("backbone", Backbone), ("schedule", LRScheduler), ("head", Head)):
        if "_target_" in content[group]:
            content[group] = defaults(group, content[group], base) | content[group]
    return content


def execution_settings(algo: dict[str, Any]) -> set[str]:
    """Return the full names of the algorithm's settings that change its speed and memory, not its result."""
    return {f"algo.{name}" for name in target_class("algo", algo, Algorithm).execution_settings}


def defaults(name: str, node: dict[str, Any], base: type) -> dict[str, Any]:
    """Return the default settings of the class that a config node names."""
    parameters = parameters_of(target_class(name, node, base)).values()
    return {own.name: own.default for own in parameters if own.default is not own.empty}


def beyond_defaults(name: str, node: dict[str, Any], base: type) -> dict[str, Any]:
    """Return the settings of a config node, by their full names, that are not the defaults of its class."""
    known = {"_target_": node["_target_"]} | defaults(name, node, base)
    return {f"{name}.{key}": value for key, value in node.items() if key not in known or value != known[key]}


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class by name, with their types (Any if unknown).

    A constructor with `**settings` passes them on to that of a base class, so it has the parameters of that class too.
    """
    found: dict[str, inspect.Parameter] = {}
    for constructor in (vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)):
        own = inspect.signature(constructor).parameters
        try:
            hints = typing.get_type_hints(constructor, include_extras=True)
        except NameError:  # some classes have annotations for type checkers only
            hints = {}
        if cls.__module__.startswith("torch."):
            hints |= TORCH
        named = {key: p.replace(annotation=hints.get(key, Any)) for key, p in own.items() if p.kind not in UNNAMED}
        found = {key: p for key, p in named.items() if key != "self"} | found
        if all(p.kind != inspect.Parameter.VAR_KEYWORD for p in own.values()):
            break
    return found


def build_node(name: str, node: dict[str, Any], base: type[T], **given: Any) -> T:
    """Build the object that a config node describes: call its `_target_` with its other entries and `given`."""
    cls = target_class(name, node, base)
    settings = {key: value for key, value in node.items() if key != "_target_"}
    parameters = parameters_of(cls)
    for key, value in settings.items():
        if key in given or key not in parameters:
            raise UserError(f"{name}.{key}: {cls.__name__} has no such setting")
        try:
            settings[key] = checked(f"{name}.{key}", value, parameters[key].annotation)
        except ValueError as error:
            raise UserError(str(error)) from None
    try:
        return cls(**given, **settings)
    except (TypeError, ValueError, ArithmeticError, LookupError, AssertionError, RuntimeError) as error:
        raise UserError(f"{name}: {first_line(error)}") from error


def describe_device(device: torch.device) -> str:
    """Return the name of the processor or GPU, and on a CPU the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.processor() or 'CPU'}, {plural(torch.get_num_threads(), 'thread')}"


def pick_device(name: str) -> torch.device:
    """Return the torch device for the setting `device`; `auto`: a GPU if present. UserError if it does not exist."""
    available = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(available if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"device={name}: must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices; use auto or cpu")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name}: only cpu and cuda are supported")
    return device
