"""The command line: evaluation, errors in one line, help and completion."""

import atexit
import errno
import gc
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from conftest import SMALL, after_first_line, largest_file
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from metacv import CONFIG_DIR, cli, completion
from metacv.config import EvaluateConfig, differences
from metacv.errors import UserError
from metacv.evaluate import prepare
from metacv.help import about
from metacv.model import load_checkpoint, settings
from metacv.results import Result, read_results
from metacv.terminal import error_line
from metacv.train import training_step
from metacv.words import hydra_overrides, quoted

COMMANDS = ("train", "evaluate", "predict", "compare", "report", "list", "info")
EVALUATE = ("evaluate", "checkpoint=run", "hydra.run.dir=evaluation")


@pytest.fixture
def run(metacv, trained):
    """The command line, with a copy of a trained ProtoNet in the folder `run`."""
    shutil.copytree(trained("protonet"), "run")
    return metacv


def test_threads_wait_asleep_unless_the_environment_says_how_long_they_spin(metacv, monkeypatch):
    """libgomp reads the variable when torch is imported, which no command does before it is set."""
    command = [sys.executable, "-c", "import sys, metacv.cli; print('torch' in sys.modules)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
    for given, expected in ((None, "1000"), ("5", "5")):
        monkeypatch.setenv("GOMP_SPINCOUNT", given or "")
        if given is None:
            monkeypatch.delenv("GOMP_SPINCOUNT")
        metacv("--version")
        assert os.environ["GOMP_SPINCOUNT"] == expected


def test_python_does_not_look_for_garbage_at_the_end_of_a_command(metacv, monkeypatch):
    at_the_end: list[object] = []
    monkeypatch.setattr(atexit, "register", at_the_end.append)
    metacv("--version")
    assert at_the_end == [gc.freeze]


def results() -> list[Result]:
    return read_results(Path("evaluation/result.json")).results


def test_evaluate_records_everything_that_the_accuracy_depends_on(run):
    code, out, err = run(*EVALUATE, "shot=2", "query=4", "way=4")
    assert (code, err) == (0, "")
    (result,) = results()
    assert (result.way, result.shot, result.query, result.split, result.dataset) == (4, 2, 4, "test", "Glyphs")
    assert (result.batch_norm, result.rotation, result.method, result.step) == ("inductive", "none", "ProtoNet", 4)
    assert result.checkpoint_sha256 == hashlib.sha256(Path("run/best.pt").read_bytes()).hexdigest()
    assert len(result.episodes_sha256) == 64
    assert f"accuracy {100 * result.accuracy:.2f} ± {100 * result.ci95:.2f} %" in out
    assert result.episodes == 8  # as many as the checkpoint says


def test_both_batch_norm_modes_give_two_results_with_the_accuracy_of_every_episode(run):
    assert run(*EVALUATE, "batch_norm=both")[0] == 0
    assert [result.batch_norm for result in results()] == ["inductive", "transductive"]
    accuracies = numpy.load("evaluation/accuracies.npy")
    assert accuracies.shape == (2, 8)
    for row, result in zip(accuracies, results(), strict=True):
        assert row.mean() == pytest.approx(result.accuracy, abs=1e-12)
        assert 1.96 * row.std(ddof=1) / 8**0.5 == pytest.approx(result.ci95)


def test_a_checkpoint_and_its_run_folder_give_the_same_accuracy(run):
    records = []
    for checkpoint in ("run", "run/best.pt"):
        assert run(*EVALUATE, f"checkpoint={checkpoint}")[0] == 0
        records.append(replace(results()[0], tasks_per_second=0))
    assert records[0] == records[1]


def test_the_list_of_episodes_depends_on_its_seed_and_not_on_the_model(trained, data_dir):
    def episodes(algo: str, training_seed: int, seed: int) -> str:
        checkpoint = load_checkpoint(trained(algo))
        changed = replace(checkpoint, config=replace(checkpoint.config, seed=training_seed))
        given = EvaluateConfig(split="test", seed=seed, device="cpu", data_dir=str(data_dir))
        return prepare(changed, given).episodes.fingerprint

    assert episodes("protonet", 0, 0) == episodes("maml", 5, 0) != episodes("protonet", 0, 1)


def test_settings_of_the_data_set_and_the_algorithm_can_be_changed(run):
    code, _, err = run(*EVALUATE, "dataset.test_rotation=per_class", "algo.metric=cosine")
    assert (code, err) == (0, "")
    assert (results()[0].rotation, results()[0].changes) == ("per_class", {"metric": "cosine"})


def test_evaluation_can_use_another_data_set(run):
    code, _, err = run(*EVALUATE, "dataset=glyphs", "dataset.seed=1", "dataset.classes={train:2,val:2,test:9}", "way=9")
    assert (code, err) == (0, "")
    assert results()[0].way == 9


def assert_one_line(answer: tuple[int, str, str], message: str) -> None:
    code, out, err = answer
    assert (code, after_first_line(out)) == (1, "")
    assert message in err
    assert err.startswith("metacv: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wya=5",), "wya: there is no such setting"),
        (("algo=foo",), "algo=foo: there is no such file in configs/algo; one of: anil, baseline, baselinepp"),
        (("algo=protonets",), "algo=protonets: there is no such file in configs/algo; did you mean protonet?"),
        (("experiment=maml_20w1s",), "configs/experiment; did you mean omniglot/maml_20w1s?"),
        (("experiment=maml_5w1s",), "did you mean cifar_fs/maml_5w1s or miniimagenet/maml_5w1s or omniglot/maml_5w1s?"),
        (("algo=maml", "algo=protonet"), "algo=maml and algo=protonet: give algo only once"),
        (
            ("backbone=conv4", "backbone=resnet12", "way=3"),
            "backbone=conv4 and backbone=resnet12: give backbone only once",
        ),
        (("shots=5",), "shots: there is no such setting; did you mean shot?"),
        (("algo.inner_lrr=1",), "algo.inner_lrr: there is no such setting; did you mean algo.inner_lr?"),
        (("optimizer.weightdecay=1",), "there is no such setting; did you mean optimizer.weight_decay?"),
        (("save=a.pt",), "save: there is no such setting of this command, or of what it chooses"),
        (("dataset.size=28",), "dataset.size: there is no such setting of this command, or of what it chooses"),
        (("optimizer.betas=[1,2]",), "optimizer.betas: there is no such setting\n"),
        (("=5",), "=5: give settings as name=value"),
        (("+=5",), "+=5: give settings as name=value"),
        (("~",), "~: give settings as name=value"),
        (("/=5",), "/=5: cannot be read; special characters need quotes"),
        (("algo/=maml",), "algo/=maml: cannot be read; special characters need quotes"),
        (("way==3",), "way==3: cannot be read; special characters need quotes, as in \"name='a=b'\""),
        (("way=[1",), "way=[1: cannot be read; special characters need quotes"),
        (("way=\uff15",), "way=\uff15: cannot be read; special characters need quotes"),
        (("hydra=5",), "hydra=5: must be the name of a file"),
        (("hydra/launcher=5",), "hydra/launcher=5: must be the name of a file"),
        (("algo=null",), "algo=null: must be the name of a file in configs/algo"),
        (("way=many",), "way=many: must be a whole number from 2 to 10000"),
        (("train_way=1000",), "way=1000, but glyphs train has only 30 classes; lower train_way, or set"),
        (("shot=15", "query=10"), "train_shot=15 + train_query=10 needs 25 images per class, but"),
        (("algo.inner_lr=fast",), "algo.inner_lr=fast: must be a number above 0 and at most 1000000000"),
        (("algo.inner_lr=-1",), "algo.inner_lr=-1: must be a number above 0"),
        (("algo.inner_lr=nan",), "algo.inner_lr=nan: must be a number above 0"),
        (("algo.inner_loss=max",), "algo.inner_loss=max: must be one of mean, sum_per_shot"),
        (("algo.nothing=1",), "algo.nothing: there is no such setting"),
        (("backbone.channels=0",), "backbone.channels=0: must be a whole number from 1 to 2048"),
        (("optimizer.lr=-1",), "optimizer.lr=-1: must be a number from 0 to 1000000000"),
        (("+foo=1",), "foo: there is no such setting"),
        (("algo.way=1",), "algo.way=1: must be a whole number from 2 to 10000"),
        (("algo.way=4",), "algo.way=4: must be the number of classes of all training tasks, and one has 5"),
        (("backbone.padding=1000",), "backbone.padding=1000: must be a whole number from 0 to 2 or a list"),
        (("data_dir=''",), "data_dir is empty"),
        (("steps=0",), "steps=0: must be a whole number from 1 to 1000000000"),
        (
            ("meta_batch=1208925819614629174706176",),
            "meta_batch=1208925819614629174706176: must be a whole number from 1",
        ),
        (("~steps",), "~steps: cannot be deleted; set steps=VALUE instead"),
        (("+backbone.image_shape=[1,2,3]",), "backbone.image_shape: Conv4 has no such setting"),
        (("algo=protonet", "schedule.step_size=many"), "schedule.step_size=many: must be a whole number"),
        (("optimizer.lr=fast",), "optimizer.lr=fast: must be a number from 0 to 1000000000"),
        (("meta_batch=-3",), "meta_batch=-3: must be a whole number from 1 to 1000000"),
        (("batch_norm=batch",), "batch_norm=batch: must be one of inductive, transductive"),
        (("batch_norm=both",), "batch_norm=both: must be one of inductive, transductive"),
        (("device=cuda:99",), "device=cuda:99: this machine has"),
        (("device=fast",), "device=fast: must be auto, cpu, cuda or cuda:N"),
        (("seed=-1",), "seed=-1: must be a whole number from 0 to 9223372036854775807"),
        (("eval_episodes=1",), "eval_episodes=1: must be a whole number from 2 to 1000000"),
        (("optimizer._target_=torch.optim.LBFGS", "~optimizer.weight_decay"), "optimizer: LBFGS"),
        (("optimizer._target_=os.system",), "must be a class of metacv or torch.optim, or of a package listed in"),
        (("resume=true",), "has no last.pt"),
        (("resume=nowhere",), "nowhere: there is no such file"),
        (("hydra.run.dir=/proc/nowhere",), "/proc/nowhere"),
        (("way=[1",), "way=[1"),
        (("--nope",), "--nope: there is no such option"),
        (("-x", "way=3"), "-x: there is no such option"),
        (("way=3", "--cfgg", "job"), "--cfgg: there is no such option"),
    ],
)
def test_invalid_settings_of_training_exit_with_one_line(metacv, monkeypatch, arguments, message):
    def step(*arguments):
        training_step(*arguments)
        pytest.fail("a training step succeeded")

    monkeypatch.setattr("metacv.train.training_step", step)
    assert_one_line(metacv("train", SMALL[0], *arguments), message)
    assert not [*Path().glob("outputs/train/*/*")]  # a folder of a run, where nothing ran


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("split=all",), "split=all: must be one of train, val, test"),
        (("batch_norm=none",), "batch_norm=none: must be one of inductive, transductive, both or null"),
        (("way=9",), "way=9, but glyphs test has only 8 classes"),
        (("dataset.nothing=1",), "dataset.nothing: run/best.pt has no such setting"),
        (("dataset.images=few",), "dataset.images=few: must be a whole number"),
        (("dataset=omniglot", "data_dir=empty"), "empty/omniglot/images_background is missing, and https://"),
        (("episodes=0",), "episodes=0: must be a whole number from 2 to 1000000"),
        (("algo.metric=near",), "algo.metric=near: must be one of"),
        (("checkpoint=nowhere",), "nowhere: there is no such file"),
        (("checkpoint=run/.hydra",), "run/.hydra has no best.pt"),
        (("wya=5",), "wya: there is no such setting"),
        (("--multirun",), "-m: only train supports sweeps"),
        (("--resolve",), "--resolve: there is no such option; evaluate has --help and --cfg job"),
    ],
)
def test_invalid_settings_of_an_evaluation_exit_with_one_line_and_leave_no_folder(run, monkeypatch, arguments, message):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_network)
    assert_one_line(run(*EVALUATE, *arguments), message)
    assert not Path("evaluation").exists()
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [("evaluate", "evaluate needs a model: "), ("predict", "give either checkpoint=RUN and support=FOLDER"),
     ("compare", "runs is missing"), ("report", "outputs"), ("export", "file is missing")],
)  # fmt: skip
def test_a_command_without_its_settings_exits_with_one_line_and_leaves_no_folder(metacv, command, message):
    assert_one_line(metacv(command), message)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_an_old_name_of_a_setting_is_refused_with_its_new_name(metacv, command):
    assert_one_line(metacv(command, "norm=both"), "norm=both: this setting is now called batch_norm")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_cfg_prints_the_settings_as_yaml_and_runs_nothing(metacv, command):
    words = {"train": ["seed=7"], "report": ["a", "b c"], "compare": ["a", "b", "seed=7"], "list": ["heads"]}
    words |= {"info": words["report"]}
    code, out, err = metacv(command, *words.get(command, ["device=cpu"]), "--cfg", "job")
    assert (code, err) == (0, "")
    shown = OmegaConf.to_container(OmegaConf.create(out))
    changed = {"train": ("seed", 7), "report": ("runs", ["a", "b c"]), "compare": ("runs", ["a", "b"])}
    changed |= {"info": changed["report"], "list": ("what", ["heads"])}
    name, value = changed.get(command, ("device", "cpu"))
    assert shown[name] == value
    assert "hydra" not in shown


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_damaged_and_foreign_checkpoints_are_refused_and_run_no_code(run):
    whole = Path("run/best.pt").read_bytes()
    content = torch.load("run/best.pt", weights_only=True)
    Path("short.pt").write_bytes(whole[: len(whole) // 2])
    middle = whole.index(next(iter(content["algorithm"].values())).numpy().tobytes()) + 3
    Path("flipped.pt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("hello")
    Path("bomb.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": {}}, "foreign.pt")
    odd = {"future": {"format": 99}, "bare": {"config": {"way": 5}}, "number": {"image_shape": 3},
           "letter": {"image_shape": ["a", 1, 1]}, "none": {"config": None}, "weights": {"algorithm": {"a": 1}},
           "step": {"step": "4"}, "choice": {"config": content["config"] | {"batch_norm": "both"}}}  # fmt: skip
    for name, change in odd.items():
        torch.save(content | change, f"{name}.pt")
    for name in ("short", "flipped", "empty", "text", "bomb", "foreign", *odd):
        with pytest.raises(UserError, match=rf"^{name}\.pt (is not a checkpoint of metacv|has format 99)"):
            load_checkpoint(f"{name}.pt")
    assert_one_line(run(*EVALUATE, "checkpoint=bomb.pt"), "bomb.pt is not a checkpoint of metacv, or is damaged")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("node", "target"),
    [
        ("algo", "os.system"),
        ("algo", "metacv.files.os.system"),  # reached through a module that imports it
        ("dataset", "metacv.files.write_bytes_atomically"),
        ("algo", "metacv.run.StopSignals"),
        ("backbone", "torch.optim.sgd.torch.hub.load"),
        ("dataset", "metacv.backbones.conv4.Conv4"),
        ("algo", "metacv.algorithms.metric.protonet.F.normalize"),
    ],
)
def test_a_checkpoint_whose_config_names_another_object_is_refused(run, node, target):
    content = torch.load("run/best.pt", weights_only=True)
    content["config"][node] = {"_target_": target}
    torch.save(content, "changed.pt")
    assert_one_line(run(*EVALUATE, "checkpoint=changed.pt"), f"{node}._target_={target}: ")


def test_weights_and_images_that_do_not_fit_the_config_are_refused(run):
    content = torch.load("run/best.pt", weights_only=True)
    torch.save(content | {"image_shape": [3, 84, 84]}, "large.pt")
    content["config"]["backbone"]["channels"] = 9
    torch.save(content, "wide.pt")
    assert_one_line(run(*EVALUATE, "checkpoint=wide.pt"), "its weights do not fit its config")
    message = "glyphs test has images of 1x28x28, but large.pt was trained on 3x84x84"
    assert_one_line(run(*EVALUATE, "checkpoint=large.pt"), message)


@pytest.mark.parametrize("group", ["algo", "backbone", "head", "dataset"])
def test_an_error_in_a_setting_of_a_checkpoint_names_its_file(run, group):
    content = torch.load("run/best.pt", weights_only=True)
    content["config"]["head"] = {"_target_": "metacv.algorithms.heads.ncm.NearestMean"}
    content["config"][group]["depth"] = 3
    torch.save(content, "newer.pt")
    for words in ((), ("algo.metric=cosine",)):
        code, _, err = run(*EVALUATE, "checkpoint=newer.pt", *words)
        assert (code, err.count("\n")) == (1, 1)
        assert re.fullmatch(rf"metacv: newer\.pt: {group}\.depth: \w+ has no such setting\n", err)


def test_a_setting_that_is_newer_than_a_checkpoint_has_its_default_and_can_be_changed(run):
    content = torch.load("run/best.pt", weights_only=True)
    head = {"_target_": "metacv.algorithms.heads.ncm.NearestMean", "normalize": True, "augment": 0, "flip": False}
    torch.save(content | {"config": content["config"] | {"head": head}}, "older.pt")  # without `cosine`
    older = load_checkpoint("older.pt").config
    newer = replace(older, head=older.head | {"cosine": False})
    assert [*differences(settings(newer), settings(older))] == []  # so that a run resumes
    for words, expected in {("head=ncm",): {}, ("head.cosine=true",): {"head.cosine": True}}.items():
        assert run(*EVALUATE, "checkpoint=older.pt", *words, "episodes=2")[0] == 0
        assert results()[0].changes == expected


def test_an_error_in_a_setting_of_the_command_does_not_name_the_checkpoint(run):
    code, _, err = run(*EVALUATE, "checkpoint=run", "algo.metric=odd")
    assert (code, err) == (1, "metacv: algo.metric=odd: must be one of sqeuclidean, cosine\n")
    checkpoint = load_checkpoint("run")
    for text in ("data_dir: nothing is there", "way=3: too many", "other"):  # of no group of settings
        with pytest.raises(UserError, match=f"^{text}$"), checkpoint.blamed(checkpoint.config):
            raise UserError(text)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("evaluate", "checkpoint=nowhere"), "UserError: nowhere: there is no such file"),
        (("train", "resume=true"), "has no last.pt"),
        (("report", "RUN", "hydra.run.dir=/dev/null/x"), "NotADirectoryError: "),
    ],
    ids=str,
)
def test_hydra_full_error_shows_the_traceback(monkeypatch, capsys, tmp_path, trained, arguments, error):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("RUN", str(trained("protonet"))) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["metacv", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert error in err.splitlines()[-1]


@pytest.mark.parametrize("arguments", [(), ("fly",), ("-sc", "install=cmd"), ("-sc",)])
def test_wrong_usage_gets_exit_code_2(metacv, arguments):
    code, _, err = metacv(*arguments)
    assert code == 2
    assert err.startswith("metacv: ")


def test_an_evaluation_does_not_overwrite_a_training_run(run):
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    message = "hydra.run.dir=run holds a training run; evaluate needs another folder"
    assert_one_line(run("evaluate", "checkpoint=run", "hydra.run.dir=run"), message)
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_terminal_that_cannot_encode_the_plus_minus_sign_shows_the_result(run):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "metacv", *EVALUATE], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "accuracy" in done.stdout


