"""From a shell: a few examples of each class in, labels out."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALGORITHMS, bank_of, quick
from PIL import Image

from metacv import checkpoint
from metacv.checkpoint import file_hash
from metacv.cli import quoted
from metacv.config import PredictConfig
from metacv.config_dir import config_dir
from metacv.data.glyphs import draw_glyphs
from metacv.data.sampler import EpisodeSampler
from metacv.model import build_algorithm, build_dataset
from metacv.predict import Support

CLASSES = ("alpha", "beta 2", "gamma,3", "delta=4", "épsilon (5)")


def lay_out(folder: Path, support: list[int], query: int, seed: int = 3) -> None:
    """Dark glyphs on white paper as PNG files: classes of these sizes, and as many queries of each."""
    glyphs = draw_glyphs(len(support), max(support) + query, seed)
    for name, own, size in zip(CLASSES, glyphs, support, strict=False):
        for i, glyph in enumerate(own[: size + query]):
            place = folder / ("support" if i < size else "query") / name
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(255 - glyph[0].numpy()).save(place / f"{i:02d}.png")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
    """A run of each algorithm, trained for four steps."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def trained(metacv, runs):
    def train(algo: str) -> str:
        if not (runs / algo).exists():
            assert metacv("train", *quick(algo), f"hydra.run.dir={runs / algo}")[0] == 0
        return str(runs / algo)

    return train


