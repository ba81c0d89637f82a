"""Fine-tuning the network on each task (head.adapt=backbone): against an independent loop, and its use."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Identity, SmoothNet, random_tasks
from PIL import Image
from torch import Tensor, nn

from metacv.algorithms.heads.base import WithHead
from metacv.algorithms.heads.finetune import Finetune, Tuned
from metacv.algorithms.heads.ncm import NearestMean
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.backbones.base import Backbone
from metacv.config import AugmentConfig
from metacv.data.task import TaskBatch
from metacv.data.transforms import Augment
from metacv.evaluate import best_rate

TUNE = ("head=finetune", "head.adapt=backbone")
FLIP = AugmentConfig(flip=True)
pytestmark = pytest.mark.usefixtures("may_be_at_chance")


class Linear(Backbone):
    """Features [3] are a matrix times the numbers of an image."""

    def __init__(self, numbers: int = 2) -> None:
        super().__init__()
        self.out_shape = (3,)
        self.weight = nn.Parameter(torch.randn(3, numbers, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def tuned(backbone: Backbone, augment: AugmentConfig = FLIP, **settings) -> WithHead:
    return Finetune(adapt="backbone", **settings).on(ProtoNet(backbone), augment)


def with_statistics(seed: int = 0) -> SmoothNet:
    """A network whose running statistics differ from those of any batch."""
    torch.manual_seed(seed)
    network = SmoothNet(running_stats=True)
    for norm in (network.norm1, network.norm2):
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.5, 2)
    return network


def test_three_steps_are_those_of_an_independent_loop():
    tasks = random_tasks(tasks=1, way=3, shot=2, shape=(1, 1, 2), dtype=torch.float64)
    model = tuned(Linear().double(), steps=3, lr=0.05, scale=4.0)
    support, query = (x[0].flatten(1).numpy() for x in (tasks.support_x, tasks.query_x))
    labels = tasks.support_y[0].numpy()

    def logits(weight: np.ndarray, images: np.ndarray) -> np.ndarray:
        own, given = (x @ weight.T for x in (support, images))
        own, given = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (own, given))
        means = np.stack([own[labels == c].mean(0) for c in range(3)])
        return -4.0 * ((given[:, None] - means) ** 2).sum(-1)

    def loss(weight: np.ndarray, images: np.ndarray) -> float:
        own = logits(weight, images)
        return float((np.log(np.exp(own).sum(1)) - own[np.arange(len(labels)), labels]).mean())

    def gradient(weight: np.ndarray, images: np.ndarray) -> np.ndarray:
        steps = 1e-6 * np.eye(weight.size).reshape(-1, *weight.shape)
        return (
            np.array([loss(weight + s, images) - loss(weight - s, images) for s in steps]).reshape(weight.shape) / 2e-6
        )

    weight = model.backbone.weight.detach().numpy().copy()
    flips = np.stack([Augment(0, True, 0.0, seed=i).draw(3)[:, 2] for i in range(6)])  # of image i, in each step
    assert 0 < flips.mean() < 1
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(3):  # Adam (Kingma & Ba, 2015), algorithm 1
        found = gradient(weight, np.where(flips[:, step, None] == 1, support[:, ::-1], support))
        mean, square = 0.9 * mean + 0.1 * found, 0.999 * square + 0.001 * found**2
        scaled = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
        weight -= 0.05 * scaled[0] / (np.sqrt(scaled[1]) + 1e-8)
    assert np.abs(model.predict(tasks, "inductive")[0].numpy() - logits(weight, query)).max() < 1e-6
    assert np.abs(logits(weight, query) - logits(model.backbone.weight.detach().numpy(), query)).max() > 0.1


def test_tuning_learns_to_ignore_numbers_that_say_nothing():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat_interleave(20)
    images = torch.rand(2, 40, 3, generator=generator) * torch.tensor([0.3, 1.0, 0.0])  # the second says nothing
    images += torch.stack([0.3 * labels, 0 * labels, 0.5 + 0 * labels], 1)
    support, query = images.view(2, 1, 40, 3, 1, 1)
    own = labels.unsqueeze(0)
    tasks = TaskBatch(support, own, query, own, 2, torch.arange(2).unsqueeze(0))
    before, after = (
        float((tuned(Linear(3), lr=lr).predict(tasks, "inductive").argmax(-1) == labels).float().mean())
        for lr in (0, 0.03)
    )
    assert after > before + 0.1, (before, after)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("batch_norm", ["inductive", "transductive"])
@pytest.mark.parametrize("network", [SmoothNet(), with_statistics()])
def test_a_rate_of_zero_classifies_as_the_nearest_class_mean(network, batch_norm, flip):
    tasks = random_tasks()
    plain = WithHead(ProtoNet(network), NearestMean(flip=flip), FLIP).predict(tasks, batch_norm)
    assert torch.equal(tuned(network, lr=0, flip=flip, scale=10.0).predict(tasks, batch_norm), 10 * plain)


@pytest.mark.parametrize("batch_norm", ["inductive", "transductive"])
@pytest.mark.parametrize("frozen", [False, True])
def test_each_task_starts_from_the_same_weights_which_stay_as_they_are(batch_norm, frozen):
    tasks, network = random_tasks(tasks=3), with_statistics().requires_grad_(not frozen)
    model = tuned(network, AugmentConfig(crop=1, flip=True), steps=4, lr=0.01)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model.predict(tasks, batch_norm)
    assert not torch.allclose(logits, tuned(network, lr=0).predict(tasks, batch_norm), atol=1e-3)
    assert torch.equal(model.predict(tasks, batch_norm), logits)
    one_by_one = [model.predict(one, batch_norm) for one in reversed([*tasks.split(1)])]
    assert torch.equal(torch.cat(one_by_one[::-1]), logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad is not frozen for p in model.parameters())
    assert model.training
    assert network.norm1.training
    assert network.norm1.track_running_stats


@pytest.mark.parametrize("network", [SmoothNet(), with_statistics()])
def test_inductive_logits_do_not_depend_on_the_other_queries(network):
    tasks = random_tasks()
    model = tuned(network, steps=2, lr=0.01)
    few = replace(tasks, query_x=tasks.query_x[:, 2:5], query_y=tasks.query_y[:, 2:5])
    assert torch.allclose(model.predict(few, "inductive"), model.predict(tasks, "inductive")[:, 2:5], atol=1e-5)


def test_images_are_shifted_where_training_had_no_augmentation():
    drawn = []

    class Watched(Identity):
        def forward(self, x: Tensor) -> Tensor:
            drawn.append(x)
            return super().forward(x) * self.factor

        def __init__(self) -> None:
            super().__init__((1, 16, 16))
            self.factor = nn.Parameter(torch.ones(()))

    tasks = random_tasks(tasks=1, way=2, shot=1, shape=(1, 16, 16))
    tuned(Watched(), AugmentConfig(), steps=1, lr=0.1).predict(tasks, "inductive")
    support, pseudo = drawn[0].split(2)
    assert not torch.equal(pseudo, support)
    for own, changed in zip(support, pseudo, strict=True):
        padded = nn.functional.pad(own, [2] * 4, "reflect")
        shifts = [padded[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
        assert any(torch.equal(changed, shifted) for shifted in shifts)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["maml", "protonet", "classifier"])
def test_every_method_with_a_network_takes_the_head(metacv, trained, algo):
    words = ("evaluate", f"checkpoint={trained(algo)}", "episodes=2", "query=2", "batch_norm=both")
    for folder, head in (("a", ("head=ncm",)), ("b", (*TUNE, "head.lr=0"))):
        assert metacv(*words, *head, f"hydra.run.dir={folder}")[0] == 0
    assert np.array_equal(np.load("a/accuracies.npy"), np.load("b/accuracies.npy"))


def test_a_rate_that_diverges_on_validation_episodes_is_not_chosen(metacv, trained, monkeypatch):
    monkeypatch.setattr("metacv.evaluate.RATED_ON", 3)
    monkeypatch.setattr("metacv.evaluate.RATES", (0.0, 1e9))
    code, out, err = metacv("evaluate", f"checkpoint={trained('protonet')}", *TUNE, "head.steps=2", "episodes=2")
    assert (code, err) == (0, "")
    assert re.search(r"head.lr=0, chosen on 3 validation episodes \(0: [1-9][0-9.]* %, 1e\+09: 0.0 %\)", out)


def test_evaluate_chooses_the_rate_on_validation_episodes_and_records_it(metacv, trained, monkeypatch):
    monkeypatch.setattr("metacv.evaluate.RATED_ON", 3)
    monkeypatch.setattr("metacv.evaluate.RATES", (0.0, 0.001, 0.1))
    shutil.copytree(trained("protonet"), "run")
    words = ("evaluate", "checkpoint=run", *TUNE, "head.steps=2", "query=5")
    code, out, err = metacv(*words, "episodes=4", "hydra.run.dir=auto")
    assert (code, err) == (0, "")
    result = json.loads(Path("auto/result.json").read_text())["results"][0]
    chosen = result["chosen"]
    assert (chosen["split"], chosen["episodes"], [*chosen["accuracy"]]) == ("val", 3, ["0", "0.001", "0.1"])
    assert result["changes"]["head.lr"] == chosen["head.lr"]
    assert f"inductive: head.lr={chosen['head.lr']:g}, chosen on 3 validation episodes (0: " in out
    found = {}
    for rate, accuracy in chosen["accuracy"].items():
        metacv(*words, f"head.lr={rate}", "split=val", "episodes=3", "hydra.run.dir=val")
        found[float(rate)] = torch.from_numpy(np.load("val/accuracies.npy"))
        assert float(found[float(rate)].mean()) == pytest.approx(accuracy)
    assert chosen["head.lr"] == best_rate(found)
    metacv(*words, f"head.lr={chosen['head.lr']}", "episodes=4", "hydra.run.dir=given")
    assert np.array_equal(np.load("given/accuracies.npy"), np.load("auto/accuracies.npy"))


@pytest.mark.parametrize(
    ("gains", "best"),
    [
        ({0.1: [0.1, 0.2, 0.3, 0.2], 0.2: [0.1, 0.1, 0.1, 0.1]}, 0.1),
        ({0.1: [0.6, -0.5, 0.6, -0.5], 0.2: [0.01, 0.01, 0.01, 0.01]}, 0.2),  # the first gains more, by chance
        ({0.1: [0.6, -0.5, 0.6, -0.5], 0.2: [-0.1, -0.1, -0.1, -0.1]}, 0.0),
        ({0.1: [0.0, 0.0, 0.0, 0.0]}, 0.0),
    ],
)
def test_a_rate_is_chosen_only_if_its_gain_exceeds_its_standard_error(gains, best):
    plain = torch.tensor([0.3, 0.6, 0.5, 0.4])
    assert best_rate({0.0: plain} | {rate: plain + torch.tensor(own) for rate, own in gains.items()}) == best


def photos(folder: str, count: int) -> None:
    generator = np.random.default_rng(0)
    for level, name in ((40, "dark"), (200, "light")):
        for number in range(count):
            place = Path(folder, name, f"{number}.png")
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((level + generator.integers(0, 40, (28, 28))).astype("uint8")).save(place)


def test_predict_tunes_once_and_a_saved_model_tunes_again_to_the_same_labels(metacv, trained, monkeypatch):
    calls, tune = [], Tuned.tuned
    monkeypatch.setattr(Tuned, "tuned", lambda *given: calls.append(1) or tune(*given))
    monkeypatch.setattr("metacv.predictor.QUERIES_AT_ONCE", 4)
    shutil.copytree(trained("protonet"), "run")
    photos("examples", 2)
    photos("query", 5)
    words = ("predict", "checkpoint=run", *TUNE, "head.lr=0.01", "head.steps=2", "support=examples", "query=query")
    code, out, _ = metacv(*words, "save=model.pt", "hydra.run.dir=a")
    assert code == 0
    assert "accuracy" in out
    assert calls == [1]
    assert metacv("predict", "adapted=model.pt", "query=query", "hydra.run.dir=b")[0] == 0
    assert Path("a/predictions.csv").read_bytes() == Path("b/predictions.csv").read_bytes()
    metacv("predict", "adapted=model.pt", "head=ncm", "query=query", "hydra.run.dir=c")
    assert Path("a/predictions.csv").read_bytes() != Path("c/predictions.csv").read_bytes()
    code, _, err = metacv("predict", "adapted=model.pt", "query=query", "unknown=true")
    assert (code, err.count("\n")) == (1, 1)
    assert "unknown=true: not available with head.adapt=backbone" in err
    assert (
        "export: not available with head.adapt=backbone" in metacv("export", "adapted=model.pt", "file=model.onnx")[2]
    )


def test_what_cannot_be_is_refused_in_one_line(metacv, trained):
    shutil.copytree(trained("protonet"), "run")
    photos("examples", 2)
    commands = {
        ("predict", "checkpoint=run", "support=examples", "query=examples"): "head.lr=auto: only evaluate and compare",
        (
            "train",
            "algo=protonet",
            "dataset=glyphs",
            "dataset.classes={train:6,val:6,test:6}",
        ): "head.adapt=backbone: is for evaluate and predict",
        ("evaluate", "checkpoint=run", "calibrate=val", "shot=2"): "calibrate=val: not available with head.adapt",
        ("evaluate", "checkpoint=run", "way=9"): "way=9, but ",
        ("evaluate", "checkpoint=run", "split=val"): "head.lr=auto: split=val: the test must not have the classes of",
        ("evaluate", "checkpoint=run", "head.cosine=true"): "cosine=true: only with adapt=head",
        ("evaluate", "checkpoint=run", "head.adapt=head", "head.lr=0"): "lr=0: must be above 0 with adapt=head",
        ("evaluate", "checkpoint=run", "head.lr=-1"): "head.lr=-1: must be a number from 0 to 1000000000 or",
        ("evaluate", "checkpoint=run", "head.steps=0"): "head.steps=0: must be ",
        ("evaluate", "checkpoint=run", "head.lr=1e9", "head.steps=2", "episodes=2"): "diverged with head.lr=1000000000",
    }
    for words, text in commands.items():
        code, _, err = metacv(words[0], *TUNE, *words[1:])
        assert (code, err.count("\n")) == (1, 1), err
        assert text in err
