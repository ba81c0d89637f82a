"""Output of a training run: header, progress bars, pictures, warnings, dry run, and the end of a sweep."""

import contextlib
import io
import json
import multiprocessing
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest
from conftest import after_first_line, quick
from PIL import Image

from metacv.config import TrainConfig
from metacv.curves import POINTS, curve, results_picture
from metacv.drawing import as_tensor
from metacv.logger import Logger
from metacv.results import read_results
from metacv.sweep import ranking
from metacv.terminal import progress_bar
from metacv.unusual import unusual

PROTONET = ("train", *quick("protonet"))


def on_a_terminal(columns: int, rows: int, *words: str, environment: dict[str, str]) -> str:
    """What a command prints on a terminal of this size, as one text with carriage returns."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    command = [sys.executable, "-m", "metacv", *words]
    done = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=os.environ | environment)
    os.close(theirs)
    pieces = []
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(ours)
    assert done.wait(timeout=60) == 0
    return b"".join(pieces).decode()


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (120, 40), (0, 0)])
def test_a_terminal_of_any_size_has_a_bar_that_fits_into_one_line(columns, rows, tmp_path, data_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = {"METACV_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1", "COLUMNS": "", "LINES": ""}
    words = (*PROTONET, "steps=60", "eval_every=60", "log_every=1", "hydra.run.dir=run")
    text = on_a_terminal(columns, rows, *words, environment=environment)
    bars = [part for part in re.split(r"[\r\n]", text) if " of 60 steps" in part]
    with_speed = [bar for bar in bars if "tasks/s" in bar]
    assert with_speed
    for bar in with_speed:
        visible = re.sub(r"\x1b\[\w", "", bar)
        assert len(visible) <= (columns or 80)
        drawn = re.match(r"[\s█▏▎▍▌▋▊▉#\d]*? (?=\d+ of 60)", visible)
        assert drawn is not None
        assert len(drawn[0]) >= 9


def test_runs_at_the_same_time_have_no_bars_and_name_themselves_in_each_line(tmp_path):
    def run(place: Path) -> None:
        sys.stderr = FakeTerminal()
        bar = progress_bar(3, "step")
        with Logger(place / "0_run", 0, -1) as logger, contextlib.redirect_stdout(io.StringIO()) as out:
            logger.line("step 1")
        (place / "seen").write_text(f"{bar.disable} {out.getvalue()}")

    class FakeTerminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    (tmp_path / "0_run").mkdir()
    process = multiprocessing.get_context("fork").Process(target=run, args=(tmp_path,))  # as joblib has for each run
    process.start()
    process.join(timeout=60)
    assert (tmp_path / "seen").read_text() == "True 0_run: step 1\n"
    assert (tmp_path / "0_run/train.log").read_text().endswith("  step 1\n")


def test_the_first_line_is_printed_before_torch_is_imported(tmp_path, data_dir):
    code = """
import sys
from metacv import cli
class Stop(Exception): pass
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ImportError("torch is not imported yet")
sys.meta_path.insert(0, Refuse())
sys.argv = ["metacv", "train", "steps=2", "hydra.run.dir=run"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"metacv \S+: train steps=2 hydra.run.dir=run\n", done.stdout)
    assert "torch is not imported yet" in done.stderr


def test_name_sets_the_folder_of_a_run(metacv):
    assert metacv(*PROTONET, "name=first")[0] == 0
    assert Path("outputs/train/first/best.pt").exists()
    code, _, err = metacv(*PROTONET, "name=first")
    assert (code, err) == (1, "metacv: hydra.run.dir=outputs/train/first holds a run; resume=auto continues it\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["name=a", "hydra.run.dir=b"], "name=a and hydra.run.dir=b: give only one of them"),
        (["name=a", "name=b"], "name=a and name=b: give only one of them"),
        (["name="], "name is empty; give a name for the run, or leave out name"),
        (["name=.."], "name=..: not a folder in outputs/train; hydra.run.dir=FOLDER takes any folder"),
        (["+name=a/../.."], "name=a/../..: not a folder in outputs/train; hydra.run.dir=FOLDER takes any folder"),
        (["name=."], "name=.: not a folder in outputs/train; hydra.run.dir=FOLDER takes any folder"),
        (["name=/a"], "name=/a: not a folder in outputs/train; hydra.run.dir=FOLDER takes any folder"),
        (["name=a\nb"], "name=a?b: not a folder in outputs/train; hydra.run.dir=FOLDER takes any folder"),
        (["-m", "name=.."], "name=..: not a folder in outputs/sweep; hydra.sweep.dir=FOLDER takes any folder"),
        (["name=a", "+name=b"], "name=a and +name=b: give only one of them"),
        (["-m", "name=a", "hydra.sweep.dir=b"], "name=a and hydra.sweep.dir=b: give only one of them"),
    ],
)
def test_an_invalid_name_is_refused_in_one_line(metacv, words, message):
    code, out, err = metacv("train", *words)
    assert (code, after_first_line(out), err) == (1, "", f"metacv: {message}\n")


def test_a_dry_run_prints_time_and_memory_and_leaves_no_files(metacv):
    code, out, err = metacv(*PROTONET, "steps=1000", "eval_every=300", "dry_run=true", "name=dry")
    assert (code, err) == (0, "")
    steps, validation, whole = out.splitlines()[-3:]
    assert re.fullmatch(r"training  \d+ (s|min), [\d.]+ s per step", steps)
    assert re.fullmatch(r"val       \d+ s, [\d.]+ s per validation", validation)
    assert re.fullmatch(r"total     \d+ (s|min), at most [\d.]+ GB of memory", whole)
    assert not [path for path in Path("outputs").rglob("*") if path.is_file()]
    assert not Path("outputs/train/dry").exists()


