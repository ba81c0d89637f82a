"""Classifiers of torchvision as feature extractors."""

import re

import pytest
import torch
from conftest import SMALL
from torchvision import models

from metacv.backbones.torchvision import Torchvision


def download_of(result):
    """A replacement of torchvision's download that returns `result`, or raises it."""

    def get_state_dict(weights, **options):
        assert options["weights_only"]
        assert options["check_hash"]
        if isinstance(result, Exception):
            raise result
        return result

    return get_state_dict


@pytest.mark.slow
@pytest.mark.usefixtures("may_be_at_chance")
def test_frozen_weights_are_downloaded_once_and_not_trained(metacv, monkeypatch):
    torch.manual_seed(3)
    donor = models.resnet18().state_dict()
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", download_of(donor))
    backbone = ("backbone=torchvision", "backbone.weights=DEFAULT", "backbone.frozen=true")
    tiny = ("dataset.classes={train:6,val:6,test:6}", "query=2", "eval_episodes=2", "steps=1")
    code, _, err = metacv("train", "algo=relationnet", "algo.relation=mlp", *backbone, *tiny, "hydra.run.dir=run")
    assert (code, err) == (0, "")
    weights = torch.load("run/last.pt", weights_only=True)["algorithm"]
    for name, value in donor.items():
        if not name.startswith("fc."):
            assert torch.equal(weights[f"backbone.network.{name}"], value), name
    assert len(weights) > len(donor)  # of the relation module, which is trained
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", download_of(OSError("no network")))
    assert metacv("evaluate", "checkpoint=run", "episodes=2")[0] == 0  # its weights come from the checkpoint


def test_only_weights_that_are_not_frozen_are_trainable():
    frozen, free = (Torchvision((3, 32, 32), "resnet18", frozen=on).train() for on in (True, False))
    assert all(p.requires_grad for p in free.parameters())
    assert free.network.training
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.network.training  # its batch norm keeps the running statistics as they are


@pytest.mark.slow
@pytest.mark.parametrize("problem", [OSError("no network"), {"conv1.weight": torch.zeros(1)}, RuntimeError("bad hash")])
def test_a_failed_download_of_weights_is_reported_in_one_line(metacv, monkeypatch, problem):
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", download_of(problem))
    words = ("algo=protonet", *SMALL[:1], "eval_episodes=2", "backbone=torchvision", "backbone.weights=DEFAULT")
    code, _, err = metacv("train", *words)
    assert code == 1
    assert err.startswith(
        "metacv: backbone.weights: https://download.pytorch.org/models/resnet18-f37072fd.pth could not"
    )
    assert err.count("\n") == 1


def test_images_are_normalized_as_the_weights_need_it():
    known = models.ResNet18_Weights.DEFAULT.transforms()
    backbone = Torchvision((3, 32, 32), "resnet18", "DEFAULT").eval()
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (known.mean, known.std))
    torch.testing.assert_close(backbone.features(images), backbone.network((images - mean) / std))
    with pytest.raises(ValueError, match=r"backbone.weights come with their own"):
        backbone.set_normalization([0.5], [0.5])


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("resnet17", None, "torchvision has no such classifier"),
        ("resnet18", "BEST", "weights=BEST: must be null or one of IMAGENET1K_V1, DEFAULT"),
        ("vgg16", "IMAGENET1K_FEATURES", "weights=IMAGENET1K_FEATURES: must be null or one of"),
        ("squeezenet1_0", None, "its last layer is not linear"),
        ("vit_b_32", None, "does not take images of 32x32"),
    ],
)
def test_classifiers_without_usable_features_are_refused(name, weights, words):
    with pytest.raises(ValueError, match=words):
        Torchvision((3, 32, 32), name, weights)


def test_old_parameter_names_of_densenet_files_are_accepted(monkeypatch):
    donor = models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): value for name, value in donor.items()}
    assert old.keys() != donor.keys()
    monkeypatch.setattr(models.DenseNet121_Weights, "get_state_dict", lambda self, **options: old)
    backbone = Torchvision((3, 32, 32), "densenet121", "DEFAULT")
    backbone.load_pretrained()
    name = "features.denseblock1.denselayer1.norm1.weight"
    assert all(torch.equal(value, donor[name]) for name, value in backbone.network.state_dict().items())
    assert name in backbone.network.state_dict()


def test_googlenet_trains_without_its_auxiliary_heads():
    backbone = Torchvision((3, 64, 64), "googlenet").train()
    assert backbone.features(torch.rand(2, 3, 64, 64)).shape == (2, 1024)
    assert not any("aux" in name for name in backbone.state_dict())


def test_the_feature_may_be_the_output_of_any_layer():
    backbone = Torchvision((3, 32, 32), "resnet18", layer="layer2").eval()
    assert backbone.features_dim == 128
    images = torch.rand(2, 3, 32, 32)
    network = backbone.network
    maps = network.layer2(network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(images))))))
    torch.testing.assert_close(backbone.features(images), maps.mean((2, 3)))
    with pytest.raises(ValueError, match=r"layer=layr2: resnet18 has no such module; did you mean layer2"):
        Torchvision((3, 32, 32), "resnet18", layer="layr2")


def test_images_are_resized_to_the_size_of_the_network():
    own = Torchvision((1, 8, 8), "resnet18", size="own").eval()
    assert own.size == 224
    backbone = Torchvision((1, 8, 8), "resnet18", size=32).eval()
    grey = torch.full((2, 1, 8, 8), 0.25)
    large = backbone.features(torch.full((2, 1, 32, 32), 0.25))
    torch.testing.assert_close(backbone.features(grey), large)


@pytest.mark.usefixtures("may_be_at_chance")
def test_a_run_from_a_weights_file_keeps_the_weights_and_needs_the_file_no_more(metacv, tmp_path):
    torch.manual_seed(3)
    donor = models.resnet18().state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in donor.items()}}, "donor.pth")
    backbone = ("backbone=torchvision", "backbone.weights_file=donor.pth", "backbone.frozen=true")
    tiny = ("dataset.classes={train:6,val:6,test:6}", "query=2", "eval_episodes=2", "steps=1")
    code, _, err = metacv("train", "algo=protonet", *backbone, *tiny, "hydra.run.dir=run")
    assert (code, err) == (0, "")
    (tmp_path / "donor.pth").unlink()
    weights = torch.load("run/best.pt", weights_only=True)["algorithm"]
    assert torch.equal(weights["backbone.network.conv1.weight"], donor["conv1.weight"])
    code, out, _ = metacv("evaluate", "checkpoint=run", "episodes=2")
    assert code == 0
    assert "after: weights of donor.pth, sha256 " in out
