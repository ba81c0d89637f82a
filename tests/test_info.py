"""`metacv info`: descriptions of runs, checkpoints, adapted models and kept models."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from metacv.model import load_checkpoint
from metacv.results import read_results
from metacv.text import percent


def shown(metacv, *places: str) -> dict[str, str]:
    """The lines of `metacv info` by their names."""
    code, out, err = metacv("info", *places)
    assert (code, err) == (0, "")
    width = max(len(line) - len(line.partition("  ")[2].lstrip()) for line in out.splitlines())
    return {line[:width].rstrip(): line[width:] for line in out.splitlines()}


@pytest.fixture
def run(metacv, trained, monkeypatch) -> Path:
    monkeypatch.setenv("COLUMNS", "1000")  # no line is wrapped
    return Path(shutil.copytree(trained("protonet"), "run"))


def test_info_describes_a_run(metacv, run):
    (best,) = read_results(run / "result.json").results
    assert metacv("evaluate", "checkpoint=run")[0] == 0  # into outputs/evaluate
    (file,) = Path("outputs").rglob("result.json")
    (test,) = read_results(file).results
    content = torch.load(run / "best.pt", weights_only=True)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    parameters = sum(value.numel() for name, value in content["algorithm"].items() if not name.endswith(buffers))
    lines = shown(metacv, "run")
    assert len(lines) <= 15
    assert lines["file"].startswith("run/best.pt, ")
    assert lines["file"].endswith(f"sha256 {load_checkpoint(run).sha256[:16]}")
    assert lines["method"] == "ProtoNet"
    assert lines["network"] == f"Conv4, {parameters:,} parameters"
    assert lines["data"] == "Glyphs, images of 1x28x28"
    task = "5-way 1-shot, 5 queries per class"
    assert lines["task"].startswith(f"{task}; trained 5-way 1-shot, ")
    assert lines["step"].startswith(f"{best.step} of 4")
    assert lines["validation"].startswith(f"{percent(best.accuracy, best.ci95)} % at step {best.step} (8 episodes, ")
    assert lines["classes"] == "30 in training, 8 in validation"
    assert lines["cost"].startswith(f"training took {content['training']['images']:,} images, ")
    assert lines["changed"].startswith("algo=protonet dataset.classes={train:30,val:8,test:8}")
    assert lines["evaluated"].startswith(f"{percent(test.accuracy, test.ci95)} %: 5-way 1-shot, 8 episodes of Glyphs")
    assert lines["evaluated"].endswith(f"({file})")
    assert lines["folder"].startswith("best.pt, ")


def test_info_uses_last_pt_if_a_run_has_no_best_pt(metacv, run):
    (run / "best.pt").unlink()
    lines = shown(metacv, "run")
    assert lines["file"].startswith("run/last.pt, ")
    assert lines["step"] == "4 of 4"
    assert lines["changed"].startswith("algo=protonet ")
    assert lines == shown(metacv, "run/last.pt")


def test_info_of_an_adapted_model_names_its_classes(metacv, run):
    for name in ("Ölberg", "b\x1b[31m"):
        Path("images", name).mkdir(parents=True)
        Image.new("L", (28, 28), 200).save(f"images/{name}/0.png")
    words = ("checkpoint=run", "support=images", "query=images", "save=model.pt")
    assert metacv("predict", *words)[0] == 0
    lines = shown(metacv, "model.pt")
    assert lines["adapted to"] == "2 images of 2 classes: b?[31m, Ölberg"
    assert lines["file"].startswith("model.pt, ")
    assert not {"folder", "changed", "evaluated"} & lines.keys()  # of whatever lies beside it


def test_info_lists_earlier_runs_and_omits_fields_missing_in_older_checkpoints(metacv, run):
    content = torch.load(run / "best.pt", weights_only=True)
    stages = ["Classifier on Glyphs, step 7, sha256 0123\x1b[2J", "teacher ProtoNet on Glyphs, step 8, sha256 4567"]
    training = content["training"] | {"stages": stages}
    torch.save(content | {"training": training}, run / "best.pt")
    out = metacv("info", "run")[1]
    assert out.count("\nafter ") == 2
    assert "sha256 0123?[2J\n" in out
    assert "(with earlier runs)" in out
    torch.save({name: value for name, value in content.items() if name != "training"}, run / "best.pt")
    assert not {"after", "cost", "classes"} & shown(metacv, "run").keys()


def test_info_wraps_at_the_width_of_the_terminal(metacv, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    out = metacv("info", "omniglot/protonet_5w1s")[1]
    assert all(len(line) <= 60 or " " not in line[12:] for line in out.splitlines())  # a path is not broken
    assert re.search(r"^task        5-way 1-shot, 15 queries per class; trained\n {12}60-way", out, re.MULTILINE)


def test_info_counts_a_class_once_that_is_known_by_its_name_and_by_its_images(metacv, run):
    content = torch.load(run / "best.pt", weights_only=True)
    named = {"trained_on": ["a:1", "a:2", "pixels:11", "pixels:22"], "validated_on": ["a:3", "pixels:33"]}
    torch.save(content | {"training": content["training"] | named}, run / "best.pt")
    assert shown(metacv, "run")["classes"] == "2 in training, 1 in validation"


def test_info_accepts_names_of_kept_models_and_several_runs(metacv, run):
    lines = shown(metacv, "omniglot/protonet_5w1s")
    assert lines["evaluated"].startswith("99.06 ± 0.14 %: 5-way 1-shot, 1000 episodes of Omniglot test")
    code, out, _ = metacv("info", "run", "omniglot/protonet_5w1s")
    assert (code, out.count("network  ")) == (0, 2)


def test_info_refuses_what_is_not_a_run_with_one_line(metacv, run):
    Path("text.pt").write_text("no checkpoint")
    Path("empty").mkdir()
    damaged = dataclasses.replace(load_checkpoint(run)).content | {"support": 3}
    torch.save(damaged, "damaged.pt")
    problems = {
        ("nowhere",): "nowhere: there is no such file",
        ("text.pt",): "text.pt is not a checkpoint of metacv, or is damaged",
        ("empty",): "empty has no best.pt: it is not the folder of a run",
        ("damaged.pt",): "the support set in the file is damaged",
        (): "runs is missing",
        ("runs=[]",): "runs=[]: name a run, or a file with a model",
        ("protonet_5w1s",): "did you mean cifar_fs/protonet_5w1s or miniimagenet/protonet_5w1s or ",
        ("omniglot/protonet_5w1",): "did you mean omniglot/protonet_5w1s or ",
    }
    for words, problem in problems.items():
        code, out, err = metacv("info", *words)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert problem in err