def test_a_dry_run_of_a_finished_run_has_nothing_left_to_do(metacv, trained):
    code, out, _ = metacv("train", f"resume={trained('protonet')}", "dry_run=true")
    assert code == 0
    assert re.search(r"\ntraining  0 s, 0 s per step\nval       0 s, [\d.e-]+ s per validation\ntotal     0 s, ", out)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["dry_run=true", "way=99"])
def test_a_sweep_without_a_run_leaves_no_folder(metacv, word):
    metacv("train", "-m", *quick("protonet"), "seed=0,1", word, "name=no,run")
    assert not Path("outputs/sweep/no,run").exists()


def test_a_dry_run_does_not_change_an_existing_run(metacv, trained):
    import shutil

    shutil.copytree(trained("protonet"), "run")
    before = {path.name: path.read_bytes() for path in Path("run").iterdir() if path.is_file()}
    assert metacv("train", "resume=run", "steps=6", "dry_run=true")[0] == 0
    assert {path.name: path.read_bytes() for path in Path("run").iterdir() if path.is_file()} == before


@pytest.mark.slow
def test_a_sweep_ends_with_its_runs_best_first_and_the_next_commands(metacv):
    code, out, _ = metacv(
        "train", "-m", *quick("protonet"), "seed=0,1", "train_way=2,5", "name=some", "eval_episodes=4"
    )
    assert code == 0
    table = out[out.index("best in validation: 5-way") :].splitlines()
    accuracies = [float(line.split(" ±")[0]) for line in table[1:5]]
    files = [read_results(path) for path in Path("outputs/sweep/some").glob("*/result.json")]
    assert accuracies == sorted((round(100 * file.results[0].accuracy, 2) for file in files), reverse=True)
    assert all(re.search(r"seed=[01] train_way=[25]$", line) for line in table[1:5])
    assert table[5:] == [
        "",
        "to test:   metacv evaluate checkpoint=outputs/sweep/some",
        "to report: metacv report outputs/sweep/some",
    ]


def test_runs_with_different_validation_have_separate_rankings(trained, tmp_path):
    for algo, batch_norm in (("protonet", "inductive"), ("maml", "transductive")):
        content = json.loads((trained(algo) / "result.json").read_text())
        content["results"][0]["batch_norm"] = batch_norm
        (tmp_path / algo).mkdir()
        (tmp_path / algo / "result.json").write_text(json.dumps(content))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/result.json").write_text("{")
    text = ranking(tmp_path)
    assert text.count("best in validation") == 2
    assert "Runs of different tables were validated differently" in text
    assert ranking(tmp_path / "damaged") == ""


def test_a_run_writes_a_picture_of_its_curves(metacv, monkeypatch):
    monkeypatch.setattr("metacv.curves.results_picture", results_picture)
    assert metacv(*PROTONET, "hydra.run.dir=run")[0] == 0
    with Image.open("run/results.png") as picture:
        assert picture.size == (1200, 396)


def test_the_picture_of_curves_shows_every_value():
    lines = [{"step": float(s), "train/loss": 2.0, "train/accuracy": 0.5, "train/lr": 0.1} for s in range(1, 1001)]
    lines += [{"step": 500.0, "val/accuracy": 0.6, "val/ci95": 0.01}]
    steps, losses = curve(lines, "train/loss")
    assert len(steps) <= POINTS
    assert steps.mean() == pytest.approx(500.5, rel=1e-2)
    assert set(losses) == {2.0}
    assert [*map(list, curve(lines, "val/accuracy"))] == [[500.0], [0.6]]
    assert [*map(list, curve(lines, "no/such"))] == [[], []]
    with_points, without = (Image.open(__import__("io").BytesIO(results_picture(own, "a run"))) for own in (lines, []))
    assert (as_tensor(with_points.convert("RGB")) != as_tensor(without.convert("RGB"))).any()


def test_lines_of_a_damaged_file_do_not_stop_the_drawing_of_curves():
    lines = [{"step": 1.0, "val/accuracy": 0.5}, {"step": 2.0, "val/accuracy": 0.6, "val/ci95": -1.0}]
    assert results_picture(lines, "a run").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("algo", "inner_lr", "meta_batch", "warned"),
    [
        ("gradient.maml.MAML", 0.4, 4, []),
        ("gradient.maml.MAML", 0.01, 32, []),
        ("gradient.maml.MAML", 40, 4, ["algo.inner_lr=40 is far from 0.01 to 0.4"]),
        ("gradient.maml.MAML", 1e-4, 4, ["algo.inner_lr=0.0001 is far from 0.01 to 0.4"]),
        ("metric.protonet.ProtoNet", None, 100, ["meta_batch=100 is far from 1"]),
        ("metric.protonet.ProtoNet", None, 4, []),
        ("metric.dn4.DN4", None, 10000, []),  # no file says what is usual
    ],
)
def test_a_setting_far_from_all_values_in_the_configs_gives_a_warning(algo, inner_lr, meta_batch, warned):
    node = {"_target_": f"metacv.algorithms.{algo}", **({"inner_lr": inner_lr} if inner_lr else {})}
    config = TrainConfig(algo=node, meta_batch=meta_batch)
    assert [text.partition(", the values")[0] for text in unusual(config)] == warned


@pytest.mark.slow
def test_an_unusual_setting_gives_one_warning_and_does_not_stop_the_run(metacv):
    code, _, err = metacv(*PROTONET, "meta_batch=50", "hydra.run.dir=run")
    assert code == 0
    assert re.fullmatch(r"metacv: warning: meta_batch=50 is far from 1, .*\n", err)
