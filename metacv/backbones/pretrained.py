"""What networks of torchvision and timm have in common: pre-trained weights, and features from any of their layers."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metacv.backbones.base import Backbone, ImageShape
from metacv.backbones.weights import load_weights
from metacv.bounds import Size
from metacv.errors import UserError
from metacv.text import first_line
from metacv.words import nearest


class Pretrained(Backbone):
    """Features [D] before the network's last linear layer, or of any layer. Grey images are repeated to three channels.

    size    height and width that images are resized to; own: those of the weights' training; None: not resized
    layer   the name of a module whose output is the feature: maps [D, h, w] and tokens are averaged
    frozen  do not train the network, which also keeps the running statistics of batch norm
    """

    name: str  # in the library
    size: int | None
    own_size: int  # height and width of images in the training of the weights
    removed: tuple[str, ...] = ()  # names of modules that the network had before it became a feature extractor
    channels_last = False  # whether its maps are [h, w, D]

    def __init__(
        self,
        weights_file: str | None = None,
        frozen: bool = False,
        layer: str | None = None,
        size: Size | Literal["own"] | None = None,
    ) -> None:
        super().__init__()
        self.weights_file, self.frozen, self.layer, self.wanted_size = weights_file, frozen, layer, size

    def finish(self, image_shape: ImageShape, network: nn.Module, name: str) -> None:
        """Take the network, and set `out_shape`; ValueError if a setting or the size of the images does not fit."""
        self.network, self.name, layer = network, name, self.layer
        self.size = self.own_size if self.wanted_size == "own" else self.wanted_size
        if layer is not None and layer not in (known := [path for path, _ in network.named_modules() if path]):
            raise ValueError(f"layer={layer}: {name} has no such module{nearest(layer, known)}")
        self.requires_grad_(not self.frozen)
        self.to(memory_format=torch.channels_last)  # the fastest layout on CPUs
        try:
            self.out_shape = self.shape_of_output(image_shape)
        except (RuntimeError, AssertionError, ValueError, AttributeError, TypeError, IndexError) as error:
            if isinstance(error, ValueError) and str(error).startswith("layer="):
                raise
            side = f"{self.size}x{self.size}" if self.size else f"{image_shape[1]}x{image_shape[2]}"
            advice = f"try dataset.size={self.own_size}, or backbone.size={self.own_size}"
            raise ValueError(f"name={name} does not take images of {side} ({first_line(error)}); {advice}") from None

    def forward(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1)
        if self.size and images.shape[2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        return (self.network(images) if self.layer is None else self._output_of_layer(images)).flatten(1)

    def _output_of_layer(self, images: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        assert self.layer is not None
        module = self.network.get_submodule(self.layer)
        hook = module.register_forward_hook(lambda module, given, output: outputs.append(output))
        try:
            self.network(images)
        finally:
            hook.remove()
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or not 2 <= outputs[0].dim() <= 4:
            raise ValueError(f"layer={self.layer}: its output is not one tensor of features, maps or tokens")
        return self.pooled(outputs[0])

    def pooled(self, output: Tensor) -> Tensor:
        """Average maps [B, D, h, w] or tokens [B, L, D] to features [B, D]."""
        if output.dim() == 4:
            return output.mean((1, 2) if self.channels_last else (2, 3))
        return output.mean(1) if output.dim() == 3 else output

    def train(self, mode: bool = True) -> "Pretrained":
        return super().train(mode and not self.frozen)

    def renamed(self, name: str) -> str:
        """Return the network's name for a tensor in a file."""
        return name

    def load_pretrained(self) -> str | None:
        if self.weights_file is None:
            return self.download()
        return load_weights(self.network, self.name, self.weights_file, self.removed, self.renamed)

    def download(self) -> str | None:
        """Download weights, if the settings ask for it, and load them; return a line for results about them."""
        raise NotImplementedError

    def not_downloaded(self, place: str, error: Exception) -> UserError:
        """Return the error for weights that were not downloaded from the address `place`, because of `error`."""
        advice = "download it elsewhere and set backbone.weights_file to its path"
        return UserError(f"backbone.weights: {place} could not be downloaded ({first_line(error)}); {advice}")
