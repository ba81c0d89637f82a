"""Networks from images to features."""

import copy
import math

import torch
from torch import Tensor, nn

ImageShape = tuple[int, int, int]  # C, H, W


class Backbone(nn.Module):
    """A subclass sets `out_shape` and writes `forward`: normalized images [B, C, H, W] -> features [B, *out_shape]."""

    out_shape: tuple[int, ...]  # (C, H, W) of maps, or (D,) of vectors
    mean: Tensor | None  # for the normalization of images, with `std`: from the settings, not saved with the weights
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None, persistent=False)

    @property
    def features_dim(self) -> int:
        """D of the vectors that `features` returns."""
        return math.prod(self.out_shape)

    def features(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] from 0 to 1 -> vectors [B, D]."""
        return self(self.normalize(images)).flatten(1)

    def maps(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] from 0 to 1 -> maps [B, D, h, w], where the network has maps."""
        return self(self.normalize(images))

    def shape_of_output(self, image_shape: ImageShape) -> tuple[int, ...]:
        """`out_shape` by a pass without memory, of a batch of 2 in eval mode; the errors of a pass."""
        sketch = copy.deepcopy(self).to("meta").eval()
        with torch.no_grad():
            return tuple(sketch(torch.empty(2, *image_shape, device="meta")).shape[1:])

    def normalize(self, images: Tensor) -> Tensor:
        return images if self.mean is None else (images - self.mean) / self.std

    def set_normalization(self, mean: list[float], std: list[float]) -> None:
        """Normalize images from now on, by channel or with one value for all; ValueError if set twice."""
        if self.mean is not None:
            raise ValueError("backbone.weights come with their own mean and std")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def load_pretrained(self) -> str | None:
        """Load the weights that a new training run starts from, if the network has any; returns where they are from."""
        return None


class GlobalMean(nn.Module):
    """The mean over each map, [B, C, H, W] -> [B, C, 1, 1]; nn.AdaptiveAvgPool2d(1) does not vectorise over tasks."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3), keepdim=True)
