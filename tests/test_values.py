"""Every setting of every command with invalid values: accepted on purpose, or refused in one short line.

The settings come from the dataclasses of the commands and from the classes that configs/ names. The slow test takes
every tenth of them, and all with METACV_TEST_EVERY_VALUE=1, which takes half an hour of two cores.
"""

import dataclasses
import itertools
import os
import pydoc
import re
import shutil
import socket
import time
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import after_first_line
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from metacv import CONFIG_DIR, config
from metacv.bounds import Positive, checked
from metacv.confusion import Predictions
from metacv.distributed import Ranks
from metacv.model import load_checkpoint, parameters_of, with_head
from metacv.run import start
from metacv.text import short
from metacv.train import initialize, prepare
from metacv.words import PATHS

VALUES = {
    "zero": "0",
    "minus one": "-1",
    "half": "0.5",
    "one and a half": "1.5",
    "2e9": "2000000000",
    "1e20": "1e20",
    "20 digits": "99999999999999999999",
    "nan": "nan",
    "inf": "inf",
    "-inf": "-inf",
    "null": "null",
    "true": "true",
    "text": "nonsense",
    "empty": "''",
    "list": "[1,2]",
    "empty list": "[]",
    "dict": "{a: 1}",
    "long": "x" * 5000,
    "no setting": "${nothing}",
    "no variable": "${oc.env:METACV_NOTHING}",
}
TEXT = "text, empty, long"
ACCEPTED = {  # which of the values a setting may have by its type; a setting that is not here takes none of them
    "true": "augment.flip compile projector algo.rotations algo.cosine algo.first_order algo.adapt_norm "
    "algo.gradient_checkpointing algo.learn_temperature algo.learn_penalty algo.reset_moments "
    "backbone.ceil_pool algo.learn_rates algo.per_step_norm backbone.global_pool backbone.norm_scale "
    "backbone.running_stats backbone.frozen dataset.crop dataset.color dataset.invert dataset.resize "
    "schedule.cycle_momentum head.flip head.cosine head.normalize resume dry_run evaluate:unseen_only "
    "evaluate:pictures compare:unseen_only predict:unknown",
    "zero": "algo.multi_step_loss_steps algo.first_order_steps augment.crop backbone.padding head.augment "
    "schedule.total_iters finetune:head.lr",
    "list": "normalize.mean normalize.std evaluate:normalize.mean evaluate:normalize.std predict:normalize.mean "
    "predict:normalize.std backbone.padding dataset.weights",
    "empty list": "normalize.mean normalize.std evaluate:normalize.mean evaluate:normalize.std predict:normalize.mean "
    "predict:normalize.std evaluate:checkpoint dataset.weights paper backbone.padding backbone.downsample "
    "dataset.val_alphabets compare:runs report:runs info:runs list:what",
    "half": "schedule.start_factor predict:coverage",
    f"zero, minus one, 2e9, list, empty list, {TEXT}": "predict:remove",
    "zero, 2e9": "seed dataset.seed dataset.split_seed evaluate:seed compare:seed",
    "zero, half": "augment.jitter ema backbone.dropout algo.label_smoothing algo.dropout backbone.drop_block "
    "optimizer.momentum schedule.factor schedule.end_factor schedule.pct_start head.rate",
    "half, one and a half": "clip_norm clip_value algo.inner_lr algo.temperature algo.scale algo.penalty "
    "schedule.max_lr head.lr "
    "head.scale head.C head.penalty head.support head.power head.sharpness",
    "zero, half, one and a half": "algo.balance optimizer.lr optimizer.weight_decay schedule.eta_min schedule.gamma "
    "dataset.fractions.train "
    "dataset.fractions.val dataset.fractions.test head.weight head.certainty",
    "null": "vary train_vary evaluate:vary compare:vary backbone.weights_file backbone.layer backbone.size "
    "backbone.pool dataset.weights mixture:dataset.size clip_norm clip_value patience ema name init "
    "algo.teacher algo.task_chunk algo.loss algo.shot backbone.weights dataset.root image_folder:dataset.size "
    "image_folder:dataset.color image_folder:dataset.fit image_folder:dataset.invert dataset.split_file "
    "evaluate:way evaluate:shot evaluate:query evaluate:episodes evaluate:batch_norm evaluate:checkpoint "
    "evaluate:features compare:way compare:shot compare:query compare:episodes compare:batch_norm "
    "predict:checkpoint predict:support predict:adapted predict:save predict:batch_norm "
    "evaluate:query_balance evaluate:calibrate predict:query predict:remove predict:coverage export:checkpoint "
    "export:adapted",
    TEXT: "backbone.weights_file backbone.layer init name device data_dir resume algo.teacher backbone.name "
    "dataset.root dataset.split_dir dataset.split_file dataset.split_files.train dataset.split_files.val "
    "dataset.split_files.test dataset.name evaluate:checkpoint evaluate:features evaluate:device "
    "evaluate:data_dir compare:device compare:data_dir predict:checkpoint predict:support predict:adapted "
    "predict:save predict:query predict:device backbone.weights backbone.pool "
    "export:checkpoint export:adapted export:file",
    "dict": "evaluate:backbone predict:backbone dataset backbone algo optimizer schedule head evaluate:algo "
    "evaluate:dataset evaluate:head compare:algo compare:dataset compare:head predict:algo predict:dataset "
    "predict:head export:head dataset.classes dataset.counts dataset.fractions",
}
GIVEN_NULL = (
    "head experiment launcher sweeper evaluate:dataset evaluate:backbone evaluate:head compare:dataset compare:head "
    "predict:backbone predict:head export:head"
)


