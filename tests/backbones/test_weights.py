"""Weights of others: which files and names are accepted, and what is refused in one line."""

import pickle
import re

import pytest
import torch
from torch import nn

from metacv.backbones import resnet12
from metacv.backbones.conv4 import Conv4
from metacv.backbones.resnet12 import ResNet12
from metacv.backbones.weights import load_weights
from metacv.errors import UserError


class Net(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(blocks)))


def weights_of(network, seed=7):
    torch.manual_seed(seed)
    return {
        name: torch.rand_like(value) if value.is_floating_point() else value.clone()
        for name, value in network.state_dict().items()
    }


def renamed(weights, change):
    return {change(name): value for name, value in weights.items()}


def loaded(tmp_path, content, network=None, **options):
    network = network or Net()
    torch.save(content, tmp_path / "weights.pth")
    return network, load_weights(network, "Net", str(tmp_path / "weights.pth"), **options)


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "feature.", "module.backbone."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "params"])
def test_weights_are_found_below_the_usual_names_and_prefixes(tmp_path, prefix, wrapper):
    weights = weights_of(Net())
    content = renamed(weights, lambda name: prefix + name) | {"fc.weight": torch.zeros(2, 4)}
    content = {"epoch": 3, wrapper: content} if wrapper else content
    network, source = loaded(tmp_path, content)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert re.match(
        r"weights of weights\.pth, sha256 \w{16}, trained elsewhere, perhaps on classes of the test", source
    )


def test_a_file_in_the_format_before_zip_archives_is_read(tmp_path):
    weights = weights_of(Net())
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    network = Net()
    load_weights(network, "Net", str(tmp_path / "old.pth"))
    assert torch.equal(network.stem.weight, weights["stem.weight"])


def test_a_safetensors_file_is_read(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    weights = weights_of(Net())
    save_file(weights, tmp_path / "weights.safetensors")
    network = Net()
    load_weights(network, "Net", str(tmp_path / "weights.safetensors"))
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_counters_of_batch_norm_may_be_missing(tmp_path):
    weights = weights_of(Net())
    del weights["norm.num_batches_tracked"]
    assert torch.equal(loaded(tmp_path, weights)[0].norm.running_var, weights["norm.running_var"])


def test_only_the_last_layer_and_foreign_parts_are_ignored(tmp_path):
    weights = weights_of(Net())
    last = {"blocks.2.weight": torch.zeros(9, 4)}
    loaded(tmp_path, weights | last, removed=("blocks.2",))
    with pytest.raises(UserError, match=r"weights\.pth does not fit Net: it has blocks\.2\.weight, which the network"):
        loaded(tmp_path, weights | last)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {n: v for n, v in w.items() if n != "blocks.1.bias"}, "it has no blocks.1.bias; its nearest names "),
        (lambda w: w | {"stem.weight": torch.zeros(4, 1, 3, 3)}, r"its stem.weight has the shape \(4, 1, 3, 3\), not"),
        (lambda w: renamed(w, lambda name: f"{name}2"), "it has no stem.weight; its nearest names are stem.weight2"),
        (lambda w: renamed(dict(sorted(w.items())), lambda name: f"a_{name}"), "it has no stem.weight"),
    ],
    ids=["missing", "shape", "names", "alphabetical"],
)
def test_weights_of_another_network_are_refused_with_the_nearest_names(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        loaded(tmp_path, change(weights_of(Net())))


def test_other_names_in_the_same_order_and_shapes_are_accepted_with_a_warning(tmp_path, capsys):
    weights = weights_of(Net())
    content = renamed(weights, lambda name: f"_{name}") | {"_fc.weight": torch.zeros(2, 4)}
    network, _ = loaded(tmp_path, content)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    warning = capsys.readouterr().err
    assert warning.startswith("metacv: warning: backbone.weights_file=")
    assert warning.endswith(
        "has other names than the network, so its tensors were matched by their order; check the accuracy\n"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "cannot be used (it holds a list): it must be safetensors, or a state dict"),
        ({"epoch": 3}, "has no tensors: it must be"),
        ({"stem.weight": torch.tensor([torch.nan])}, "stem.weight has values that are not finite numbers"),
        ({"code": eval}, "cannot be used (it names __builtin__.eval, which checkpoints do not need)"),
    ],
    ids=["list", "empty", "nan", "code"],
)
def test_files_without_usable_weights_are_refused(tmp_path, content, words):
    with pytest.raises(UserError, match=re.escape(words)):
        loaded(tmp_path, content)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_damaged_and_missing_files_are_refused(tmp_path, name):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    place = str(tmp_path / name)
    with pytest.raises(UserError, match="there is no such file"):
        load_weights(Net(), "Net", place)
    (tmp_path / name).write_bytes(b"hello" * 100)
    with pytest.raises(UserError, match=r"cannot be used \(damaged, o"):
        load_weights(Net(), "Net", place)
    with pytest.raises(UserError, match="is not a regular file"):
        load_weights(Net(), "Net", str(tmp_path))


def test_published_weights_of_resnet12_and_conv4_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(resnet12, "CHANNELS", (2, 3, 4, 5))
    conv4 = {"channels": 4}
    for cls, settings, change in (
        (ResNet12, {}, lambda name: f"encoder.{name}"),
        (Conv4, conv4, lambda n: f"layers{n}"),
    ):
        weights = weights_of(cls((3, 32, 32), **settings))
        torch.save({"params": renamed(weights, change) | {"fc.weight": torch.zeros(2, 5)}}, tmp_path / "weights.pth")
        backbone = cls((3, 32, 32), **settings, weights_file=str(tmp_path / "weights.pth"))
        assert "weights.pth" in str(backbone.load_pretrained())
        assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())


def test_code_in_a_file_of_the_old_format_does_not_run(tmp_path, recwarn):
    class Touch:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "touched",))

    for protocol in (2, 4):
        (tmp_path / "weights.pth").write_bytes(pickle.dumps({"a": Touch()}, protocol))
        with pytest.raises(UserError, match="with more than tensors and plain values"):
            load_weights(Net(), "Net", str(tmp_path / "weights.pth"))
    assert not (tmp_path / "touched").exists()
    assert len(recwarn) == 0


def test_running_statistics_for_a_network_without_them_name_the_setting(tmp_path):
    network = Conv4((3, 32, 32), running_stats=False)
    with pytest.raises(UserError, match=r"running_mean, which the network does not have: set backbone.running_stats="):
        loaded(tmp_path, weights_of(Conv4((3, 32, 32))), network)