def test_a_closed_pipe_causes_no_traceback():
    command = f"{sys.executable} -m metacv train --help | head -1 >/dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")


def test_a_full_disk_is_reported_in_one_line_for_any_file(metacv):
    with largest_file(50):
        code, _, err = metacv("train", "hydra.run.dir=run")
    assert code == 1
    assert err == "metacv: run: Hydra cannot write the settings of the run there: File too large\n"
    command = [sys.executable, "-m", "metacv", "--version"]
    line = "the output cannot be written: No space left on device"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, env=os.environ | {"PYTHONUNBUFFERED": ""}, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, f"metacv: {line}\n")
    assert error_line(OSError(errno.ENOSPC, "No space left on device")) == line  # as `print` raises it, without a name


def test_help_names_the_commands_and_the_version(metacv):
    from metacv import __version__

    usage = metacv("--help")[1]
    assert max(map(len, usage.splitlines())) < 80
    assert all(f"metacv {command} " in usage for command in COMMANDS)
    assert metacv("help")[1] == usage
    assert metacv("--version") == (0, f"metacv {__version__}\n", "")


def test_the_help_of_train_has_an_entry_for_every_file_of_configs(metacv):
    train, evaluate = metacv("train", "--help")[1], metacv("evaluate", "-h")[1]
    choices = [
        p.relative_to(CONFIG_DIR).with_suffix("").as_posix().split("/", 1) for p in CONFIG_DIR.glob("*/**/*.yaml")
    ]
    assert len(choices) > 40
    for group, name in choices:
        text = about((CONFIG_DIR / group / f"{name}.yaml").read_text())
        assert len(text) > 20
        assert re.search(rf"^  {group}={name} ", train, re.MULTILINE)
        assert f" {group}={name} {text} " in " ".join(train.split())
        assert (f"  {group}={name} " in evaluate) == (group in ("dataset", "backbone", "head"))
    assert "meta_batch: 4 # tasks per step" in train
    assert "episodes: null" in evaluate
    assert re.search(r"^  images: 20 # \w+", train, re.MULTILINE)
    assert 'eval "$(metacv -sc install=bash)"' in train
    assert "_target_" not in train


