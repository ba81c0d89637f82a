"""The types of each command's settings; their values live in configs/."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


@dataclass
class AugmentConfig:
    crop: int = MISSING
    flip: bool = MISSING
    jitter: float = MISSING


@dataclass
class NormalizeConfig:
    mean: list[float] = MISSING
    std: list[float] = MISSING


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
    augment: AugmentConfig = MISSING
    normalize: NormalizeConfig = MISSING

    steps: int = MISSING
    meta_batch: int = MISSING
    clip_norm: float | None = None
    clip_value: float | None = None
    precision: str = MISSING
    compile: bool = MISSING

    eval_every: int = MISSING
    eval_episodes: int = MISSING
    norm: str = MISSING
    patience: int | None = None

    seed: int = MISSING
    device: str = MISSING
    data_dir: str = MISSING
    resume: bool | str = False
    log_every: int = MISSING
    projector: bool = MISSING


@dataclass
class EvaluateConfig:
    checkpoint: str = MISSING
    split: str = MISSING
    way: int | None = None
    shot: int | None = None
    query: int | None = None
    episodes: int | None = None
    norm: str | None = None
    seed: int = MISSING
    device: str = MISSING
    data_dir: str = MISSING
    algo: Any = None
    dataset: Any = None


@dataclass
class CompareConfig:
    runs: list[str] = MISSING
    split: str = MISSING
    way: int | None = None
    shot: int | None = None
    query: int | None = None
    episodes: int | None = None
    norm: str | None = None
    seed: int = MISSING
    device: str = MISSING
    data_dir: str = MISSING
    dataset: Any = None


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
    norm: str | None = None
    algo: dict[str, Any] = MISSING
    dataset: dict[str, Any] = MISSING
    device: str = MISSING


AS_THEY_ARE = {"mean": [0.0], "std": [1.0]}
