"""Distances and cosines between features and class centres.

The first two compute in fp32 or more, whatever the precision of the network; with precision=tf32, training multiplies
in tf32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.data.task import at_least_fp32


def negative_squared_distance(features: Tensor, centres: Tensor) -> Tensor:
    """Return minus the squared distances of features [T, B, D] to centres [T, N, D]: [T, B, N]."""
    with torch.autocast(features.device.type, enabled=False):
        features, centres = at_least_fp32(features), at_least_fp32(centres)
        origin = centres.mean(1, keepdim=True)  # near the features, so that their squares do not hide the distances
        features, centres = features - origin, centres - origin
        return 2 * closeness(features, centres) - features.square().sum(-1, keepdim=True)


def cosine_similarity(features: Tensor, centres: Tensor) -> Tensor:
    """Return the cosines between features [T, B, D] and centres [T, N, D]: [T, B, N]."""
    with torch.autocast(features.device.type, enabled=False):
        features, centres = at_least_fp32(features), at_least_fp32(centres)
        return F.normalize(features, dim=-1) @ F.normalize(centres, dim=-1).mT


def closeness(features: Tensor, centres: Tensor) -> Tensor:
    """Return minus half the squared distances of features [T, B, D] to centres [T, N, D], up to a number for each
    feature, which no softmax over classes depends on: [T, B, N]."""
    return features @ centres.mT - centres.square().sum(-1).unsqueeze(1) / 2
