"""Networks of timm as feature extractors; skipped without timm."""

import sys

import pytest
import torch

from metacv.backbones.timm import Timm
from metacv.errors import UserError

SMALL, VIT = "mobilenetv3_small_050", "vit_tiny_patch16_224"


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


def test_weights_files_of_timm_are_loaded_without_their_classifier(timm, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(3)
    donor = timm.create_model(SMALL).eval()
    save_file({name: value.contiguous() for name, value in donor.state_dict().items()}, tmp_path / "w.safetensors")
    backbone = Timm((3, 64, 64), SMALL, weights_file=str(tmp_path / "w.safetensors")).eval()
    assert "w.safetensors" in str(backbone.load_pretrained())
    images = torch.rand(2, 3, 64, 64)
    about = donor.pretrained_cfg
    mean, std = (torch.tensor(about[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = donor.forward_head(donor.forward_features((images - mean) / std), pre_logits=True)
    torch.testing.assert_close(backbone.features(images), expected.flatten(1))


def test_tokens_of_a_vit_become_the_class_token_or_their_mean(timm):
    backbones = {
        pool: Timm((3, 84, 84), VIT, layer="blocks.1", pool=pool, size="own").eval() for pool in ("token", "avg")
    }
    backbones["avg"].network.load_state_dict(
        {n: v for n, v in backbones["token"].network.state_dict().items() if not n.startswith(("norm", "fc_norm"))},
        strict=False,
    )
    images = torch.rand(1, 3, 224, 224)
    network = backbones["token"].network
    with torch.no_grad():
        tokens = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(images))))
        tokens = network.blocks[1](network.blocks[0](tokens))
        expected = {"token": tokens[:, 0], "avg": tokens[:, 1:].mean(1)}
        for pool, backbone in backbones.items():
            torch.testing.assert_close(backbone(images), expected[pool])


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "resnet1"}, "name=resnet1: timm has no such network; did you mean"),
        ({"name": "hf-hub:owner/name"}, "name=hf-hub:owner/name: timm has no such network"),
        ({"name": "local-dir:/tmp"}, "name=local-dir:/tmp: timm has no such network"),
        ({"name": "resnet18.best"}, r"name=resnet18.best: Invalid pretrained tag"),
        ({"name": SMALL, "pool": "most"}, f"name={SMALL}, pool=most: "),
        ({"name": VIT}, r"does not take images of 84x84 .*; try dataset.size=224, or backbone.size=224"),
        ({"name": SMALL, "layer": "layer9"}, f"layer=layer9: {SMALL} has no such module"),
    ],
)
def test_invalid_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Timm((3, 84, 84), **settings)


def test_a_failed_download_says_where_to_put_the_file(timm, monkeypatch, capsys):
    backbone = Timm((3, 64, 64), SMALL, weights="DEFAULT")

    def create_model(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(UserError, match=r"could not be downloaded \(no network\); .* set backbone.weights_file to its"):
        backbone.load_pretrained()
    assert capsys.readouterr().out == f"downloading the weights of {SMALL}\n"


def test_without_timm_an_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm is not installed: pip install 'metacv\[timm\]'"):
        Timm((3, 84, 84), "resnet18")
