"""The settings of each command as dataclasses. Their values, and comments on them, are in configs/."""

import dataclasses
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
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
LOCAL = {"device", "data_dir", "resume", "log_every", "projector"}  # do not change what a run computes
RESUMABLE = LOCAL | {"steps", "compile", "eval_every", "patience", "paper"}  # do not change what a step computes


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
    head: dict[str, Any] = field(default_factory=dict)

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

    init: str | None = None
    ema: float | None = None
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
    unseen_only: bool = MISSING
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
    head: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvaluateConfig(TestConfig):
    checkpoint: str | None = None
    features: str | None = None


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
    head: dict[str, Any] = field(default_factory=dict)
    device: str = MISSING


def typed(cfg: DictConfig, schema: type[T]) -> T:
    """The composed settings as an object of `schema`; UserError or OmegaConf's error if one is invalid or missing."""
    if deleted := typing.get_type_hints(schema).keys() - cfg.keys():
        raise UserError(f"~{min(deleted)}: this setting cannot be deleted")
    content: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    try:
        config = from_dict(schema, content)
    except ValueError as error:
        raise UserError(str(error)) from None
    dataset = getattr(config, "dataset", {})
    for name, value in dataset.items():
        if is_path(name) and isinstance(value, str) and os.path.exists(place := os.path.expanduser(value)):
            dataset[name] = os.path.abspath(place)  # found from any folder later
    return config


def from_dict(schema: type[T], content: Mapping[str, Any]) -> T:
    """Settings from plain values, where `${...}` stays text; ValueError if one is unknown, missing or invalid."""
    hints = typing.get_type_hints(schema)
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in hints:
            raise ValueError(f"{name}: there is no such setting")
        hint = hints[name]
        words, fits = allowed(hint)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            value = from_dict(hint, value)
        elif not fits(value) and not (hint is int and type(value) is int):  # of any size, such as a seed
            raise ValueError(f"{name}={value}: not {words}")
        values[name] = value
    config = schema(**values)
    for name in hints:
        value, choices = getattr(config, name), CHOICES.get(name, ())
        if value == MISSING:
            raise ValueError(f"{name} is missing")
        if name == "batch_norm" and schema is EvaluateConfig:
            choices = (*choices, "both")
        if choices and value not in (None, *choices):
            raise ValueError(f"{name}={value}: one of {', '.join(choices)}")
    return config


def merged(one: Any, other: Any) -> Any:
    """Nested settings, where those of `other` replace those of `one`."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one | {name: merged(one.get(name), value) for name, value in other.items()}
    return other


def to_dict(config: TrainConfig, *, with_local: bool = False) -> dict[str, Any]:
    """Plain values, as a checkpoint holds them; without what concerns only this machine unless `with_local`."""
    content = dataclasses.asdict(config)
    return content if with_local else {name: value for name, value in content.items() if name not in LOCAL}


def is_resumable(name: str) -> bool:
    return name in RESUMABLE


def is_path(name: str) -> bool:
    """Whether a setting of a data set is a path on this machine: `root`, or a name that ends in _file."""
    return name == "root" or name.endswith("_file")


def class_name(node: Mapping[str, Any]) -> str:
    """Of the class that a config node builds; empty without one."""
    return str(node.get("_target_", "")).rpartition(".")[2]


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their full names, without local ones; `_target_` becomes group: class name."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif name == "_target_":
            yield prefix.rstrip("."), str(value).rpartition(".")[2]
        elif prefix or name not in LOCAL | {"paper"}:
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
        ConfigStore.instance().store(f"{path.stem}_schema", globals()[f"{path.stem.capitalize()}Config"])


def composed(command: str, overrides: list[str]) -> DictConfig:
    """The settings of a command, with those of Hydra itself."""
    from hydra import compose, initialize_config_dir

    register()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(command, overrides, return_hydra_config=True)


def allowed(hint: Any) -> tuple[str, Callable[[Any], bool]]:
    """The values of a YAML file that a parameter with this annotation takes: in words, and as a check."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}", lambda value: value in args
    if origin in (typing.Union, types.UnionType):
        kinds = [allowed(arg) for arg in args]
        return " or ".join(words for words, _ in kinds), lambda value: any(fits(value) for _, fits in kinds)
    if origin is list:
        words, fits = allowed(args[0])
        return f"a list of {words}", lambda value: isinstance(value, list) and all(map(fits, value))
    if origin is dict:
        words, fits = allowed(args[1])
        return f"all {words}", lambda value: isinstance(value, dict) and all(map(fits, value.values()))
    if hint is int:
        return "a whole number", lambda value: type(value) is int and abs(value) < 2**31
    if hint is float:
        return "a finite number", lambda value: type(value) in (int, float) and abs(value) < 1e300
    if hint is Any or origin or not isinstance(hint, type):
        return str(hint), lambda value: True
    names = {bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, hint.__name__), lambda value: isinstance(value, hint)
