"""Networks from images to feature maps."""

from torch import nn


class Backbone(nn.Module):
    """Images [B, C, H, W] -> feature maps [B, *out_shape]."""

    out_shape: tuple[int, int, int]
