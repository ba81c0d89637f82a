"""Conv4 and residual networks, against the feature sizes of the papers and published parameters."""

import pytest
import torch
from torch import nn
from torchvision import models

from metacv.backbones.conv4 import Conv4
from metacv.backbones.resnet12 import ResNet12, drop_blocks
from metacv.backbones.resnet18 import ResNet18
from metacv.backbones.wrn import WideResNet


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("cls", "settings", "features"),
    [
        (Conv4, {}, 1600),  # Prototypical Networks
        (Conv4, {"channels": 32, "norm_scale": False, "running_stats": False}, 800),  # MAML
        (Conv4, {"channels": 32, "ceil_pool": True, "running_stats": False}, 1152),  # Reptile
        (Conv4, {"downsample": ["max_pool", "max_pool", "none", "none"], "padding": [0, 0, 1, 1]}, 64 * 19 * 19),
        (ResNet12, {}, 640),
        (ResNet12, {"global_pool": False}, 640 * 5 * 5),
        (WideResNet, {"width": 1}, 64),
        (WideResNet, {"width": 1, "global_pool": False}, 64 * 21 * 21),
        (ResNet18, {}, 512),
        (ResNet18, {"global_pool": False}, 512 * 11 * 11),
    ],
)
def test_images_of_84_pixels_have_as_many_features_as_in_the_papers(cls, settings, features):
    assert cls((3, 84, 84), **settings).features_dim == features


@pytest.mark.parametrize(
    ("cls", "side"), [(ResNet12, 84), (ResNet12, 33), (ResNet18, 33), (Conv4, 33), (WideResNet, 33)]
)
def test_maps_without_global_pooling_have_the_announced_shape(cls, side):
    settings = {Conv4: {}, WideResNet: {"width": 1, "global_pool": False}}.get(cls, {"global_pool": False})
    backbone = cls((3, side, side), **settings).eval()
    with torch.no_grad():
        assert backbone.maps(torch.rand(2, 3, side, side)).shape == (2, *backbone.out_shape)


def test_networks_have_the_published_number_of_parameters():
    assert parameters(ResNet12((3, 84, 84))) == 12_424_320
    # torchvision's 11,689,512 without the last layer of 513,000 and with 3x3 for 7x7 in the first
    assert parameters(ResNet18((3, 84, 84))) == 11_689_512 - 513_000 - 64 * 3 * (49 - 9)
    with torch.device("meta"):  # 36,479,194 of WRN-28-10 for CIFAR-10 without its last layer
        assert parameters(WideResNet((3, 84, 84))) == 36_479_194 - 6_410
    assert parameters(Conv4((3, 84, 84))) == 64 * (3 * 9 + 3) + 3 * 64 * (64 * 9 + 3)


def test_parameters_have_the_names_and_shapes_of_published_weights():
    """MetaOptNet's ResNet-12, and torchvision's ResNet-18 under `net`."""
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

    theirs = {
        f"net.{name}": tuple(p.shape) for name, p in models.resnet18().state_dict().items() if not name.startswith("fc")
    }
    ours = {name: tuple(p.shape) for name, p in ResNet18((3, 84, 84)).state_dict().items()}
    assert ours.pop("net.conv1.weight") == (64, 3, 3, 3)
    assert theirs.pop("net.conv1.weight") == (64, 3, 7, 7)
    assert ours == theirs


def test_a_residual_block_adds_its_branches():
    torch.manual_seed(0)
    block = ResNet12((3, 16, 16)).eval().get_submodule("layer1.0")
    images = torch.rand(2, 3, 16, 16)
    out = images
    for number in (1, 2, 3):
        out = block.get_submodule(f"bn{number}")(block.get_submodule(f"conv{number}")(out))
        out = nn.functional.leaky_relu(out, 0.1) if number < 3 else out
    expected = nn.functional.max_pool2d(nn.functional.leaky_relu(out + block.downsample(images), 0.1), 2)
    torch.testing.assert_close(block(images), expected)


def test_drop_block_drops_its_share_in_squares_and_keeps_the_scale():
    torch.manual_seed(0)
    maps = torch.ones(64, 50, 10, 10)
    out = drop_blocks(maps, 0.1)
    dropped = out == 0
    assert 0.08 < dropped.float().mean() < 0.1  # squares that overlap drop a little less
    assert out.mean() == pytest.approx(1, abs=1e-4)
    whole = (nn.functional.avg_pool2d(dropped.float(), 5, stride=1) == 1).float()
    squares = nn.functional.max_pool2d(nn.functional.pad(whole, (4, 4, 4, 4)), 5, stride=1)
    assert torch.equal(squares.bool(), dropped)  # what is dropped is a union of 5x5 squares
    backbone = ResNet12((3, 32, 32), drop_block=0.5, global_pool=False)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(backbone.eval()(images), backbone(images))
    assert (backbone.train()(images) == 0).any()


@pytest.mark.parametrize("cls", [ResNet12, ResNet18])
def test_without_running_statistics_a_network_has_no_buffers(cls):
    backbone = cls((3, 32, 32), running_stats=False)
    assert not [name for name, _ in backbone.named_buffers()]


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="images of 12x12 are too small to be halved four times"):
        ResNet12((3, 12, 12))


def test_normalization_applies_to_the_images_and_is_not_saved():
    backbone = Conv4((3, 28, 28)).eval()
    images, mean, std = torch.rand(2, 3, 28, 28), [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    expected = backbone((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    names = list(backbone.state_dict())
    backbone.set_normalization(mean, std)
    torch.testing.assert_close(backbone.maps(images), expected)
    torch.testing.assert_close(backbone.features(images), expected.flatten(1))
    assert list(backbone.state_dict()) == names


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 84, 84)])
def test_maps_of_conv4_are_channels_last(shape):
    """The fast layout on CPUs, with weights of either layout: adapted ones may have either."""
    backbone = Conv4(shape, running_stats=False)
    seen = []
    for block in backbone.blocks:
        for layer in block:
            layer.register_forward_hook(lambda layer, inputs, maps: seen.append(maps))
    for layout in (torch.channels_last, torch.contiguous_format):
        backbone.to(memory_format=layout)(torch.rand(2, 3, *shape)[:, 1])
    assert len(seen) == 2 * 16
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in seen)


def test_a_wide_resnet_has_the_parameter_names_of_published_weights():
    names = {*WideResNet((3, 32, 32), width=2).state_dict()}
    assert {"conv1.weight", "bn1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.3.conv2.weight"} <= names
    assert "block1.layer.1.convShortcut.weight" not in names
