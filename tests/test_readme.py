"""What the README promises: its example, its table of choices, and the wheel."""

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
from conftest import TRAIN

from metacv.config_dir import config_dir

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def run(place: Path, cwd: Path, data_dir: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The metacv that lies in `place`, from another folder."""
    environment = os.environ | {"PYTHONPATH": str(place), "METACV_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"}
    environment.pop("HYDRA_FULL_ERROR", None)
    return subprocess.run(
        [sys.executable, "-m", "metacv", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_example_of_a_new_algorithm_works_as_it_stands(tmp_path, data_dir):
    place = tmp_path / "checkout"
    for folder in ("metacv", "configs"):
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    section = README.split("## Your own algorithm")[1].split("\n## ")[0]
    files = re.findall(r"`((?:metacv|configs)/[\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", section, re.DOTALL)
    assert [name for name, _ in files] == ["metacv/algorithms/matchingnet.py", "configs/algo/matchingnet.yaml"]
    for name, text in files:
        (place / name).write_text(text)
    done = run(place, tmp_path, data_dir, "train", "algo=matchingnet", *TRAIN, "hydra.run.dir=run")
    assert (done.returncode, done.stderr) == (0, "")
    done = run(place, tmp_path, data_dir, "evaluate", "checkpoint=run", "episodes=8", "hydra.run.dir=evaluation")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "evaluation/result.json").read_text())["algorithm"] == "MatchingNet"
    assert "matchingnet" in run(place, tmp_path, data_dir, "train", "--help").stdout


def expanded(word: str) -> list[str]:
    """a{b,c} as a shell has it: ab ac."""
    parts = [part.strip("{}").split(",") for part in re.findall(r"\{.*?\}|[^{}]+", word)]
    return ["".join(choice) for choice in itertools.product(*parts)]


@pytest.mark.parametrize("group", ["algo", "backbone", "dataset", "optimizer", "schedule", "experiment"])
def test_the_table_of_choices_lists_the_files_of_configs(group):
    row = re.search(rf"^\| `{group}/` \| (.*?) \|", README, re.MULTILINE)
    files = sorted(p.relative_to(config_dir() / group).with_suffix("").as_posix()
                   for p in (config_dir() / group).rglob("*.yaml"))  # fmt: skip
    assert row is not None
    assert sorted(name for word in re.findall(r"`([\w/{},]+)`", row[1]) for name in expanded(word)) == files


def test_every_file_and_folder_that_the_readme_links_is_there():
    for page in (ROOT / "README.md", ROOT / "docs/own-images.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), target


def test_the_page_on_own_images_shows_the_numbers_on_file():
    page, place = (ROOT / "docs/own-images.md").read_text(), ROOT / "outputs/reference/own_images"
    comparison, found = (json.loads((place / f"{name}.json").read_text()) for name in ("comparison", "predictions"))

    def percent(one: dict, name: str = "accuracy", sign: str = "") -> str:
        return f"{100 * one[name]:{sign}.2f} ± {100 * one['ci95']:.2f} %"

    (difference,) = comparison["differences"]
    shown = [percent(one) for one in comparison["runs"].values()] + [percent(difference, "mean", "+")]
    shown.append(f"best in validation: {percent(json.loads((place / 'rotated.json').read_text()))} at step 150")
    right = [Path(one["file"]).parent.name == one["label"] for one in found["predictions"]]
    shown.append(f"accuracy {100 * sum(right) / len(right):.2f} %: {sum(right)} of {len(right)}")
    shown += [line.split("|")[1].strip() for line in (place / "report.md").read_text().splitlines()[2:4]]
    for words in shown:
        assert words in page


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
    train = run(tmp_path / "installed", elsewhere, data_dir, "train", *TRAIN, "hydra.run.dir=run")
    assert (train.returncode, train.stderr) == (0, "")
    evaluate = run(tmp_path / "installed", elsewhere, data_dir, "evaluate", "checkpoint=run", "episodes=8")
    assert (evaluate.returncode, evaluate.stderr) == (0, "")
    assert "accuracy" in evaluate.stdout


def test_the_speeds_are_those_of_the_kept_benchmark():
    kept = (ROOT / "outputs/reference/benchmark/benchmark.md").read_text()
    header = kept.splitlines()[2]
    assert header.startswith("| | metacv, tasks/s |")
    shown = README[README.index(header) :].split("\n\n")[0].splitlines()
    assert len(shown) >= 10
    assert {*shown} <= {*kept.splitlines()}
