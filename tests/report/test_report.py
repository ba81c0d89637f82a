"""Reports on run folders with known content, read back from the table, and from the page in a real browser."""

import csv
import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
from html import escape
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import open_dict
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from metacv.compare import check_same_tasks
from metacv.config import CompareConfig, ReportConfig, TrainConfig, composed, from_dict, typed
from metacv.files import sha256
from metacv.model import load_checkpoint, save_checkpoint
from metacv.report import report
from metacv.report.figures import draw, lines_of, point, sample_episode, svg
from metacv.results import Result, ResultFile
from metacv.text import csv_safe, shortened_in_the_middle
from metacv.words import hydra_overrides

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "outputs/reference/omniglot"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CONFIG = {
    "dataset": {"_target_": "metacv.data.omniglot.Omniglot", "split": "vinyals", "test_rotation": "as_classes"},
    "backbone": {"_target_": "metacv.backbones.conv4.Conv4", "channels": 64},
    "algo": {"_target_": "metacv.algorithms.metric.protonet.ProtoNet", "temperature": 1.0},
    "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.001},
    "schedule": {"_target_": "torch.optim.lr_scheduler.ConstantLR"},
    "way": 5, "shot": 1, "query": 15, "episodes": 1000, "train_way": 60, "train_shot": 1, "train_query": 5,
    "steps": 10, "meta_batch": 1, "precision": "fp32", "compile": False, "eval_every": 5, "eval_episodes": 200,
    "batch_norm": "inductive", "seed": 0,
}  # fmt: skip
TEST = Result(
    accuracy=0.8, ci95=0.01, dataset="Omniglot", split="test", rotation="as_classes", way=5, shot=1, query=15,
    episodes=1000, seed=0, batch_norm="inductive", episodes_sha256="1", method="ProtoNet",
)  # fmt: skip


