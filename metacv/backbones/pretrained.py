"""Any classifier of torchvision without its last layer, with the weights that torchvision has for it."""

import torch
from torch import Tensor, nn
from torchvision import models

from metacv import MetacvError
from metacv.backbones import Backbone


class Torchvision(Backbone):
    """The features that the network's last linear layer would classify: maps [D, 1, 1].

    Images are normalized as `weights` want it, grey ones as red, green and blue alike. `frozen`: as they are, batch
    norm's statistics too.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], name: str, weights: str | None = None, frozen: bool = False
    ) -> None:
        super().__init__()
        if name not in models.list_models(module=models):
            raise ValueError(f"name={name}: torchvision has no such classifier")
        self.weights = None
        if weights is not None:
            choices = models.get_model_weights(name).__members__
            if weights not in choices:
                raise ValueError(f"weights={weights}: null or one of {', '.join(choices)}")
            self.weights = choices[weights]
        self.network = models.get_model(name, weights=None)
        self.network.aux_logits = False  # which GoogLeNet and Inception would give in training too
        linear = [path for path, module in self.network.named_modules() if isinstance(module, nn.Linear)]
        parent, _, last = linear[-1].rpartition(".") if linear else ("", "", "")
        if not linear or linear[-1] != list(dict(self.network.named_modules()))[-1]:
            raise ValueError(f"name={name}: its last layer is not linear")
        self.last = linear[-1]
        setattr(self.network.get_submodule(parent), last, nn.Identity())
        if self.weights:
            known = self.weights.transforms()
            self.normalize(list(known.mean), list(known.std))
        self.frozen = frozen
        self.requires_grad_(not frozen)
        try:
            with torch.no_grad():
                self.out_shape = (self.eval()(torch.zeros(2, *image_shape)).shape[1], 1, 1)
        except (RuntimeError, AssertionError, ValueError, AttributeError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"name={name} does not take images of {image_shape[1]}x{image_shape[2]} ({said})"
            ) from None
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.expand(-1, 3, -1, -1)).flatten(1)[:, :, None, None]

    def train(self, mode: bool = True) -> "Torchvision":
        return super().train(mode and not self.frozen)

    def load_pretrained(self) -> None:
        if self.weights is None:
            return
        try:
            found = self.weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise MetacvError(f"backbone.weights: {self.weights.url} could not be downloaded ({error})") from None
        self.network.load_state_dict({k: v for k, v in found.items() if not k.startswith(f"{self.last}.")})
