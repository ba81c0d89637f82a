"""Backbones, against the papers' feature sizes, published parameter counts and hand calculations."""

import re

import pytest
import torch
import yaml
from conftest import SMALL
from torch import nn
from torchvision import models

from metacv.backbones.base import Backbone
from metacv.backbones.batch_norm import BatchNorm
from metacv.backbones.conv4 import Conv4
from metacv.backbones.resnet12 import ResNet12, drop_blocks
from metacv.backbones.resnet18 import ResNet18
from metacv.backbones.torchvision import Torchvision
from metacv.config_dir import config_dir
from metacv.model import build

NAMES = sorted(path.stem for path in (config_dir() / "backbone").glob("*.yaml"))


def from_yaml(name: str, shape: tuple[int, int, int], **changes) -> Backbone:
    node = {"defaults": [name]}
    while base := node.pop("defaults", None):
        node = yaml.safe_load((config_dir() / f"backbone/{base[0]}.yaml").read_text()) | node
    return build("backbone", node | changes, Backbone, image_shape=shape)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 84, 84)], ids=["28", "84"])
def test_every_backbone_gives_maps_of_the_shape_that_it_says(name, shape):
    backbone = from_yaml(name, shape).eval()
    assert backbone(torch.rand(2, *shape)).shape == (2, *backbone.out_shape)


@pytest.mark.parametrize(
    ("name", "changes", "features"),
    [
        ("conv4", {}, 1600),  # Prototypical Networks
        ("conv4", {"channels": 32, "norm_scale": False, "running_stats": False}, 800),  # MAML
        ("conv4", {"channels": 32, "ceil_pool": True, "running_stats": False}, 1152),  # Reptile
        ("conv4_relation", {}, 64 * 19 * 19),  # Relation Networks
        ("resnet12", {}, 640),
        ("resnet12", {"global_pool": False}, 640 * 5 * 5),
        ("resnet18", {}, 512),
        ("resnet18", {"global_pool": False}, 512 * 11 * 11),
    ],
)
def test_features_of_84_pixels_are_as_many_as_in_the_papers(name, changes, features):
    assert torch.Size(from_yaml(name, (3, 84, 84), **changes).out_shape).numel() == features


def test_parameters_are_as_many_as_published():
    assert parameters(ResNet12((3, 84, 84))) == 12_424_320
    # torchvision's 11,689,512 without the last layer of 513,000 and with 3x3 for 7x7 in the first
    assert parameters(ResNet18((3, 84, 84))) == 11_689_512 - 513_000 - 64 * 3 * (49 - 9)
    assert parameters(Conv4((3, 84, 84))) == 64 * (3 * 9 + 3) + 3 * 64 * (64 * 9 + 3)


def test_parameters_have_the_names_and_shapes_of_published_weights():
    """Those of MetaOptNet's ResNet-12, and of torchvision's ResNet-18 under `net`."""
    ours = {name: tuple(p.shape) for name, p in ResNet12((3, 84, 84)).state_dict().items()}
    inputs, expected = 3, {}
    for layer, outputs in enumerate((64, 160, 320, 640), start=1):
        norms = []
        for conv, depth, side in (("conv1", inputs, 3), ("conv2", outputs, 3), ("conv3", outputs, 3)):
            expected[f"layer{layer}.0.{conv}.weight"] = (outputs, depth, side, side)
            norms.append(f"layer{layer}.0.bn{conv[-1]}")
        expected[f"layer{layer}.0.downsample.0.weight"] = (outputs, inputs, 1, 1)
        for norm in [*norms, f"layer{layer}.0.downsample.1"]:
            expected |= {f"{norm}.{name}": (outputs,) for name in ("weight", "bias", "running_mean", "running_var")}
            expected[f"{norm}.num_batches_tracked"] = ()
        inputs = outputs
    assert ours == expected

    from torchvision.models import resnet18

    theirs = {f"net.{name}": tuple(p.shape) for name, p in resnet18().state_dict().items() if not name.startswith("fc")}
    ours = {name: tuple(p.shape) for name, p in ResNet18((3, 84, 84)).state_dict().items()}
    assert ours.pop("net.conv1.weight") == (64, 3, 3, 3)
    assert theirs.pop("net.conv1.weight") == (64, 3, 7, 7)
    assert ours == theirs