class Setting(NamedTuple):
    command: str
    words: tuple[str, ...]  # that choose the class with the setting
    name: str
    hint: Any

    @property
    def key(self) -> str:
        return self.name if self.command == "train" else f"{self.command}:{self.name}"

    @property
    def names(self) -> set[str]:
        """In the table, where `image_folder:` stands before a setting of that data set alone."""
        return {self.key, *(f"{word.partition('=')[2]}:{self.name}" for word in self.words[:1])}

    @property
    def accepted(self) -> set[str]:
        return {kind for kinds, keys in ACCEPTED.items() if self.names & {*keys.split()} for kind in kinds.split(", ")}


def nested(setting: Setting) -> Iterator[Setting]:
    """The setting, and those within it."""
    yield setting
    if dataclasses.is_dataclass(setting.hint):
        inner = typing.get_type_hints(setting.hint, include_extras=True)
    elif setting.name.count(".") and typing.get_origin(setting.hint) is dict:
        inner = dict.fromkeys(("train", "val", "test"), typing.get_args(setting.hint)[1])
    else:
        inner = {}
    for name, hint in inner.items():
        yield Setting(setting.command, setting.words, f"{setting.name}.{name}", hint)


def settings_of_commands() -> Iterator[Setting]:
    for path in sorted(CONFIG_DIR.glob("*.yaml")):
        schema = getattr(config, f"{path.stem.capitalize()}Config")
        for name, hint in typing.get_type_hints(schema, include_extras=True).items():
            yield from nested(Setting(path.stem, (), name, hint))


def settings_of_classes() -> Iterator[Setting]:
    for group in ("algo", "backbone", "dataset", "optimizer", "schedule", "head"):
        for path in sorted((CONFIG_DIR / group).glob("*.yaml")):
            content = yaml.safe_load(path.read_text())
            node = content.get(group, {}) if group == "algo" else content
            if "_target_" not in node:
                continue  # another file's class, with other values
            cls = pydoc.locate(node.pop("_target_"))
            hints = {name: parameter.annotation for name, parameter in parameters_of(cls).items()}
            words = (f"{group}={path.stem}", *["dataset.root=images"] * ("root" in node))
            for name in node:
                yield from nested(Setting("train", words, f"{group}.{name}", hints[name]))


SETTINGS = [*settings_of_commands(), *settings_of_classes()]


@cache
def parsed(text: str) -> Any:
    """The value as Hydra's command line reads it."""
    return OverridesParser.create().parse_override(f"name={text}").value()


def fits(hint: Any, value: Any) -> bool:
    try:
        config.from_dict(hint, value) if dataclasses.is_dataclass(hint) else checked("name", value, hint)
    except (ValueError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: " ".join([*setting.words, setting.key]))
def test_the_type_of_a_setting_accepts_exactly_the_values_in_the_table(setting):
    interpolations = {"no setting", "no variable"}  # text that stands for another value
    assert {
        kind for kind in VALUES.keys() - interpolations if fits(setting.hint, parsed(VALUES[kind]))
    } == setting.accepted


