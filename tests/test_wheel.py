"""The installed wheel: kept models, and custom methods from a package of the user."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import TRAIN

from metacv.algorithms.base import Algorithm
from metacv.errors import UserError
from metacv.model import checkpoint_path, load_checkpoint, target_class

ROOT = Path(__file__).resolve().parents[1]
KEPT = (
    "omniglot/protonet_5w1s", "omniglot/maml_5w1s", "cifar_fs/classifier_5w1s", "miniimagenet/classifier_5w5s",
    "glyphs_to_omniglot",
)  # fmt: skip
METHOD = '''
from metacv.algorithms.base import MetricMethod

class Own(MetricMethod):
    """Nearest class mean."""

    def head(self, tasks):
        means = tasks.class_means(tasks.support_x)
        return -(tasks.query_x.unsqueeze(2) - means.unsqueeze(1)).square().sum(-1)
'''


@pytest.fixture
def method(tmp_path) -> Path:
    """A folder with a package `own_methods`, and its YAML file below `configs`."""
    folder = tmp_path / "mine"
    (folder / "own_methods").mkdir(parents=True)
    (folder / "configs/algo").mkdir(parents=True)
    (folder / "own_methods/__init__.py").write_text(METHOD)
    (folder / "configs/algo/own.yaml").write_text("# @package _global_\n# Mine\nalgo:\n  _target_: own_methods.Own\n")
    return folder


def test_a_custom_method_needs_its_package_in_the_environment_variable(metacv, method, monkeypatch):
    monkeypatch.syspath_prepend(str(method))
    train = ("train", "--config-dir", str(method / "configs"), "algo=own", *TRAIN, "hydra.run.dir=run")
    refused = "algo._target_=own_methods.Own: must be a class of metacv or torch.optim, or of a package "
    code, _, err = metacv(*train)
    assert (code, refused in err, "own_methods" in sys.modules) == (1, True, False)
    monkeypatch.setenv("METACV_METHODS", "another, own_methods")
    assert metacv(*train)[0] == 0
    assert "accuracy" in metacv("evaluate", "checkpoint=run")[1]
    for value in ("", "own", "own_methods.Own", "metacv"):  # and a checkpoint cannot allow it
        monkeypatch.setenv("METACV_METHODS", value)
        code, _, err = metacv("evaluate", "checkpoint=run")
        assert (code, refused in err) == (1, True)


@pytest.mark.parametrize(
    "target", ["own_methods.os.system", "own_methods.os", "own_methods.METHOD", "own_methods.None"]
)
def test_an_allowed_package_provides_only_classes_of_the_expected_base(metacv, method, monkeypatch, target):
    (method / "own_methods/__init__.py").write_text("import os\nMETHOD = 1\n")
    monkeypatch.syspath_prepend(str(method))
    monkeypatch.setenv("METACV_METHODS", "own_methods")
    monkeypatch.delitem(sys.modules, "own_methods", raising=False)
    code, _, err = metacv("train", "algo=protonet", f"algo._target_={target}", *TRAIN)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"metacv: algo._target_={target}: ")


def test_a_kept_model_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in KEPT:
        assert load_checkpoint(name).path == ROOT / "outputs/reference" / name / "best.pt"
    Path("glyphs_to_omniglot").mkdir()  # a folder of the user's comes first
    with pytest.raises(UserError, match=r"^glyphs_to_omniglot has no best.pt"):
        checkpoint_path("glyphs_to_omniglot")
    with pytest.raises(UserError, match="there is no such file; did you mean omniglot/maml_5w1s"):
        load_checkpoint("omniglot/mamls_5w1s")


@pytest.mark.slow
def test_the_wheel_contains_the_kept_models_and_runs_a_custom_method(tmp_path, data_dir, method):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*pip, tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        names = [name for name in archive.namelist() if name.startswith("metacv/kept/")]
    assert sorted(names) == sorted(f"metacv/kept/{name}/{file}" for name in KEPT for file in ("best.pt", "result.json"))
    assert wheel.stat().st_size < 4_000_000
    environment = os.environ | {"METACV_DATA_DIR": str(data_dir), "METACV_METHODS": "own_methods"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path / "installed"), str(method)])}
    own = ["--config-dir", str(method / "configs"), "algo=own", *TRAIN, "hydra.run.dir=run"]
    for words in (["info", *KEPT], ["list"], ["train", *own], ["evaluate", "checkpoint=run"]):
        command = [sys.executable, "-m", "metacv", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert not [line for line in done.stdout.splitlines() if str(ROOT) in line]


def test_a_package_of_methods_that_is_no_name_has_one_line(monkeypatch):
    monkeypatch.setenv("METACV_METHODS", ".")
    with pytest.raises(UserError, match="there is no such class"):
        target_class("algo", {"_target_": "..x.Own"}, Algorithm)
