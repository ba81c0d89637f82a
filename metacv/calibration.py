"""Calibrated probabilities, label sets and a measure of how familiar an image is, from images that were held out.

A score is the logarithm of the odds against a class, log((1 - p) / p). It has the order of 1 - p, the score of split
conformal prediction, and is not rounded to 0 for a confident model.
"""

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.data.task import TaskBatch

BINS = 15
STEPS = 60  # of bisection, over a factor of e**24


def fit_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the most probable temperatures [...] of logits [..., M, N] with labels [M].

    The likelihood is that of Guo et al., 2017, https://arxiv.org/abs/1706.04599. Without a prior, few images give
    extreme values: 0 if all are classified correctly, infinity if no more than by chance. So the logarithm of the
    temperature has a normal prior with deviation 1, centred on the logarithm of the logits' standard deviation over
    classes. With many images it counts for little. Bisection finds where the posterior's derivative is zero.
    """
    unit = logits.double().std(-1, keepdim=True).mean(-2, keepdim=True).clamp_min(1e-12)
    scaled = logits.double() / unit
    own = scaled.gather(-1, labels.expand(scaled.shape[:-1]).unsqueeze(-1)).sum((-2, -1))
    low, high = torch.full_like(own, -12), torch.full_like(own, 12)  # logarithm of the inverse temperature
    for _ in range(STEPS):
        middle = (low + high) / 2
        inverse = middle.exp()
        expected = ((scaled * inverse[..., None, None]).softmax(-1) * scaled).sum((-2, -1))
        rises = inverse * (own - expected) > middle
        low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
    return unit[..., 0, 0] / ((low + high) / 2).exp()


def scores(logits: Tensor) -> Tensor:
    """Return the score of each class, the logarithm of the odds against it: logits [..., N] -> float64 [..., N]."""
    logits = logits.double()
    top = logits.argmax(-1, keepdim=True)
    without_top = logits.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    others = logits.logsumexp(-1, keepdim=True) + torch.log1p(-logits.softmax(-1))
    return others.scatter(-1, top, without_top) - logits


def scores_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the scores [..., M] of the true classes: logits [..., M, N], labels [M]."""
    return scores(logits).gather(-1, labels.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def quantile(values: Tensor, share: float) -> Tensor:
    """Return the value [...] that a new one exceeds in a share of 1 - `share`, given exchangeable values [..., M].

    The value at position (M + 1) * share of the sorted ones, as in split conformal prediction, interpolated; the
    largest if there is no such position. So M values support a share of M / (M + 1) at most.
    """
    found = numpy.quantile(values.cpu().numpy(), share, axis=-1, method="weibull")
    return torch.as_tensor(found, device=values.device)


def familiarity(tasks: TaskBatch) -> Tensor:
    """Return the cosine of each query to the nearest class mean [T, Q], for tasks of features; low for unknown classes.

    On validation classes of CIFAR-FS with cifar_fs/classifier_5w1s, 5-way 5-shot, 500 episodes, its AUROC was 0.773:
    distance to the mean 0.772, energy 0.764, cosine to the nearest example 0.744, largest probability 0.653.
    """
    tasks = tasks.map(vectors)
    means = F.normalize(tasks.class_means(tasks.support_x), dim=-1)
    return (F.normalize(tasks.query_x, dim=-1) @ means.mT).amax(-1)


def vectors(features: Tensor) -> Tensor:
    """Average feature maps [T, B, D, h, w] over their places: vectors [T, B, D], which are returned as they are."""
    return features.flatten(3).mean(-1) if features.dim() > 3 else features


def auroc(known: Tensor, unknown: Tensor) -> float:
    """Return the probability that a known image [A] is more familiar than an unknown one [B]."""
    from sklearn.metrics import roc_auc_score  # takes time to import

    return float(roc_auc_score([1] * len(known) + [0] * len(unknown), torch.cat([known, unknown]).cpu()))


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Return the expected calibration error: the mean of |accuracy - confidence| over BINS bins, weighted.

    confidence  probabilities [M] of the predicted classes
    correct     whether each prediction is right [M]
    """
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, correct.double() - confidence.double())
    return float(gaps.abs().sum()) / len(confidence)
