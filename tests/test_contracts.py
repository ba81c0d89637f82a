"""Requirements for every method, backbone and data set. The tests find all YAML files, including new ones."""

import hashlib
import inspect
import re
import socket
import typing
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import pytest
import torch
from conftest import ALGORITHMS, BACKBONES, DATASETS, assert_same
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from metacv import CONFIG_DIR, config
from metacv.algorithms.base import Algorithm
from metacv.backbones.base import Backbone
from metacv.backbones.batch_norm import batch_norms
from metacv.completion import CHOICES
from metacv.config import TrainConfig, typed
from metacv.data.bank import SPLITS, Dataset
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.data.task import TaskBatch
from metacv.distributed import Ranks
from metacv.episodes import evaluate_episodes
from metacv.errors import UserError
from metacv.model import build_dataset, build_node, load_checkpoint, save_checkpoint, target_class
from metacv.run import Run
from metacv.train import prepare, training_step

T = TypeVar("T")
TINY = ("dataset.classes={train:6,val:6,test:4}", "way=3", "query=3", "steps=4", "meta_batch=2", "eval_episodes=4")
# Where a class has the setting.
FAST = {"backbone": {"channels": 8, "width": 1}, "algo": {"eval_inner_steps": 2}}
MODES = typing.get_args(config.BatchNormMode)
GROUPS = {"algo": Algorithm, "backbone": Backbone, "dataset": Dataset}
ALL = [*(("algo", name) for name in ALGORITHMS), *(("backbone", name) for name in BACKBONES)]
ALL += [("dataset", name) for name in DATASETS]

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
every_backbone = pytest.mark.parametrize("name", BACKBONES)
every_dataset = pytest.mark.parametrize("name", DATASETS)


@cache
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", list(overrides))


def node_of(group: str, name: str, **changes: Any) -> dict[str, Any]:
    """The settings of a class, with those of FAST and `changes` where it has them."""
    node = OmegaConf.to_container(composed(f"{group}={name}")[group], resolve=True)
    changes = FAST.get(group, {}) | changes
    return node | {key: value for key, value in changes.items() if key in node}


def attempt(function: Callable[[], T]) -> tuple[T | None, str]:
    """The result and "", or None and the text of the UserError."""
    try:
        return function(), ""
    except UserError as error:
        return None, str(error)


# Methods


def settings_of(algo: str, data_dir: Path) -> TrainConfig:
    settings = typed(composed(f"algo={algo}", *TINY), TrainConfig)
    fast = {}
    for group, changes in FAST.items():
        node = getattr(settings, group)
        fast[group] = node | {key: value for key, value in changes.items() if key in node}
    return replace(settings, data_dir=str(data_dir), device="cpu", **fast)


def new_run(algo: str, data_dir: Path) -> tuple[Run, EpisodeList]:
    return prepare(settings_of(algo, data_dir), [], Ranks())


def train(run: Run, steps: int) -> Run:
    if run.optimizer is not None:  # otherwise nothing is trained
        run.window += [training_step(run, Ranks()) for _ in range(steps)]
    return run


@pytest.fixture(scope="module")
def after_two_steps(data_dir):
    """A run after two steps with its validation episodes. Tests must not change it."""

    @cache
    def trained(algo: str) -> SimpleNamespace:
        run, validation = new_run(algo, data_dir)
        for norm in batch_norms(run.algorithm):
            norm.momentum = None  # running statistics are then the mean over the steps, so that features have size 1
        return SimpleNamespace(run=train(run, 2), algorithm=run.algorithm, validation=validation)

    return trained


def fingerprint(algorithm: Algorithm) -> str:
    digest = hashlib.sha256()
    for name, value in [*algorithm.named_parameters(), *algorithm.named_buffers()]:
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def with_queries(tasks: TaskBatch, rows: Tensor) -> TaskBatch:
    return replace(tasks, query_x=tasks.query_x[:, rows], query_y=tasks.query_y[:, rows])