def test_a_residual_block_is_the_sum_of_its_branches():
    torch.manual_seed(0)
    block = ResNet12((3, 16, 16)).eval().get_submodule("layer1.0")
    images = torch.rand(2, 3, 16, 16)
    out = images
    for number in (1, 2, 3):
        out = block.get_submodule(f"bn{number}")(block.get_submodule(f"conv{number}")(out))
        out = nn.functional.leaky_relu(out, 0.1) if number < 3 else out
    expected = nn.functional.max_pool2d(nn.functional.leaky_relu(out + block.downsample(images), 0.1), 2)
    torch.testing.assert_close(block(images), expected)


def test_drop_block_drops_about_its_share_in_squares_and_keeps_the_scale():
    torch.manual_seed(0)
    maps = torch.ones(64, 50, 10, 10)
    out = drop_blocks(maps, 0.1)
    dropped = out == 0
    assert 0.08 < dropped.float().mean() < 0.1  # squares that overlap drop a little less
    assert out.mean() == pytest.approx(1, abs=1e-4)
    whole = (nn.functional.avg_pool2d(dropped.float(), 5, stride=1) == 1).float()
    squares = nn.functional.max_pool2d(nn.functional.pad(whole, (4, 4, 4, 4)), 5, stride=1)
    assert torch.equal(squares.bool(), dropped)  # what is dropped is a union of 5x5 squares
    backbone = ResNet12((3, 84, 84), drop_block=0.5, global_pool=False)
    images = torch.rand(2, 3, 84, 84)
    assert torch.equal(backbone.eval()(images), backbone(images))
    assert (backbone.train()(images) == 0).any()