def make_run(folder: Path, accuracy: float = 0.5, overrides: tuple[str, ...] = (), **changes) -> Path:
    """The folder of a finished run with this validation accuracy; `changes` are settings that differ from CONFIG."""
    folder.mkdir(parents=True)
    config = CONFIG | changes
    best = {"accuracy": accuracy, "ci95": 0.01}
    content = {"config": config, "image_shape": [1, 28, 28], "step": 10, "algorithm": {"w": torch.zeros(1)}}
    save_checkpoint(folder / "best.pt", content | {"validation": best | {"step": 10}})
    validated = dataclasses.replace(
        TEST, **best, split="val", episodes=config["eval_episodes"], episodes_sha256="", step=10
    )
    ResultFile([validated], {"steps": 10, "seconds": 1.0, "overrides": [*overrides]}).write(folder / "result.json")
    lines = [{"step": step, "train/accuracy": accuracy - 0.1 / step, "train/loss": 1.0} for step in range(1, 11)]
    lines += [{"step": step, "val/accuracy": accuracy - 0.1 / step, "val/ci95": 0.01} for step in (5, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_test(run: Path, folder: Path, *changes: dict) -> None:
    """An evaluation of the run's checkpoint, with a result for each of the `changes` to TEST."""
    folder.mkdir(parents=True)
    digest = sha256(run / "best.pt")
    results = [dataclasses.replace(TEST, checkpoint_sha256=digest, **one) for one in changes]
    ResultFile(results).write(folder / "result.json")


@pytest.fixture(scope="module")
def kept_sweep(tmp_path_factory) -> Path:
    sweep = tmp_path_factory.mktemp("sweep")
    for i, (seed, lr) in enumerate((seed, lr) for seed in (0, 1) for lr in (0.001, 0.01)):
        words = ("algo=protonet", f"seed={seed}", f"optimizer.lr={lr}", "steps=10")
        optimizer = CONFIG["optimizer"] | {"lr": lr}
        run = make_run(sweep / str(i), 0.5 + 0.1 * i, words, seed=seed, optimizer=optimizer)
        with SummaryWriter(str(run)) as writer:
            writer.add_image("val/episode", torch.full((3, 120, 200), 99, dtype=torch.uint8), 10)
    make_test(sweep / "0", sweep / "tests/0/1", {"accuracy": 0.41})
    make_test(sweep / "0", sweep / "tests/0/2", {"accuracy": 0.52, "shot": 2, "episodes_sha256": "2"})
    both = {"accuracy": 0.71}, {"accuracy": 0.73, "batch_norm": "transductive"}
    make_test(sweep / "3", sweep / "tests/3/1", *both)
    return sweep


@pytest.fixture
def runs(kept_sweep, tmp_path, monkeypatch) -> Path:
    """A copy of a sweep of two by two, two of its runs tested, one of them on two shots and one in both modes."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(kept_sweep, "sweep")
    return Path("sweep")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("own")


def rows(*places: Path | str) -> list[dict[str, str]]:
    """The rows of a report's table, as report.csv has them."""
    report(ReportConfig([str(place) for place in places]), Path("out"))
    with Path("out/report.csv").open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def paper_of(row: dict[str, str]) -> str:
    return " ± ".join(filter(None, (row.get("paper accuracy %"), row.get("paper ci95 %"))))


def test_the_table_has_every_run_and_every_test_with_the_settings_that_vary(runs, capsys):
    table = rows(runs)
    out = capsys.readouterr().out
    assert len({row["run"] for row in table}) == 4
    assert {(row["seed"], row["optimizer.lr"]) for row in table} == {(s, r) for s in "01" for r in ("0.001", "0.01")}
    assert not {"steps", "algo", "query", "batch_norm", "eval_episodes"} & table[0].keys()  # the same for all
    tested = sorted(
        (row["run"], row["task"], row["tested on"].split(", ")[2], row["test accuracy %"], row["test ci95 %"])
        for row in table
        if row["test accuracy %"]
    )
    assert tested == [
        ("0", "5-way 1-shot", "inductive", "41.00", "1.00"),
        ("0", "5-way 2-shot", "inductive", "52.00", "1.00"),
        ("3", "5-way 1-shot", "inductive", "71.00", "1.00"),
        ("3", "5-way 1-shot", "transductive", "73.00", "1.00"),
    ]
    for row in table:
        assert row["validation accuracy %"] == f"{50 + 10 * int(row['run'])}.00"
        assert row["validation ci95 %"] == "1.00"
        assert row["at step"] == "10"
        assert f"{row['validation accuracy %']} ± 1.00" in out
    sections = Path("out/report.md").read_text().split("## ")[1:]
    tables = [[line for line in section.splitlines() if line.startswith("|")] for section in sections]
    assert sum(len(lines) - 2 for lines in tables) == len(table)
    assert all(len({line.count(" | ") for line in lines}) == 1 for lines in tables)


def test_rows_of_a_task_are_together_and_the_best_comes_first(runs):
    table = rows(runs)
    keys = [(row["task"], row["tested on"]) for row in table]
    assert len(set(keys)) == sum(key != other for key, other in zip(keys, [None, *keys], strict=False))
    assert len(set(keys)) > 2
    for key in set(keys):
        own = [row for row, k in zip(table, keys, strict=True) if k == key]
        values = [float(row["validation accuracy %"]) for row in own]  # a test may not choose
        assert values == sorted(values, reverse=True)


def test_runs_that_differ_in_a_setting_are_distinguishable_in_the_table(folder):
    """Also if no command line is known, or if another method has other validation settings."""
    make_run(folder / "a", overrides=("algo=protonet",))
    make_run(folder / "b", overrides=("algo=protonet",), clip_norm=5.0)
    assert {row["run"]: row["clip_norm"] for row in rows(folder)} == {"a": "null", "b": "5.0"}
    make_run(folder / "c", overrides=("algo=protonet",), eval_episodes=50, batch_norm="transductive")
    table = {row["run"]: row for row in rows(folder)}
    assert (table["c"]["eval_episodes"], table["c"]["batch_norm"]) == ("50", "transductive")


def test_settings_of_the_machine_have_no_column(folder):
    make_run(folder / "a", overrides=("seed=0", "device=cpu", "+launcher=joblib", "hydra.job.num=1", "log_every=1"))
    make_run(folder / "b", overrides=("seed=1", "device=cuda", "log_every=2"), seed=1)
    validation = {"validation accuracy %", "validation ci95 %"}
    assert rows(folder)[0].keys() == {"run", "algorithm", "task", *validation, "selection", "at step", "seed"}


def test_a_trained_and_evaluated_run_is_in_the_report(metacv, trained):
    shutil.copytree(trained("protonet"), "run")
    assert metacv("evaluate", "checkpoint=run", "hydra.run.dir=test")[0] == 0
    assert metacv("compare", "run", str(trained("protonet")), "hydra.run.dir=compared")[0] == 0
    code, out, err = metacv("report", ".", "hydra.run.dir=out")
    assert (code, err) == (0, "")
    (test,) = json.loads(Path("test/result.json").read_text())["results"]
    (best,) = json.loads(Path("run/result.json").read_text())["results"]
    with Path("out/report.csv").open(newline="", encoding="utf-8-sig") as file:
        (row,) = csv.DictReader(file)
    for kind, measured in (("test", test), ("validation", best)):
        texts = row[f"{kind} accuracy %"], row[f"{kind} ci95 %"]
        assert texts == (f"{100 * measured['accuracy']:.2f}", f"{100 * measured['ci95']:.2f}")
        assert " ± ".join(texts) in out
    assert row["at step"] == str(best["step"])
    page = Path("out/report.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("data:image/png;base64,") == 1


def test_results_of_a_comparison_count_as_tests(folder):
    digests = {name: sha256(make_run(folder / name) / "best.pt") for name in "ab"}
    results = [dataclasses.replace(TEST, checkpoint_sha256=digest) for digest in digests.values()]
    (folder / "compared").mkdir()
    ResultFile(results, differences=[{"mean": 0.0}]).write(folder / "compared/result.json")
    assert {row["run"]: row["test accuracy %"] for row in rows(folder)} == {"a": "80.00", "b": "80.00"}


def test_numbers_of_papers_are_beside_results_under_their_protocol(folder):
    table = rows(REFERENCE)
    papers = {(row["run"], row["tested on"].split(" episodes")[0]): paper_of(row) for row in table}
    assert papers["maml_5w1s", "600"] == "98.7 ± 0.4"
    assert papers["maml_5w1s", "2000"] == ""
    assert papers["protonet_20w5s", "1000"] == "98.9"
    assert papers["protonet_20w1s", "1000"] == "96.0"
    reptile = {
        row["tested on"].split(", ")[2]: paper_of(row)
        for row in table
        if row["run"] == "reptile_5w1s" and ", 1 query" in row["tested on"]
    }
    assert reptile == {"transductive": "97.68 ± 0.04", "inductive": "95.39 ± 0.09"}


@pytest.mark.parametrize(
    ("overrides", "changes", "paper"),
    [
        (["experiment=own"], {}, "98.80 ± 0.04"),
        (["experiment=own", "steps=5", "algo.temperature=2"], {}, "98.80 ± 0.04"),
        (["experiment=own"], {"batch_norm": "transductive"}, "99.1"),
        ([], {}, ""),
        (["experiment=own", "shot=5"], {}, ""),
        (["experiment=own", "algo=maml"], {}, ""),
        (["experiment=own", "batch_norm=inductive"], {}, ""),
        (["experiment=own", "backbone.channels=32"], {}, ""),
        (["experiment=own", "dataset.split=lake"], {}, ""),
        (["experiment=own", "paper=[{accuracy:1}]"], {}, ""),
        (["experiment=own"], {"split": "train"}, ""),
        (["experiment=own"], {"rotation": "none"}, ""),
        (["experiment=own"], {"dataset": "Glyphs"}, ""),
        (["experiment=own"], {"way": 20}, ""),
        (["experiment=own"], {"shot": 5}, ""),
        (["experiment=own"], {"query": 5}, ""),
        (["experiment=own"], {"changes": {"temperature": 2}}, ""),
    ],
)
def test_a_papers_number_appears_only_under_its_own_protocol(folder, overrides, changes, paper):
    numbers = [
        {"accuracy": 98.8, "ci95": 0.04, "source": "a paper"},  # in the mode of validation
        {"accuracy": 99.1, "ci95": None, "batch_norm": "transductive", "source": "a paper"},
        {"accuracy": "<script>", "batch_norm": "inductive"},
    ]
    make_test(make_run(folder / "run", overrides=tuple(overrides), paper=numbers), folder / "test", changes)
    assert [paper_of(row) for row in rows(folder)] == [paper]


def test_a_checkpoint_without_numbers_of_a_paper_has_those_of_its_experiment(folder):
    known = make_run(folder / "known", overrides=("experiment=omniglot/protonet_5w1s",))
    outside = make_run(folder / "outside", overrides=("experiment=../../outside",), seed=1)
    for run in (known, outside):
        make_test(run, run / "test", {})
    assert {row["run"]: paper_of(row) for row in rows(folder)} == {"known": "98.8", "outside": ""}


def test_runs_that_were_validated_on_other_images_are_not_ranked_together(runs):
    make_run(Path("other/run"), 0.99, dataset=CONFIG["dataset"] | {"split": "lake"})
    table = rows(runs, "other")
    page = Path("out/report.html").read_text()
    untested = [row for row in table if not row["test accuracy %"]]
    assert len(untested) == 3
    best = {row["tested on"].rpartition(" ")[2] for row in table if row["selection"] == "best"}
    assert best == {"", "as_classes"}
    assert [row["selection"] for row in untested if row["run"].endswith("other/run")] == [""]
    assert page.count('<tr class="row best">') == 2


def test_runs_of_several_folders_have_distinct_names(runs):
    shutil.copytree(runs, "a/sweep")
    shutil.copytree(runs, "b/sweep")
    Path("b/sweep/multirun.yaml").write_text("")
    names = {row["run"] for row in rows("a", "b", "b/sweep/multirun.yaml")}
    assert len(names) == 8
    assert {name.split("/")[0] for name in names} == {"a", "b"}


def test_an_unfinished_run_has_its_settings_too(runs):
    for run in sorted(runs.glob("[0-3]")):
        words = json.loads((run / "result.json").read_text())["training"]["overrides"]
        (run / "result.json").unlink()
        (run / ".hydra").mkdir()
        (run / ".hydra/overrides.yaml").write_text("".join(f"- {word}\n" for word in words))
    table = rows(runs)
    assert {(row["seed"], row["optimizer.lr"]) for row in table} == {(s, r) for s in "01" for r in ("0.001", "0.01")}
    assert not {"steps", "algo", "query"} & table[0].keys()


def test_names_cannot_break_the_page_or_the_tables(folder, capsys):
    odd = "<script>alert(1)<script> & | co"
    words = ("=cmd", "a|b=\x1b[31m\ud800", "way=9", "@SUM(1)=-1+cmd|' /C calc'!A0")
    run = make_run(folder / odd, overrides=words)
    make_run(folder / "=1+1", seed=1)
    make_test(run, run / "test", {"dataset": "<script>Omniglot", "changes": {"<script>": "[a](http://b)<script>"}})
    table = rows(folder)
    assert "\x1b" not in capsys.readouterr().out
    page, markdown = Path("out/report.html").read_text(), Path("out/report.md").read_text()
    assert "<script" not in page + markdown
    assert "&lt;script&gt;alert" in page
    assert "\\| co" in markdown
    assert "&lt;script&gt;alert" in markdown
    assert "\\[a\\](http" in markdown
    assert "'=1+1" in [row["run"] for row in table]
    assert "'-1+cmd|' /C calc'!A0" in [row["'@SUM(1)"] for row in table]


def test_a_resumed_run_has_its_last_picture_and_nothing_is_printed_about_it(folder, caplog):
    run = make_run(folder / "run")
    for step, grey, first in (10, 50, None), (5, 99, 1):  # the resumed run repeats steps after its checkpoint
        with SummaryWriter(str(run), purge_step=first) as writer:
            writer.add_scalar("train/loss", 1.0, step)
            writer.add_image("val/episode", torch.full((3, 20, 20), grey, dtype=torch.uint8), step)
    picture = Image.open(io.BytesIO(sample_episode(run) or b""))
    assert picture.getpixel((0, 0)) == (99, 99, 99)
    assert caplog.text == ""


def test_an_empty_and_a_missing_folder_are_reported_in_one_line(metacv):
    Path("empty").mkdir()
    assert metacv("report", "empty")[::2] == (1, "metacv: empty: there is no run with a best.pt\n")
    assert metacv("report", "nowhere")[::2] == (1, "metacv: nowhere: there is no such folder\n")
    assert not Path("outputs").exists()


def test_damaged_files_are_left_out(runs, capsys):
    first, second, third = runs / "0/best.pt", runs / "1", runs / "2/best.pt"
    first.write_bytes(first.read_bytes()[:500])
    torch.save(torch.load(third) | {"format": torch.zeros(2, 2)}, third)
    (second / "metrics.jsonl").write_text(
        '{"step": 1, "val/accuracy": 0.5}\n{"step": \n5\n{"val/accuracy": 1}\n'
        '{"step": 3, "val/accuracy": 0.5, "val/ci95": NaN}\n{"step": 1' + "0" * 400 + "}"
    )
    for events in second.glob("events.*"):
        events.write_bytes(b"no events")
    (runs / "tests/0/1/result.json").write_text("{")
    (runs / "tests/0/2/result.json").write_text(json.dumps({"schema": 2, "results": [{"checkpoint_sha256": []}]}))
    (runs / "runs.json").write_text('{"runs": ["a", "b"]}')
    (runs / "deep.json").write_text("[" * 200000)
    (runs / "folder.json").mkdir()
    assert {row["run"] for row in rows(runs)} == {"1", "3"}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"metacv: {first} is not a checkpoint of metacv, or is damaged: left out"
    assert [line.startswith(f"metacv: {third} ") for line in lines] == [False, True]


def test_csv_text_cannot_become_formulas_and_numbers_stay_numbers():
    for text in ("=1+1", "@SUM(A1)", "+1+2", "-1+cmd|' /C calc'!A0", "+cmd", "- 1", " =1", "\t=1", "\n1", "\uff1d1"):
        assert csv_safe(text) == f"'{text}"
    for text in ("", "1", "-1", "+1", "-0.5", "-.5", "1e-3", "-1E+3", "98.70 ± 0.40", "a=b", "run/1", "5-way 1-shot"):
        assert csv_safe(text) == text


@pytest.mark.parametrize(
    "lines",
    [
        [[(0, 50, 0), (10, 100, 0)], [(5, 75, 40)]],
        [[(5, 93.1, 0.1)]],
        [[], [(1e14, 1e14, 1e14)], [(-3, -5, 0), (1234, 99.99, 0.1)]],
        [[(x, 20 + x, 1) for x in range(60)]],
    ],
)
def test_a_chart_shows_every_point_and_interval_within_0_to_100_percent(lines):
    (axes,) = draw(lines, "step").axes
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn == [[[x, min(100, max(0, y))] for x, y, _ in line] for line in lines]
    for line in lines:
        assert all(left <= x <= right for x, *_ in line)
    assert -6 < bottom < top < 106
    intervals = [bar.get_segments()[0].tolist() for bar in axes.collections if bar.get_segments()]
    for x, (low, high) in [(s[0][0], (s[0][1], s[1][1])) for s in intervals]:
        y, half = next((min(100, max(0, y)), half) for line in lines for at, y, half in line if at == x)
        assert (low, high) == pytest.approx((max(0, y - half), min(100, y + half)))
        assert bottom <= low <= high <= top
    assert len(intervals) == sum(0 < len(line) <= 30 for line in lines)


def test_a_chart_marks_the_shots_that_were_tested():
    (axes,) = draw([[(1, 50, 1), (5, 60, 1), (20, 70, 1)]], "shot").axes
    assert axes.get_xticks().tolist() == [1, 5, 20]


def test_a_chart_is_the_same_for_the_same_data():
    first, second = (svg(draw([[(1, 50, 1), (5, 60, 1)]], "shot")) for _ in range(2))
    assert first == second
    assert "<metadata" not in first
    assert len(first) < 10_000


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(
    ("width", "dark"),
    [
        (390, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((390, False), (1200, True), (1200, False))),
    ],
)
def test_a_browser_shows_the_page_without_a_network_and_within_its_width(runs, tmp_path, width, dark):
    shutil.copytree(runs / "0", runs / "a" / ("long_name_" * 12))
    table = rows(runs)
    text = Path("out/report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)|url\((?!#)|@import|<script""", text)
    # The page reports what the browser made of it, from a frame: a window itself is never narrower than 500.
    probe = """<script>
      const light = colour => { const [r, g, b] = colour.map(v => v / 255).map(
        v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b }
      const colour = text => text.match(/[\\d.]+/g).map(Number)
      const ground = node => { for (; node; node = node.parentElement) {
        const own = colour(getComputedStyle(node).backgroundColor); if (own[3] !== 0) return own } }
      const contrast = node => { const style = getComputedStyle(node)
        const ink = colour(node.closest("svg") ? style.fill : style.color)
        const [a, b] = [ink, ground(node)].map(c => light(c.slice(0, 3)))
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) }
      addEventListener("load", () => { const all = [...document.body.querySelectorAll("*")]
        const texts = all.filter(n => !["SCRIPT", "STYLE"].includes(n.tagName) && !n.closest("defs")
          && [...n.childNodes].some(c => c.data?.trim()))
        parent.document.getElementById("probe").textContent = JSON.stringify({
        width: innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches,
        page: document.documentElement.scrollWidth, texts: texts.length,
        widest: Math.max(...all.filter(n => !n.closest(".wide > *")).map(n => n.getBoundingClientRect().right)),
        headings: Math.max(...[...document.querySelectorAll("h2")].map(n => n.getBoundingClientRect().right)),
        names: Math.max(...[...document.querySelectorAll(".row td:first-child")].map(
          n => n.getBoundingClientRect().right)),
        contrast: Math.min(...texts.map(contrast)),
        pictures: [...document.images].map(image => image.naturalWidth),
        text: Math.min(...[...document.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height)),
        charts: document.querySelectorAll("svg").length,
        rows: document.querySelectorAll("tr.row").length})})</script>"""
    framed = escape(text.replace("</body>", f"{probe}</body>"))
    frame = f'<iframe style="border:0;height:900px;width:{width}px" srcdoc="{framed}"></iframe>'
    Path("probed.html").write_text(f'<!DOCTYPE html><meta charset="utf-8"><pre id="probe"></pre>{frame}')
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-quic", "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1300,900",
         "--virtual-time-budget=3000", "--dump-dom", str(Path("probed.html").resolve())],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    seen = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)[1])
    assert (seen["width"], seen["dark"]) == (width, dark)
    assert seen["page"] <= width
    assert seen["widest"] <= width
    assert max(seen["headings"], seen["names"]) <= width
    assert seen["texts"] > 50
    assert seen["contrast"] >= 4.5
    assert seen["pictures"] == [200] * 5
    assert seen["charts"] == 3
    assert seen["text"] > 11
    assert seen["rows"] == len(table)


