"""Any network of timm (Wightman, 2019), https://github.com/huggingface/pytorch-image-models, without its last layer."""

import logging
from typing import Any

from torch import Tensor

from metacv.backbones.base import ImageShape
from metacv.backbones.pretrained import Pretrained
from metacv.terminal import say
from metacv.text import first_line
from metacv.words import nearest


class Timm(Pretrained):
    """`name` may end with the tag of timm's weights. `weights_file` is read instead of a download."""

    def __init__(
        self, image_shape: ImageShape, name: str, weights: str | None = None, pool: str | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        try:
            import timm  # an optional dependency
        except ImportError:
            raise ValueError("timm is not installed: pip install 'metacv[timm]'") from None
        if not timm.is_model(name):  # also names that would make timm read a folder or a repository
            raise ValueError(f"name={name}: timm has no such network{nearest(name, timm.list_models())}")
        if weights not in (None, "DEFAULT"):
            raise ValueError(f"weights={weights}: must be null or DEFAULT; a tag of timm's weights belongs to name")
        self.weights = weights
        given: dict[str, Any] = {} if pool is None else {"global_pool": pool}
        try:
            network: Any = timm.create_model(name, num_classes=0, **given)
        except (RuntimeError, TypeError, AssertionError, ValueError, KeyError) as error:
            raise ValueError(f"name={name}{f', pool={pool}' if pool else ''}: {first_line(error)}") from None
        self.about = about = network.pretrained_cfg
        self.own_size = about["input_size"][-1]
        classifiers = about.get("classifier") or ()
        self.removed = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
        self.channels_last = getattr(network, "output_fmt", "") == "NHWC"
        self.prefix_tokens = getattr(network, "num_prefix_tokens", 0)  # such as the class token of a ViT
        self.pool = pool or getattr(network, "global_pool", None)
        self.set_normalization(list(about["mean"]), list(about["std"]))
        self.finish(image_shape, network, name)

    def pooled(self, output: Tensor) -> Tensor:
        """As the network pools: take the class token [0], or average the others."""
        if output.dim() == 3 and self.prefix_tokens:
            return output[:, 0] if self.pool == "token" else output[:, self.prefix_tokens :].mean(1)
        return super().pooled(output)

    def download(self) -> str | None:
        if self.weights is None:
            return None
        import timm
        from huggingface_hub import try_to_load_from_cache

        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it repeats what the error below says
        hub = self.about.get("hf_hub_id")
        if not (hub and try_to_load_from_cache(hub, "model.safetensors")):
            say(f"downloading the weights of {self.name}")  # without a network the library tries for a minute
        try:
            found = timm.create_model(self.name, pretrained=True).state_dict()
            self.network.load_state_dict({name: found[name] for name in self.network.state_dict()})
        except Exception as error:
            place = f"https://huggingface.co/{hub}/model.safetensors" if hub else self.about.get("url") or self.name
            raise self.not_downloaded(place, error) from None
        tag = self.about.get("tag") or "default"
        return f"weights {tag} of timm, trained on ImageNet or other images, and so perhaps on classes of the test"