def table(folder: str) -> list[dict[str, str]]:
    with (Path(folder) / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("sizes", [[2] * 5, [1, 3, 2]], ids=["as trained", "three classes of 1, 3 and 2"])
def test_predict_labels_every_image_and_keeps_what_it_needs(metacv, trained, algo, sizes):
    lay_out(Path("own"), sizes, query=3)
    words = (f"checkpoint={trained(algo)}", "support=own/support", "query=own/query", "save=kept.pt")
    code, out, err = metacv("predict", *words, "hydra.run.dir=one")
    assert (code, err) == (0, "")
    found = json.loads(Path("one/predictions.json").read_text())
    names = [name for name in sorted(CLASSES[: len(sizes)])]
    assert list(found["support"]) == names
    assert len(found["predictions"]) == 3 * len(sizes)
    for one, row in zip(found["predictions"], table("one"), strict=True):
        assert sum(one["probabilities"].values()) == pytest.approx(1)
        assert one["label"] == max(one["probabilities"], key=one["probabilities"].get) == row["label"]
        assert float(row["probability"]) == one["probability"] == float(row[f"P({one['label']})"])
        assert Path(one["file"]).is_file()
    right = sum(Path(one["file"]).parent.name == one["label"] for one in found["predictions"])
    assert f"accuracy {100 * right / 3 / len(sizes):.2f} %: {right} of {3 * len(sizes)}" in out
    assert Image.open("one/predictions.png").size[0] > 100

    shutil.rmtree("own/support")
    code, _, err = metacv("predict", "adapted=kept.pt", "query=own/query", "hydra.run.dir=two")
    assert (code, err) == (0, "")
    assert Path("one/predictions.csv").read_bytes() == Path("two/predictions.csv").read_bytes()


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_label_does_not_depend_on_the_other_queries(metacv, trained, algo):
    lay_out(Path("own"), [2] * 5, query=2)
    words = (f"checkpoint={trained(algo)}", "support=own/support", "norm=inductive")
    metacv("predict", *words, "query=own/query", "hydra.run.dir=all")
    for row in table("all")[::4]:
        metacv("predict", *words, f"query={row['file']}", "hydra.run.dir=one")
        assert table("one") == [row]


def test_predict_agrees_with_evaluation_task_by_task(data_dir):
    """The same images, as files would give them and as an episode has them."""
    config = {"backbone": {"_target_": "metacv.backbones.conv4.Conv4", "channels": 8},
              "algo": {"_target_": "metacv.algorithms.metric.protonet.ProtoNet"},
              "normalize": {"mean": [0.0], "std": [1.0]}}  # fmt: skip
    algorithm = build_algorithm(config, (1, 28, 28))
    sampler = EpisodeSampler(bank_of([20] * 6, shape=(1, 28, 28)), 4, 2, 3)
    rows = sampler.draw(1)
    tasks, images = sampler.gather(rows), sampler.images[rows[0]]
    support = Support(images[:, :2].flatten(0, 1), (2,) * 4, tuple("abcd"))
    own = support.task(images[:, 2:].flatten(0, 1), torch.device("cpu"))
    assert torch.equal(own.support_x, tasks.support_x)
    assert torch.equal(own.support_y, tasks.support_y)
    assert torch.equal(algorithm.predict(own, "inductive"), algorithm.predict(tasks, "inductive"))


def as_files(folder: str, images: torch.Tensor) -> None:
    """A folder for each class of images [N, B, 1, H, W]."""
    for c, own in enumerate(images):
        (Path(folder) / str(c)).mkdir(parents=True)
        for i, image in enumerate(own):
            Image.fromarray(image[0].numpy()).save(f"{folder}/{c}/{i}.png")


@pytest.mark.parametrize("norm", ["inductive", "transductive"])
@pytest.mark.parametrize("algo", ["maml", "protonet", "reptile"])
def test_predict_says_of_files_what_evaluation_says_of_the_same_tasks(metacv, algo, norm):
    """By the norm that the model was trained to be tested with, and from what `save` keeps too."""
    for i, split in enumerate(("train", "val", "test")):
        as_files(f"own/{split}", draw_glyphs(4, 7, seed=i))
        for c in range(4):
            Path(f"own/{split}/{c}").rename(f"own/{split}/{split}{c}")
    words = ("dataset=image_folder", "dataset.root=own", "dataset.size=28", "dataset.color=false", f"norm={norm}")
    small = ("way=3", "shot=2", "query=5", "train_shot=2", "train_query=5", "hydra.run.dir=run")
    assert metacv("train", f"algo={algo}", *words, *quick(algo)[2:], *small)[0] == 0
    assert metacv("evaluate", "checkpoint=run", "episodes=2", "hydra.run.dir=evaluation")[0] == 0
    evaluated = json.loads(Path("evaluation/result.json").read_text())

    saved = checkpoint.load(Path("run/best.pt"))
    bank = build_dataset(saved["config"], "cache").load("test")
    sampler = EpisodeSampler(bank, 3, 2, 5)
    algorithm = build_algorithm(saved["config"], bank.image_shape)
    algorithm.load_state_dict(saved["algorithm"])
    rows = sampler.draw(2)
    probabilities = algorithm.probabilities(algorithm.predict(sampler.gather(rows), norm))
    accuracies = []
    for task in range(2):
        images = sampler.images[rows[task]]
        as_files(f"{task}/support", images[:, :2])
        as_files(f"{task}/query", images[:, 2:])
        words = (f"query={task}/query", "hydra.run.dir=labels")
        code, out, _ = metacv("predict", "checkpoint=run", f"support={task}/support", "save=kept.pt", *words)
        assert code == 0
        assert ("norm=transductive: each label depends on" in out) == (norm == "transductive")
        whole = json.loads(Path("labels/predictions.json").read_text())["predictions"]
        found = torch.tensor([[*one["probabilities"].values()] for one in whole])
        torch.testing.assert_close(found, probabilities[task], rtol=1e-3, atol=1e-4)
        accuracies.append(sum(Path(one["file"]).parent.name == one["label"] for one in whole) / 15)
        assert metacv("predict", "adapted=kept.pt", *words)[0] == 0
        assert json.loads(Path("labels/predictions.json").read_text())["predictions"] == whole
    assert str(Path.cwd()).encode() not in Path("kept.pt").read_bytes()
    code, _, err = metacv("evaluate", "checkpoint=kept.pt")
    assert (code, err) == (1, "metacv: dataset.root=null: it must name a folder of images\n")
    assert sum(accuracies) / 2 == pytest.approx(evaluated["accuracy"])
    assert evaluated["norm"] == norm


def test_more_transductive_queries_than_memory_holds_are_told(metacv, trained, monkeypatch):
    lay_out(Path("own"), [1, 1], query=1)
    run = trained("protonet")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB\nmore")

    monkeypatch.setattr("metacv.algorithms.base.Algorithm.predict", full)
    words = (f"checkpoint={run}", "support=own/support", "query=own/query", "norm=transductive")
    said = "norm=transductive with 2 query images: CUDA out of memory. Tried to allocate 1 TiB; try norm=inductive"
    assert metacv("predict", *words) == (1, "", f"metacv: {said}\n")


def algorithm_of(target: str, **settings):
    conv4 = {"_target_": "metacv.backbones.conv4.Conv4", "channels": 8}
    if "relation" in target:
        conv4 |= {"downsample": ["max_pool", "max_pool", "none", "none"], "padding": [0, 0, 1, 1]}
    algo = {"_target_": f"metacv.algorithms.{target}"} | settings
    config = {"backbone": conv4, "algo": algo, "normalize": {"mean": [0.0], "std": [1.0]}}
    torch.manual_seed(0)
    return build_algorithm(config, (1, 28, 28))


@pytest.mark.parametrize(
    ("target", "settings"), [("protonet.ProtoNet", {}), ("relationnet.RelationNet", {"relation": "mlp"})]
)
def test_an_image_that_is_there_twice_counts_once(target, settings):
    images = torch.randint(0, 256, (10, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    algorithm = algorithm_of(target, **settings)
    uneven = Support(images[[0, 1, 2]], (1, 2), ("a", "b")).task(images[3:], torch.device("cpu"))
    even = Support(images[[0, 0, 1, 2]], (2, 2), ("a", "b")).task(images[3:], torch.device("cpu"))
    ours, theirs = (algorithm.predict(task, "inductive") for task in (uneven, even))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.std(dim=1).min() > 0


def test_relation_networks_sum_a_class_as_if_all_had_the_mean_size():
    images = torch.randint(0, 256, (10, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    algorithm = algorithm_of("relationnet.RelationNet").eval()
    task = Support(images[:4], (1, 3), ("a", "b")).task(images[4:], torch.device("cpu"))
    with torch.no_grad():
        maps = algorithm.backbone(task.support_x[0])
        classes = 2 * torch.stack([maps[0], maps[1:].mean(0)])  # (1 + 3) / 2 images each
        expected = algorithm.scores(classes.unsqueeze(0), algorithm.backbone(task.query_x[0]).unsqueeze(0))
    torch.testing.assert_close(algorithm.predict(task, "inductive"), expected, rtol=1e-4, atol=1e-6)


def test_weights_that_are_not_finite_label_nothing(metacv, trained):
    lay_out(Path("own"), [1, 1], query=1)
    saved = checkpoint.load(Path(trained("protonet")) / "best.pt")
    next(iter(saved["algorithm"].values())).fill_(float("nan"))
    checkpoint.save(Path("nan.pt"), saved)
    code, out, err = metacv("predict", "checkpoint=nan.pt", "support=own/support", "query=own/query")
    assert (code, out) == (1, "")
    assert err == "metacv: nan.pt: the probabilities are not finite; the weights are not, or adaptation diverges\n"


def test_what_is_kept_holds_nothing_of_this_machine(metacv, trained):
    lay_out(Path("own"), [1, 1], query=1)
    metacv("predict", f"checkpoint={trained('protonet')}/last.pt", "support=own/support", "query=own/query",
           "save=kept.pt")  # fmt: skip
    kept = checkpoint.load(Path("kept.pt"))
    assert kept.keys() == checkpoint.WEIGHTS | {"support"}
    assert "data_dir" not in kept["config"]


@pytest.mark.parametrize("value", ["a'b", "a\\", "a\\'b", "${x}", "a b,c=(d)", "\\\\server\\'s", "a\\b"])
def test_paths_of_any_characters_come_through_hydra(value):
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="predict_schema", node=PredictConfig)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        assert compose("predict", [f"query={quoted(value)}"]).query == value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["support=own/support"], "checkpoint=... is missing"),
        (["checkpoint=RUN"], "support=... is missing"),
        ([], "give checkpoint=RUN and support=FOLDER, or adapted=FILE alone"),
        (["adapted=RUN", "support=own/support"], "give checkpoint=RUN and support=FOLDER, or adapted=FILE alone"),
        (["adapted=RUN"], "holds no support set; save=FILE beside support=FOLDER makes one"),
        (["checkpoint=RUN", "support=nowhere"], "support=nowhere: there is no such folder"),
        (["checkpoint=RUN", "support=own/query/alpha"], "holds 0 folders: it wants one for each class, and at least 2"),
        (["checkpoint=RUN", "support=empty"], "support=empty: the class a has no readable image"),
        (["checkpoint=RUN", "support=own/support", "query=nowhere"], "query=nowhere: there is no such file or folder"),
        (["checkpoint=RUN", "support=own/support", "query=empty"], "query=empty: no readable image"),
        (["checkpoint=RUN", "support=own/support", "query=text.png"], "query=text.png: no readable image"),
        (["checkpoint=RUN", "support=own/support", "norm=both"], "norm=both: one of inductive, transductive"),
        (["checkpoint=RUN", "support=own/support", "save=none/a.pt"], "none/a.pt cannot be written"),
        (["checkpoint=RUN", "support=own/support", "save=own"], "save=own: is there already, and is not a model that"),
        (["checkpoint=RUN", "support=own/support", "save=text.png"], "save=text.png: is there already"),
        (["checkpoint=RUN", "support=own/support", "save=RUN/best.pt"], "save=.*/best.pt: is there already"),
        (["checkpoint=nowhere", "support=own/support"], "nowhere: there is no such file"),
        (["checkpoint=own", "support=own/support"], "own holds no best.pt"),
        (["checkpoint=text.png", "support=own/support"], "text.png is not a checkpoint of metacv, or is damaged"),
        (["checkpoint=RUN", "support=splits"], "support=splits holds test and train: give one of them"),
        (["checkpoint=RUN", "support=alike"], "two classes whose names cannot be printed look the same; rename one"),
        (["checkpoint=odd.pt", "support=own/support"], r"support: .* \(1, 28, 28\), and odd.pt was .* \(1, 32, 32\)"),
        (["checkpoint=RUN", "support=own/support", "dataset.size=3"], "dataset.size: .* has no such setting"),
        (["checkpoint=RUN", "support=own/support", "algo.metric=near"], "algo.metric=near: not one of sqeuclidean"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(metacv, trained, words, said):
    lay_out(Path("own"), [1, 1], query=1)
    for name in "ab":
        (Path("empty") / name).mkdir(parents=True)
    for place in ("splits/train/a", "splits/test/b", "alike/a\n", "alike/a\t"):
        Path(place).mkdir(parents=True)
    Path("text.png").write_text("text")
    run = trained("protonet")
    checkpoint.save(Path("odd.pt"), checkpoint.load(Path(run) / "best.pt") | {"image_shape": [1, 32, 32]})
    before = file_hash(Path(run) / "best.pt")
    words = [word.replace("RUN", run) for word in words]
    code, out, err = metacv("predict", "query=own/query", *words)
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("metacv: ")
    assert re.search(said, last), last
    assert file_hash(Path(run) / "best.pt") == before


def test_names_of_strangers_neither_reach_the_terminal_nor_are_computed_by_a_spreadsheet(metacv, trained):
    lay_out(Path("own"), [1, 1], query=1)
    for kind in ("support", "query"):
        Path(f"own/{kind}/alpha").rename(f"own/{kind}/file")
        Path(f"own/{kind}/beta 2").rename(f"own/{kind}/=2+2\n\x1b[31mred")
    shutil.copy("own/query/file/01.png", "=own\x1b[31m.png")
    words = (f"checkpoint={trained('protonet')}", "support=own/support", "save=kept.pt", "hydra.run.dir=out")
    code, out, err = metacv("predict", *words, "query=own/query")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "by the folders that they lie in" in out
    assert list(table("out")[0]) == ["file", "label", "probability", "P(=2+2??[31mred)", "P(file)"]
    assert {row["label"] for row in table("out")} <= {"'=2+2??[31mred", "file"}
    code, out, err = metacv("predict", "adapted=kept.pt", "query==own\x1b[31m.png", "hydra.run.dir=out")
    assert (code, err) == (0, "")
    assert out.startswith("=own?[31m.png  ")
    assert [row["file"] for row in table("out")] == ["'=own\x1b[31m.png"]
    code, _, err = metacv("predict", "adapted=kept.pt", "query=\x1b[31m")
    assert err == "metacv: query=?[31m: there is no such file or folder\n"


def test_a_kept_model_may_be_kept_anew(metacv, trained):
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
    saved = checkpoint.load(Path(trained("protonet")) / "best.pt")
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
        {"images": images.to_sparse(), "shots": [2, 1], "classes": ["a", "b"]},
        "support",
    ):
        checkpoint.save(Path("kept.pt"), saved | {"support": kept})
        code, _, err = metacv("predict", "adapted=kept.pt", "query=q.png")
        assert code == 1
        assert "adapted=kept.pt is damaged" in err


def test_photographs_of_any_kind_can_be_asked_about(metacv, trained):
    lay_out(Path("own"), [1, 1], query=1)
    colours = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Path("any").mkdir()
    Image.fromarray(colours).save("any/a b=c,(1).jpg")
    Image.fromarray(colours).convert("RGBA").save("any/b.webp")
    code, _, err = metacv("predict", f"checkpoint={trained('protonet')}", "support=own/support",
                          "query=any/a b=c,(1).jpg", "hydra.run.dir=out")  # fmt: skip
    assert (code, err) == (0, "")
    assert [row["file"] for row in table("out")] == ["any/a b=c,(1).jpg"]
