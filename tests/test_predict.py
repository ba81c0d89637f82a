"""`metacv predict`: labels for images, given a few examples of each class."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import bank_of, each, quick
from PIL import Image

from metacv import CONFIG_DIR
from metacv.algorithms.base import Algorithm
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.algorithms.metric.relationnet import RelationNet
from metacv.backbones.conv4 import Conv4
from metacv.data.glyphs import draw_glyphs
from metacv.data.sampler import EpisodeSampler
from metacv.files import read_checked, sha256
from metacv.model import WEIGHTS, build_dataset, load_checkpoint, save_checkpoint, with_head
from metacv.predictor import Support, label
from metacv.results import read_results

CLASSES = ("alpha", "beta 2", "gamma,3", "delta=4", "épsilon (5)")


def lay_out(folder: Path, support: list[int], query: int, seed: int = 3) -> None:
    """Dark glyphs on white paper as PNG files: examples of classes of these sizes, and `query` queries of each."""
    glyphs = draw_glyphs(len(support), max(support) + query, seed)
    for name, own, size in zip(CLASSES, glyphs, support, strict=False):
        for i, glyph in enumerate(own[: size + query]):
            place = folder / ("support" if i < size else "query") / name
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(255 - glyph[0].numpy()).save(place / f"{i:02d}.png")


def table(folder: str) -> list[dict[str, str]]:
    with (Path(folder) / "predictions.csv").open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("sizes", [[1, 3, 2], pytest.param([2] * 5, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("algo", each("matchingnet", "feat"))
def test_a_saved_model_gives_every_image_the_same_label(metacv, trained, algo, sizes):
    lay_out(Path("own"), sizes, query=3)
    words = (f"checkpoint={trained(algo)}", "support=own/support", "query=own/query", "save=kept.pt")
    code, out, err = metacv("predict", *words, "hydra.run.dir=one")
    assert (code, err) == (0, "")
    found = json.loads(Path("one/predictions.json").read_text())
    assert found["support"] == dict(sorted(zip(CLASSES, sizes, strict=False)))
    assert len(found["predictions"]) == 3 * len(sizes)
    for one, row in zip(found["predictions"], table("one"), strict=True):
        assert sum(one["probabilities"].values()) == pytest.approx(1)
        assert one["label"] == max(one["probabilities"], key=one["probabilities"].get) == row["label"]
        assert float(row["probability"]) == one["probability"] == float(row[f"P({one['label']})"])
        assert Path(one["file"]).is_file()
    right = sum(Path(one["file"]).parent.name == one["label"] for one in found["predictions"])
    assert found["accuracy"] == right / 3 / len(sizes)
    assert all(one["truth"] == Path(one["file"]).parent.name for one in found["predictions"])
    assert f"accuracy {100 * right / 3 / len(sizes):.2f} %: {right} of {3 * len(sizes)}" in out
    assert Image.open("one/predictions.png").size[0] > 100

    shutil.rmtree("own/support")
    code, _, err = metacv("predict", "adapted=kept.pt", "query=own/query", "hydra.run.dir=two")
    assert (code, err) == (0, "")
    assert Path("one/predictions.csv").read_bytes() == Path("two/predictions.csv").read_bytes()


@pytest.mark.parametrize("algo", ["maml", "protonet"])
def test_an_inductive_label_does_not_depend_on_the_other_queries(metacv, trained, algo):
    lay_out(Path("own"), [2] * 5, query=2)
    words = (f"checkpoint={trained(algo)}", "support=own/support", "batch_norm=inductive")
    metacv("predict", *words, "query=own/query", "hydra.run.dir=all")
    for row in table("all")[::4]:
        metacv("predict", *words, f"query={row['file']}", "hydra.run.dir=one")
        (alone,) = table("one")
        assert (alone["file"], alone["label"]) == (row["file"], row["label"])
        numbers = [[float(one[name]) for name in one if name.startswith("P(")] for one in (alone, row)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)


def test_predict_agrees_with_evaluation_on_the_same_task():
    """The same images, read from files as support and query, and in an episode."""
    algorithm = conv4_with(ProtoNet)
    sampler = EpisodeSampler(bank_of([20] * 6, shape=(1, 28, 28)), 4, 2, 3)
    rows = sampler.draw(1)
    tasks, images = sampler.tasks(sampler.images, rows), sampler.images[rows[0]]
    support = Support(images[:, :2].flatten(0, 1), (2,) * 4, tuple("abcd"))
    queries = images[:, 2:].flatten(0, 1)
    own = support.task(queries, torch.device("cpu"))
    assert torch.equal(own.support_x, tasks.support_x)
    assert torch.equal(own.support_y, tasks.support_y)
    for mode in ("inductive", "transductive"):
        logits = label(algorithm, support, queries, mode, torch.device("cpu"))
        assert torch.equal(logits, algorithm.predict(tasks, mode)[0])


def as_files(folder: str, images: torch.Tensor) -> None:
    """A folder for each class of images [N, B, 1, H, W]."""
    for c, own in enumerate(images):
        (Path(folder) / str(c)).mkdir(parents=True)
        for i, image in enumerate(own):
            Image.fromarray(image[0].numpy()).save(f"{folder}/{c}/{i}.png")


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["maml", "reptile", "protonet", "simpleshot"])
@pytest.mark.parametrize("mode", ["inductive", "transductive"])
def test_image_files_get_the_same_labels_as_in_evaluation(metacv, algo, mode):
    """In the batch-norm mode of training, also from a saved model."""
    for i, split in enumerate(("train", "val", "test")):
        as_files(f"own/{split}", draw_glyphs(4, 7, seed=i))
        for c in range(4):
            Path(f"own/{split}/{c}").rename(f"own/{split}/{split}{c}")
    words = ("dataset=image_folder", "dataset.root=own", "dataset.size=28", "dataset.color=false", f"batch_norm={mode}")
    small = ("way=3", "shot=2", "query=5", "train_shot=2", "train_query=5", "hydra.run.dir=run")
    assert metacv("train", f"algo={algo}", *words, *quick(algo)[2:], *small)[0] == 0
    assert metacv("evaluate", "checkpoint=run", "episodes=2", "hydra.run.dir=evaluation")[0] == 0
    (evaluated,) = read_results(Path("evaluation/result.json")).results

    checkpoint = load_checkpoint("run")
    bank = build_dataset(checkpoint.config.dataset, "cache").load("test")
    sampler = EpisodeSampler(bank, 3, 2, 5)
    algorithm = with_head(checkpoint.build(), checkpoint.config, checkpoint.centre)
    rows = sampler.draw(2)
    probabilities = algorithm.probabilities(algorithm.predict(sampler.tasks(sampler.images, rows), mode))
    accuracies = []
    for task in range(2):
        images = sampler.images[rows[task]]
        as_files(f"{task}/support", images[:, :2])
        as_files(f"{task}/query", images[:, 2:])
        words = (f"query={task}/query", "hydra.run.dir=labels")
        code, out, _ = metacv("predict", "checkpoint=run", f"support={task}/support", "save=kept.pt", *words)
        assert code == 0
        assert ("batch_norm=transductive: each label depends on" in out) == (mode == "transductive")
        whole = json.loads(Path("labels/predictions.json").read_text())["predictions"]
        found = torch.tensor([[*one["probabilities"].values()] for one in whole])
        torch.testing.assert_close(found, probabilities[task], rtol=1e-3, atol=1e-4)
        accuracies.append(sum(Path(one["file"]).parent.name == one["label"] for one in whole) / 15)
        assert metacv("predict", "adapted=kept.pt", *words)[0] == 0
        assert json.loads(Path("labels/predictions.json").read_text())["predictions"] == whole
    assert str(Path.cwd()).encode() not in Path("kept.pt").read_bytes()
    code, _, err = metacv("evaluate", "checkpoint=kept.pt")
    assert code == 1
    assert err.startswith("metacv: dataset.root=null")
    assert err.count("\n") == 1
    assert sum(accuracies) / 2 == pytest.approx(evaluated.accuracy)
    assert evaluated.batch_norm == mode


def test_out_of_memory_in_transductive_prediction_is_one_clear_line(metacv, trained, monkeypatch):
    lay_out(Path("own"), [1, 1], query=1)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB\nmore")

    monkeypatch.setattr("metacv.algorithms.base.Algorithm.predict", full)
    words = (f"checkpoint={trained('protonet')}", "support=own/support", "query=own/query", "batch_norm=transductive")
    message = "batch_norm=transductive with 2 query images: CUDA out of memory. Tried to allocate 1 TiB; try "
    assert metacv("predict", *words) == (1, "", f"metacv: {message}batch_norm=inductive\n")


def conv4_with(algorithm: type[Algorithm], **settings) -> Algorithm:
    torch.manual_seed(0)
    large_maps = {"downsample": ["max_pool", "max_pool", "none", "none"], "padding": [0, 0, 1, 1]}
    backbone = Conv4((1, 28, 28), channels=8, **(large_maps if algorithm is RelationNet else {}))
    return algorithm(backbone, **settings).eval()


@pytest.mark.parametrize(("kind", "settings"), [(ProtoNet, {}), (RelationNet, {"relation": "mlp"})])
def test_duplicating_an_example_does_not_change_predictions(kind, settings):
    images = torch.randint(0, 256, (10, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    algorithm = conv4_with(kind, **settings)
    uneven = Support(images[[0, 1, 2]], (1, 2), ("a", "b")).task(images[3:], torch.device("cpu"))
    even = Support(images[[0, 0, 1, 2]], (2, 2), ("a", "b")).task(images[3:], torch.device("cpu"))
    ours, theirs = (algorithm.predict(task, "inductive") for task in (uneven, even))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.std(dim=1).min() > 0


def test_relation_networks_scale_sums_to_the_mean_class_size():
    images = torch.randint(0, 256, (10, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    algorithm = conv4_with(RelationNet)
    task = Support(images[:4], (1, 3), ("a", "b")).task(images[4:], torch.device("cpu"))
    with torch.no_grad():
        maps = algorithm.backbone(task.support_x[0])
        classes = 2 * torch.stack([maps[0], maps[1:].mean(0)])  # (1 + 3) / 2 images each
        expected = algorithm.scores(classes.unsqueeze(0), algorithm.backbone(task.query_x[0]).unsqueeze(0))
    torch.testing.assert_close(algorithm.predict(task, "inductive"), expected, rtol=1e-4, atol=1e-6)


def test_weights_that_are_not_finite_are_refused_in_prediction(metacv, trained):
    lay_out(Path("own"), [1, 1], query=1)
    saved = load_checkpoint(trained("protonet")).content
    next(iter(saved["algorithm"].values())).fill_(float("nan"))
    save_checkpoint(Path("nan.pt"), saved)
    code, out, err = metacv("predict", "checkpoint=nan.pt", "support=own/support", "query=own/query")
    assert (code, out) == (1, "")
    assert (
        err == "metacv: nan.pt: the probabilities are not finite: adaptation diverged, or the weights are not finite\n"
    )


def test_a_saved_model_of_a_run_with_listed_splits_can_be_used(metacv, trained):
    content = torch.load(trained("protonet") / "best.pt", weights_only=True)
    dataset = yaml.safe_load((CONFIG_DIR / "dataset/omniglot.yaml").read_text()) | {"split": "file"}
    torch.save(content | {"config": content["config"] | {"dataset": dataset}}, "omniglot.pt")
    lay_out(Path("own"), [2, 2, 2], query=1)
    words = ("checkpoint=omniglot.pt", "support=own/support", "query=own/query", "save=kept.pt")
    assert metacv("predict", *words)[::2] == (0, "")
    assert metacv("predict", "adapted=kept.pt", "query=own/query")[::2] == (0, "")


def test_a_saved_model_contains_no_local_paths(metacv, trained):
    lay_out(Path("own"), [1, 1], query=1)
    metacv("predict", f"checkpoint={trained('protonet')}/last.pt", "support=own/support", "query=own/query",
           "save=kept.pt")  # fmt: skip
    kept = read_checked(Path("kept.pt"))
    assert kept.keys() == WEIGHTS | {"training", "support", "format"}
    assert "data_dir" not in kept["config"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["support=own/support"], "checkpoint=... is missing"),
        (["checkpoint=RUN"], "support=... is missing"),
        ([], "give either checkpoint=RUN and support=FOLDER, or adapted=FILE"),
        (["adapted=RUN", "checkpoint=RUN"], "give either checkpoint=RUN and support=FOLDER, or adapted=FILE"),
        (["adapted=RUN"], "has no support set; save=FILE together with support=FOLDER makes one"),
        (["checkpoint=RUN", "support=nowhere"], "support=nowhere: there is no such folder"),
        (["checkpoint=RUN", "support=own/query/alpha"], "has 0 folders: it needs one for each class, and at least 2"),
        (["checkpoint=RUN", "support=empty"], "support=empty: the class a has no readable image"),
        (["checkpoint=RUN", "support=own/support", "query=nowhere"], "query=nowhere: there is no such file or folder"),
        (["checkpoint=RUN", "support=own/support", "query=empty"], "query=empty: no readable image"),
        (["checkpoint=RUN", "support=own/support", "query=text.png"], "query=text.png: no readable image"),
        (
            ["checkpoint=RUN", "support=own/support", "batch_norm=both"],
            "batch_norm=both: must be one of inductive, transductive",
        ),
        (["checkpoint=RUN", "support=own/support", "save=none/a.pt"], "none/a.pt cannot be written"),
        (["checkpoint=RUN", "support=own/support", "save=own"], "save=own: already exists and is not a file of `save`"),
        (["checkpoint=RUN", "support=own/support", "save=text.png"], "save=text.png: already exists"),
        (["checkpoint=RUN", "support=own/support", "save=RUN/best.pt"], "save=.*/best.pt: already exists"),
        (["checkpoint=nowhere", "support=own/support"], "nowhere: there is no such file"),
        (["checkpoint=own", "support=own/support"], "own has no best.pt"),
        (["checkpoint=text.png", "support=own/support"], "text.png is not a checkpoint of metacv, or is damaged"),
        (["checkpoint=RUN", "support=splits"], "support=splits holds test and train; use one of them"),
        (
            ["checkpoint=RUN", "support=alike"],
            "two class names look the same without unprintable characters; rename one",
        ),
        (["checkpoint=odd.pt", "support=own/support"], r"support: .* \(1, 28, 28\), but odd.pt was .* \(1, 32, 32\)"),
        (["checkpoint=RUN", "support=own/support", "dataset.size=3"], "dataset.size: .* has no such setting"),
        (["checkpoint=RUN", "support=own/support", "algo.metric=near"], "algo.metric=near: must be one of sqeuclidean"),
    ],
)
def test_invalid_input_exits_with_one_line_and_leaves_no_folder(metacv, trained, words, message):
    lay_out(Path("own"), [1, 1], query=1)
    for name in "ab":
        (Path("empty") / name).mkdir(parents=True)
    for place in ("splits/train/a", "splits/test/b", "alike/a\n", "alike/a\t"):
        Path(place).mkdir(parents=True)
    Path("text.png").write_text("text")
    run = trained("protonet")
    save_checkpoint(Path("odd.pt"), load_checkpoint(run).content | {"image_shape": [1, 32, 32]})
    before = sha256(run / "best.pt")
    words = [word.replace("RUN", str(run)) for word in words]
    code, out, err = metacv("predict", "query=own/query", "hydra.run.dir=out", *words)
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("metacv: ")
    assert re.search(message, last), last
    assert sha256(run / "best.pt") == before
    assert not Path("out").exists()


def test_file_names_are_escaped_for_the_terminal_and_for_spreadsheets(metacv, trained):
    lay_out(Path("own"), [1, 1], query=1)
    for kind in ("support", "query"):
        Path(f"own/{kind}/alpha").rename(f"own/{kind}/file")
        Path(f"own/{kind}/beta 2").rename(f"own/{kind}/=2+2\n\x1b[31mred")
    shutil.copy("own/query/file/01.png", "=own\x1b[31m.png")
    words = (f"checkpoint={trained('protonet')}", "support=own/support", "save=kept.pt", "hydra.run.dir=out")
    code, out, err = metacv("predict", *words, "query=own/query")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "by the names of their folders" in out
    assert list(table("out")[0]) == ["file", "label", "probability", "P(=2+2??[31mred)", "P(file)"]
    assert {row["label"] for row in table("out")} <= {"'=2+2??[31mred", "file"}
    code, out, err = metacv("predict", "adapted=kept.pt", "query==own\x1b[31m.png", "hydra.run.dir=out")
    assert (code, err) == (0, "")
    assert out.startswith("=own?[31m.png  ")
    assert [row["file"] for row in table("out")] == ["'=own?[31m.png"]
    assert Path("out/predictions.csv").read_bytes().startswith("\ufefffile,label".encode())  # Excel reads it as UTF-8
    name = os.fsdecode(b"na\xff\n.png")  # no UTF-8, as on an old disk
    shutil.copy("own/query/file/01.png", name)
    assert metacv("predict", "adapted=kept.pt", f"query={name}", "hydra.run.dir=out")[0] == 0
    (one,) = json.loads(Path("out/predictions.json").read_text())["predictions"]
    assert one["file"] == table("out")[0]["file"] == "na??.png"
    code, _, err = metacv("predict", "adapted=kept.pt", "query=\x1b[31m")
    assert err == "metacv: query=?[31m: there is no such file or folder\n"


def test_save_can_overwrite_an_earlier_saved_model(metacv, trained):
    lay_out(Path("own"), [1, 1], query=1)
    words = (f"checkpoint={trained('protonet')}", "support=own/support", "query=own/query", "save=kept.pt")
    assert [metacv("predict", *words)[0] for _ in range(2)] == [0, 0]


def test_unreadable_files_are_named_and_left_out(metacv, trained):
    lay_out(Path("own"), [2, 2], query=2)
    Path("own/query/alpha/notes.txt").write_text("text")
    Path("own/support/alpha/cut.jpg").write_bytes(b"\xff\xd8\xff")
    code, _, err = metacv("predict", f"checkpoint={trained('protonet')}", "support=own/support", "query=own/query",
                          "hydra.run.dir=out")  # fmt: skip
    assert code == 0
    assert "own/query/alpha/notes.txt cannot be read" in err
    assert "own/support/alpha/cut.jpg cannot be read" in err
    assert err.count("1 of ") == 2
    assert len(table("out")) == 4


def test_a_damaged_support_set_is_refused(metacv, trained):
    saved = load_checkpoint(trained("protonet")).content
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    Image.new("L", (28, 28)).save("q.png")
    for kept in (
        {"images": images, "shots": [1, 1], "classes": ["a", "b"]},
        {"images": images, "shots": [3, 0], "classes": ["a", "b"]},
        {"images": images.float(), "shots": [2, 1], "classes": ["a", "b"]},
        {"images": 3, "shots": [2, 1], "classes": ["a", "b"]},
        {"images": images, "shots": [2, 1], "classes": ["a", "a"]},
        {"images": images, "shots": [3], "classes": ["a"]},
        {"images": images, "shots": [2, 1], "classes": ["a", "b\x1b[31m"]},
        {"images": images[:1].expand(3, 1, 28, 28), "shots": [2, 1], "classes": ["a", "b"]},
        "support",
    ):
        save_checkpoint(Path("kept.pt"), saved | {"support": kept})
        code, _, err = metacv("predict", "adapted=kept.pt", "query=q.png")
        assert code == 1
        assert "adapted=kept.pt is damaged" in err
    sparse = {"images": images.to_sparse(), "shots": [2, 1], "classes": ["a", "b"]}
    save_checkpoint(Path("kept.pt"), saved | {"support": sparse})
    code, _, err = metacv("predict", "adapted=kept.pt", "query=q.png")
    assert code == 1
    assert "kept.pt is not a checkpoint of metacv, or is damaged (it names torch._utils._rebuild_sparse_tensor" in err


def test_images_of_any_mode_and_file_name_get_labels(metacv, trained):
    lay_out(Path("own"), [1, 1], query=1)
    colours = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Path("any").mkdir()
    Image.fromarray(colours).save("any/a b=c,(1).jpg")
    Image.fromarray(colours).convert("RGBA").save("any/b.webp")
    code, _, err = metacv("predict", f"checkpoint={trained('protonet')}", "support=own/support",
                          "query=any/a b=c,(1).jpg", "hydra.run.dir=out")  # fmt: skip
    assert (code, err) == (0, "")
    assert [row["file"] for row in table("out")] == ["any/a b=c,(1).jpg"]


def test_copies_within_support_and_between_support_and_query_are_reported(metacv, trained):
    lay_out(Path("own"), [2, 2, 2], query=2)
    words = (f"checkpoint={trained('protonet')}", "support=own/support", "query=own/query")
    assert metacv("predict", *words, "hydra.run.dir=one")[2] == ""
    shutil.copy("own/support/alpha/00.png", "own/support/beta 2/copy.png")
    shutil.copy("own/support/alpha/01.png", "own/query/alpha/copy.png")
    code, _, err = metacv("predict", *words, "hydra.run.dir=two")
    assert code == 0
    assert err.splitlines() == [
        "metacv: warning: support: 1 of 7 images are copies: 1 of images in another class; accuracies may be too high",
        "metacv: warning: query: 1 of 7 images are copies of support images; their labels say nothing about the model",
    ]