def test_every_name_in_the_table_is_a_setting():
    names = set().union(*(setting.names for setting in SETTINGS))
    assert {key for keys in ACCEPTED.values() for key in keys.split()} <= names


@pytest.fixture
def refused_or_built(metacv, trained, monkeypatch):
    """The command line in a folder with a run and images, which prepares everything, and trains and labels nothing."""

    for algo in ("protonet", "maml"):
        Path(algo).mkdir()
        shutil.copy(trained(algo) / "best.pt", algo)

    def build(cfg, folder, overrides):
        settings, words, _ = start(cfg, folder, overrides)
        initialize(prepare(settings, words, Ranks())[0])
        return 0.0

    def no_network(*_, **__):
        raise OSError("tests have no network")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between a library's attempts to download
    monkeypatch.setattr("metacv.train.train", build)
    monkeypatch.setattr(
        "metacv.evaluate.predict_episodes",
        lambda _, episodes, *__: Predictions(
            episodes, torch.zeros(len(episodes), episodes.sampler.way * episodes.sampler.query).short()
        ),
    )
    monkeypatch.setattr(
        "metacv.predictor.label", lambda _, support, images, *__: torch.zeros(len(images), len(support.shots))
    )
    monkeypatch.setattr("metacv.report.page", lambda *_: "")
    monkeypatch.setattr("metacv.export.as_onnx", lambda *_: b"")
    for name in ("a", "b"):
        Path("images", name).mkdir(parents=True)
        Image.new("L", (28, 28), 200).save(f"images/{name}/0.png")

    def run(setting: Setting, kind: str) -> None:
        group, *inner = setting.name.split(".")
        default = {*setting.words} <= DEFAULTS  # another class has no such settings as COMMANDS sets
        words = [word for word in COMMANDS[setting.command] if (inner and default) or not word.startswith(f"{group}.")]
        if group == "runs":
            words = [word for word in words if "=" in word]  # folders without a name are runs too
        words += [*setting.words, f"{setting.name}={VALUES[kind]}", "hydra.run.dir=new"]
        code, _, err = metacv(setting.command, *words)
        shutil.rmtree("new", ignore_errors=True)
        allowed = setting.accepted | ({"null"} if setting.key in GIVEN_NULL.split() else set())
        if PATHS.fullmatch(setting.name) or setting.key == "predict:query":
            allowed |= {"list", "empty list", "dict"}  # names of files with any characters
            allowed -= {"empty"}
        assert "traceback" not in err.lower(), (kind, err)
        if kind in allowed:  # by its type; its class or the images may still refuse it
            assert code == 0 or (code == 1 and err.startswith("metacv: ")), (kind, err)
            return
        name = setting.name.split(".")[-1]
        assert code == 1, kind
        assert err.count("\n") == 1, (kind, err)
        assert re.match(rf"metacv: .*\b{name}\b", err), (kind, err)
        assert len(err) < 400, (kind, err)

    return run


DEFAULTS = {"dataset=glyphs", "backbone=conv4"}
COMMANDS = {
    "train": ("dataset.classes={train:30,val:8,test:8}", "backbone.channels=8", "query=5", "eval_episodes=8"),
    "evaluate": ("checkpoint=protonet",),
    "compare": ("protonet", "maml", "batch_norm=inductive"),
    "predict": ("checkpoint=protonet", "support=images", "query=images"),
    "export": ("checkpoint=protonet", "file=new.onnx"),
    "report": ("protonet",),
    "info": ("protonet",),
    "list": (),
}
CHOSEN = [Setting("train", (), group, str) for group in ("experiment", "launcher", "sweeper")]


EVERY = [*SETTINGS, *CHOSEN]
SOME = EVERY if os.environ.get("METACV_TEST_EVERY_VALUE") else EVERY[::10]
SAMPLE = [(EVERY[i], kind) for i, kind in zip(range(0, len(EVERY), 16), itertools.cycle(VALUES), strict=False)]


@pytest.mark.parametrize(("setting", "kind"), SAMPLE, ids=lambda one: getattr(one, "key", one))
def test_a_sample_of_invalid_values_is_refused_in_one_short_line(refused_or_built, setting, kind):
    refused_or_built(setting, kind)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SOME, ids=lambda setting: " ".join([*setting.words, setting.key]))
