"""Networks from images to features."""

import copy
import math

import torch
from torch import Tensor, nn

from metacv.backbones.weights import load_weights

ImageShape = tuple[int, int, int]  # C, H, W


class Backbone(nn.Module):
    """A subclass sets `out_shape` and writes `forward`: normalized images [B, C, H, W] -> features [B, *out_shape]."""

    out_shape: tuple[int, ...]  # (C, H, W) of maps, or (D,) of vectors
    mean: Tensor | None  # normalization of images, with `std`: from the settings, not saved with the weights
    std: Tensor
    weights_file: str | None = None  # pre-trained weights, for networks with this setting

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None, persistent=False)

    @property
    def features_dim(self) -> int:
        """The dimension D of the vectors that `features` returns."""
        return math.prod(self.out_shape)

    def features(self, images: Tensor) -> Tensor:
        """Compute feature vectors: images [B, C, H, W] from 0 to 1 -> [B, D]."""
        return self(self.normalize(images)).flatten(1)

    def maps(self, images: Tensor) -> Tensor:
        """Compute feature maps, if the network has maps: images [B, C, H, W] from 0 to 1 -> [B, D, h, w]."""
        return self(self.normalize(images))

    def shape_of_output(self, image_shape: ImageShape) -> tuple[int, ...]:
        """Compute `out_shape` by a forward pass on the meta device, without memory; raises the errors of that pass."""
        sketch = copy.deepcopy(self).to("meta").eval()
        with torch.no_grad():
            return tuple(sketch(torch.empty(2, *image_shape, device="meta")).shape[1:])

    def normalize(self, images: Tensor) -> Tensor:
        return images if self.mean is None else (images - self.mean) / self.std

    def set_normalization(self, mean: list[float], std: list[float]) -> None:
        """Set the mean and std of images, per channel or one value for all; ValueError if already set."""
        if self.mean is not None:
            raise ValueError("backbone.weights come with their own mean and std")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def load_pretrained(self) -> str | None:
        """Load pre-trained weights for a new training run, if the settings name any; return their source, or None."""
        return load_weights(self, type(self).__name__, self.weights_file) if self.weights_file else None


class GlobalMean(nn.Module):
    """Mean over each map, [B, C, H, W] -> [B, C, 1, 1]; nn.AdaptiveAvgPool2d(1) does not vectorise over tasks."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3), keepdim=True)
