"""Wide ResNet-28-10 (Zagoruyko and Komodakis, 2016), https://arxiv.org/abs/1605.07146, as LEO and S2M2 use it."""

import torch.nn.functional as F
from torch import Tensor, nn

from metacv.backbones.base import Backbone, GlobalMean, ImageShape
from metacv.bounds import ShareBelowOne, Width

BLOCKS = 4  # of each of three stages: (28 - 4) / 6


class WideResNet(Backbone):
    """Three stages of four blocks, with `width` times 16, 32 and 64 channels. Parameter names are those of S2M2."""

    def __init__(
        self,
        image_shape: ImageShape,
        width: Width = 10,
        dropout: ShareBelowOne = 0.0,
        global_pool: bool = True,
        weights_file: str | None = None,
    ) -> None:
        super().__init__()
        self.weights_file = weights_file
        channels = 16
        self.conv1 = nn.Conv2d(image_shape[0], channels, 3, padding=1, bias=False)
        for number, stride in enumerate((1, 2, 2), start=1):
            blocks = nn.Sequential()
            for _ in range(BLOCKS):
                blocks.append(Block(channels, 8 * 2**number * width, 1 if len(blocks) else stride, dropout))
                channels = 8 * 2**number * width
            self.add_module(f"block{number}", nn.ModuleDict({"layer": blocks}))
        self.bn1 = nn.BatchNorm2d(channels)
        self.pool = GlobalMean() if global_pool else nn.Identity()
        sides = (1, 1) if global_pool else (-(-side // 4) for side in image_shape[1:])  # halved twice, rounded up
        self.out_shape = (channels, *sides)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv1(images)
        for number in (1, 2, 3):
            maps = self.get_submodule(f"block{number}.layer")(maps)
        return self.pool(F.relu(self.bn1(maps)))


class Block(nn.Module):
    """Batch norm and ReLU before each convolution; the shortcut of a wider block starts after the first ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, maps: Tensor) -> Tensor:
        out = F.relu(self.bn1(maps))
        shortcut = maps if self.convShortcut is None else self.convShortcut(out)
        return shortcut + self.conv2(self.dropout(F.relu(self.bn2(self.conv1(out)))))