def test_the_choices_in_the_help_fit_the_terminal(metacv, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    choices = metacv("train", "--help")[1].partition("\nChoices")[2].partition("\nSettings")[0].splitlines()
    assert len(choices) > 100
    assert 70 < max(map(len, choices)) <= 80


def test_help_shows_the_settings_of_the_chosen_files(metacv):
    reptile = metacv("train", "algo=reptile", "--help")[1]
    assert "  inner_batch: 10 # " in reptile
    assert "# schedule=linear" in reptile
    for command in ("predict", "compare", "report"):
        assert f"metacv {command}: " in metacv(command, "--help")[1]
    assert "adapted: null # a file that `save` wrote, instead of checkpoint" in metacv("predict", "--help")[1]


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["dataset.root=my photos"], ["dataset.root='my photos'"]),
        (["dataset.root=~/photos"], ["dataset.root='/home/me/photos'"]),
        (["++dataset.root=it's"], ["++dataset.root='it\\'s'"]),
        (["dataset.root='quoted, as Hydra wants it'"], ["dataset.root='quoted, as Hydra wants it'"]),
        (["data_dir=${oc.env:DATA}/a"], ["data_dir=${oc.env:DATA}/a"]),
        (["-m", "dataset.root=a,b"], ["-m", "dataset.root=a,b"]),
        (["-m", "dataset.root=exists,too"], ["-m", "dataset.root='exists,too'"]),
        (["-m", "dataset.root=my photos"], ["-m", "dataset.root='my photos'"]),
        (["dataset.split_file=null"], ["dataset.split_file=null"]),
        (["resume=true"], ["resume=true"]),
        (["way=5", "dataset.fractions={train:1,val:1,test:1}"], ["way=5", "dataset.fractions={train:1,val:1,test:1}"]),
    ],
)
def test_only_paths_are_quoted_for_hydra(monkeypatch, tmp_path, words, overrides):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    Path("exists,too").mkdir()
    assert hydra_overrides("train", words) == overrides