@every_algorithm
def test_training_gives_finite_gradients_to_every_trainable_parameter(name, after_two_steps):
    run = after_two_steps(name).run
    if run.optimizer is None:
        assert not any(p.requires_grad for p in run.algorithm.parameters())
        return
    assert run.step == 2
    for parameter, p in run.algorithm.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, parameter
            assert p.grad.isfinite().all(), parameter
    assert any(p.grad.any() for p in run.algorithm.parameters() if p.grad is not None)
    for scalars in run.window:
        assert all(value.dim() == 0 and value.isfinite() for value in scalars.values())


@every_algorithm
def test_a_resumed_run_equals_one_without_interruption_to_the_bit(name, data_dir, tmp_path):
    straight, _ = new_run(name, data_dir)
    train(straight, 2)
    save_checkpoint(tmp_path / "last.pt", straight.state())
    expected = train(straight, 2).state()
    resumed, _ = new_run(name, data_dir)
    torch.manual_seed(5)
    resumed.load(load_checkpoint(tmp_path, "last.pt"))
    state = train(resumed, 2).state()
    for own in ("seconds", "hardware"):
        del expected[own], state[own]
    assert_same(state, expected)


@every_algorithm
@pytest.mark.parametrize("mode", MODES)
def test_evaluating_twice_gives_the_same_accuracies_and_changes_no_value(name, mode, after_two_steps):
    trained = after_two_steps(name)
    before, random_state = fingerprint(trained.algorithm), torch.get_rng_state()
    first = evaluate_episodes(trained.algorithm, trained.validation, mode)
    assert first.shape == (len(trained.validation),)
    assert ((first >= 0) & (first <= 1)).all()
    assert torch.equal(evaluate_episodes(trained.algorithm, trained.validation, mode), first)
    assert fingerprint(trained.algorithm) == before
    assert torch.equal(torch.get_rng_state(), random_state)


@every_algorithm
def test_inductive_probabilities_do_not_depend_on_the_other_queries(name, after_two_steps):
    trained = after_two_steps(name)
    tasks = next(trained.validation.batches(2))

    def probabilities(rows: Tensor) -> Tensor:
        return trained.algorithm.probabilities(trained.algorithm.predict(with_queries(tasks, rows), "inductive"))

    rows = torch.arange(tasks.query_x.shape[1])
    whole = probabilities(rows)
    assert (whole >= 0).all()
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, len(rows)))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    for some in (order, rows[:1], rows[1:6]):
        torch.testing.assert_close(probabilities(some), whole[:, some], rtol=1e-5, atol=1e-5)


@every_algorithm
def test_a_saved_model_predicts_the_same_after_loading(name, after_two_steps, tmp_path):
    trained = after_two_steps(name)
    save_checkpoint(tmp_path / "best.pt", trained.run.weights())
    loaded = load_checkpoint(tmp_path).build()
    tasks = next(trained.validation.batches(2))
    for mode in MODES:
        assert torch.equal(loaded.predict(tasks, mode), trained.algorithm.predict(tasks, mode))


@every_algorithm
@pytest.mark.parametrize("way", [2, 5])
def test_a_model_classifies_tasks_of_another_way(name, way, after_two_steps):
    trained = after_two_steps(name)
    sampler = EpisodeSampler(trained.validation.sampler.bank, way, shot=2, query=1)
    assert trained.run.config.way != way
    tasks = sampler.sample(2)
    for mode in MODES:
        logits = trained.algorithm.predict(tasks, mode)
        assert logits.shape == (2, way, way)
        assert logits.isfinite().all()


# Backbones


