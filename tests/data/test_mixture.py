"""Several data sets as one: `dataset=[A,B]`."""

from dataclasses import dataclass

import pytest
import torch
from conftest import bank_of
from PIL import Image

from metacv.data.bank import Dataset, ImageBank, Readable, fitted
from metacv.data.mixture import Mixture
from metacv.data.sampler import EpisodeSampler, ImageSampler
from metacv.errors import UserError
from metacv.words import hydra_overrides


@dataclass
class Plain(Dataset):
    """`classes` classes of 4 images of one colour."""

    classes: int = 4
    shape: tuple[int, int, int] = (3, 8, 8)
    value: int = 0

    def load(self, split: str) -> ImageBank:
        bank = bank_of([4] * self.classes, shape=self.shape)
        return ImageBank(split, torch.full_like(bank.images, self.value), bank.offsets, bank.class_names)


class Unloaded(Plain):
    """It reads images, and none of its own is there."""

    def load(self, split: str) -> ImageBank:
        raise UserError("missing")

    def read(self, path: Readable) -> torch.Tensor:
        return torch.full(self.shape, self.value, dtype=torch.uint8)


def mixture(tmp_path, sets: dict[str, dict], **settings) -> Mixture:
    return Mixture(tmp_path, sets={name: Plain(tmp_path, **own) for name, own in sets.items()}, **settings)


def test_all_classes_of_a_task_come_from_one_data_set_in_proportion_to_its_weight(tmp_path):
    bank = mixture(tmp_path, {"a": {"classes": 3}, "b": {"classes": 5}}, weights=[3, 1]).load("train")
    sampler = EpisodeSampler(bank, way=3, shot=1, query=2)
    sets = sampler.classes_of(sampler.draw(2000)[:, :, 0]) >= 3  # of each class of each task
    assert (sets == sets[:, :1]).all()
    assert 0.22 < float(sets[:, 0].double().mean()) < 0.28
    per_class = sampler.classes_of(sampler.draw(2000)[:, :, 0]).flatten().bincount()
    assert per_class[:3].min() == per_class[:3].max()  # all three are in each task of `a`
    assert per_class[3:].min() > 0.8 * per_class[3:].max()


def test_tasks_do_not_depend_on_how_many_are_drawn_at_once(tmp_path):
    bank = mixture(tmp_path, {"a": {}, "b": {}}).load("train")
    one, other = (EpisodeSampler(bank, way=2, shot=1, query=1) for _ in range(2))
    assert torch.equal(one.draw(10), torch.cat([other.draw(1) for _ in range(10)]))


def test_with_rotations_as_classes_a_task_stays_within_one_data_set(tmp_path):
    bank = mixture(tmp_path, {"a": {}, "b": {}}).load("train")
    sampler = EpisodeSampler(bank, way=10, shot=1, query=1, rotation="as_classes")
    sets = sampler.classes_of(sampler.draw(100)[:, :, 0]) % 8 >= 4
    assert (sets == sets[:, :1]).all()
    assert sets.any()
    assert not sets.all()


def test_training_on_images_mixes_all_classes(tmp_path):
    bank = mixture(tmp_path, {"a": {}, "b": {}}).load("train")
    labels = ImageSampler(bank, "none", 0, torch.device("cpu")).sample(32).labels
    assert labels.bincount().tolist() == [4] * 8


def test_images_are_resized_and_grey_ones_get_three_channels(tmp_path):
    sets = {"grey": {"shape": (1, 6, 6), "value": 200}, "colour": {"shape": (3, 9, 9), "value": 100}}
    bank = mixture(tmp_path, sets, size=8).load("train")
    assert bank.image_shape == (3, 8, 8)
    assert bank.name == "grey+colour train"
    assert bank.images[:16].unique().tolist() == [200]
    assert bank.images[16:].unique().tolist() == [100]
    assert bank.class_names[0].startswith("grey/")
    assert bank.class_names[-1].startswith("colour/")


def test_images_of_several_sizes_need_a_size(tmp_path):
    with pytest.raises(UserError, match=r"images differ in size \(a has 8x8, b has 6x6\); set dataset.size"):
        mixture(tmp_path, {"a": {}, "b": {"shape": (3, 6, 6)}}).load("train")


def test_a_way_above_the_classes_of_the_smallest_data_set_is_refused(tmp_path):
    bank = mixture(tmp_path, {"a": {"classes": 3}, "b": {"classes": 5}}).load("train")
    with pytest.raises(UserError, match="way=4, but a\\+b train has only 3 classes in one of its data sets"):
        EpisodeSampler(bank, way=4, shot=1, query=1)


def test_weights_must_fit_the_data_sets(tmp_path):
    with pytest.raises(ValueError, match=r"weights=\[1\]: must have a number for each of a, b"):
        mixture(tmp_path, {"a": {}, "b": {}}, weights=[1])
    with pytest.raises(UserError, match="sets is empty"):
        mixture(tmp_path, {}).load("train")


def test_settings_of_one_data_set_that_have_no_effect_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"sets\.b\.train_rotation=per_class: tasks of all data sets are rotated in one"
    ):
        mixture(tmp_path, {"a": {}, "b": {"train_rotation": "per_class"}})
    bank = mixture(tmp_path, {"a": {}, "b": {}}, weights=[1, 2]).load("train")
    with pytest.raises(UserError, match=r"dataset\.weights: must be null for training on images"):
        ImageSampler(bank, "none", 0, "cpu")


def test_an_image_is_read_without_loading_the_data_sets(tmp_path):
    grey, colour = Unloaded(tmp_path, shape=(1, 8, 8), value=7), Unloaded(tmp_path, value=9)
    found = Mixture(tmp_path, sets={"grey": grey, "colour": colour}, size=5).read(Image.new("L", (8, 8)))
    assert torch.equal(found, torch.full((3, 5, 5), 7, dtype=torch.uint8))


def test_classes_keep_the_identities_that_they_have_in_their_own_data_set(tmp_path):
    data = mixture(tmp_path, {"a": {"classes": 2}, "b": {"classes": 1}})
    own = [identity for inner in data.sets.values() for identity in inner.identities(inner.load("val"))]
    assert data.identities(data.load("val")) == own


def test_selected_classes_keep_their_data_set(tmp_path):
    bank = mixture(tmp_path, {"a": {}, "b": {}}).load("train").select("some", [1, 5, 6])
    assert bank.groups == (0, 1, 1)
    assert bank.chances == (0.5, 0.5)


def test_a_list_of_data_sets_is_a_mixture():
    assert hydra_overrides("train", ["dataset=[cifar_fs,omniglot]"]) == [
        "dataset=mixture",
        "+dataset@dataset.sets.cifar_fs=cifar_fs",
        "+dataset@dataset.sets.omniglot=omniglot",
    ]
    with pytest.raises(
        UserError, match=r"dataset=omniglo: there is no such file in configs/dataset; did you mean omni"
    ):
        hydra_overrides("train", ["dataset=[cifar_fs,omniglo]"])


@pytest.mark.parametrize(("shape", "expected"), [((3, 4, 4), (10, 20, 30)), ((1, 4, 4), (18,)), ((1, 2, 2), (18,))])
def test_images_are_fitted_to_a_shape(shape, expected):
    """0.299 * 10 + 0.587 * 20 + 0.114 * 30 = 18.15"""
    images = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, -1, 4, 4)
    assert fitted(images, shape).shape == (2, *shape)
    assert fitted(images, shape)[0, :, 0, 0].tolist() == [*expected]
