"""Random augmentation of training images, on the device where the images are."""

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in grey: ITU-R 601, as in torchvision


class Augment:
    """Change each image of a batch [B, C, H, W], from 0 to 1, at random, in this order:

    crop    shift by up to `crop` pixels in each direction, with reflection padding
    flip    mirror left to right, with probability 1/2
    jitter  multiply brightness, contrast and saturation by factors from 1 - jitter to 1 + jitter
    """

    def __init__(self, crop: int, flip: bool, jitter: float, seed: int = 0) -> None:
        self.crop, self.flip, self.jitter = crop, flip, jitter
        self.generator = torch.Generator().manual_seed(seed)

    def __bool__(self) -> bool:
        return bool(self.crop or self.flip or self.jitter)

    def draw(self, count: int) -> Tensor:
        """Draw changes for `count` images, [B, 6]: shift down and right in pixels, flip (0 or 1), and three factors."""
        down, right, flip, factors = *torch.zeros(3, count), torch.ones(3, count)
        if self.crop:
            down, right = torch.randint(2 * self.crop + 1, (2, count), generator=self.generator)
        if self.flip:
            flip = torch.randint(2, (count,), generator=self.generator)
        if self.jitter:
            factors += self.jitter * (2 * torch.rand(3, count, generator=self.generator) - 1)
        return torch.stack([down, right, flip, *factors], dim=1)

    def __call__(self, images: Tensor, changes: Tensor) -> Tensor:
        """Apply `changes` [B, 6] from `draw` to images [B, C, H, W]."""
        count, _, height, width = images.shape
        changes = changes.to(images.device, images.dtype, non_blocking=True)
        if self.crop:
            image, channel, row, column = (torch.arange(n, device=images.device) for n in images.shape)
            down, right = changes[:, :2].long().T.unsqueeze(-1)
            rows, columns = (row + down).view(count, 1, height, 1), (column + right).view(count, 1, 1, width)
            padded = F.pad(images, [self.crop] * 4, "reflect")
            images = padded[image.view(-1, 1, 1, 1), channel.view(-1, 1, 1), rows, columns]
        flip, brightness, contrast, saturation = changes[:, 2:].T.reshape(4, count, 1, 1, 1)
        if self.flip:
            images = torch.where(flip.bool(), images.flip(-1), images)
        if self.jitter:
            images = (images * brightness).clamp(0, 1)
            mean = _grey(images).mean((2, 3), keepdim=True)
            images = torch.lerp(mean.expand_as(images), images, contrast).clamp(0, 1)
            images = torch.lerp(_grey(images).expand_as(images), images, saturation).clamp(0, 1)
        return images


def _grey(images: Tensor) -> Tensor:
    """Convert [B, C, H, W] to grey, [B, 1, H, W]; images without three channels are grey already."""
    red, *others = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * others[0] + LUMA[2] * others[1] if len(others) == 2 else red