def copies(folder: Path, accuracies: dict[str, float]) -> None:
    """Runs that differ in the seed, each tested on two shots; validation accuracy falls as test accuracy rises."""
    for seed, (name, accuracy) in enumerate(accuracies.items()):
        run = make_run(folder / name, 1 - accuracy, seed=seed)
        for shot in (1, 5):
            tested = {"accuracy": accuracy, "ci95": 0.001, "shot": shot, "episodes_sha256": str(shot)}
            make_test(run, run / str(shot), tested)


def test_validation_selects_and_runs_with_overlapping_intervals_are_marked(folder, capsys):
    copies(folder, {"a": 0.80, "b": 0.801, "c": 0.99})
    selection = {(row["run"], row["task"]): row["selection"] for row in rows(folder)}
    for task in ("5-way 1-shot", "5-way 5-shot"):
        assert [selection[run, task] for run in "abc"] == ["best", "similar", ""]
    assert "metacv compare" in capsys.readouterr().out


def test_an_evaluation_with_other_settings_is_never_the_best(folder):
    """These settings were not used in validation."""
    make_test(make_run(folder / "a", 0.9), folder / "a/test", {}, {"accuracy": 0.805, "changes": {"temperature": 2}})
    make_test(make_run(folder / "b", 0.8, seed=1), folder / "b/test", {})
    selection = {(row["run"], row["algo.temperature"]): row["selection"] for row in rows(folder)}
    assert selection == {("a", "1.0"): "best", ("a", "2"): "similar", ("b", "1.0"): "similar"}


