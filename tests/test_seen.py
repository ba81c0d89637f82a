"""No class that a model was trained or validated on counts as new, whatever the data set or the run it came from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DATASETS, TRAIN, bank_of
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from metacv import CONFIG_DIR
from metacv.backbones.conv4 import Conv4
from metacv.data.bank import Dataset
from metacv.model import Training, build_dataset, load_checkpoint

pytestmark = pytest.mark.slow

# The runs that `trained` makes use glyphs 0 to 29 for training, 30 to 37 for validation and 38 to 45 for the test.
SHIFTED = "dataset.classes={train:10,val:10,test:26}"  # tests on glyphs 20 to 45, 18 of which training used
TEST = ("episodes=8", "query=5", "device=cpu")


def results(folder: str) -> list[dict]:
    return json.loads((Path(folder) / "result.json").read_text())["results"]


def without_names(run: Path, target: Path) -> Path:
    """A checkpoint as it was written before names of classes were kept."""
    content = torch.load(run / "best.pt", weights_only=True)
    del content["training"]["trained_on"], content["training"]["validated_on"]
    target.mkdir()
    torch.save(content, target / "best.pt")
    return target


@pytest.mark.parametrize("old", [False, True])
def test_a_test_on_classes_of_training_is_refused_and_can_leave_them_out(metacv, trained, tmp_path, old):
    run = without_names(trained("protonet"), tmp_path / "old") if old else trained("protonet")
    code, out, err = metacv("evaluate", f"checkpoint={run}", SHIFTED, *TEST)
    assert (code, out) == (1, "")
    assert "glyphs test: 18 of its 26 classes (glyph00020, ...) were used in training or validation" in err
    assert err.endswith("unseen_only=true leaves them out\n")
    assert not Path("outputs").exists()
    code, out, err = metacv("evaluate", f"checkpoint={run}", SHIFTED, *TEST, "unseen_only=true", "hydra.run.dir=part")
    assert (code, err) == (0, "")
    assert "of Glyphs test without 18 classes of training, " in out
    assert metacv("evaluate", f"checkpoint={run}", *TEST, "hydra.run.dir=own")[0] == 0
    part, own = results("part")[0], results("own")[0]
    assert (part["left_out"], own["left_out"]) == (18, 0)
    assert part["images_sha256"] == own["images_sha256"]  # what is left is the run's own test split
    assert part["accuracy"] == own["accuracy"]


def test_validation_classes_may_be_validated_again_but_training_classes_may_not(metacv, trained):
    run = f"checkpoint={trained('protonet')}"
    assert metacv("evaluate", run, *TEST, "split=val")[0] == 0
    assert metacv("evaluate", run, *TEST, "split=train")[0] == 0
    code, _, err = metacv("evaluate", run, *TEST, "split=val", "dataset.classes={train:25,val:10,test:8}")
    assert code == 1
    assert "glyphs val: 5 of its 10 classes (glyph00025, ...) were used" in err


@pytest.mark.parametrize("words", [("calibrate=val", "head=ncm"), ("head=finetune", "head.adapt=backbone")])
def test_nothing_is_chosen_on_validation_classes_of_another_split_that_were_in_training(metacv, trained, words):
    shifted = ("dataset.classes={train:25,val:10,test:11}", "unseen_only=true", "way=6")  # training used 25 to 29
    code, _, err = metacv("evaluate", f"checkpoint={trained('protonet')}", *shifted, *TEST, *words)
    assert code == 1
    assert "way=6, but glyphs val has only 5 classes" in err


def test_glyphs_with_another_seed_are_other_classes(metacv, trained):
    assert metacv("evaluate", f"checkpoint={trained('protonet')}", *TEST, SHIFTED, "dataset.seed=1")[0] == 0


@pytest.mark.usefixtures("may_be_at_chance")
def test_compare_leaves_out_classes_that_any_of_the_models_has_seen(metacv, trained):
    other = ("algo=protonet", *TRAIN, "dataset.classes={train:40,val:2,test:4}", "way=2", "hydra.run.dir=other")
    assert metacv("train", *other)[0] == 0
    runs = ("compare", str(trained("protonet")), "other", "way=2", *TEST)
    code, _, err = metacv(*runs, "dataset.classes={train:10,val:6,test:30}")
    assert code == 1
    assert "were used in training or validation of" in err
    code, out, err = metacv(*runs, "dataset.classes={train:10,val:6,test:30}", "unseen_only=true", "hydra.run.dir=both")
    assert (code, err) == (0, "")
    assert out.count(" test without 26 classes of training") == 2
    assert [one["left_out"] for one in results("both")] == [26, 26]  # of glyphs 16 to 45, 42 to 45 are new to both


def test_classes_of_the_first_stage_and_of_the_teacher_count(metacv, trained):
    first = trained("classifier")
    second = (*TRAIN, "dataset.classes={train:8,val:8,test:30}", "hydra.run.dir=second")
    code, _, err = metacv("train", "algo=protonet", *second, f"init={first}")
    assert code == 0
    assert "was trained on 8 classes of this run's validation (glyphs0:glyph00008, ...)" in err
    code, _, err = metacv("evaluate", "checkpoint=second", *TEST)
    assert code == 1
    assert "22 of its 30 classes (glyph00016, ...) were used" in err
    taught = (*TRAIN, "dataset.seed=7", "hydra.run.dir=taught", f"algo.teacher={first}")
    assert metacv("train", "algo=classifier", *taught)[0] == 0
    code, _, err = metacv("evaluate", "checkpoint=taught", *TEST, "dataset.seed=0", SHIFTED)
    assert code == 1
    assert "18 of its 26 classes (glyph00020, ...) were used" in err
    training = load_checkpoint("taught").training
    assert [stage.split(",")[0] for stage in training.stages] == ["learned from Classifier on Glyphs"]
    assert training.images > load_checkpoint(first).training.images  # whose cost is part of it


def test_a_first_stage_that_is_also_the_teacher_counts_once(metacv, trained):
    first = trained("classifier")
    words = ("algo=classifier", *TRAIN, f"init={first}", f"algo.teacher={first}", "hydra.run.dir=both")
    assert metacv("train", *words)[0] == 0
    both, one = load_checkpoint("both").training, load_checkpoint(first).training
    assert both.images == one.images + 2 * load_checkpoint("both").step
    assert [stage.split(" ")[0] for stage in both.stages] == ["learned", "Classifier"]
    out = metacv("evaluate", "checkpoint=both", *TEST)[1]
    assert out.splitlines()[6].startswith("  after: learned from Classifier on Glyphs, step ")
    assert out.splitlines()[7].startswith("  after: Classifier on Glyphs, step ")


def test_a_class_of_a_folder_is_known_by_its_images_under_another_name(metacv, tmp_path):
    for c in range(12):
        (tmp_path / f"photos/class{c}").mkdir(parents=True)
        for i, image in enumerate(bank_of([7] * 12, shape=(1, 12, 12)).images[7 * c : 7 * c + 7]):
            Image.fromarray(image[0].numpy()).save(tmp_path / f"photos/class{c}/{i}.png")
    data = (
        "dataset=image_folder",
        "dataset.size=16",
        "dataset.color=false",
        "dataset.fractions={train:6,val:3,test:3}",
    )
    train = ("algo=protonet", *TRAIN[1:], *data, "dataset.root=photos", "way=2", "query=2", "hydra.run.dir=run")
    assert metacv("train", *train)[0] == 0
    split = json.loads(Path("run/split.json").read_text())
    seen = split["train"][0]
    shutil.copytree("photos", "renamed")
    for folder in [*Path("renamed").iterdir()]:
        folder.rename(folder.with_name(f"new {folder.name}"))
    everything = {"train": [], "val": [], "test": [f"new {name}" for name in (seen, *split["test"][:2])]}
    Path("split.json").write_text(json.dumps(everything))
    words = ("checkpoint=run", "dataset.root=renamed", "dataset.split_file=split.json", *TEST[::2], "query=2", "shot=1")
    code, _, err = metacv("evaluate", *words)
    assert code == 1
    assert f"1 of its 3 classes (new {seen}, ...) were used in training" in err


def test_data_sets_with_the_same_classes_share_their_names():
    names = {name: dataset(name).namespace for name in DATASETS}
    assert names["cifar_fs"] == names["fc100"] == "cifar100"
    assert names["miniimagenet"] == names["tieredimagenet"] == "imagenet"
    assert len({*names.values()}) == len(names) - 2


def dataset(name: str) -> Dataset:
    words = [f"dataset={name}", "dataset.root=."] if name == "image_folder" else [f"dataset={name}"]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", words)
    return build_dataset(OmegaConf.to_container(cfg.dataset), ".")


def test_training_cost_includes_earlier_runs():
    first = Training(
        classes=3, images=10, flops=2.0, seconds=1.5, stages=["a"], trained_on=["x:1"], validated_on=["x:2"]
    )
    second = Training(
        classes=5, images=1, flops=1.0, seconds=1.0, stages=["b"], trained_on=["x:0"], validated_on=["x:2"]
    )
    both = second.after(first)
    assert both == Training(5, 11, 3.0, 2.5, ["a", "b"], ["x:0", "x:1"], ["x:2"])


def test_a_run_does_not_resume_with_another_teacher_at_the_same_path(metacv, trained, tmp_path):
    shutil.copytree(trained("classifier"), "teacher")
    words = ("algo=classifier", *TRAIN, "schedule=constant", "algo.teacher=teacher", "hydra.run.dir=run")
    assert metacv("train", *words, "steps=2")[0] == 0
    assert metacv("train", "resume=run", "steps=4")[0] == 0
    content = torch.load("teacher/best.pt", weights_only=True)
    torch.save(content | {"step": 3}, "teacher/best.pt")
    code, _, err = metacv("train", "resume=run", "steps=6")
    what = f"algo.teacher={tmp_path}/teacher is not the run that run/last.pt learned from; set it to that run"
    assert (code, err) == (1, f"metacv: {what}\n")


def test_results_record_pre_training_on_imagenet(metacv, monkeypatch):
    text = "ResNet18_Weights.IMAGENET1K_V1 of torchvision, trained on ImageNet"
    with monkeypatch.context() as patch:
        patch.setattr(Conv4, "load_pretrained", lambda self: text)
        assert metacv("train", "algo=protonet", *TRAIN, "hydra.run.dir=first")[0] == 0
    words = ("algo=maml", *TRAIN, "init=first", "backbone.running_stats=true", "backbone.norm_scale=true")
    assert metacv("train", *words, "hydra.run.dir=run")[0] == 0
    for run, stages in (("first", 1), ("run", 2)):
        code, out, err = metacv("evaluate", f"checkpoint={run}", *TEST, "hydra.run.dir=test")
        assert (code, err) == (0, "")
        assert f"  after: {text}" in out
        assert (len(results("test")[0]["stages"]), results("test")[0]["stages"][0]) == (stages, text)