def test_every_invalid_value_is_refused_in_one_short_line(refused_or_built, setting):
    for kind in VALUES:
        refused_or_built(setting, kind)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("algo=0",), "algo=0: must be the name of a file in configs/algo"),
        (("dataset=true",), "dataset=true: must be the name of a file in configs/dataset"),
        (("dataset=[1,2]",), "dataset=[1,2]: must be the name of a file in configs/dataset"),
        (("backbone={a: 1}",), "backbone={a: 1}: must be the name of a file in configs/backbone"),
        (("-m", "head=null,ncm"), "head=null,ncm: must be the name of a file in configs/head"),
        (("optimizer=${nothing}",), "optimizer=${nothing}: Error resolving interpolation '${nothing}'"),
        (("shot=${nothing}",), "shot=${nothing}: Interpolation key 'nothing' not found"),
        (("algo.inner_lr=${oc.env:NO_LR}",), "algo.inner_lr=${oc.env:NO_LR}: Environment variable 'NO_LR' not found"),
        (
            ("query=" + "x" * 5000,),
            "query=" + "x" * 94 + "..." + "x" * 49 + ": must be a whole number from 1 to 1000000",
        ),
        (("data_dir=nan",), "data_dir=nan: must be a path; for a file of that name use ./nan"),
        (("init=true",), "init=true: must be a path; for a file of that name use ./true"),
        (("data_dir=''",), "data_dir is empty: it must be a path"),
        (("projector=99999999999999999999",), "projector=99999999999999999999: must be true or false"),
        (("augment.flip=-1",), "augment.flip=-1: must be true or false"),
        (("augment=2",), "augment=2: must be a group of settings"),
        (
            ("algo=protonet", "schedule.step_size=0"),
            "schedule.step_size=0: must be a whole number from 1 to 1000000000",
        ),
        (("algo=protonet", "schedule.gamma=-1"), "schedule.gamma=-1: must be a number from 0 to 10"),
        (("optimizer=sgd", "optimizer.momentum=2.5"), "optimizer.momentum=2.5: must be a number from 0 to 1"),
        (("algo=classifier", "schedule.total_steps=5"), "schedule.total_steps=5: must be at least steps=1000"),
        (("meta_batch=1000000",), "meta_batch=1000000: the images of a step take 250.9 GB, above 8.6 GB"),
        (("dataset.classes.train=1000000",), "take 15.7 GB, above 4.3 GB"),
    ],
)
def test_errors_name_the_allowed_values(metacv, words, message):
    code, out, err = metacv("train", *COMMANDS["train"][:2], *words)
    assert (code, after_first_line(out)) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_head_null_removes_the_head_that_a_method_or_experiment_sets(metacv):
    for words in (("algo=baseline",), ("experiment=cifar_fs/classifier_5w1s",)):
        code, out, _ = metacv("train", *words, "head=null", "--cfg", "job")
        assert code == 0
        assert "_target_" not in yaml.safe_load(out)["head"]


def test_without_a_head_the_method_itself_classifies(trained):
    checkpoint = load_checkpoint(trained("protonet"))
    algorithm = checkpoint.build()
    left_over = dataclasses.replace(checkpoint.config, head={"augment": 5, "flip": True})
    assert with_head(algorithm, left_over) is algorithm


def test_an_integer_is_converted_for_a_float_setting():
    assert [type(checked("a", 1, hint)) for hint in (float, Positive, Positive | None, int)] == [
        float,
        float,
        float,
        int,
    ]
    assert checked("a", {"b": [1, 2]}, dict[str, list[float]]) == {"b": [1.0, 2.0]}


def test_paper_accuracies_are_a_list_of_groups_of_settings():
    paper = [{"accuracy": 98.7, "ci95": None, "source": "a paper"}]
    assert checked("paper", paper, list[dict[str, Any]]) == paper


def test_long_words_and_long_lines_are_shortened():
    assert short("a " + "b" * 200) == "a " + "b" * 200
    assert short("a " + "b" * 201) == "a " + "b" * 100 + "..." + "b" * 50
    assert short("ab " * 1000, length=100) == ("ab " * 1000)[:50] + " ... " + ("ab " * 1000)[-25:]
