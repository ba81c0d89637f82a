"""Conv4 of Vinyals et al. (2016); the papers' variants are in configs/backbone/ and configs/experiment/."""

from typing import Annotated, Literal

from torch import Tensor, nn

from metacv.backbones.base import Backbone, GlobalMean, ImageShape
from metacv.backbones.batch_norm import BatchNorm
from metacv.bounds import Range, Width

BLOCKS = 4
Downsample = Literal["max_pool", "stride", "none"]
Padding = Annotated[int, Range(0, 2)]


class Conv4(Backbone):
    """Four blocks of 3x3 convolution, batch norm, ReLU, and downsampling by 2 with max pooling or stride."""

    def __init__(
        self,
        image_shape: ImageShape,
        channels: Width = 64,
        downsample: Downsample | list[Downsample] = "max_pool",
        padding: Padding | list[Padding] = 1,
        ceil_pool: bool = False,
        global_pool: bool = False,
        norm_scale: bool = True,
        running_stats: bool = True,
        weights_file: str | None = None,
    ) -> None:
        super().__init__()
        self.weights_file = weights_file
        downsamples = downsample if isinstance(downsample, list) else [downsample] * BLOCKS
        paddings = padding if isinstance(padding, list) else [padding] * BLOCKS
        if len(downsamples) != BLOCKS or len(paddings) != BLOCKS:
            text = "must have one value, or one for each of four blocks"
            raise ValueError(f"downsample={downsample}, padding={padding}: {text}")
        self.blocks, inputs = nn.Sequential(), image_shape[0]
        for down, pad in zip(downsamples, paddings, strict=True):
            norm = BatchNorm(channels, track_running_stats=running_stats)
            norm.weight.requires_grad_(norm_scale)  # a scale that is never trained stays 1
            conv = nn.Conv2d(inputs, channels, 3, stride=2 if down == "stride" else 1, padding=pad)
            pool = [nn.MaxPool2d(2, ceil_mode=ceil_pool)] if down == "max_pool" else []
            self.blocks.append(nn.Sequential(conv, norm, *pool, nn.ReLU()))  # pooled first: same result, fewer ReLUs
            inputs = channels
        if global_pool:
            self.blocks.append(GlobalMean())
        try:
            self.out_shape = self.shape_of_output(image_shape)
        except (RuntimeError, ValueError):
            raise ValueError(f"images of {image_shape[1]}x{image_shape[2]} are too small for four blocks") from None

    def forward(self, images: Tensor) -> Tensor:
        # Channels last, the fastest layout; `.to(memory_format=...)` has no effect on images of one channel.
        last = images.movedim(1, -1)
        return self.blocks(last.flatten(1).unflatten(1, last.shape[1:]).movedim(-1, 1))
