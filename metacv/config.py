"""The settings of each command as dataclasses. Their values, and comments on them, are in configs/."""

import dataclasses
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf

from metacv import CONFIG_DIR
from metacv.bounds import (
    Count,
    Episodes,
    Images,
    Positive,
    QueryBalance,
    Range,
    Seed,
    Share,
    ShareBelowOne,
    Vary,
    Way,
    checked,
)
from metacv.errors import UserError
from metacv.words import KEPT_PATHS

T = TypeVar("T")
BatchNormMode = Literal["inductive", "transductive"]
Precision = Literal["fp32", "tf32", "bf16"]
Split = Literal["train", "val", "test"]
# Settings that do not change what a run computes, and those that do not change what a step computes.
LOCAL = {"device", "processes", "data_dir", "name", "resume", "dry_run", "log_every", "projector"}
RESUMABLE = LOCAL | {"steps", "compile", "eval_every", "patience", "paper"}


@dataclass
class AugmentConfig:
    crop: Annotated[int, Range(0, 4096)] = 0  # pixels
    flip: bool = False
    jitter: Share = 0.0


@dataclass
class NormalizeConfig:
    mean: list[float] = field(default_factory=lambda: [0.0])
    std: list[Positive] = field(default_factory=lambda: [1.0])


@dataclass
class TrainConfig:
    dataset: dict[str, Any] = MISSING
    backbone: dict[str, Any] = MISSING
    algo: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    schedule: dict[str, Any] = MISSING
    head: dict[str, Any] = field(default_factory=dict)

    way: Way = MISSING
    shot: Images = MISSING
    query: Images = MISSING
    episodes: Episodes = MISSING
    train_way: Way = MISSING
    train_shot: Images = MISSING
    train_query: Images = MISSING
    vary: Vary | None = None
    train_vary: Vary | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)

    steps: Count = MISSING
    meta_batch: Images = MISSING
    clip_norm: Positive | None = None
    clip_value: Positive | None = None
    precision: Precision = MISSING
    compile: bool = MISSING

    eval_every: Count = MISSING
    eval_episodes: Episodes = MISSING
    batch_norm: BatchNormMode = MISSING
    patience: Count | None = None

    init: str | None = None
    ema: ShareBelowOne | None = None
    seed: Seed = MISSING
    device: str = "auto"
    processes: Count = 1
    data_dir: str = ""
    name: str | None = None
    resume: bool | str = False
    dry_run: bool = False
    log_every: Count = 10
    projector: bool = False
    paper: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class TestConfig:
    """Settings that evaluate and compare share. None stands for the value that the model was trained with."""

    split: Split = MISSING
    unseen_only: bool = MISSING
    way: Way | None = None
    shot: Images | None = None
    query: Images | None = None
    vary: Vary | Literal["none"] | None = None
    episodes: Episodes | Literal["disjoint"] | None = None
    seed: Seed = MISSING
    device: str = MISSING
    data_dir: str = MISSING
    algo: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvaluateConfig(TestConfig):
    batch_norm: Literal[BatchNormMode, "both"] | None = None
    query_balance: Literal[QueryBalance, "both"] | None = None
    checkpoint: str | list[str] | None = None
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    features: str | None = None
    backbone: dict[str, Any] = field(default_factory=dict)
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    calibrate: Literal["val", "loo"] | None = None
    pictures: bool = True

    def balances(self, uses_query_set: bool, vary: str | None = None) -> tuple[QueryBalance, ...]:
        """Return the balances of the queries to measure. null: both for a head that uses the whole query set, whose
        accuracy depends on the balance, unless the episodes can only be balanced."""
        known: tuple[QueryBalance, ...] = typing.get_args(QueryBalance)
        balanced = "episodes=disjoint" if self.episodes == "disjoint" else f"vary={vary}" if vary else ""
        given = self.query_balance or ("both" if uses_query_set and not balanced else "balanced")
        if balanced and given != "balanced":
            raise UserError(f"query_balance={given}: cannot be set together with {balanced}")
        return tuple(one for one in known if given in (one, "both"))


@dataclass
class CompareConfig(TestConfig):
    batch_norm: BatchNormMode | None = None
    runs: list[str] = MISSING


@dataclass
class ReportConfig:
    runs: list[str] = MISSING


@dataclass
class ListConfig:
    what: list[str] = field(default_factory=list)


@dataclass
class InfoConfig:
    runs: list[str] = MISSING


