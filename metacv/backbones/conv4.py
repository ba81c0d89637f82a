"""The four-block convolutional network of Vinyals et al. 2016 and the variants of it that the papers used.

| paper | settings |
|---|---|
| Prototypical Networks, Matching Networks | as they are: 64 features of 28x28, 1600 of 84x84 |
| MAML, Omniglot | downsample=stride global_pool=true norm_scale=false running_stats=false: 64 features |
| MAML, miniImageNet | channels=32 norm_scale=false running_stats=false: 800 features of 84x84 |
| Reptile, Omniglot | downsample=stride running_stats=false: 2x2x64 = 256 features |
| Reptile, miniImageNet | channels=32 ceil_pool=true running_stats=false: 1152 features of 84x84 |
| Relation Networks | downsample=[max_pool,max_pool,none,none] padding=[0,0,1,1]: 64 maps of 5x5 or 19x19 |
"""

from typing import Literal

import torch
from torch import Tensor, nn

from metacv.backbones.base import Backbone, GlobalMean
from metacv.backbones.batch_norm import BatchNorm

BLOCKS = 4
Downsample = Literal["max_pool", "stride", "none"]


class Conv4(Backbone):
    """Four times: 3x3 convolution, batch norm, ReLU, and a halving of the map by max pool or by stride.

    The pooling comes before the ReLU, which is the same function with fewer ReLUs.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: int = 64,
        downsample: Downsample | list[Downsample] = "max_pool",
        padding: int | list[int] = 1,
        ceil_pool: bool = False,
        global_pool: bool = False,
        norm_scale: bool = True,
        running_stats: bool = True,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels={channels}: must be at least 1")
        downsamples = downsample if isinstance(downsample, list) else [downsample] * BLOCKS
        paddings = padding if isinstance(padding, list) else [padding] * BLOCKS
        if len(downsamples) != BLOCKS or len(paddings) != BLOCKS or {*paddings} - {0, 1, 2}:
            raise ValueError(f"downsample={downsample}, padding={padding}: one value, or one a block; padding 0 to 2")
        blocks: list[nn.Module] = []
        inputs = image_shape[0]
        for down, pad in zip(downsamples, paddings, strict=True):
            norm = BatchNorm(channels, track_running_stats=running_stats)
            norm.weight.requires_grad_(norm_scale)  # a scale that is never trained stays 1
            layers = [
                nn.Conv2d(inputs, channels, 3, stride=2 if down == "stride" else 1, padding=pad),
                norm,
            ]
            if down == "max_pool":
                layers.append(nn.MaxPool2d(2, ceil_mode=ceil_pool))
            blocks.append(nn.Sequential(*layers, nn.ReLU()))
            inputs = channels
        if global_pool:
            blocks.append(GlobalMean())
        self.blocks = nn.Sequential(*blocks)
        try:
            with torch.no_grad():  # in eval mode with a batch of 2, so that no statistics change and none lack samples
                channels, height, width = self.blocks.eval()(torch.zeros(2, *image_shape)).shape[1:]
        except (RuntimeError, ValueError):
            raise ValueError(f"images of {image_shape[1]}x{image_shape[2]} are too small for four blocks") from None
        self.train().to(memory_format=torch.channels_last)
        self.out_shape = (channels, height, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(_channels_last(images))


def _channels_last(images: Tensor) -> Tensor:
    """The same in the layout that CPUs convolve, normalize and pool fastest.

    `.to(memory_format=...)` leaves images of one channel unchanged, and their maps would have the other layout.
    """
    last = images.movedim(1, -1)
    return last.flatten(1).unflatten(1, last.shape[1:]).movedim(-1, 1)
