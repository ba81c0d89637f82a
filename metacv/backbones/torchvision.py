"""Any torchvision classifier without its last layer, optionally with torchvision's pre-trained weights."""

import re
from typing import Any

from torch import nn
from torchvision import models

from metacv.backbones.base import ImageShape
from metacv.backbones.pretrained import Pretrained


class Torchvision(Pretrained):
    """`weights_file` is read instead of a download; without `weights` it has the mean and std of the default ones."""

    def __init__(self, image_shape: ImageShape, name: str, weights: str | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if name not in models.list_models(module=models):
            raise ValueError(f"name={name}: torchvision has no such classifier")
        found = models.get_model_weights(name).__members__
        choices = {key: value for key, value in found.items() if value.meta.get("categories")}  # full classifiers only
        if weights not in (None, *choices):
            raise ValueError(f"weights={weights}: must be null or one of {', '.join(choices)}")
        self.weights = choices[weights] if weights else None
        known = self.weights or choices["DEFAULT"]
        self.own_size = known.transforms().crop_size[0]
        pretrained = self.weights is not None or self.weights_file is not None
        sizes = {"image_size": known.meta["min_size"][0]} if pretrained and name.startswith("vit_") else {}
        network = models.get_model(name, weights=None, **sizes)
        self._make_feature_extractor(network, name, pretrained)
        if pretrained:  # normalize images as in the training of the weights
            self.set_normalization(list(known.transforms().mean), list(known.transforms().std))
        self.channels_last = isinstance(network, models.SwinTransformer)
        self.finish(image_shape, network, name)

    def _make_feature_extractor(self, network: Any, name: str, pretrained: bool) -> None:
        for auxiliary in ("aux1", "aux2", "AuxLogits"):  # in GoogLeNet and Inception
            if hasattr(network, auxiliary):
                setattr(network, auxiliary, None)
                network.aux_logits = False
                network.transform_input = pretrained  # as torchvision does with its weights
        *_, last = (path for path, module in network.named_modules() if not [*module.children()])
        if not isinstance(network.get_submodule(last), nn.Linear):
            raise ValueError(f"name={name}: its last layer is not linear")
        network.set_submodule(last, nn.Identity())
        self.removed = (last,)

    def renamed(self, name: str) -> str:
        """Files of DenseNet use old names: norm.1 instead of norm1, and so on."""
        return re.sub(r"\b(norm|conv)\.([12])\.", r"\1\2.", name)

    def download(self) -> str | None:
        if self.weights is None:
            return None
        own = self.network.state_dict()
        try:
            found = self.weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
            found = {self.renamed(name): value for name, value in found.items()}
            self.network.load_state_dict({name: value for name, value in found.items() if name in own})
        except Exception as error:
            raise self.not_downloaded(self.weights.url, error) from None
        return f"{self.weights} of torchvision, trained on ImageNet, and so perhaps on classes of the test"
