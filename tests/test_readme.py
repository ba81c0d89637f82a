"""The README: its example, its table of choices, its links, its numbers; and the wheel."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TRAIN, random_tasks

from metacv import CONFIG_DIR, cli, completion, config, help, limits
from metacv.algorithms import metric
from metacv.model import load_checkpoint
from metacv.results import Result, read_results
from metacv.text import percent

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def checkout(monkeypatch, tmp_path) -> Path:
    """A folder whose modules in metacv/algorithms/metric and whose configs/ this process uses too."""
    shutil.copytree(CONFIG_DIR, tmp_path / "checkout/configs")
    modules = tmp_path / "checkout/metacv/algorithms/metric"
    modules.mkdir(parents=True)
    monkeypatch.setattr(metric, "__path__", [*metric.__path__, str(modules)])
    for user in (cli, completion, config, help):
        monkeypatch.setattr(user, "CONFIG_DIR", tmp_path / "checkout/configs")
    return tmp_path / "checkout"


def test_the_example_of_a_new_algorithm_works_without_changes(metacv, checkout):
    section = README.split("## Your own algorithm")[1].split("\n## ")[0]
    files = re.findall(r"`((?:metacv|configs)/[\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", section, re.DOTALL)
    names = ["metacv/algorithms/metric/matchingnet.py", "configs/algo/matchingnet.yaml"]
    assert [name for name, _ in files] == names
    for name, text in files:
        (checkout / name).write_text(text)
    code, _, err = metacv("train", "algo=matchingnet", *TRAIN, "hydra.run.dir=run")
    assert (code, err) == (0, "")
    for mode in ("inductive", "transductive"):
        words = (f"batch_norm={mode}", "way=4", f"hydra.run.dir={mode}")
        code, _, err = metacv("evaluate", "checkpoint=run", *words)
        assert (code, err) == (0, "")
        assert read_results(Path(mode) / "result.json").results[0].method == "MatchingNet"
    assert "algo=matchingnet" in metacv("train", "--help")[1]
    assert "matchingnet" in completion.values("train", "algo")
    task = random_tasks(2, way=3, shot=2, query=2, shape=(1, 28, 28))
    logits = load_checkpoint("run").build().predict(task, "inductive")
    torch.testing.assert_close(logits.exp().sum(dim=-1), torch.full((2, 6), 0.5))  # means over two images of each class


def expanded(word: str) -> list[str]:
    """a{b,c} as a shell has it: ab ac."""
    parts = [part.strip("{}").split(",") for part in re.findall(r"\{.*?\}|[^{}]+", word)]
    return ["".join(choice) for choice in itertools.product(*parts)]


def test_every_module_in_the_table_of_files_exists():
    for row in re.findall(r"^\| (`metacv/.*?) \|", README, re.MULTILINE):
        folder = ROOT
        for name in re.findall(r"`([\w/.]+)`", row):
            folder = (ROOT / name).parent if "/" in name else folder
            assert (ROOT / name if "/" in name else folder / name).exists(), name


def test_the_page_on_security_has_every_limit():
    rows = re.findall(r"^\| `([A-Z]+)` \| ([\d,]+) \|", (ROOT / "docs/security.md").read_text(), re.MULTILINE)
    own = {name: value for name, value in vars(limits).items() if name.isupper()}
    assert {name: int(number.replace(",", "")) for name, number in rows} == own


@pytest.mark.parametrize("group", ["algo", "backbone", "dataset", "optimizer", "schedule", "experiment"])
def test_the_table_of_choices_names_files_of_configs(group):
    row = re.search(rf"^\| `{group}/` \| (.*?) \|", README, re.MULTILINE)
    assert row is not None
    names = [name for word in re.findall(r"`([\w/{},]+)`", row[1]) for name in expanded(word)]
    assert names
    for name in names:
        assert (CONFIG_DIR / group / f"{name}.yaml").is_file(), name


def test_every_file_and_folder_that_the_readme_links_exists():
    for page in (ROOT / "README.md", ROOT / "docs/own-images.md", ROOT / "docs/security.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), target


def test_the_page_on_own_images_shows_the_numbers_on_file():
    page, place = (ROOT / "docs/own-images.md").read_text(), ROOT / "outputs/reference/own_images"
    page, place = (ROOT / "docs/own-images.md").read_text(), ROOT / "outputs/reference/own_images"
    comparison = read_results(place / "comparison.json")

    def measured(result: Result) -> str:
        return f"{percent(result.accuracy, result.ci95)} %"

    (difference,) = comparison.differences
    shown = [measured(result) for result in comparison.results]
    shown.append(f"{100 * difference['mean']:+.2f} ± {100 * difference['ci95']:.2f} %")
    shown.append(f"best in validation: {measured(read_results(place / 'rotated.json').results[0])} at step 150")
    predictions = json.loads((place / "predictions.json").read_text())["predictions"]
    right = [Path(one["file"]).parent.name == one["label"] for one in predictions]
    shown.append(f"accuracy {100 * sum(right) / len(right):.2f} %: {sum(right)} of {len(right)}")
    shown += [line.split("|")[1].strip() for line in (place / "report.md").read_text().splitlines()[2:4]]
    for words in shown:
        assert words in page


@pytest.mark.slow
def test_the_wheel_runs_both_commands_from_any_folder(tmp_path, data_dir):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path,
         ROOT],
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "METACV_DATA_DIR": str(data_dir)}
    environment.pop("HYDRA_FULL_ERROR", None)
    for words in (["train", *TRAIN, "hydra.run.dir=run"], ["evaluate", "checkpoint=run"], ["train", "--help"]):
        command = [sys.executable, "-m", "metacv", *words]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    command = [sys.executable, "-c", "import metacv; print(metacv.CONFIG_DIR)"]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "installed/metacv/configs")


def test_the_speeds_are_those_of_the_benchmark_on_file():
    kept = (ROOT / "outputs/reference/benchmark/benchmark.md").read_text()
    header = kept.splitlines()[2]
    assert header.startswith("| | metacv, tasks/s |")
    shown = README[README.index(header) :].split("\n\n")[0].splitlines()
    assert len(shown) >= 10
    assert {*shown} <= {*kept.splitlines()}


def test_the_readme_shows_the_accuracies_on_file_for_cifar_fs():
    place = ROOT / "outputs/reference"
    folders = ("cifar_fs/classifier_5w1s", "cifar_fs/classifier_5w5s", "quick/cifar_fs", "cifar_fs/seed1")
    for result in [one for folder in folders for one in read_results(place / folder / "result.json").results]:
        assert percent(result.accuracy, result.ci95) in README
