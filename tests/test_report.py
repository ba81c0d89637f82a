"""Reports: what lies in the folders, read back from the table and from the page in a real browser."""

import csv
import hashlib
import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest
import torch
from conftest import quick

from metacv.files import csv_safe
from metacv.report.page import chart, point, ticks

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture
def runs(metacv, sweep) -> Path:
    """A sweep of two by two, two of its runs tested, one of them on two shots."""
    if not (sweep / "multirun.yaml").exists():
        words = ("-m", *quick("protonet"), "seed=0,1", "optimizer.lr=1e-3,1e-2", f"hydra.sweep.dir={sweep}")
        assert metacv("train", *words)[0] == 0
        names = sorted(path.parent.name for path in sweep.glob("*/best.pt"))
        for name, shot, norm in ((names[0], 1, "inductive"), (names[0], 2, "inductive"), (names[3], 1, "both")):
            tested = f"hydra.run.dir={sweep / 'tests' / name / str(shot)}"
            words = (f"checkpoint={sweep / name}", f"shot={shot}", f"norm={norm}", "query=5", "episodes=8", tested)
            assert metacv("evaluate", *words)[0] == 0
    return sweep


def rows(folder: str) -> list[dict[str, str]]:
    with (Path(folder) / "report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_every_run_what_was_varied_and_every_test(metacv, runs):
    code, out, err = metacv("report", str(runs), "hydra.run.dir=out")
    assert (code, err) == (0, "")
    found = rows("out")
    assert len({row["run"] for row in found}) == 4
    assert {(row["seed"], row["optimizer.lr"]) for row in found} == {(s, r) for s in "01" for r in ("0.001", "0.01")}
    assert not {"steps", "algo", "query"} & found[0].keys()  # the same for all
    tested = [row for row in found if row["test %"]]
    assert sorted((row["task"], row["tested on"].split(", ")[-1]) for row in tested) == [
        ("5-way 1-shot", "inductive"), ("5-way 1-shot", "inductive"), ("5-way 1-shot", "transductive"),
        ("5-way 2-shot", "inductive"),
    ]  # fmt: skip
    for row in tested:
        shot, norm = row["task"].split()[1][0], row["tested on"].split(", ")[-1]
        (path,) = [path for path in (runs / "tests").glob(f"*/{shot}/result.json") if path.parts[-3] == row["run"]]
        content = json.loads(path.read_text())
        one = content.get(norm, content)
        assert (one["norm"], str(one["shot"])) == (norm, shot)
        assert row["test %"] == f"{100 * one['accuracy']:.2f} ± {100 * one['ci95']:.2f}"
    for row in found:
        best = json.loads((runs / row["run"] / "result.json").read_text())
        assert row["validation %"] == f"{100 * best['accuracy']:.2f} ± {100 * best['ci95']:.2f}"
        assert row["at step"] == str(best["step"])
        assert row["run"] in out
    markdown = Path("out/report.md").read_text().splitlines()
    assert len(markdown) == len(found) + 2
    assert len({line.count(" | ") for line in markdown}) == 1


def test_rows_of_one_task_stand_together_and_the_best_comes_first(metacv, runs):
    metacv("report", str(runs), "hydra.run.dir=out")
    found = rows("out")
    keys = [(row["task"], row["tested on"]) for row in found]
    assert keys == sorted(keys)
    assert len(set(keys)) > 2
    for key in set(keys):
        own = [row for row, k in zip(found, keys, strict=True) if k == key]
        values = [float((row["test %"] or row["validation %"]).split()[0]) for row in own]
        assert values == sorted(values, reverse=True)


def test_the_papers_numbers_stand_beside_results_under_their_protocol(metacv):
    code, _, err = metacv("report", str(ROOT / "outputs/reference/omniglot"), "hydra.run.dir=out")
    assert (code, err) == (0, "")
    found = {(row["run"], row["tested on"].split(" episodes")[0]): row for row in rows("out")}
    assert found["maml_5w1s", "600"]["paper %"] == "98.7 ± 0.4"
    assert found["maml_5w1s", "2000"]["paper %"] == ""
    assert found["protonet_20w5s", "1000"]["paper %"] == "98.9"
    reptile = {row["tested on"].split(", ")[-1]: row["paper %"] for row in rows("out")
               if row["run"] == "reptile_5w1s" and ", 1 queries" in row["tested on"]}  # fmt: skip
    assert reptile == {"transductive": "97.68 ± 0.04", "inductive": "95.39 ± 0.09"}


@pytest.mark.parametrize(
    ("overrides", "changes", "paper"),
    [
        ([], {}, "98.8"),
        (["steps=5"], {}, "98.8"),
        (["shot=5"], {}, ""),
        (["algo=maml"], {}, ""),
        (["dataset.split=lake"], {}, ""),
        ([], {"split": "train"}, ""),
        ([], {"norm": "transductive"}, ""),
        ([], {"rotation": "none"}, ""),
        ([], {"dataset": "Glyphs"}, ""),
        (["experiment=../../outside"], {}, ""),
    ],
)
def test_a_paper_is_named_only_under_its_own_protocol(metacv, overrides, changes, paper):
    kept = ROOT / "outputs/reference/omniglot/protonet_5w1s"
    Path("own").mkdir()
    shutil.copy(kept / "best.pt", "own/best.pt")
    test = json.loads((kept / "result.json").read_text()) | changes
    Path("own/result.json").write_text(json.dumps(test))
    words = {"overrides": ["experiment=omniglot/protonet_5w1s", *overrides]}
    Path("own/train.json").write_text(json.dumps(words))
    assert metacv("report", "own", "hydra.run.dir=out")[0] == 0
    assert [row.get("paper %", "") for row in rows("out")] == [paper]


def test_what_is_not_of_one_task_is_not_ranked_together(metacv, runs):
    words = (*quick("protonet"), "dataset.classes={train:30,val:9,test:8}")
    assert metacv("train", *words, "hydra.run.dir=other/run")[0] == 0
    assert metacv("report", str(runs), "other", "hydra.run.dir=out")[0] == 0
    page = Path("out/report.html").read_text()
    untested = [row for row in rows("out") if not row["test %"]]
    assert len(untested) == 3
    tested = {row["tested on"].rpartition(" ")[2] for row in rows("out") if row["choice"] == "chosen"}
    assert tested == {"", "inductive"}  # of the others there is one run each
    assert [row["choice"] for row in untested if row["run"].endswith("other/run")] == [""]
    assert page.count('<tr class="best">') == 2


def test_runs_of_several_folders_and_copies_have_names_of_their_own(metacv, runs):
    shutil.copytree(runs, "a/sweep")
    shutil.copytree(runs, "b/sweep")
    metacv("report", "a", "b", "b/sweep/multirun.yaml", "hydra.run.dir=out")
    names = {row["run"] for row in rows("out")}
    assert len(names) == 8
    assert {name.split("/")[0] for name in names} == {"a", "b"}


def test_a_run_that_goes_on_has_its_settings_too(metacv, runs):
    shutil.copytree(runs, "some")
    for path in Path("some").glob("*/result.json"):
        path.unlink()
    metacv("report", "some", "hydra.run.dir=out")
    found = rows("out")
    assert {(row["seed"], row["optimizer.lr"]) for row in found} == {(s, r) for s in "01" for r in ("0.001", "0.01")}
    assert not {"steps", "algo", "query"} & found[0].keys()


def test_names_cannot_break_the_page(metacv, runs):
    odd = "<script>alert(1)<script> & | co"
    source = next(path.parent for path in sorted(runs.glob("*/best.pt")))
    Path("odd").mkdir()
    shutil.copytree(source, Path("odd") / odd)
    assert metacv("report", "odd", "hydra.run.dir=out")[0] == 0
    page = Path("out/report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\\|" in Path("out/report.md").read_text()
    result = json.loads(Path("odd", odd, "result.json").read_text())
    result["overrides"] += ["=cmd", "a|b=\x1b[31m\ud800", "way=9", "@SUM(1)=-1+cmd|' /C calc'!A0"]
    Path("odd", odd, "result.json").write_text(json.dumps(result))
    Path("odd/=1+1").mkdir()
    shutil.copy(source / "best.pt", "odd/=1+1/best.pt")
    code, out, _ = metacv("report", "odd", "hydra.run.dir=out")
    assert code == 0
    assert "\x1b" not in out
    assert "'=1+1" in [row["run"] for row in rows("out")]
    assert "'-1+cmd|' /C calc'!A0" in [row["'@SUM(1)"] for row in rows("out")]


def test_nothing_to_report_and_damaged_files_have_a_line_each(metacv, runs):
    Path("empty").mkdir()
    assert metacv("report", "empty")[2] == "metacv: empty: no run with a best.pt in there\n"
    assert metacv("report", "nowhere")[2] == "metacv: nowhere: there is no such folder\n"
    shutil.copytree(runs, "some")
    first, second, *_ = sorted(Path("some").glob("*/best.pt"))
    first.write_bytes(first.read_bytes()[:500])
    (second.parent / "metrics.jsonl").write_text('{"step": 1, "val/accuracy": 0.5}\n{"step": ')
    first_test, second_test, *_ = sorted(Path("some/tests").rglob("result.json"))
    first_test.write_text("{")
    second_test.write_text(json.dumps({"checkpoint_sha256": [], "accuracy": 1, "ci95": 0}))
    Path("some/runs.json").write_text('{"runs": ["a", "b"]}')
    Path("some/deep.json").write_text("[" * 200000)
    with (second.parent / "metrics.jsonl").open("a") as file:
        file.write(
            '\n5\n{"val/accuracy": 1}\n{"step": 3, "val/accuracy": 0.5, "val/ci95": NaN}\n{"step": 1' + "0" * 400 + "}"
        )
    for events in second.parent.glob("events.*"):
        events.write_bytes(b"no events")
    code, _, err = metacv("report", "some", "hydra.run.dir=out")
    assert code == 0
    assert err == f"metacv: {first} is not a checkpoint of metacv, or is damaged: left out\n"
    assert len({row["run"] for row in rows("out")}) == 3


def test_a_spreadsheet_computes_nothing_and_numbers_stay_numbers():
    for text in ("=1+1", "@SUM(A1)", "+1+2", "-1+cmd|' /C calc'!A0", "+cmd", "- 1", " =1", "\t=1", "\n1", "\uff1d1"):
        assert csv_safe(text) == f"'{text}"
    for text in ("", "1", "-1", "+1", "-0.5", "-.5", "1e-3", "-1E+3", "98.70 ± 0.40", "a=b", "run/1", "5-way 1-shot"):
        assert csv_safe(text) == text


def test_ticks_are_round_and_enclose_what_is_shown():
    assert ticks(0, 10000) == [0, 2000, 4000, 6000, 8000, 10000]
    assert ticks(93.1, 98.9) == [92, 94, 96, 98, 100]
    assert len(ticks(5, 5)) > 1
    for low, high in ((0.0, 1e-7), (-3, 1234), (99.99, 100.0)):
        found = ticks(low, high)
        assert found[0] <= low
        assert high <= found[-1]
        assert 3 <= len(found) <= 8


def test_a_chart_puts_every_point_where_its_values_say():
    drawn = chart([[(0, 50, 0), (10, 100, 0)], [(5, 75, 25)]])
    first, second = (
        [tuple(map(float, point.split(","))) for point in points.split()]
        for points in re.findall(r'points="([^"]+)"', drawn)
    )
    (x0, y0), (x1, y1) = first
    assert second == [((x0 + x1) / 2, (y0 + y1) / 2)]
    assert x0 < x1
    assert y0 > y1
    assert f'y1="{y0:.1f}" y2="{y1:.1f}"' in drawn  # the interval of the single point: 50 to 100


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_without_a_network_and_within_its_width(metacv, runs, tmp_path, width, dark):
    metacv("report", str(runs), "hydra.run.dir=out")
    text = Path("out/report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|<script""", text)
    # The page tells what the browser made of it, from a frame: a window itself is never narrower than 500.
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
        const said = all.filter(n => n.tagName !== "SCRIPT" && [...n.childNodes].some(c => c.data?.trim()))
        parent.document.getElementById("probe").textContent = JSON.stringify({
        width: innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches,
        page: document.documentElement.scrollWidth, texts: said.length,
        widest: Math.max(...all.filter(n => !n.closest(".wide > *")).map(n => n.getBoundingClientRect().right)),
        contrast: Math.min(...said.map(contrast)),
        pictures: [...document.images].map(image => image.naturalWidth),
        text: Math.min(...[...document.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height)),
        charts: document.querySelectorAll("svg polyline").length,
        rows: document.querySelectorAll("tbody tr").length})})</script>"""
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
    found = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)[1])
    assert (found["width"], found["dark"]) == (width, dark)
    assert found["page"] <= width
    assert found["widest"] <= width
    assert found["texts"] > 50
    assert found["contrast"] >= 4.5
    assert len(found["pictures"]) == 4
    assert min(found["pictures"]) > 100
    assert found["charts"] > 4
    assert found["text"] > 11
    assert found["rows"] == len(rows("out"))


def copies_of(name: str, accuracies: dict[str, float], folder: str, **changes) -> None:
    """Copies of a kept model that differ in the seed, and a result for each."""
    kept = ROOT / "outputs/reference/omniglot" / name
    saved = torch.load(kept / "best.pt", weights_only=True)
    for seed, (run, accuracy) in enumerate(accuracies.items()):
        home = Path(folder, run)
        home.mkdir(parents=True, exist_ok=True)
        own = saved | {"config": saved["config"] | {"seed": seed}, "validation": {"accuracy": 1 - accuracy, "ci95": 0}}
        torch.save(own, home / "best.pt")
        digest = hashlib.sha256((home / "best.pt").read_bytes()).hexdigest()
        test = json.loads((kept / "result.json").read_text()) | {"accuracy": accuracy, "checkpoint_sha256": digest}
        for shot in (1, 5):
            own_test = test | {"shot": shot, "episodes_sha256": str(shot)} | changes
            (home / f"{shot}{''.join(changes)}.json").write_text(json.dumps(own_test))


def test_validation_chooses_and_what_overlaps_is_not_told_apart(metacv):
    copies_of("protonet_5w1s", {"a": 0.80, "b": 0.801, "c": 0.99}, "own")
    code, out, _ = metacv("report", "own", "hydra.run.dir=out")
    assert code == 0
    chosen = {(row["run"], row["task"]): row["choice"] for row in rows("out")}
    for task in ("5-way 1-shot", "5-way 5-shot"):
        assert [chosen[run, task] for run in "abc"] == ["chosen", "not told apart", ""]
    assert "metacv compare" in out
    page = Path("out/report.html").read_text()
    # The line is the mean of the three seeds, with Student's t of two degrees of freedom over them.
    assert re.search(r"ProtoNet, trained \d+-way 1-shot: 3 runs<", page)
    assert point(1, [{"accuracy": a, "ci95": 0.0} for a in (0.1, 0.2, 0.3)]) == pytest.approx((1, 20, 24.84), abs=0.01)
    assert point(1, [{"accuracy": 0.1, "ci95": 0.02}]) == (1, 10, 2)


def test_an_evaluation_with_other_settings_stands_beside_the_default_one(metacv):
    copies_of("protonet_5w1s", {"a": 0.80}, "own")
    for shot in (1, 5):
        content = json.loads(Path(f"own/a/{shot}.json").read_text())
        Path(f"own/a/{shot}_changed.json").write_text(
            json.dumps(content | {"accuracy": 0.9, "algo": {"temperature": 2}})
        )
    assert metacv("report", "own", "hydra.run.dir=out")[0] == 0
    found = {(row["task"], row["algo.temperature"]): row for row in rows("out")}
    assert set(found) == {(f"5-way {shot}-shot", t) for shot in (1, 5) for t in ("1.0", "2")}
    assert found["5-way 1-shot", "2"]["test %"].startswith("90.00")
    assert "choice" not in found["5-way 1-shot", "2"]  # of one run


def test_what_a_stranger_wrote_stays_small(metacv):
    copies_of("protonet_5w1s", {"a": 0.80}, "own")
    Path("own/a/.hydra").mkdir()
    bombs = "".join(f"- &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    Path("own/a/.hydra/overrides.yaml").write_text(f"- &a0 [x]\n{bombs}- &m way=5\n- *m\n")
    Path("own/a/metrics.jsonl").write_text('{"step": 1, "val/accuracy": 0.5}\n' * 400_000)
    assert metacv("report", "own", "hydra.run.dir=out")[0] == 0
    assert Path("out/report.html").stat().st_size < 20_000


def test_what_is_left_out_is_counted_and_named(metacv):
    copies_of("protonet_5w1s", {"a": 0.80}, "own")
    copies_of("protonet_5w1s", {"b": 0.80}, "own", checkpoint_sha256="of another")
    Path("own/failed").mkdir()
    Path("own/failed/metrics.jsonl").write_text("")
    out = metacv("report", "own", "hydra.run.dir=out")[1]
    assert "left out: 1 run without a best.pt (failed, or not validated yet): own/failed\n" in out
    assert "evaluations of a checkpoint that is not there, or has changed since: own/b/" in out
    assert "own/failed" in Path("out/report.html").read_text()


def test_a_folder_that_cannot_be_written_has_a_line(metacv):
    copies_of("protonet_5w1s", {"a": 0.80}, "own")
    Path("out/report.html").mkdir(parents=True)
    assert metacv("report", "own", "hydra.run.dir=out")[::2] == (1, "metacv: out/report.html: Is a directory\n")
