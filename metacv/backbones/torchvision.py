"""Any torchvision classifier without its last layer, optionally with torchvision's pre-trained weights."""

import re

from torch import Tensor, nn
from torchvision import models

from metacv.backbones.base import Backbone, ImageShape
from metacv.errors import UserError
from metacv.text import first_line


class Torchvision(Backbone):
    """Features [D] before the network's last linear layer. Grey images are repeated to three channels."""

    def __init__(self, image_shape: ImageShape, name: str, weights: str | None = None, frozen: bool = False) -> None:
        super().__init__()
        if name not in models.list_models(module=models):
            raise ValueError(f"name={name}: torchvision has no such classifier")
        found = models.get_model_weights(name).__members__
        choices = {key: value for key, value in found.items() if value.meta.get("categories")}  # full classifiers only
        if weights not in (None, *choices):
            raise ValueError(f"weights={weights}: must be null or one of {', '.join(choices)}")
        self.weights = choices[weights] if weights else None
        sizes = {"image_size": self.weights.meta["min_size"][0]} if self.weights and name.startswith("vit_") else {}
        self.network = models.get_model(name, weights=None, **sizes)
        self._as_a_feature_extractor(name)
        if self.weights:  # normalize images as in the training of the weights
            known = self.weights.transforms()
            self.set_normalization(list(known.mean), list(known.std))
        self.frozen = frozen  # also freezes the running statistics of batch norm
        self.requires_grad_(not frozen)
        try:
            self.out_shape = self.shape_of_output(image_shape)
        except (RuntimeError, AssertionError, ValueError, AttributeError) as error:
            words = f"images of {image_shape[1]}x{image_shape[2]} ({first_line(error)})"
            raise ValueError(f"name={name} does not take {words}; try dataset.size=224") from None

    def _as_a_feature_extractor(self, name: str) -> None:
        for auxiliary in ("aux1", "aux2", "AuxLogits"):  # in GoogLeNet and Inception
            if hasattr(self.network, auxiliary):
                setattr(self.network, auxiliary, None)
                self.network.aux_logits = False
                self.network.transform_input = self.weights is not None  # as torchvision does with its weights
        *_, last = (path for path, module in self.network.named_modules() if not [*module.children()])
        if not isinstance(self.network.get_submodule(last), nn.Linear):
            raise ValueError(f"name={name}: its last layer is not linear")
        self.network.set_submodule(last, nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.expand(-1, 3, -1, -1)).flatten(1)

    def train(self, mode: bool = True) -> "Torchvision":
        return super().train(mode and not self.frozen)

    def load_pretrained(self) -> str | None:
        if self.weights is None:
            return None
        own = self.network.state_dict()
        try:
            found = self.weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
            # Files of DenseNet use old names: norm.1 instead of norm1, and so on.
            found = {re.sub(r"\b(norm|conv)\.([12])\.", r"\1\2.", name): value for name, value in found.items()}
            self.network.load_state_dict({name: value for name, value in found.items() if name in own})
        except Exception as error:  # no network, an incomplete file, ...
            reason = f"could not be downloaded ({first_line(error)})"
            raise UserError(f"backbone.weights: {self.weights.url} {reason}") from None
        return f"{self.weights} of torchvision, trained on ImageNet, and so perhaps on classes of the test"
