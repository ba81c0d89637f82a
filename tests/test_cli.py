"""The command line: evaluation, errors in one line, help and completion."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, TRAIN

from metacv import cli, completion
from metacv.config_dir import config_dir

EVALUATE = ("evaluate", "checkpoint=run", "episodes=8", "hydra.run.dir=evaluation")


@pytest.fixture
def run(metacv):
    assert metacv("train", "algo=protonet", *TRAIN, "hydra.run.dir=run")[0] == 0
    return metacv


def result() -> dict:
    return json.loads(Path("evaluation/result.json").read_text())


def test_evaluate_reports_what_the_number_depends_on(run):
    code, out, err = run(*EVALUATE, "shot=2", "query=4", "way=4")
    assert (code, err) == (0, "")
    found = result()
    expected = {"episodes": 8, "way": 4, "shot": 2, "query": 4, "split": "test", "dataset": "Glyphs"}
    assert found.items() >= (expected | {"norm": "inductive", "rotation": "none"}).items()
    assert found["checkpoint_sha256"] == hashlib.sha256(Path("run/best.pt").read_bytes()).hexdigest()
    assert len(found["episodes_sha256"]) == 64
    assert f"accuracy {100 * found['accuracy']:.2f} ± {100 * found['ci95']:.2f} %" in out


def test_evaluate_takes_as_many_episodes_as_the_checkpoint_says(metacv):
    assert metacv("train", "algo=protonet", *TRAIN, "episodes=7", "hydra.run.dir=run")[0] == 0
    assert metacv("evaluate", "checkpoint=run", "hydra.run.dir=evaluation")[0] == 0
    assert result()["episodes"] == 7


def test_evaluate_takes_a_file_or_a_run_and_gives_the_same_number_twice(run):
    numbers = []
    for checkpoint in ("run", "run/best.pt"):
        assert run(*EVALUATE, f"checkpoint={checkpoint}")[0] == 0
        numbers.append((result()["accuracy"], result()["ci95"], result()["checkpoint_sha256"]))
    assert numbers[0] == numbers[1]


def test_the_list_of_episodes_is_the_same_for_every_algorithm(run):
    assert run("train", "algo=maml", *TRAIN, "seed=5", "hydra.run.dir=maml")[0] == 0
    hashes = []
    for checkpoint in ("run", "maml"):
        assert run(*EVALUATE, f"checkpoint={checkpoint}")[0] == 0
        hashes.append(result()["episodes_sha256"])
    assert hashes[0] == hashes[1]
    assert run(*EVALUATE, "seed=1")[0] == 0
    assert result()["episodes_sha256"] != hashes[0]


def test_norm_both_gives_both(run):
    assert run(*EVALUATE, "norm=both")[0] == 0
    assert result()["inductive"]["norm"] == "inductive"
    assert result()["transductive"]["norm"] == "transductive"


def test_settings_of_the_data_set_and_the_algorithm_can_be_changed(run):
    code, _, err = run(*EVALUATE, "dataset.test_rotation=per_class", "algo.metric=cosine")
    assert (code, err) == (0, "")
    assert result()["rotation"] == "per_class"


def test_another_data_set_is_taken_as_it_is(run):
    """Here the glyphs in full instead of the few that were trained on."""
    assert run(*EVALUATE, "dataset=glyphs", "way=100")[0] == 0
    assert result()["way"] == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "wya=5"), "Key 'wya' not in 'TrainConfig'"),
        (("train", "algo=foo"), "Could not find 'algo/foo' Available options in 'algo': maml"),
        (("train", "way=many"), "Value 'many' of type 'str' could not be converted to Integer"),
        (("train", "train_way=1000"), "train_way=1000 but glyphs train has only 30 classes"),
        (("train", "shot=15", "query=10"), "shot=15 + train_query=10 needs 25 images a class but"),
        (("train", "algo.inner_lr=fast"), "algo.inner_lr=fast: not a finite number"),
        (("train", "algo.inner_lr=-1"), "inner_lr=-1"),
        (("train", "algo.inner_lr=nan"), "algo.inner_lr=nan: not a finite number"),
        (("train", "algo.inner_loss=max"), "algo.inner_loss=max: not one of mean, sum_per_shot"),
        (("train", "algo.nothing=1"), "Key 'nothing' is not in struct"),
        (("train", "backbone.channels=0"), "backbone: channels=0"),
        (("train", "optimizer.lr=-1"), "optimizer: Invalid learning rate"),
        (("train", "+foo=1"), "foo: there is no such setting"),
        (("train", "algo.way=1"), "way=1: must be at least 2"),
        (("train", "algo.way=4"), "algo.way=4 but train_way=5: the head is trained for train_way classes"),
        (("train", "backbone.padding=1000"), "padding=1000: one value"),
        (("train", "data_dir=''"), "data_dir is empty"),
        (("train", "steps=0"), "steps=0: must be positive"),
        (("train", "meta_batch=1208925819614629174706176"), "must be positive, and below 2**31"),
        (("train", "~steps"), "~steps: this setting cannot be deleted"),
        (("train", "+backbone.image_shape=[1,2,3]"), "backbone.image_shape: is not a setting"),
        (("train", "algo=protonet", "schedule.step_size=many"), "schedule.step_size=many: not a whole number"),
        (("train", "optimizer.lr=fast"), "optimizer.lr=fast: not a finite number"),
        (("train", "meta_batch=-3"), "meta_batch=-3: must be positive"),
        (("train", "norm=batch"), "norm=batch: one of inductive, transductive"),
        (("train", "device=cuda:99"), "device=cuda:99: this machine has"),
        (("train", "device=fast"), "device=fast: not a device"),
        (("train", "seed=-1"), "seed=-1: must lie between"),
        (("train", "eval_episodes=1"), "eval_episodes=1: an interval needs at least 2"),
        (("train", "optimizer._target_=torch.optim.LBFGS", "~optimizer.weight_decay"), "optimizer: LBFGS"),
        (("train", "optimizer._target_=os.system"), "only classes of metacv and torch.optim may be named"),
        (("train", "resume=true"), "holds no last.pt"),
        (("train", "resume=nowhere"), "nowhere: there is no such file"),
        (("train", "hydra.run.dir=/proc/nowhere"), "/proc/nowhere"),
        (("train", "way=[1"), "way=[1"),
        (("evaluate",), "Missing mandatory value: checkpoint"),
        (("evaluate", "checkpoint=nowhere"), "nowhere: there is no such file"),
        (("evaluate", "checkpoint=."), "holds no best.pt"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_1(metacv, arguments, message):
    small = SMALL[:1] if arguments[0] == "train" else ()
    code, out, err = metacv(arguments[0], *small, *arguments[1:])
    assert code == 1
    assert message in err
    assert err.startswith("metacv: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("split=all",), "split=all: one of train, val, test"),
        (("norm=none",), "norm=none: one of inductive, transductive, both"),
        (("way=9",), "way=9 but glyphs test has only 8 classes"),
        (("dataset.nothing=1",), "dataset.nothing: run/best.pt has no such setting"),
        (("dataset.images=few",), "dataset.images=few: not a whole number"),
        (("dataset=omniglot", "data_dir=empty"), "omniglot/images_background is not there and https://"),
        (("episodes=0",), "episodes=0: an interval needs at least 2"),
    ],
)
def test_bad_input_to_evaluate_gets_one_line(run, monkeypatch, arguments, message):
    monkeypatch.setattr("torchvision.datasets.utils.download_url", lambda *_, **__: no_network())
    code, _, err = run(*EVALUATE, *arguments)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert not Path("evaluation/result.json").exists()


def no_network():
    raise OSError("no network")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_damaged_and_foreign_checkpoints_are_refused_and_run_no_code(run):
    whole = Path("run/best.pt").read_bytes()
    Path("short.pt").write_bytes(whole[: len(whole) // 2])
    weight = next(iter(torch.load("run/best.pt", weights_only=True)["algorithm"].values()))
    middle = whole.index(weight.numpy().tobytes()) + 3
    Path("flipped.pt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("hello")
    Path("bomb.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": {}}, "foreign.pt")
    torch.save({**torch.load("run/best.pt", weights_only=True), "format": 99}, "future.pt")
    torch.save({**torch.load("run/best.pt", weights_only=True), "config": {"way": 5}}, "bare.pt")
    whole_content = torch.load("run/best.pt", weights_only=True)
    for key, value in [("image_shape", 3), ("image_shape", ["a", 1, 1]), ("config", None), ("algorithm", {"a": 1})]:
        torch.save(whole_content | {key: value}, "odd.pt")
        code, _, err = run(*EVALUATE, "checkpoint=odd.pt")
        assert (code, err) == (1, "metacv: odd.pt is not a checkpoint of metacv, or is damaged\n")
    for name in ("short", "flipped", "empty", "text", "bomb", "foreign", "future", "bare"):
        code, _, err = run(*EVALUATE, f"checkpoint={name}.pt")
        assert code == 1
        assert err.startswith(f"metacv: {name}.pt")
        assert err.count("\n") == 1
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("node", "target"),
    [
        ("algo", "os.system"),
        ("algo", "metacv.files.os.system"),  # reached through a module that imports it
        ("dataset", "metacv.files.write_bytes_atomically"),
        ("algo", "metacv.train.StopSignals"),
        ("backbone", "torch.optim.sgd.torch.hub.load"),
        ("dataset", "metacv.backbones.conv4.Conv4"),
        ("algo", "metacv.algorithms.metric.protonet.F.normalize"),
    ],
)
def test_a_checkpoint_whose_config_points_elsewhere_is_refused(run, node, target):
    content = torch.load("run/best.pt", weights_only=True)
    content["config"][node] = {"_target_": target}
    torch.save(content, "changed.pt")
    code, _, err = run(*EVALUATE, "checkpoint=changed.pt")
    assert code == 1
    assert f"{node}._target_={target}: " in err
    assert err.count("\n") == 1


def test_weights_that_do_not_fit_the_config_are_refused(run):
    content = torch.load("run/best.pt", weights_only=True)
    content["config"]["backbone"]["channels"] = 9
    torch.save(content, "changed.pt")
    code, _, err = run(*EVALUATE, "checkpoint=changed.pt")
    assert code == 1
    assert "its weights do not fit its config" in err


def test_images_of_another_size_are_refused(run):
    content = torch.load("run/best.pt", weights_only=True)
    content["image_shape"] = [3, 84, 84]
    torch.save(content, "changed.pt")
    _, _, err = run(*EVALUATE, "checkpoint=changed.pt")
    assert "glyphs test has images of 1x28x28 but changed.pt was trained on 3x84x84" in err


def test_resume_wants_the_whole_state(run):
    code, _, err = run("train", "resume=run/best.pt", "hydra.run.dir=other")
    assert code == 1
    assert "holds weights only" in err


def test_a_traceback_is_shown_when_asked_for(tmp_path):
    command = [sys.executable, "-m", "metacv", "evaluate", "checkpoint=nowhere"]
    shown = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"HYDRA_FULL_ERROR": "1"}, capture_output=True, text=True
    )
    assert "Traceback" in shown.stderr
    hidden = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert hidden.stderr == "metacv: nowhere: there is no such file\n"


@pytest.mark.parametrize("arguments", [(), ("fly",), ("-sc", "install=cmd")])
def test_wrong_usage_gets_exit_code_2(metacv, arguments):
    code, _, err = metacv(*arguments)
    assert code == 2
    assert err.startswith("metacv: ")


def test_an_evaluation_is_not_written_over_a_training_run(run):
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    code, _, err = run("evaluate", "checkpoint=run", "episodes=8", "hydra.run.dir=run")
    assert code == 1
    assert "hydra.run.dir=run holds a training run" in err
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_a_terminal_without_the_sign_for_plus_or_minus_gets_the_result_too(run):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "metacv", *EVALUATE], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "accuracy" in done.stdout


def test_a_reader_that_goes_away_gets_no_traceback():
    command = f"{sys.executable} -m metacv train --help | head -1 >/dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")


def test_help_names_the_commands_and_each_commands_help_its_choices(metacv):
    assert "metacv evaluate checkpoint=RUN" in metacv("--help")[1]

    def text(command: str) -> str:
        command_line = [sys.executable, "-m", "metacv", command, "--help"]
        return subprocess.run(command_line, check=True, capture_output=True, text=True).stdout

    train, evaluate = text("train"), text("evaluate")
    choices = [
        p.relative_to(config_dir()).with_suffix("").as_posix().split("/", 1) for p in config_dir().glob("*/**/*.yaml")
    ]
    assert len(choices) > 40
    for group, name in choices:
        (line,) = re.findall(rf"^  {group}={name} +(\S.+)$", train, re.MULTILINE)
        assert len(line) > 20
        assert (f"  {group}={name} " in evaluate) == (group == "dataset")
    assert "meta_batch: 4 # tasks a step" in train
    assert "episodes: null" in evaluate
    assert "\n  images: 20 # a class\n" in train
    assert "adapted: null # what an earlier `save` kept, in place of checkpoint and support" in text("predict")
    reptile = metacv("train", "algo=reptile", "--help")[1]
    assert "  inner_batch: 10 # images an inner step" in reptile
    assert "# schedule=linear" in reptile
    assert 'eval "$(metacv -sc install=bash)"' in train
    for command in ("predict", "compare", "report"):
        assert f"metacv {command}: " in text(command)


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["dataset.root=my photos"], ["dataset.root='my photos'"]),
        (["dataset.root=~/photos"], ["dataset.root='/home/me/photos'"]),
        (["++dataset.root=it's"], ["++dataset.root='it\\'s'"]),
        (["dataset.root='quoted, as Hydra wants it'"], ["dataset.root='quoted, as Hydra wants it'"]),
        (["data_dir=${oc.env:DATA}/a"], ["data_dir=${oc.env:DATA}/a"]),
        (["-m", "dataset.root=a,b"], ["-m", "dataset.root=a,b"]),
        (["-m", "dataset.root=there,too"], ["-m", "dataset.root='there,too'"]),
        (["-m", "dataset.root=my photos"], ["-m", "dataset.root='my photos'"]),
        (["dataset.split_file=null"], ["dataset.split_file=null"]),
        (["resume=true"], ["resume=true"]),
        (["way=5", "dataset.fractions={train:1,val:1,test:1}"], ["way=5", "dataset.fractions={train:1,val:1,test:1}"]),
    ],
)
def test_paths_are_quoted_for_hydra_and_nothing_else_is(monkeypatch, tmp_path, words, seen):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    Path("there,too").mkdir()
    assert cli._adjusted("train", words) == seen


def test_a_run_with_an_equals_sign_in_its_name_is_a_run_and_no_setting(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("lr=1").mkdir()
    assert cli._adjusted("compare", ["lr=1", "lr=2", "b"]) == ["lr=2", "runs=['lr=1','b']"]


def quickest(*arguments: str, **environment: str) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "metacv", *arguments], env=os.environ | environment, check=True,
                       capture_output=True)  # fmt: skip
        times.append(time.perf_counter() - start)
    return min(times)


def test_help_and_completion_answer_at_once():
    assert quickest("--help") < 0.3
    assert quickest("train", "--help") < 0.4
    assert quickest("-sc", "query=bash", COMP_LINE="metacv train algo=maml algo.") < 0.2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("metacv ", ["compare", "evaluate", "predict", "report", "train"]),
        ("metacv tr", ["train"]),
        ("metacv train algo=p", ["algo=protonet"]),
        ("metacv train algo=maml,rel", ["algo=maml,relationnet"]),
        ("metacv train algo=protonet algo.", ["algo.metric=", "algo.temperature="]),
        ("metacv train backbone=conv4_relation backbone.p", ["backbone.padding="]),
        ("metacv train clip", ["clip_norm=", "clip_value="]),
        ("metacv evaluate dataset=o", ["dataset=omniglot"]),
        ("metacv evaluate ch", ["checkpoint="]),
        ("metacv compare dataset=o", ["dataset=omniglot"]),
        ("metacv predict su", ["support="]),
        ("metacv predict dataset=o", []),
        ("metacv train experiment=omniglot/protonet_5w5s algo.m", ["algo.metric="]),
        ("metacv train experiment=omniglot/protonet_5w5s dataset.co", ["dataset.counts."]),
        ("metacv train experiment=omniglot/reptile_5w1s algo=maml algo.eval_", ["algo.eval_inner_steps="]),
        ("metacv train nothing", []),
        ("metacv nothing ", []),
    ],
)
def test_completion(line, expected):
    assert sorted(completion.candidates(line)) == expected


def test_completion_offers_every_file_of_configs():
    for group in ("algo", "backbone", "dataset"):
        files = sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
        assert completion.candidates(f"metacv train {group}=") == [f"{group}={name}" for name in files]


def test_bash_completes_with_the_installed_script():
    script = f"""
metacv() {{ {sys.executable} -m metacv "$@"; }}
eval "$(metacv -sc install=bash)"
COMP_LINE="metacv train algo=pro" COMP_POINT=21
_metacv
echo "${{COMPREPLY[@]}}"
"""
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == "protonet\n"
