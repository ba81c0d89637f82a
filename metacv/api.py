"""Few-shot classification from Python, in the manner of scikit-learn: see docs/python-api.md."""

import os
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from metacv import CONFIG_DIR, limits
from metacv.config import PredictConfig, from_dict
from metacv.data.bank import Readable
from metacv.data.image_files import map_on_threads
from metacv.errors import UserError
from metacv.files import user_path
from metacv.look import unlike
from metacv.predictor import Predictor, Support, check_labels, check_place_to_save
from metacv.text import plural
from metacv.words import choices, nearest

CHANNELS = (1, 3, 4)  # grey, colour, and colour with transparency


def load(checkpoint: str | os.PathLike[str], **settings: Any) -> "FewShotClassifier":
    """Load a model from a checkpoint, a run's folder or a file of `save`, or a kept model by its name.

    It is already fitted if `save` or `metacv predict save=` wrote the file. `settings` are those of FewShotClassifier.
    """
    classifier = FewShotClassifier(os.fspath(checkpoint), **settings)
    classifier.predictor_ = classifier._predictor()
    if "support" in classifier.predictor_.checkpoint.content:
        classifier.support_ = classifier.predictor_.kept_support()
    return classifier


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Classify images by a few examples of each class, with a model that metacv trained on other classes.

    checkpoint     as `load` takes it
    head           the classifier of features, such as ncm, ridge or logistic; None: as the model was trained
    head_settings  settings of the head, such as {"augment": 5}
    batch_norm     inductive, transductive, or None: as the model was trained. transductive: labels depend on which
                   images are given together; so they do with the heads soft_kmeans, laplacian, tim and pt_map
    device         auto, cpu, cuda, cuda:1, ...

    Images are a list of paths, PIL images, numpy arrays (HxW or HxWx3, uint8, or floats from 0 to 1) and torch tensors
    ([C, H, W], of the same types), in any mixture, or an array or a tensor of many. They are prepared like image files.
    Labels are text or whole numbers. A UserError says what is wrong with an input.
    """

    predictor_: Predictor
    support_: Support

    def __init__(
        self,
        checkpoint: str,
        *,
        head: str | None = None,
        head_settings: dict[str, Any] | None = None,
        batch_norm: str | None = None,
        device: str = "auto",
    ) -> None:
        self.checkpoint = checkpoint
        self.head = head
        self.head_settings = head_settings
        self.batch_norm = batch_norm
        self.device = device

    def fit(self, images: Iterable[Any], labels: Iterable[Any]) -> "FewShotClassifier":
        """Set the examples: images with their labels, of at least two classes. Replaces earlier examples."""
        predictor = self._predictor()
        support = supported(predictor, images, labels)
        self.predictor_, self.support_ = predictor, support
        return self

    def partial_fit(self, images: Iterable[Any], labels: Iterable[Any]) -> "FewShotClassifier":
        """Add examples of known or new classes."""
        if not self.__sklearn_is_fitted__():
            return self.fit(images, labels)
        self.support_ = supported(self.predictor_, images, labels, self.support_)
        return self

    def remove(self, classes: Iterable[Any]) -> "FewShotClassifier":
        """Remove classes and their examples; at least two must be left."""
        check_is_fitted(self)
        self.support_ = self.support_.without(listed("classes", classes))
        return self

    def predict_proba(self, images: Iterable[Any]) -> np.ndarray:
        """Return probabilities [images, classes] in the order of `classes_`; warn if images look unusual."""
        return self._probabilities(images)

    def predict(self, images: Iterable[Any]) -> np.ndarray:
        """Return the most likely class of each image."""
        return self.classes_[self._probabilities(images).argmax(axis=1)]

    @property
    def classes_(self) -> np.ndarray:
        """The classes, sorted."""
        check_is_fitted(self)
        return np.array(self.support_.classes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file with the model and its examples, which `load` and `metacv predict adapted=` take."""
        check_is_fitted(self)
        check_place_to_save(place := user_path(os.fspath(path)))
        self.predictor_.save(place, self.support_)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "support_")

    def _probabilities(self, images: Iterable[Any]) -> np.ndarray:
        check_is_fitted(self)
        queries = prepared(images, self.predictor_)
        if text := unlike("the images", queries, self.predictor_.checkpoint):
            warnings.warn(text, stacklevel=3)  # the caller of predict or predict_proba
        return self.predictor_.answers(self.support_, queries).probabilities.numpy()

    def _predictor(self) -> Predictor:
        head = dict(self.head_settings or {})
        if self.head is not None:
            if self.head not in (known := choices("head")):
                raise UserError(f"head={self.head}: there is no such head{nearest(str(self.head), known)}")
            head = yaml.safe_load((CONFIG_DIR / "head" / f"{self.head}.yaml").read_text("utf-8")) | head
        given = {"query": "", "batch_norm": self.batch_norm, "head": head, "device": self.device}
        try:
            predictor = Predictor.load(self.checkpoint, from_dict(PredictConfig, given))
        except ValueError as error:
            raise UserError(str(error)) from None
        _ = predictor.algorithm  # reports wrong settings now
        return predictor


