"""Configs and checkpoints of older versions, changed into today's form. Old names appear here and nowhere else."""

from typing import Any

# Where classes lived in version 1.
MOVED = {
    "metacv.algorithms.maml.MAML": "metacv.algorithms.gradient.maml.MAML",
    "metacv.algorithms.reptile.Reptile": "metacv.algorithms.gradient.reptile.Reptile",
    "metacv.algorithms.protonet.ProtoNet": "metacv.algorithms.metric.protonet.ProtoNet",
    "metacv.algorithms.relationnet.RelationNet": "metacv.algorithms.metric.relationnet.RelationNet",
    "metacv.backbones.pretrained.Torchvision": "metacv.backbones.torchvision.Torchvision",
}
INNER_LOOPS = ("metacv.algorithms.gradient.maml.MAML", "metacv.algorithms.gradient.reptile.Reptile")


def upgrade(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a checkpoint, with settings that came later set to what the program did before it had them."""
    later: dict[str, Any] = {
        "projector": False,
        "episodes": 600,
        "augment": {"crop": 0, "flip": False, "jitter": 0.0},
        "normalize": {"mean": [0.0], "std": [1.0]},
        "precision": "fp32",
        "compile": False,
    }
    config = later | config
    for group in ("algo", "backbone"):
        target = config[group].get("_target_")
        if target in MOVED:
            config[group] = config[group] | {"_target_": MOVED[target]}
    if config["algo"].get("_target_") in INNER_LOOPS:
        config["algo"] = {"task_batching": "auto", "task_chunk": None} | config["algo"]
    return config