def test_each_group_begins_with_the_run_selected_by_validation(folder, capsys):
    """Two methods are validated and tested in different batch-norm modes; each has one run that is not tested yet."""
    maml = {"algo": CONFIG["algo"] | {"_target_": "metacv.algorithms.gradient.maml.MAML"}, "batch_norm": "transductive"}
    runs = {"0_maml": (0.60, 0.90), "1_maml": (0.70, 0.10), "2_maml": (0.88, None)}
    runs |= {"3_proto": (0.92, 0.92), "4_proto": (0.91, 0.93), "5_proto": (0.99, None)}
    for name, (validated, tested) in runs.items():
        own = maml if "maml" in name else {"batch_norm": "inductive"}
        run = make_run(folder / name, validated, (f"seed={name[0]}",), query=1, seed=int(name[0]), **own)
        if tested:
            make_test(run, run / "test", {"accuracy": tested, "batch_norm": own["batch_norm"], "query": 1})
    table = rows(folder)
    out = capsys.readouterr().out
    tested = "5-way 1-shot, 1000 episodes of Omniglot test, 1 query"
    untested = "5-way 1-shot, not tested yet; validated on 200 episodes of Omniglot val, 1 query"
    expected = {
        f"{tested}, inductive": "Best in validation: 3_proto, ProtoNet with seed=3, 92.00 ± 1.00 % validation, "
        "92.00 ± 1.00 % test.",
        f"{tested}, transductive": "Best in validation: 1_maml, MAML with seed=1, 70.00 ± 1.00 % validation, "
        "10.00 ± 1.00 % test.",
        f"{untested}, inductive": "Only run: 5_proto, ProtoNet with seed=5, 99.00 ± 1.00 % validation, not tested yet; "
        "to test: metacv evaluate checkpoint=own/5_proto",
        f"{untested}, transductive": "Only run: 2_maml, MAML with seed=2, 88.00 ± 1.00 % validation, not tested yet; "
        "to test: metacv evaluate checkpoint=own/2_maml",
    }
    for heading, sentence in expected.items():
        assert re.search(rf"^{re.escape(heading)}(, rotation as_classes)?\n{re.escape(sentence)}$", out, re.MULTILINE)
    command = "metacv compare own/5_proto own/2_maml split=val batch_norm=inductive"
    assert out.count("different batch-norm modes") == out.count(command) == 1
    for kind in ("html", "md"):
        assert command in Path(f"out/report.{kind}").read_text()
    assert [row["run"] for row in table] == ["3_proto", "4_proto", "1_maml", "0_maml", "5_proto", "2_maml"]


