"""Which classes a model has seen, by names that hold across data sets, so that no test counts them as new."""

import sys
from collections.abc import Iterable

from metacv.data.bank import Dataset, ImageBank
from metacv.errors import UserError
from metacv.model import Checkpoint, build_dataset
from metacv.text import plural, setting


def names(dataset: Dataset, bank: ImageBank) -> list[str]:
    """The names of all classes of a bank."""
    return sorted(set().union(*dataset.identities(bank)))


def unseen(dataset: Dataset, bank: ImageBank, split: str, models: Iterable[Checkpoint], only: bool) -> ImageBank:
    """The bank, without the classes that a model has seen if `only`, and otherwise a UserError if there are any.

    Training has seen the classes of its train and val, which chose the weights; the val split may hold those of val.
    Any class of the train split may be evaluated.
    """
    if split == "train":
        return bank
    classes, left_out = dataset.identities(bank), set[int]()
    for checkpoint in models:
        trained, validated = seen(checkpoint, dataset)
        known = trained if split == "val" else trained | validated
        hit = [c for c, own in enumerate(classes) if own & known]
        if hit and not only:
            raise UserError(
                f"{bank.name}: {len(hit)} of its {plural(len(classes), 'class', 'classes')} "
                f"({bank.class_names[hit[0]]}, ...) were used in training or validation of {checkpoint.path}; "
                f"unseen_only=true leaves them out{_advice(dataset, checkpoint)}"
            )
        left_out.update(hit)
    return bank.select(bank.name, [c for c in range(len(classes)) if c not in left_out]) if left_out else bank


def seen(checkpoint: Checkpoint, dataset: Dataset) -> tuple[set[str], set[str]]:
    """Names of the classes that training and validation of a checkpoint used, as far as `dataset` may have them."""
    training = checkpoint.training
    if training.trained_on:
        return {*training.trained_on}, {*training.validated_on}
    own = build_dataset(checkpoint.config.dataset, str(dataset.data_dir))
    if own.namespace != dataset.namespace:
        return set(), set()
    try:  # of a checkpoint without the names: read its splits again
        if splits := checkpoint.content.get("splits"):
            trained, validated = ([f"{own.namespace}:{name}" for name in splits[split]] for split in ("train", "val"))
        else:
            trained, validated = (names(own, own.load(split)) for split in ("train", "val"))
    except UserError as error:
        print(f"metacv: which classes {checkpoint.path} was trained on is not known ({error})", file=sys.stderr)
        return set(), set()
    return {*trained}, {*validated}


def _advice(dataset: Dataset, checkpoint: Checkpoint) -> str:
    """For a data set whose split a run keeps."""
    if dataset.splits() is None or not checkpoint.content.get("splits"):
        return ""
    return f"; {setting('dataset.split_file', checkpoint.path.with_name('split.json'))} keeps the split of the training"
