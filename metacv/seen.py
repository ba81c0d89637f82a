"""Find the classes that a model has seen in training, so that no test counts them as new."""

import sys
from collections.abc import Iterable

from metacv.data.bank import Dataset, ImageBank
from metacv.errors import UserError
from metacv.model import Checkpoint, build_dataset
from metacv.text import plural, setting


def names(dataset: Dataset, bank: ImageBank) -> list[str]:
    """Return the identities of all classes of a bank, see Dataset.identities."""
    return sorted(set().union(*dataset.identities(bank)))


def unseen(dataset: Dataset, bank: ImageBank, split: str, models: Iterable[Checkpoint], only: bool) -> ImageBank:
    """Return the bank without classes that a model has seen; unless `only`, raise UserError if there are any.

    A model has seen its training and validation classes: validation selected the weights. The val split may contain
    validation classes, and the train split any class.
    """
    if split == "train":
        return bank
    classes, left_out = dataset.identities(bank), set[int]()
    for checkpoint in models:
        trained, validated = seen(checkpoint, dataset)
        known = trained if split == "val" else trained | validated
        overlap = [c for c, identities in enumerate(classes) if identities & known]
        if overlap and not only:
            raise UserError(
                f"{bank.name}: {len(overlap)} of its {plural(len(classes), 'class', 'classes')} "
                f"({bank.class_names[overlap[0]]}, ...) were used in training or validation of {checkpoint.path}; "
                f"unseen_only=true leaves them out{_advice(dataset, checkpoint)}"
            )
        left_out.update(overlap)
    return bank.select(bank.name, [c for c in range(len(classes)) if c not in left_out]) if left_out else bank


def seen(checkpoint: Checkpoint, dataset: Dataset) -> tuple[set[str], set[str]]:
    """Return the identities of a checkpoint's training and validation classes; empty if `dataset` cannot share any."""
    training = checkpoint.training
    if training.trained_on:
        return {*training.trained_on}, {*training.validated_on}
    own = build_dataset(checkpoint.config.dataset, str(dataset.data_dir))
    if own.namespace != dataset.namespace:
        return set(), set()
    try:  # an older checkpoint does not list them: read its splits again
        if splits := checkpoint.content.get("splits"):
            trained, validated = ([f"{own.namespace}:{name}" for name in splits[split]] for split in ("train", "val"))
        else:
            trained, validated = (names(own, own.load(split)) for split in ("train", "val"))
    except UserError as error:
        print(f"metacv: the training classes of {checkpoint.path} are unknown ({error})", file=sys.stderr)
        return set(), set()
    return {*trained}, {*validated}


def _advice(dataset: Dataset, checkpoint: Checkpoint) -> str:
    """Return advice for a data set whose split is kept with the run; empty for others."""
    own = "split_file" in checkpoint.config.dataset and checkpoint.content.get("splits")
    if not own or not hasattr(dataset, "split_file"):
        return ""
    return f"; {setting('dataset.split_file', checkpoint.path.with_name('split.json'))} keeps the split of the training"
