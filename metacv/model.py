"""From a config to objects: `_target_` is the registry, for classes of this program and of torch.optim alone."""

import dataclasses
import importlib
import platform
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from metacv import MetacvError
from metacv.algorithms.base import Algorithm
from metacv.backbones.base import Backbone
from metacv.config import AS_THEY_ARE
from metacv.data.bank import Dataset

T = TypeVar("T")


def build(name: str, node: dict[str, Any], base: type[T], **given: Any) -> T:
    """The object that a config node describes: its `_target_`, a `base`, called with its other entries and `given`.

    A checkpoint brings its own config, and whoever wrote it chose the targets. So a target must lie in a module of
    `metacv.` or `torch.optim.` and be a class of the kind that is asked for here: nothing else is called.
    """
    target = str(node.get("_target_"))
    module, _, attribute = target.rpartition(".")
    if not target.startswith(("metacv.", "torch.optim.")):
        raise MetacvError(f"{name}._target_={target}: only classes of metacv and torch.optim may be named")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise MetacvError(f"{name}._target_={target}: there is no such class ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise MetacvError(f"{name}._target_={target}: not a {base.__name__} of metacv or torch.optim")

    settings = {key: value for key, value in node.items() if key != "_target_"}
    try:
        hints = typing.get_type_hints(cls.__init__)
    except NameError:  # of classes whose annotations are for type checkers alone
        hints = {}
    for key, value in settings.items():
        if key in given:
            raise MetacvError(f"{name}.{key}: is not a setting")
        if key in hints and not _fits(value, hints[key]):
            raise MetacvError(f"{name}.{key}={value}: not {_describe(hints[key])}")
    try:
        return cls(**given, **settings)
    except (TypeError, ValueError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise MetacvError(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, args[1]) for item in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    return origin is not None or not isinstance(hint, type) or isinstance(value, hint)


def _describe(hint: Any) -> str:
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(args)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args if arg is not torch.Tensor)
    if typing.get_origin(hint) is list:
        return f"a list of {_describe(args[0])}"
    if typing.get_origin(hint) is dict:
        return f"all {_describe(args[1])}"
    names = {float: "a finite number", int: "a whole number", bool: "true or false", str: "text"}
    return names.get(hint, str(getattr(hint, "__name__", hint)))


def check_settings(cfg: Mapping[Any, Any], schema: type) -> None:
    """Refuses what `+name=value` adds and `~name` deletes at the top level, which Hydra lets pass."""
    known = {field.name for field in dataclasses.fields(schema)}
    if unknown := cfg.keys() - known:
        raise MetacvError(f"{min(map(str, unknown))}: there is no such setting")
    if deleted := known - cfg.keys():
        raise MetacvError(f"~{min(deleted)}: this setting cannot be deleted")


def build_dataset(config: dict[str, Any], data_dir: str) -> Dataset:
    if not data_dir:
        raise MetacvError("data_dir is empty")
    return build("dataset", config["dataset"], Dataset, data_dir=Path(data_dir).expanduser())  # type: ignore[type-abstract]


def build_algorithm(config: dict[str, Any], image_shape: tuple[int, int, int]) -> Algorithm:
    backbone = build("backbone", config["backbone"], Backbone, image_shape=image_shape)
    normalize = config["normalize"]
    for name, values in normalize.items():
        if len(values) not in (1, image_shape[0]):
            raise MetacvError(f"normalize.{name}={values}: the images have {image_shape[0]} channels")
    if normalize != AS_THEY_ARE:
        try:
            backbone.normalize(**normalize)
        except ValueError as error:
            raise MetacvError(f"normalize: {error}") from None
    return build("algo", config["algo"], Algorithm, backbone=backbone)  # type: ignore[type-abstract]


def build_optimizer(config: dict[str, Any], algorithm: Algorithm) -> tuple[Optimizer, LRScheduler]:
    parameters = [parameter for parameter in algorithm.parameters() if parameter.requires_grad]
    parameters = parameters or [nn.Parameter(torch.zeros(()))]  # all is frozen, and an optimizer wants something
    optimizer = build("optimizer", config["optimizer"], Optimizer, params=parameters)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise MetacvError("optimizer: LBFGS wants to compute the loss itself; take another")
    schedule = build("schedule", config["schedule"], LRScheduler, optimizer=optimizer)
    if isinstance(schedule, ReduceLROnPlateau):
        raise MetacvError("schedule: ReduceLROnPlateau is not a function of the step; take another")
    return optimizer, schedule


def describe_device(device: torch.device) -> str:
    """The hardware, for a result's reader."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    threads = torch.get_num_threads()
    return f"{found[1] if found else platform.processor() or 'CPU'}, {threads} thread{'s' * (threads > 1)}"


def pick_device(name: str) -> torch.device:
    """`device` as a torch device that is there; `auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MetacvError(f"device={name}: not a device; take auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MetacvError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise MetacvError(f"device={name}: only cpu and cuda are supported")
    return device