def test_the_command_to_compare_batch_norm_modes_is_accepted_as_printed(folder, capsys):
    make_run(folder / "it's a", batch_norm="inductive", episodes=600)
    make_run(folder / "a=b", batch_norm="transductive", episodes=1000)
    rows(folder)
    (command,) = re.findall(r"metacv (compare .*)", capsys.readouterr().out)
    words = shlex.split(command)
    assert {*words[1:3]} == {"own/it's a", "own/a=b"}
    with open_dict(settings := composed("compare", hydra_overrides("compare", words[1:]))):
        del settings["hydra"]
    config = typed(settings, CompareConfig)
    check_same_tasks({place: load_checkpoint(place) for place in config.runs}, config)
    assert (len(config.runs), config.split, config.batch_norm) == (2, "val", "inductive")


def test_a_sweep_over_methods_shows_their_names_and_not_the_settings_that_follow(folder, capsys):
    classifier, losses = "metacv.algorithms.classifier.Classifier", {"baseline": False, "baselinepp": True}
    for name, cosine in losses.items():
        make_run(folder / name, 0.6, (f"algo={name}",), algo={"_target_": classifier, "cosine": cosine})
    make_run(folder / "protonet", 0.7, ("algo=protonet",), optimizer={"_target_": "torch.optim.SGD", "momentum": 0.9})
    rows(folder)
    out = capsys.readouterr().out
    assert re.search(r"^run +algorithm +validation % +selection +algo$", out, re.M)
    assert re.search(r"^baselinepp +Classifier .* baselinepp$", out, re.M)


