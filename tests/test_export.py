"""`metacv export`: files for other programs compute what metacv computes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_predict import lay_out

import metacv as package
from metacv.api import prepared
from metacv.export import Exported
from metacv.model import load_checkpoint


@pytest.fixture
def kept(metacv, trained):
    """A saved model of three classes, with the head of the words, and queries of its classes."""

    def keep(*words: str, algo: str = "protonet") -> str:
        lay_out(Path("own"), [3, 2, 4], query=2)
        words = (f"checkpoint={trained(algo)}", "support=own/support", "save=kept.pt", *words)
        assert metacv("predict", *words)[0] == 0
        return "kept.pt"

    return keep


def queries() -> list[str]:
    return sorted(map(str, Path("own/query").glob("*/*.png")))


def images() -> torch.Tensor:
    """The queries as the file takes them."""
    return prepared(queries(), package.load("kept.pt").predictor_).float() / 255


@pytest.mark.slow
def test_onnx_gives_the_same_probabilities_and_names(metacv, kept):
    for package_name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package_name)
    import onnxruntime

    code, out, err = metacv("export", f"adapted={kept('head=ncm')}", "file=model.onnx")
    assert (code, err) == (0, "")
    assert out == "written: model.onnx (3 classes; images [batch, 1, 28, 28], from 0 to 1)\n"
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images().numpy()})
    expected = package.load("kept.pt").predict_proba(queries())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == package.load("kept.pt").classes_.tolist()
    assert about["inverted"] == "true"
    assert [own.name for own in session.get_outputs()] == ["probabilities"]


@pytest.mark.parametrize(
    ("algo", "head"), [("protonet", head) for head in ("", "ncm", "ridge", "logistic", "svm")] + [("feat", "")]
)
def test_the_linear_layer_of_a_file_is_the_head(kept, algo, head):
    words = [f"head={head}"] if head else ["algo.temperature=1"] if algo == "feat" else []
    classifier = package.load(kept(*words, algo=algo))
    model = Exported(classifier.predictor_.method)
    model.learn_from(classifier.predictor_, classifier.support_)
    with torch.no_grad():
        found = model.float().eval()(images())
    assert found.std(0).min() > 1e-4
    np.testing.assert_allclose(found.numpy(), classifier.predict_proba(queries()), atol=1e-5)


def test_safetensors_hold_the_network_the_linear_layer_and_its_names(metacv, kept):
    loaded = pytest.importorskip("safetensors.torch")
    assert metacv("export", f"adapted={kept()}", "format=safetensors", "file=model.safetensors")[0] == 0
    tensors = loaded.load_file("model.safetensors")
    network = load_checkpoint("kept.pt").build().embedding
    for name, value in network.state_dict().items():
        assert torch.equal(tensors[f"network.{name}"], value)
    assert tensors["weight"].shape == (3, network.features_dim)


def test_a_head_whose_labels_are_not_linear_is_refused_with_one_clear_line(metacv, kept):
    code, out, err = metacv("export", f"adapted={kept(algo='matchingnet')}", "file=model.onnx")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("metacv: MatchingNet: its labels are no linear function of features")
    assert not Path("model.onnx").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["file=model.onnx"], "give either checkpoint=RUN, for features, or adapted=FILE"),
        (["checkpoint=RUN", "adapted=RUN", "file=model.onnx"], "give either checkpoint=RUN, for features, or"),
        (["checkpoint=RUN", "file=model.txt"], "file=model.txt: must end with .onnx, as format=onnx"),
        (["checkpoint=RUN", "file=a.onnx", "format=safetensors"], "file=a.onnx: must end with .safetensors"),
        (["checkpoint=RUN", "file=a.tf", "format=tf"], "format=tf: must be one of onnx, safetensors"),
        (["adapted=RUN", "file=model.onnx"], "has no support set; save=FILE together with support=FOLDER makes one"),
        (["checkpoint=nowhere", "file=model.onnx"], "nowhere: there is no such file"),
        (
            ["checkpoint=MAML", "file=model.onnx"],
            "export: needs a model that embeds each image by itself, which MAML with batch_norm=transductive does not",
        ),
        (["checkpoint=RUN", "file=model.onnx"], "onnx is not installed; pip install 'metacv[export]' installs it"),
    ],
)
def test_what_cannot_be_exported_has_one_clear_line(metacv, trained, monkeypatch, words, message):
    monkeypatch.setitem(sys.modules, "onnx", None)
    runs = {"RUN": str(trained("protonet")), "MAML": str(trained("maml"))}
    given = [f"{name}={runs.get(value, value)}" for name, _, value in (word.partition("=") for word in words)]
    code, out, err = metacv("export", *given)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
