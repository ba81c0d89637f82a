"""Use a pre-trained network without a training run: build a checkpoint of it in memory, which is in no file."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf, open_dict
from PIL import Image

from metacv import CONFIG_DIR
from metacv.algorithms.base import Algorithm
from metacv.algorithms.heads.base import Embedding, Head
from metacv.algorithms.heads.finetune import SHIFT
from metacv.backbones.base import Backbone
from metacv.config import (
    AugmentConfig,
    EvaluateConfig,
    NormalizeConfig,
    PredictConfig,
    TrainConfig,
    composed,
    from_dict,
    network_name,
    to_dict,
)
from metacv.errors import UserError
from metacv.feature_cache import IGNORED, digest
from metacv.features import DEFAULT_HEAD
from metacv.model import Checkpoint, Training, beyond_defaults, build, build_dataset, build_node, load_checkpoint

# Settings that do not change features, or that a result has as `backbone` and in `stages` and `checkpoint_sha256`.
NOT_CHANGES = {"backbone.name", "backbone.weights", *(f"backbone.{name}" for name in IGNORED)}
DEFAULT_SIZE = ("backbone.size", "own")  # without a training


@dataclass(frozen=True)
class Unsaved(Checkpoint):
    """A pre-trained network in the form of a checkpoint. `path` is the name of its weights."""

    network: Algorithm

    @cached_property
    def sha256(self) -> str:
        """The hash of its weights."""
        return digest(self.content["algorithm"])

    @contextmanager
    def blamed(self, config: TrainConfig) -> Iterator[None]:
        yield  # all settings are those of the command

    def changes(self, config: TrainConfig) -> dict[str, Any]:
        """Return the settings of network, normalization and head that are not the defaults of their classes."""
        found = beyond_defaults("backbone", config.backbone, Backbone) | beyond_defaults("head", config.head, Head)
        if config.normalize != NormalizeConfig():
            found |= {f"normalize.{name}": value for name, value in vars(config.normalize).items()}
        return {name: now for name, now in found.items() if name not in NOT_CHANGES and (name, now) != DEFAULT_SIZE}

    def build(self, config: TrainConfig | None = None) -> Algorithm:
        return copy.deepcopy(self.network)  # the settings of the command line have no others


def checkpoint_or_pretrained(given: EvaluateConfig | PredictConfig, place: object) -> Checkpoint:
    """Load the checkpoint at `place`, or build the network of `given.backbone`; UserError unless one of them is set."""
    if not given.backbone:
        if given.normalize != NormalizeConfig():
            raise UserError("normalize: only for backbone=NAME; a checkpoint has its own")
        return load_checkpoint(str(place))
    if "_target_" not in given.backbone:
        text = "set backbone=NAME too; the network of a checkpoint cannot be changed"
        raise UserError(f"backbone.{min(given.backbone)}: {text}")
    if place:
        raise UserError("give either checkpoint=RUN, or backbone=NAME for a pre-trained network without a run")
    return pretrained(given)


def pretrained(given: EvaluateConfig | PredictConfig) -> Checkpoint:
    """Build the network of `given.backbone` with its weights, as if a run with the default settings had saved it."""
    config = _settings(given)
    dataset = build_dataset(config.dataset, config.data_dir)
    channels, height, width = dataset.read(Image.new("RGB", (84, 84))).shape  # any image, for the shape of all
    image_shape = channels, height, width
    algorithm = build(config, image_shape)
    if (source := algorithm.embedding.load_pretrained()) is None:
        download = "backbone.weights=DEFAULT or " * ("weights" in config.backbone)
        advice = f"set {download}backbone.weights_file=FILE, or train it first"
        raise UserError(f"backbone: {network_name(config.backbone)} has no trained weights; {advice}")
    training = Training(stages=[f"{network_name(config.backbone)}, {source}"])
    config = replace(config, augment=AugmentConfig(crop=min(height, width) // SHIFT, flip=True))  # of head.augment, ...
    content = {
        "config": to_dict(config),
        "image_shape": [*image_shape],
        "step": 0,
        "algorithm": algorithm.state_dict(),
        "training": asdict(training),
        "splits": {"train": [], "val": []},  # their classes are unknown
    }
    place = config.backbone.get("weights_file") or config.backbone.get("name", "weights")
    network = algorithm.requires_grad_(False)
    return Unsaved(Path(Path(place).name), config, image_shape, 0, training, None, content, network)


def _settings(given: EvaluateConfig | PredictConfig) -> TrainConfig:
    """Return default settings with those of `given`. A size that is not set is that of the weights' training."""
    cfg = composed("train", ["~algo"])
    with open_dict(cfg):
        del cfg["hydra"]
    content: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    content["data_dir"] = getattr(given, "data_dir", ".")
    dataset = given.dataset
    if "_target_" not in dataset:
        if isinstance(given, EvaluateConfig):
            raise UserError("dataset is missing; set dataset=NAME, the images to test the network on")
        folder: dict[str, Any] = yaml.safe_load((CONFIG_DIR / "dataset/image_folder.yaml").read_text("utf-8"))
        dataset = folder | {"root": None} | dataset
    backbone = dict(given.backbone)
    if backbone.get("size", ...) is None:
        backbone["size"] = "own"
    if dataset.get("size", ...) is None and "size" in backbone:
        with torch.device("meta"):
            network = build_node("backbone", backbone, Backbone, image_shape=(3, 84, 84))
        dataset = dataset | {"size": getattr(network, "size", None)}
    own = {"_target_": f"{Embedding.__module__}.{Embedding.__name__}"}
    head = given.head if "_target_" in given.head else DEFAULT_HEAD | given.head
    content |= {"backbone": backbone, "dataset": dataset, "algo": own, "head": head}
    try:
        return replace(from_dict(TrainConfig, content), normalize=given.normalize)
    except ValueError as error:
        raise UserError(str(error)) from None