def test_no_two_rows_of_a_group_are_equal(folder):
    """With or without a known command line; rows differ in validation, data or method."""
    changes = [
        {"eval_episodes": 50}, {"batch_norm": "transductive"}, {"query": 5}, {"clip_norm": 5.0},
        {"dataset": CONFIG["dataset"] | {"split": "lake"}}, {"backbone": CONFIG["backbone"] | {"channels": 32}},
        {"algo": {"_target_": "metacv.algorithms.metric.feat.FEAT", "temperature": 64.0}, "eval_episodes": 60},
        {"head": {"_target_": "metacv.algorithms.heads.ncm.NearestMean", "flip": True}},
        {"algo": CONFIG["algo"] | {"removed_in_this_version": True}},
    ]  # fmt: skip
    for i, change in enumerate([{}, *changes]):
        make_test(make_run(folder / f"a{i}", **change), folder / f"a{i}/test", {})
        make_run(folder / f"b{i}", **change, seed=1)
    without_name = [
        tuple(text for name, text in row.items() if name != "run" and "accuracy" not in name) for row in rows(folder)
    ]
    assert "head.flip" not in rows(folder)[0]
    assert len({*without_name}) == len(without_name) == 20
    sections = Path("out/report.md").read_text().split("## ")[1:]
    for section in sections:
        cells = [line.split(" | ") for line in section.splitlines() if line.startswith("|")][2:]
        assert len({tuple(line[1:]) for line in cells}) == len(cells)
    headings = [section.splitlines()[0] for section in sections]
    assert len({*headings}) == len(headings) > 1