@pytest.mark.parametrize(
    "name", ["my run", "it's", "a,b=c(d)", "${x}", "back\\slash", "ends in \\", "[1]", '"quoted"', "~odd", "a#b"]
)
def test_evaluate_and_predict_accept_paths_with_special_characters(metacv, name):
    """A missing file is named in the error as it was typed."""
    Path(name).mkdir()
    assert_one_line(metacv("evaluate", f"checkpoint={name}"), f"{name} has no best.pt")
    for words in ([f"checkpoint={name}", "support=."], [f"adapted={name}"]):
        assert_one_line(metacv("predict", *words, "query=."), f"{name} has no best.pt")
    assert quoted(name) in hydra_overrides("predict", [f"query={name}"])[0]


def test_a_leading_tilde_is_the_home_folder(metacv, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("home/run").mkdir(parents=True)
    assert_one_line(metacv("evaluate", "checkpoint=~/run"), f"{tmp_path}/home/run has no best.pt")
    assert_one_line(metacv("predict", "adapted=~/run", "query=a"), f"{tmp_path}/home/run has no best.pt")


def test_a_run_folder_may_contain_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("lr=1").mkdir()
    assert hydra_overrides("compare", ["lr=1", "lr=2", "b"]) == ["lr=2", "runs=['lr=1','b']"]


def completed(line: str) -> list[str]:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        plugin = hydra.get_shell_to_plugin_map(hydra.config_loader)["bash"][0]
        return sorted(completion.candidates(line, plugin))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("metacv ", ["compare", "evaluate", "export", "info", "list", "predict", "report", "train"]),
        ("metacv list ", ["backbones", "datasets", "experiments", "heads", "hydra.run.dir=", "methods"]),
        ("metacv list methods he", ["heads"]),
        ("metacv tr", ["train"]),
        ("metacv train algo=proton", ["algo=protonet"]),
        ("metacv train algo=maml,rel", ["algo=maml,relationnet"]),
        ("metacv train algo=protonet algo.", ["algo.learn_temperature=", "algo.metric=", "algo.temperature="]),
        ("metacv train backbone=conv4_relation backbone.p", ["backbone.padding."]),
        ("metacv train clip", ["clip_norm=", "clip_value="]),
        ("metacv train precision=", ["precision=bf16", "precision=fp32", "precision=tf32"]),
        ("metacv train batch_norm=t", ["batch_norm=transductive"]),
        ("metacv train experiment=omniglot/maml_5", ["experiment=omniglot/maml_5w1s", "experiment=omniglot/maml_5w5s"]),
        ("metacv evaluate split=t", ["split=test", "split=train"]),
        ("metacv evaluate batch_norm=b", ["batch_norm=both"]),
        ("metacv evaluate dataset=o", ["dataset=omniglot"]),
        ("metacv evaluate ch", ["checkpoint="]),
        ("metacv compare dataset=o", ["dataset=omniglot"]),
        ("metacv predict su", ["support="]),
        ("metacv predict dataset=o", []),
        ("metacv train device=", ["device=auto", "device=cpu", "device=cuda"]),
        ("metacv train hydra.run.d", ["hydra.run.dir="]),
        ("metacv train experiment=omniglot/protonet_5w5s algo.m", ["algo.metric="]),
        ("metacv train experiment=omniglot/protonet_5w5s dataset.co", ["dataset.counts."]),
        ("metacv train experiment=omniglot/reptile_5w1s algo=maml algo.eval_", ["algo.eval_inner_steps="]),
        ("metacv train nothing", []),
        ("metacv nothing ", []),
    ],
)
def test_tab_completion_offers_the_expected_words(line, expected):
    assert completed(line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("metacv report ", ["a run/", "a.txt", "b/", "hydra.run.dir="]),
        ("metacv report b", ["b/"]),
        ("metacv info b", ["b/"]),
        ("metacv report b/", ["b/one/", "b/two/"]),
        ("metacv compare b/t", ["b/two/"]),
        ("metacv compare b/one b/t", ["b/two/"]),
        ("metacv compare b/one batch_norm=inductive b/two sh", ["shot="]),
        ("metacv evaluate checkpoint=b/o", ["checkpoint=b/one/"]),
        ("metacv train init=a", ["init=a run/", "init=a.txt"]),
        ("metacv train dataset=image_folder dataset.root=b", ["dataset.root=b/"]),
        ("metacv train hydra.run.dir=nowhere", []),
    ],
)
def test_completion_offers_paths_for_path_settings(line, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("a run", "b/one", "b/two"):
        Path(folder).mkdir(parents=True)
    Path("a.txt").touch()
    assert completed(line) == expected


def test_completion_offers_every_file_of_configs():
    for group in ("algo", "backbone", "dataset", "experiment"):
        files = (path.relative_to(CONFIG_DIR / group).with_suffix("") for path in (CONFIG_DIR / group).rglob("*.yaml"))
        assert completed(f"metacv train {group}=") == sorted(f"{group}={name.as_posix()}" for name in files)


def test_bash_completes_with_the_installed_script(tmp_path):
    command = tmp_path / "metacv"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m metacv "$@"\n')
    command.chmod(0o755)
    script = """
eval "$(metacv -sc install=bash)"
COMP_LINE="metacv train algo=proton" COMP_POINT=24 COMP_CWORD=2
hydra_bash_completion
echo "${COMPREPLY[@]}"
"""
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "algo=protonet\n"


@pytest.mark.parametrize("words", [("train", "algo=nope"), ("train", "algo=["), ("evaluate", "dataset=nope")])
def test_help_is_shown_whatever_other_words_are_given(metacv, words):
    code, out, err = metacv(*words, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"metacv {words[0]}: ")


def test_an_invalid_command_line_has_no_completions(metacv, monkeypatch):
    monkeypatch.setenv("COMP_LINE", "metacv train algo=[ st")
    assert metacv("-sc", "query=bash") == (0, "", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluate", "RUN"), "RUN: give settings as name=value"),
        (("train", "protonet"), "protonet: give settings as name=value"),
        (("train", "+augment.foo=1"), "foo: there is no such setting"),
        (("train", "clip_norm=inf"), "clip_norm=inf: must be a number above 0 and at most 1000000000 or null"),
        (
            ("train", "seed=99999999999999999999999"),
            "seed=99999999999999999999999: must be a whole number from 0",
        ),
        (("evaluate", "checkpoint=a", "--cfg", "job", "--resolve"), "--resolve: there is no such option; evaluate has"),
    ],
)
def test_words_without_an_equals_sign_exit_with_one_line(metacv, words, message):
    code, out, err = metacv(*words)
    assert (code, after_first_line(out)) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_method_of_a_checkpoint_cannot_be_changed(metacv, trained):
    target = "algo._target_=metacv.algorithms.metric.protonet.ProtoNet"
    code, _, err = metacv("evaluate", f"checkpoint={trained('protonet')}", target)
    assert (code, err) == (1, "metacv: algo._target_: the method of a checkpoint cannot be changed\n")


def test_help_needs_no_locale_of_utf8():
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "metacv", "train", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