def supported(
    predictor: Predictor, images: Iterable[Any], labels: Iterable[Any], earlier: Support | None = None
) -> Support:
    """Build a support set from images and labels, added to an earlier one if given; UserError if they are invalid."""
    added = prepared(images, predictor)
    try:
        names = np.asarray(listed("labels", labels))
    except ValueError:  # lists of different lengths
        raise UserError("labels: must be all text or all whole numbers") from None
    if names.shape != (len(added),):
        raise UserError(f"labels: shape {names.shape} for {len(added)} images: must be one label for each image")
    if names.dtype.kind not in "Uib":
        raise UserError("labels: must be all text or all whole numbers")
    if earlier and names.dtype.kind != (before := np.array(earlier.classes)).dtype.kind:
        raise UserError(f"labels: {names[0]} must be of the same type as the existing classes, such as {before[0]}")
    support = predictor.with_features(Support.of(added, names))
    support = earlier.with_examples(support) if earlier else support
    classes = support.classes
    if not 2 <= len(classes) <= limits.CLASSES:
        raise UserError(f"labels: {plural(len(classes), 'class', 'classes')}: must be from 2 to {limits.CLASSES}")
    try:
        check_labels(classes)
    except ValueError as error:
        raise UserError(f"labels: {error}") from None
    return support


def listed(what: str, values: Iterable[Any]) -> list[Any]:
    """The values as a list, those of an array as plain ones; UserError for a single value."""
    try:
        return list(values.tolist() if what == "labels" and hasattr(values, "tolist") else values)
    except TypeError:
        raise UserError(f"{what}: {type(values).__name__}: must be a list") from None


def prepared(images: Iterable[Any], predictor: Predictor) -> Tensor:
    """Prepare images for the model: uint8 [B, C, H, W]; UserError if one of them cannot be read."""
    path_or_image = isinstance(images, str | os.PathLike | Image.Image)
    one_tensor = isinstance(images, Tensor) and images.dim() != 4
    one_array = isinstance(images, np.ndarray) and (
        images.ndim == 2 or (images.ndim == 3 and images.shape[2] in CHANNELS)
    )
    if path_or_image or one_tensor or one_array:
        raise UserError("images: must be a list of images, or an array of many; for a single image give [image]")
    items = listed("images", images)
    if not items:
        raise UserError("images: must not be empty")

    def read(row: int) -> Tensor:
        try:
            return predictor.dataset.read(readable(items[row]))
        except UserError as error:
            raise UserError(f"images[{row}]: {error}") from None

    found = torch.stack(list(map_on_threads("images", read, list(range(len(items))))))
    predictor.check_shape("images", found)
    return found


def readable(image: Any) -> Readable:
    """Convert an input to a path or a PIL image, as its file would be; UserError for other types or shapes."""
    if isinstance(image, str | os.PathLike):
        return user_path(os.fsdecode(image))
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, np.ndarray | Tensor):
        raise UserError(f"{type(image).__name__}: must be a path, a PIL image, a numpy array or a torch tensor")
    if tensor := isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    form = "[C, H, W]" if tensor else "HxW or HxWxC"
    if image.ndim == 3:
        image = image.transpose(1, 2, 0) if tensor else image
    elif tensor or image.ndim != 2:
        raise UserError(f"shape {image.shape}: must be {form}")
    if (image.ndim == 3 and image.shape[2] not in CHANNELS) or not image.size:
        raise UserError(f"shape {image.shape}: must be {form} with 1, 3 or 4 channels")
    if image.dtype.kind == "f":
        if not (image.min() >= 0 and image.max() <= 1):
            raise UserError(f"floats from {image.min():.4g} to {image.max():.4g}: must be from 0 to 1, or uint8")
        image = (image * 255).round().astype(np.uint8)
    if image.dtype != np.uint8:
        raise UserError(f"numbers of type {image.dtype}: must be uint8, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2:] == (1,) else image))