def test_runs_that_were_validated_in_different_ways_have_no_common_best(folder, capsys):
    for name, validated, changes in (("a", 0.5, {}), ("b", 0.9, {"eval_episodes": 50})):
        make_test(make_run(folder / name, validated, **changes), folder / name / "test", {})
    assert "selection" not in rows(folder)[0]
    out = capsys.readouterr().out
    assert "No best in validation: no two runs were validated in the same way (eval_episodes).\n" in out
    make_test(make_run(folder / "c", 0.4, seed=1), folder / "c/test", {})
    table = {row["run"]: row["selection"] for row in rows(folder)}
    assert table == {"a": "best", "b": "", "c": "similar"}
    assert "Best in validation (eval_episodes=200): a, ProtoNet with" in capsys.readouterr().out


def test_the_best_of_runs_tested_with_other_settings_is_labelled_as_such(folder, capsys):
    make_test(make_run(folder / "a", 0.9), folder / "a/test", {"changes": {"temperature": 2}})
    make_test(make_run(folder / "b", 0.8, seed=1), folder / "b/test", {})
    assert {row["run"]: row["selection"] for row in rows(folder)} == {"a": "similar", "b": "best"}
    assert "Best in validation (of runs tested with the settings of training): b, " in capsys.readouterr().out


def test_runs_that_differ_in_the_seed_only_have_a_line_with_their_mean(folder, capsys):
    for seed, (accuracy, lr) in enumerate([(0.1, 0.1), (0.2, 0.1), (0.3, 0.1), (0.5, 0.2)]):
        optimizer = CONFIG["optimizer"] | {"lr": lr}
        run = make_run(folder / str(seed), accuracy, ("optimizer.lr=1",), seed=seed, optimizer=optimizer)
        make_test(run, run / "test", {"accuracy": accuracy + 0.1})
    rows(folder)
    # Student's t of two degrees of freedom: 4.303 * 10 / sqrt(3) = 24.84
    text = "ProtoNet with optimizer.lr=0.1, 30.00 ± 24.84 % test, 20.00 ± 24.84 % validation (Student's t)."
    assert re.findall("Over .*", capsys.readouterr().out) == [f"Over 3 seeds: {text}"]


def test_earlier_stages_of_a_run_are_shown(folder, capsys):
    make_run(folder / "a")
    run = make_run(folder / "b", 0.9, seed=1)
    stages = ["Classifier on CIFARFS, step 7, sha256 0123", "teacher Classifier on FC100, step 8, sha256 4567"]
    content = torch.load(run / "best.pt", weights_only=True)
    save_checkpoint(run / "best.pt", content | {"training": {"stages": stages}})
    text = "Classifier on CIFARFS, step 7; teacher Classifier on FC100, step 8"
    assert {row["run"]: row["after"] for row in rows(folder)} == {"a": "", "b": text}
    assert f"b, ProtoNet with seed=1, after {text}, 90.00" in capsys.readouterr().out


def test_the_terminal_has_80_columns_and_the_files_have_whole_names(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"2026-11-26_12-00-00/{i}_protonet_omniglot_5w1s_with_a_long_name/seed_{i}" for i in range(3)]
    for i, name in enumerate(names):
        run = make_run(folder / name, 0.5 + 0.1 * i, (f"seed={i}", "way=5"), seed=i)
        make_test(run, run / "test", {})
    table = rows(folder)
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("run "))
    assert lines[start].split() == ["run", "test", "%", "validation", "%", "selection", "seed"]
    assert [len(line) <= 80 for line in lines[start : start + 4]] == [True] * 4
    shown = [line.split()[0] for line in lines[start + 1 : start + 4]]
    assert [(name[:2], name[-7:]) for name in shown] == [(f"{i}_", f"/seed_{i}") for i in (2, 1, 0)]
    shortest = [name.removeprefix("2026-11-26_12-00-00/") for name in names]
    assert {row["run"] for row in table} == {*shortest}
    for kind in ("html", "md"):
        assert all(name in Path(f"out/report.{kind}").read_text() for name in shortest)
    assert shortened_in_the_middle("0123456789abcdef", 9) == "012...def"
    assert shortened_in_the_middle("0123456789", 10) == "0123456789"


