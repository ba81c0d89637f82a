"""Tasks that differ in their numbers of classes and of support images.

uniform       a way from 2 to `way`, and one shot for all classes from 1 to `shot`, each equally likely
meta_dataset  a way from 5 to `way`; the size of the support set and the shares of the classes in it are random (Meta-
              Dataset, Triantafillou et al. 2020, section 3.2, https://arxiv.org/abs/1903.03096; `way` is 50 and `shot`
              100 there)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.bounds import Vary

MOST_SUPPORT = 500  # images of a task, in Meta-Dataset; more only if it has more classes
LEAST_WAY = {"uniform": 2, "meta_dataset": 5}
ABSENT = -1  # a row that is no image


def values_per_task(way: int) -> int:
    """Return how many random values `varied` takes for a task."""
    return 2 + way


def varied(rule: Vary, rows: Tensor, sizes: Tensor, random: Tensor, shot: int, query: int) -> Tensor:
    """Return the rows [T, N, K+Q] of tasks, ABSENT for images that a task does not have.

    rows    of images of each class in random order, [T, N, M]
    sizes   number of images of each class, [T, N]
    random  uniform from 0 to 1, [T, values_per_task(N)]
    """
    way = rows.shape[1]
    least = min(LEAST_WAY[rule], way)
    ways = least + (random[:, :1] * (way - least + 1)).long()  # [T, 1]
    inside = torch.arange(way) < ways  # [T, N]
    room = (sizes - query).clamp(max=shot)  # support images that a class may have
    if rule == "uniform":
        shots = (1 + (random[:, 1:2] * shot).long()).minimum(room)
    else:
        share = 1 - random[:, 1:2]  # above 0 and at most 1
        total = ((share * room).ceil() * inside).sum(1, keepdim=True).clamp(max=MOST_SUPPORT)
        spread = math.log(0.5) + random[:, 2:] * math.log(4)  # from log 0.5 to log 2
        parts = spread.exp() * sizes * inside
        parts = parts / parts.sum(1, keepdim=True)
        shots = (1 + (parts * (total - ways).clamp(min=0)).floor().long()).minimum(room)
    queries, support = rows[:, :, :query], rows[:, :, query : query + shot]
    support = F.pad(support, [0, shot - support.shape[2]], value=ABSENT)
    support = support.masked_fill(torch.arange(shot) >= shots.unsqueeze(2), ABSENT)
    return torch.cat([support, queries], dim=2).masked_fill(~inside.unsqueeze(2), ABSENT)
