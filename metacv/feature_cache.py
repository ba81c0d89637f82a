"""Keep the features of a frozen network on disk, so that a later evaluation on the same images computes none."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from metacv import __version__
from metacv.algorithms.base import Algorithm, MetricMethod
from metacv.config import TrainConfig
from metacv.data.sampler import EpisodeSampler
from metacv.files import read_checked, write_atomically

IGNORED = {"weights_file", "frozen"}  # settings of a backbone that do not change features


def digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names and values."""
    whole = hashlib.sha256()
    for name, value in weights.items():
        whole.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        whole.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


class FeatureCache:
    """A file in data_dir/cache with rows [R] of a sampler's images and their features [R, ...].

    Its name has a hash of the weights, the images, and the settings that change features. A damaged file is ignored.
    """

    def __init__(self, folder: Path, algorithm: MetricMethod, config: TrainConfig, sampler: EpisodeSampler) -> None:
        key = {
            "weights": digest(algorithm.embedding.state_dict()),
            "backbone": {name: value for name, value in config.backbone.items() if name not in IGNORED},
            "normalize": vars(config.normalize),
            "embedding": algorithm.embedding_key,
            "images": sampler.bank.fingerprint,
            "rotation": sampler.rotation,
            "versions": [__version__, str(torch.__version__), sampler.device.type],
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.path, self.images = folder / "cache" / f"features-{name}.pt", len(sampler.images)

    def embedded(self, rows: Tensor, embed: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """Return the features of `rows`, sorted and unique; `embed` computes those that are not in the file.

        None if `embed` returns None.
        """
        known, features = self._read()
        left = rows[~torch.isin(rows, known)]
        if len(left):
            if (computed := embed(left)) is None:
                return None
            known, order = torch.cat([known, left]).sort()
            computed = computed.cpu()
            features = torch.cat([features, computed])[order] if len(features) else computed
            self._write(known, features)
        return features[torch.searchsorted(known, rows)]

    def _read(self) -> tuple[Tensor, Tensor]:
        try:
            content = read_checked(self.path)
            rows, features = content["rows"], content["features"]
            whole = rows.dtype == torch.int64 and rows.dim() == 1 and features.dtype == torch.float32
            if not whole or len(rows) != len(features) or not features.isfinite().all():
                raise ValueError
            if not (rows.diff() > 0).all() or int(rows[0]) < 0 or int(rows[-1]) >= self.images:
                raise ValueError
            return rows, features
        except FileNotFoundError:
            pass
        except Exception as error:  # a damaged file may raise any error
            print(f"metacv: {self.path} cannot be read ({type(error).__name__}); creating it again", file=sys.stderr)
        return torch.empty(0, dtype=torch.long), torch.empty(0)

    def _write(self, rows: Tensor, features: Tensor) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, {"rows": rows, "features": features})
        except Exception as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            print(f"metacv: {self.path} cannot be written ({reason}); continuing without it", file=sys.stderr)


def feature_cache(
    folder: Path, algorithm: Algorithm, config: TrainConfig, sampler: EpisodeSampler
) -> FeatureCache | None:
    """Return the cache for a frozen network; None for others, whose weights change from run to run."""
    if not isinstance(algorithm, MetricMethod) or any(p.requires_grad for p in algorithm.embedding.parameters()):
        return None
    return FeatureCache(folder, algorithm, config, sampler)