def test_a_line_of_accuracy_by_shot_is_the_mean_over_seeds(folder):
    copies(folder, {"a": 0.80, "b": 0.801, "c": 0.99})
    rows(folder)
    assert re.search(r"ProtoNet, trained 60-way 1-shot: 3 runs<", Path("out/report.html").read_text())
    tests = [dataclasses.replace(TEST, accuracy=accuracy, ci95=0.0) for accuracy in (0.1, 0.2, 0.3)]
    assert point(1, tests) == pytest.approx((1, 20, 24.84), abs=0.01)  # Student's t of two degrees of freedom
    assert point(1, [dataclasses.replace(TEST, accuracy=0.1, ci95=0.02)]) == (1, 10, 2)


def test_a_line_of_runs_trained_for_each_task_leaves_out_only_settings_that_follow_the_task():
    def line(shot: int, changes: dict[str, str] | None = None) -> str:
        config = CONFIG | {"shot": shot, "train_shot": shot, "algo": CONFIG["algo"] | {"shot": shot}}
        row = SimpleNamespace(run=SimpleNamespace(config=from_dict(TrainConfig, config), algorithm="RelationNet"))
        return [*lines_of(row, dataclasses.replace(TEST, shot=shot, changes=changes or {}), [])][1][1]

    assert line(1) == line(5)
    assert len({line(1), line(1, {"algo.shot": "null"}), line(1, {"algo.temperature": "2"})}) == 3


def test_an_evaluation_with_other_settings_is_a_row_beside_the_default_one(folder):
    run = make_run(folder / "a")
    make_test(run, run / "tests", {}, {"accuracy": 0.9, "changes": {"temperature": 2}})
    table = {row["algo.temperature"]: row for row in rows(folder)}
    assert set(table) == {"1.0", "2"}
    assert table["2"]["test accuracy %"] == "90.00"
    assert "selection" not in table["2"]  # of one run


def test_groups_of_the_same_task_on_other_episodes_have_different_headings(folder):
    run = make_run(folder / "a")
    make_test(run, run / "tests", {"episodes_sha256": "abcdefghi"}, {"episodes_sha256": "123456789"})
    rows(folder)
    headings = re.findall(r"<h2>(.*?)</h2>", Path("out/report.html").read_text())
    lists = [heading.rpartition(", ")[2] for heading in headings if "-way" in heading]
    assert lists == [
        "episode list 12345678",
        "episode list abcdefgh",
    ]


def test_yaml_aliases_and_long_logs_do_not_enlarge_the_report(folder):
    run = make_run(folder / "a")
    (run / "result.json").unlink()
    (run / ".hydra").mkdir()
    bombs = "".join(f"- &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    (run / ".hydra/overrides.yaml").write_text(f"- &a0 [x]\n{bombs}- &m way=5\n- *m\n")
    lines = [f'{{"step": {step}, "val/accuracy": 0.{step % 7}}}\n' for step in range(100_000)]
    (run / "metrics.jsonl").write_text("".join(lines))
    assert len(rows(folder)) == 1
    assert Path("out/report.html").stat().st_size < 20_000


def test_runs_and_evaluations_that_are_left_out_are_counted_and_named(folder, capsys):
    run = make_run(folder / "b")
    make_test(run, run / "test", {})
    content = (run / "test/result.json").read_text()
    (run / "test/result.json").write_text(content.replace(sha256(run / "best.pt"), "of another"))
    (folder / "failed").mkdir()
    (folder / "failed/metrics.jsonl").write_text("")
    one = {"norm": "inductive", "accuracy": 0.5, "checkpoint_sha256": sha256(run / "best.pt")}
    for name, old in {"old": one, "both": {"inductive": one}, "train": {"norm": "inductive", "overrides": []}}.items():
        (folder / f"{name}.json").write_text(json.dumps(old, indent=2))
    rows(folder)
    out = capsys.readouterr().out
    assert "left out: 2 evaluations of version 1: evaluate again: own/both.json, own/old.json\n" in out
    assert "left out: 1 run without a best.pt (failed, or not validated yet): own/failed\n" in out
    assert "left out: 1 evaluation of a checkpoint that is not in these folders, or has changed since: own/b/" in out
    assert "own/failed" in Path("out/report.html").read_text()


def test_evaluations_in_the_default_folder_belong_to_runs_anywhere(folder, capsys):
    run, other = make_run(folder / "a"), make_run(folder.with_name("other") / "b", seed=1)
    make_test(run, Path("outputs/evaluate/1"), {"accuracy": 0.625})
    make_test(other, Path("outputs/evaluate/2"), {"accuracy": 0.375})
    (row,) = rows(folder)
    assert row["test accuracy %"] == "62.50"
    assert "left out" not in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_reported_in_one_line(metacv):
    make_run(Path("own/a"))
    Path("out/report.html").mkdir(parents=True)
    assert metacv("report", "own", "hydra.run.dir=out")[::2] == (1, "metacv: out/report.html: Is a directory\n")


def test_a_home_folder_of_an_unknown_user_gets_one_line(metacv):
    assert metacv("report", "~nobody-of-this-name/runs") == (
        1,
        "",
        "metacv: ~nobody-of-this-name/runs: there is no such folder\n",
    )
