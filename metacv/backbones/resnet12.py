"""ResNet-12 of few-shot learning, as in MetaOptNet (Lee et al., 2019), https://arxiv.org/abs/1904.03758"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metacv.backbones.base import Backbone, GlobalMean, ImageShape
from metacv.bounds import ShareBelowOne

CHANNELS = (64, 160, 320, 640)
BLOCK = 5  # side of a dropped square


class ResNet12(Backbone):
    """Four residual blocks that each halve the map, the last two with DropBlock. Parameter names are the authors'."""

    def __init__(
        self,
        image_shape: ImageShape,
        drop_block: ShareBelowOne = 0.0,
        global_pool: bool = True,
        running_stats: bool = True,
        weights_file: str | None = None,
    ) -> None:
        super().__init__()
        self.weights_file = weights_file
        inputs, height, width = image_shape
        if min(height, width) < 16:
            raise ValueError(f"images of {height}x{width} are too small to be halved four times")
        for number, outputs in enumerate(CHANNELS, start=1):
            dropped = drop_block if number > 2 else 0.0
            setattr(self, f"layer{number}", nn.Sequential(Block(inputs, outputs, dropped, running_stats)))
            inputs, height, width = outputs, height // 2, width // 2
        self.pool = GlobalMean() if global_pool else nn.Identity()
        self.out_shape = (inputs, 1, 1) if global_pool else (inputs, height, width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
        self.to(memory_format=torch.channels_last)  # the fastest layout on CPUs

    def forward(self, images: Tensor) -> Tensor:
        for number in range(1, len(CHANNELS) + 1):
            images = self.get_submodule(f"layer{number}")(images)
        return self.pool(images)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, drop_block: float, running_stats: bool) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, outputs, track_running_stats=running_stats)
        self.drop_block = drop_block
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm()
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), norm()
        self.conv3, self.bn3 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), norm()
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), norm())

    def forward(self, maps: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(self.conv1(maps)), 0.1)
        out = F.leaky_relu(self.bn2(self.conv2(out)), 0.1)
        out = F.leaky_relu(F.max_pool2d(self.bn3(self.conv3(out)) + self.downsample(maps), 2), 0.1)
        return drop_blocks(out, self.drop_block) if self.training and self.drop_block else out


def drop_blocks(maps: Tensor, rate: float) -> Tensor:
    """DropBlock (Ghiasi et al. 2018, arXiv:1810.12890): zero about `rate` of maps [B, C, H, W] in squares, rescale."""
    height, width = maps.shape[2:]
    side = min(BLOCK, height, width)
    chance = rate * height * width / (side**2 * (height - side + 1) * (width - side + 1))
    at = (torch.rand_like(maps[:, :, : height - side + 1, : width - side + 1]) < chance).to(maps.dtype)
    kept = 1 - F.max_pool2d(F.pad(at, [side - 1] * 4), side, stride=1)
    return maps * kept * (kept.numel() / kept.sum().clamp_min(1))