@every_backbone
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 84, 84)], ids=["28 grey", "84 colour"])
def test_a_backbone_gives_features_of_its_shape_and_finite_gradients(name, shape):
    torch.manual_seed(0)
    backbone, error = attempt(lambda: build_node("backbone", node_of("backbone", name), Backbone, image_shape=shape))
    if backbone is None:  # a network may need larger images, and must say so
        assert shape == (1, 28, 28)
        assert "images of 28x28" in error
        return
    images = torch.rand(2, *shape)
    features = backbone.features(images)
    assert features.shape == (2, backbone.features_dim)
    if len(backbone.out_shape) == 3:
        maps = backbone.maps(images)
        assert maps.shape == (2, *backbone.out_shape)
    trainable = {parameter: p for parameter, p in backbone.named_parameters() if p.requires_grad}
    if trainable:
        (features * torch.randn_like(features)).sum().backward()
    for parameter, p in trainable.items():
        assert p.grad is not None, parameter
        assert p.grad.isfinite().all(), parameter


@every_backbone
def test_with_running_statistics_features_of_an_image_do_not_depend_on_the_batch(name):
    """Evaluation relies on this when it caches features."""
    torch.manual_seed(0)
    backbone = build_node("backbone", node_of("backbone", name), Backbone, image_shape=(3, 84, 84)).eval()
    if any(norm.running_mean is None for norm in batch_norms(backbone)):
        return
    images = torch.rand(2, 3, 84, 84)
    with torch.no_grad():
        torch.testing.assert_close(backbone.features(images[1:]), backbone.features(images)[1:], rtol=1e-4, atol=1e-5)


# Data sets


def without_network(*_: object, **__: object) -> None:
    raise OSError("tests have no network")


@every_dataset
def test_splits_share_no_class_and_missing_data_are_reported_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "socket", without_network)
    raw = OmegaConf.to_container(composed(f"dataset={name}").dataset, resolve=False)
    node = {key: str(tmp_path / "missing") if value == "???" else value for key, value in raw.items()}
    if isinstance(node.get("classes"), dict):  # fewer, to be drawn in less time
        node["classes"] = {split: 4 for split in SPLITS}
    dataset = build_dataset(node, str(tmp_path / "data"))
    banks, error = attempt(lambda: {split: dataset.load(split) for split in SPLITS})
    if banks is None:
        assert re.search(r"data_dir|root", error)
        assert "\n" not in error
        return
    names = [class_name for bank in banks.values() for class_name in bank.class_names]
    assert len({*names}) == len(names)
    images = [image.numpy().tobytes() for bank in banks.values() for image in bank.images]
    assert len({*images}) == len(images)


# Settings and the choices that YAML comments name, which completion and help show


def literals(hint: Any) -> set[str]:
    """All values of the Literals in a type."""
    if typing.get_origin(hint) is Literal:
        return {*map(str, typing.get_args(hint))}
    return {value for part in typing.get_args(hint) for value in literals(part)}


def choices_in_comments(path: Path) -> dict[str, set[str]]:
    """The settings of a YAML file with the choices of their comments; an empty set where a comment names none."""
    choices = {}
    for line in path.read_text().splitlines():
        if setting := re.match(r"\s*(\w+):", line):
            comment = CHOICES.search("#" + line.partition("#")[2])
            choices[setting[1]] = {*comment[1].split(" | ")} - {"null"} if comment else set()
    return choices


@pytest.mark.parametrize(("group", "name"), ALL)
def test_choices_in_the_comments_of_a_class_are_its_literals(group, name):
    cls = target_class(group, composed(f"{group}={name}")[group], GROUPS[group])
    hints = typing.get_type_hints(cls.__init__)
    written = choices_in_comments(CONFIG_DIR / group / f"{name}.yaml")
    inherits = "_target_" not in written  # comments then are in the file that it inherits from
    for setting in written.keys() & inspect.signature(cls).parameters.keys():
        assert written[setting] == literals(hints[setting]) or (inherits and not written[setting]), setting


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_choices_in_the_comments_of_a_command_are_those_of_its_settings(path):
    written = choices_in_comments(path)
    hints = typing.get_type_hints(getattr(config, f"{path.stem.capitalize()}Config"))
    for setting in written.keys() & hints.keys():
        if expected := literals(hints[setting]):
            assert written[setting] == expected, setting
