"""Networks from images to feature maps."""

import math

import torch
from torch import Tensor, nn


class Backbone(nn.Module):
    """Images [B, C, H, W] -> feature maps [B, *out_shape]."""

    out_shape: tuple[int, int, int]

    def normalize(self, mean: list[float], std: list[float]) -> None:
        """From now on takes (images - mean) / std, by channel; one value goes for all. Not part of the weights."""
        if not all(map(math.isfinite, mean)) or not all(0 < value < math.inf for value in std):
            raise ValueError(f"mean={mean}, std={std}: finite, and every std above 0")
        if hasattr(self, "input_mean"):
            raise ValueError("backbone.weights come with their own")
        self.register_buffer("input_mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("input_std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.register_forward_pre_hook(lambda self, images: (images[0] - self.input_mean) / self.input_std)

    def load_pretrained(self) -> None:
        """Takes the weights that a new training starts from, where they come from elsewhere."""


class GlobalMean(nn.Module):
    """The mean over each map, [B, C, H, W] -> [B, C, 1, 1]; nn.AdaptiveAvgPool2d(1) does not vectorise over tasks."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3), keepdim=True)
