"""Convert configs and checkpoints of earlier versions. Old names appear only in this file."""

from typing import Any

MOVED = {  # classes: path in version 1 -> current path
    "metacv.algorithms.maml.MAML": "metacv.algorithms.gradient.maml.MAML",
    "metacv.algorithms.reptile.Reptile": "metacv.algorithms.gradient.reptile.Reptile",
    "metacv.algorithms.protonet.ProtoNet": "metacv.algorithms.metric.protonet.ProtoNet",
    "metacv.algorithms.relationnet.RelationNet": "metacv.algorithms.metric.relationnet.RelationNet",
    "metacv.backbones.pretrained.Torchvision": "metacv.backbones.torchvision.Torchvision",
}
RENAMED = {"norm": "batch_norm"}  # settings: old name -> current name


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """Add `algo.shot` to earlier Relation Networks, which then scale their sums to the shot of training."""
    algo = config["algo"]
    if algo.get("_target_") == MOVED["metacv.algorithms.relationnet.RelationNet"] and "shot" not in algo:
        return config | {"algo": algo | {"shot": None if config.get("train_vary") else config["train_shot"]}}
    return config


def upgrade_config(config: dict[str, Any]) -> dict[str, Any]:
    """Convert settings of version 1. Newer settings get the value that matches the old behaviour."""
    later: dict[str, Any] = {"episodes": 600, "precision": "fp32", "compile": False}
    config = later | {RENAMED.get(name, name): value for name, value in config.items()}
    for group in ("algo", "backbone"):
        target = config[group].get("_target_")
        config[group] = config[group] | {"_target_": MOVED.get(target, target)}
    if ".gradient." in config["algo"]["_target_"]:
        config["algo"] = {"task_batching": "auto", "task_chunk": None} | config["algo"]
    return config


def upgrade_override(word: str) -> str:
    """Convert a `name=value` word of the command line that started a run."""
    name, equals, value = word.partition("=")
    return RENAMED.get(name, name) + equals + value


def upgrade_checkpoint(content: dict[str, Any]) -> dict[str, Any]:
    """Convert the content of a best.pt, a last.pt, or a file of `predict save=`."""
    content = content | {"config": upgrade_config(content["config"]), "format": 2}
    if "overrides" in content:
        content["overrides"] = [upgrade_override(word) for word in content["overrides"]]
    if "window" in content:
        loss, accuracy = content["window"].unbind(1)
        content["window"] = {"loss": loss, "accuracy": accuracy}
    return content
