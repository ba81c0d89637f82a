"""The settings of each command as dataclasses. Their values, and comments on them, are in configs/."""

import dataclasses
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf

from metacv import CONFIG_DIR
from metacv.errors import UserError

T = TypeVar("T")
CHOICES = {
    "batch_norm": ("inductive", "transductive"),
    "precision": ("fp32", "tf32", "bf16"),
    "split": ("train", "val", "test"),
}
# Settings of where and how a run is executed on this machine: they do not change what it computes.
LOCAL = {"device", "data_dir", "resume", "log_every", "projector"}
# Settings that may change when a run is resumed: they do not change what a training step computes.
RESUMABLE = LOCAL | {"steps", "compile", "eval_every", "patience", "paper"}


@dataclass
class AugmentConfig:
    crop: int = 0
    flip: bool = False
    jitter: float = 0.0


@dataclass
class NormalizeConfig:
    mean: list[float] = field(default_factory=lambda: [0.0])
    std: list[float] = field(default_factory=lambda: [1.0])


@dataclass
class TrainConfig:
    dataset: dict[str, Any] = MISSING
    backbone: dict[str, Any] = MISSING
    algo: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    schedule: dict[str, Any] = MISSING

    way: int = MISSING
    shot: int = MISSING
    query: int = MISSING
    episodes: int = MISSING
    train_way: int = MISSING
    train_shot: int = MISSING
    train_query: int = MISSING
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)

    steps: int = MISSING
    meta_batch: int = MISSING
    clip_norm: float | None = None
    clip_value: float | None = None
    precision: str = MISSING
    compile: bool = MISSING

    eval_every: int = MISSING
    eval_episodes: int = MISSING
    batch_norm: str = MISSING
    patience: int | None = None

    seed: int = MISSING
    device: str = "auto"
    data_dir: str = ""
    resume: bool | str = False
    log_every: int = 10
    projector: bool = False
    paper: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class TestConfig:
    """What evaluate and compare share. Settings that are None are those that the model was trained with."""

    split: str = MISSING
    way: int | None = None
    shot: int | None = None
    query: int | None = None
    episodes: int | None = None
    batch_norm: str | None = None
    seed: int = MISSING
    device: str = MISSING
    data_dir: str = MISSING
    algo: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvaluateConfig(TestConfig):
    checkpoint: str = MISSING


@dataclass
class CompareConfig(TestConfig):
    runs: list[str] = MISSING


@dataclass
class ReportConfig:
    runs: list[str] = MISSING


@dataclass
class PredictConfig:
    checkpoint: str | None = None
    support: str | None = None
    adapted: str | None = None
    query: str = MISSING
    save: str | None = None
    batch_norm: str | None = None
    algo: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    device: str = MISSING


def typed(cfg: DictConfig, schema: type[T]) -> T:
    """The composed settings as an object of `schema`, with absolute paths in `dataset`.

    Raises UserError, or an error of OmegaConf, if a setting is unknown, deleted, missing or has an invalid value.
    """
    known = {own.name for own in dataclasses.fields(schema)}  # type: ignore[arg-type]
    if unknown := cfg.keys() - known:
        raise UserError(f"{min(map(str, unknown))}: there is no such setting")
    if deleted := known - cfg.keys():
        raise UserError(f"~{min(deleted)}: this setting cannot be deleted")
    content: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    try:
        config = from_dict(schema, content)
    except ValueError as error:
        raise UserError(str(error)) from None
    check_choices(config)
    if dataset := getattr(config, "dataset", None):
        dataset.update({name: absolute(value) for name, value in dataset.items() if is_path(name)})
    return config


def absolute(path: Any) -> Any:
    """`path` made absolute if it exists, so that it is found from any folder later; otherwise unchanged."""
    if not isinstance(path, str) or not os.path.exists(os.path.expanduser(path)):
        return path
    return os.path.abspath(os.path.expanduser(path))


def from_dict(schema: type[T], content: Mapping[str, Any]) -> T:
    """Settings from plain values, such as a checkpoint holds. Interpolations (`${...}`) in them stay text.

    Raises ValueError if a setting is unknown, missing or of the wrong type.
    """
    hints = typing.get_type_hints(schema)
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in hints:
            raise ValueError(f"{name}: there is no such setting")
        hint = hints[name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            value = from_dict(hint, value)
        elif not fits(value, hint) and not (hint is int and type(value) is int):  # of any size, such as a seed
            raise ValueError(f"{name}={value}: not {describe_type(hint)}")
        values[name] = value
    config = schema(**values)
    missing = [own.name for own in dataclasses.fields(schema) if getattr(config, own.name) == MISSING]  # type: ignore[arg-type]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    return config


def merged(one: Any, other: Any) -> Any:
    """Nested settings, where those of `other` replace those of `one`."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one | {name: merged(one.get(name), value) for name, value in other.items()}
    return other


def to_dict(config: TrainConfig, *, with_local: bool = False) -> dict[str, Any]:
    """Plain values, as a checkpoint holds them; without what concerns only this machine unless `with_local`."""
    content = dataclasses.asdict(config)
    return content if with_local else {name: value for name, value in content.items() if not is_local(name)}


def check_choices(config: Any) -> None:
    for name, choices in CHOICES.items():
        value = getattr(config, name, None)
        if name == "batch_norm" and isinstance(config, EvaluateConfig):
            choices = (*choices, "both")
        if value is not None and value not in choices:
            raise UserError(f"{name}={value}: one of {', '.join(choices)}")


def is_local(name: str) -> bool:
    return name in LOCAL


def is_resumable(name: str) -> bool:
    return name in RESUMABLE


def is_path(name: str) -> bool:
    """Whether a setting of a data set is a path on this machine: `root`, or a name that ends in _file."""
    return name == "root" or name.endswith("_file")


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their full names, without local ones; `_target_` becomes group: class name."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif name == "_target_":
            yield prefix.rstrip("."), str(value).rpartition(".")[2]
        elif prefix or not (is_local(name) or name == "paper"):
            yield f"{prefix}{name}", value


def differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Full name and both values of every setting in which two nested configs differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name, one, other


def register() -> None:
    """Make the dataclasses known to Hydra, under the names that configs/*.yaml use."""
    from hydra.core.config_store import ConfigStore

    for path in CONFIG_DIR.glob("*.yaml"):
        schema = globals()[f"{path.stem.capitalize()}Config"]
        ConfigStore.instance().store(name=f"{path.stem}_schema", node=schema)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file can be passed for a parameter with this annotation."""
    if hint is Any:
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is list:
        return isinstance(value, list) and all(fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, args[1]) for item in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    return origin is not None or not isinstance(hint, type) or isinstance(value, hint)


def describe_type(hint: Any) -> str:
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(args)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if typing.get_origin(hint) is list:
        return f"a list of {describe_type(args[0])}"
    if typing.get_origin(hint) is dict:
        return f"all {describe_type(args[1])}"
    names = {float: "a finite number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, str(getattr(hint, "__name__", hint)))