@dataclass
class PredictConfig:
    checkpoint: str | None = None
    backbone: dict[str, Any] = field(default_factory=dict)
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    support: str | None = None
    adapted: str | None = None
    query: str | None = None
    save: str | None = None
    remove: list[str | int] | str | int | None = None
    unknown: bool = False
    coverage: Annotated[float, Range(0, 1, above=True, below=True)] | None = None
    batch_norm: BatchNormMode | None = None
    algo: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    device: str = MISSING


@dataclass
class ExportConfig:
    checkpoint: str | None = None
    adapted: str | None = None
    format: Literal["onnx", "safetensors"] = MISSING
    file: str = MISSING
    head: dict[str, Any] = field(default_factory=dict)


def typed(cfg: DictConfig, schema: type[T]) -> T:
    """Convert composed settings to a `schema` object; UserError or OmegaConf's error if one is invalid or missing."""
    hints = typing.get_type_hints(schema, include_extras=True)
    if deleted := {name for name in hints if getattr(schema, name, None) == MISSING} - cfg.keys():
        raise UserError(f"~{min(deleted)}: cannot be deleted; set {min(deleted)}=VALUE instead")
    content: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    try:
        return from_dict(schema, with_paths(content, lambda _, path: absolute(path)))
    except ValueError as error:
        raise UserError(str(error)) from None


def from_dict(schema: type[T], content: Mapping[str, Any], prefix: str = "") -> T:
    """Build settings from plain values; `${...}` stays text. ValueError if one is unknown, missing or invalid."""
    hints = typing.get_type_hints(schema, include_extras=True)
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in hints:
            raise ValueError(f"{prefix}{name}: there is no such setting")
        hint = hints[name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            values[name] = from_dict(hint, checked(f"{prefix}{name}", value, dict[str, Any]), f"{prefix}{name}.")
        else:
            values[name] = checked(f"{prefix}{name}", value, hint)
    config = schema(**values)
    if missing := [name for name in hints if getattr(config, name) == MISSING]:
        raise ValueError(f"{prefix}{missing[0]} is missing")
    return config


def merged(one: Any, other: Any) -> Any:
    """Merge nested settings; values of `other` replace those of `one`."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one | {name: merged(one.get(name), value) for name, value in other.items()}
    return other


def to_dict(config: TrainConfig, *, with_local: bool = False) -> dict[str, Any]:
    """Return plain values as in a checkpoint, without settings that concern only this machine unless `with_local`."""
    content = dataclasses.asdict(config)
    return content if with_local else {name: value for name, value in content.items() if name not in LOCAL}


def is_resumable(name: str) -> bool:
    return name in RESUMABLE


def is_path(name: str) -> bool:
    """Whether the setting with this full name is a path that a run reads again when it is resumed or evaluated."""
    return KEPT_PATHS.fullmatch(name) is not None


def with_paths(content: Mapping[str, Any], change: Callable[[str, str], Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with every path replaced by `change(full name, path)`."""

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return with_paths(value, change, f"{name}.")
        return change(name, value) if is_path(name) and isinstance(value, str) and value else value

    return {name: changed(f"{prefix}{name}", value) for name, value in content.items()}


def absolute(path: str) -> str:
    """Make a path absolute; relative paths start at the current folder, ~ at the home folder."""
    return os.path.abspath(os.path.expanduser(path))


def class_name(node: Mapping[str, Any]) -> str:
    """Return the name of the class that a config node builds, or the names in `sets`; empty without any."""
    if isinstance(sets := node.get("sets"), dict):
        return "+".join(class_name(own) for own in sets.values())
    return str(node.get("_target_", "")).rpartition(".")[2]


def network_name(node: Mapping[str, Any]) -> str:
    """`ResNet12`, or with the name of a network in a library: `Timm resnet18`."""
    return " ".join([class_name(node), *([str(node["name"])] if "name" in node else [])])


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings as (full name, value), without local ones; `_target_` becomes (group, class name)."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif name == "_target_":
            yield prefix.rstrip("."), str(value).rpartition(".")[2]
        elif prefix or name not in LOCAL | {"paper"}:
            yield f"{prefix}{name}", value


def validation_protocol(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that determine the episodes of validation, by their full names."""
    names = ("dataset", "way", "shot", "query", "vary", "batch_norm", "eval_episodes")
    whole = flat({name: getattr(config, name) for name in names})
    return {name: value for name, value in whole if name != "dataset.train_rotation"}


def differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the full name and both values of every setting in which two nested configs differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name, one, other


def composed(command: str, overrides: list[str]) -> DictConfig:
    """Compose the settings of a command, including Hydra's own."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(command, overrides, return_hydra_config=True)