@pytest.mark.parametrize("cls", [ResNet12, ResNet18])
def test_without_running_statistics_tasks_leave_no_trace(cls):
    backbone = cls((3, 32, 32), running_stats=False)
    assert not [name for name, _ in backbone.named_buffers()]


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [(ResNet12, {"drop_block": 1.0}, "drop_block=1.0"), (ResNet12, {"image_shape": (3, 12, 12)}, "too small")],
)
def test_impossible_settings_are_refused(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(**({"image_shape": (3, 84, 84)} | settings))


def test_a_normalized_backbone_is_the_backbone_of_normalized_images():
    backbone = Conv4((3, 28, 28)).eval()
    images, mean, std = torch.rand(2, 3, 28, 28), [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    expected = backbone((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    names = list(backbone.state_dict())
    backbone.normalize(mean, std)
    torch.testing.assert_close(backbone(images), expected)
    assert list(backbone.state_dict()) == names
    with pytest.raises(ValueError, match="std above 0"):
        backbone.normalize([0.5], [0.0])
    with pytest.raises(ValueError, match="finite"):
        backbone.normalize([0.5], [float("nan")])


def giving(found):
    """In place of torchvision's download."""

    def get_state_dict(weights, **options):
        assert options["weights_only"]
        assert options["check_hash"]
        if isinstance(found, Exception):
            raise found
        return found

    return get_state_dict


def test_downloaded_weights_are_taken_and_a_frozen_network_stays_as_it_is(metacv, monkeypatch):
    torch.manual_seed(3)
    donor = models.resnet18().state_dict()
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", giving(donor))
    words = ("algo=protonet", *SMALL[:1], *SMALL[2:3], "eval_episodes=2", "backbone=torchvision")
    for frozen in (True, False):
        given = ("backbone.weights=DEFAULT", f"backbone.frozen={frozen}", "steps=2", f"hydra.run.dir={frozen}")
        code, _, err = metacv("train", *words, *given)
        assert (code, err) == (0, "")
        kept = torch.load(f"{frozen}/last.pt", weights_only=True)["algorithm"]
        same = [
            torch.equal(kept[f"backbone.network.{name}"], value) for name, value in donor.items() if "fc" not in name
        ]
        assert len(same) == len(donor) - 2
        assert all(same) == frozen
    # what is evaluated comes from the checkpoint, without a network
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", giving(OSError("no network")))
    assert metacv("evaluate", "checkpoint=True", "episodes=2", "query=5")[0] == 0


@pytest.mark.parametrize("problem", [OSError("no network"), {"conv1.weight": torch.zeros(1)}, RuntimeError("bad hash")])
def test_weights_that_cannot_be_had_are_told_in_a_line(metacv, monkeypatch, problem):
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", giving(problem))
    words = ("algo=protonet", *SMALL[:1], "eval_episodes=2", "backbone=torchvision", "backbone.weights=DEFAULT")
    code, _, err = metacv("train", *words)
    assert code == 1
    assert err.startswith(
        "metacv: backbone.weights: https://download.pytorch.org/models/resnet18-f37072fd.pth could not"
    )
    assert err.count("\n") == 1


def test_images_are_normalized_once_as_the_weights_want_it():
    known = models.ResNet18_Weights.DEFAULT.transforms()
    backbone = Torchvision((3, 32, 32), "resnet18", "DEFAULT").eval()
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (known.mean, known.std))
    torch.testing.assert_close(backbone(images), backbone.network((images - mean) / std)[:, :, None, None])
    with pytest.raises(ValueError, match=r"backbone.weights come with their own"):
        backbone.normalize([0.5], [0.5])


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("resnet17", None, "torchvision has no such classifier"),
        ("resnet18", "BEST", "weights=BEST: null or one of IMAGENET1K_V1, DEFAULT"),
        ("vgg16", "IMAGENET1K_FEATURES", "weights=IMAGENET1K_FEATURES: null or one of"),
        ("squeezenet1_0", None, "its last layer is not linear"),
        ("vit_b_32", None, "does not take images of 32x32"),
    ],
)
def test_classifiers_that_cannot_serve_are_refused(name, weights, words):
    with pytest.raises(ValueError, match=words):
        Torchvision((3, 32, 32), name, weights)


def test_densenet_takes_the_names_of_its_old_files(monkeypatch):
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
    assert backbone(torch.rand(2, 3, 64, 64)).shape == (2, 1024, 1, 1)
    assert not any("aux" in name for name in backbone.state_dict())


def norms(track_running_stats: bool = False) -> tuple[BatchNorm, nn.BatchNorm2d]:
    own, torchs = (cls(4, track_running_stats=track_running_stats).double() for cls in (BatchNorm, nn.BatchNorm2d))
    with torch.no_grad():
        own.weight.normal_()
        own.bias.normal_()
    torchs.load_state_dict(own.state_dict())
    own.second_order = True
    return own, torchs


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_and_its_first_two_gradients_are_torchs(layout):
    torch.manual_seed(0)
    images = torch.randn(3, 4, 5, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    found = []
    for norm in norms():
        inputs = [images, norm.weight, norm.bias]
        maps = norm(images)
        first = torch.autograd.grad((maps**3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum((grad**2).sum() for grad in first), inputs)
        found.append([maps, *first, *second])
    for own, torchs in zip(*found, strict=True):
        torch.testing.assert_close(own, torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("task_dim", [None, 0, 1])
def test_batch_norms_gradients_are_right_by_finite_differences(task_dim):
    """Of one task, and of two with parameters of their own, or the scale in common."""
    torch.manual_seed(0)
    own, _ = norms()
    if task_dim is None:
        images, weight, bias = torch.randn(3, 4, 2, 2), torch.randn(4), torch.randn(4)
    else:
        images, weight, bias = torch.randn(2, 3, 4, 2, 2), torch.randn(4), torch.randn(2, 4)
        images = images.movedim(0, task_dim)

    def call(images, weight, bias):
        return torch.func.functional_call(own, {"weight": weight, "bias": bias}, (images,))

    inputs = tuple(x.double().requires_grad_() for x in (images, weight, bias))
    function = call if task_dim is None else torch.vmap(call, in_dims=(task_dim, None, 0))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_batch_norm_with_running_statistics_is_torchs_own():
    own, torchs = norms(track_running_stats=True)
    images = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    for _ in range(2):
        assert torch.equal(own(images), torchs(images))
    assert torch.equal(own.eval()(images), torchs.eval()(images))
    for key, value in torchs.state_dict().items():
        assert torch.equal(own.state_dict()[key], value)


def test_a_third_gradient_of_batch_norm_is_refused_instead_of_wrong():
    own, _ = norms()
    images = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    (by_images,) = torch.autograd.grad((own(images) ** 3).sum(), images, create_graph=True)
    with pytest.raises(NotImplementedError, match="third"):
        torch.autograd.grad((by_images**2).sum(), images, create_graph=True)


def test_batch_norm_refuses_a_single_value_for_each_channel_as_torch_does():
    own, _ = norms()
    with pytest.raises(ValueError, match="more than 1 value"):
        own(torch.randn(1, 4, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 84, 84)])
def test_all_maps_of_a_conv4_are_in_the_layout_that_is_fast(shape):
    """With weights of either layout, as the adapted ones may be."""
    backbone = Conv4(shape, running_stats=False)
    seen = []
    for block in backbone.blocks:
        for layer in block:
            layer.register_forward_hook(lambda layer, inputs, maps: seen.append(maps))
    for layout in (torch.channels_last, torch.contiguous_format):
        backbone.to(memory_format=layout)(torch.rand(2, 3, *shape)[:, 1])
    assert len(seen) == 2 * 16
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in seen)
