"""torchvision's ResNet-18 (He et al., 2016), https://arxiv.org/abs/1512.03385, modified for small images."""

from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from metacv.backbones.base import Backbone, GlobalMean, ImageShape


class ResNet18(Backbone):
    """Start with a 3x3 convolution of stride 1 instead of the 7x7 one and pooling, which halve the map twice."""

    def __init__(self, image_shape: ImageShape, global_pool: bool = True, running_stats: bool = True) -> None:
        super().__init__()
        net = resnet18(norm_layer=partial(nn.BatchNorm2d, track_running_stats=running_stats))
        net.conv1 = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.net = nn.Sequential()
        for name in ("conv1", "bn1", "relu", "layer1", "layer2", "layer3", "layer4"):
            self.net.add_module(name, net.get_submodule(name))
        self.pool = GlobalMean() if global_pool else nn.Identity()
        sides = (1, 1) if global_pool else (-(-side // 8) for side in image_shape[1:])  # halved three times, rounded up
        self.out_shape = (512, *sides)
        self.to(memory_format=torch.channels_last)  # the fastest layout on CPUs

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.net(images))
