"""The README and docs/: their commands, examples, tables, links and numbers; and the wheel."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TRAIN, random_tasks
from omegaconf import open_dict

from metacv import CONFIG_DIR, cli, completion, config, help, limits
from metacv.algorithms import metric
from metacv.model import load_checkpoint
from metacv.results import Result, read_results
from metacv.text import percent
from metacv.words import choices, hydra_overrides

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import docs_cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
REFERENCE = ROOT / "outputs/reference"


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
    section = DOCS["extending.md"].split("\n## A method\n")[1].split("\n## ")[0]
    files = re.findall(r"`((?:metacv|configs)/[\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", section, re.DOTALL)
    names = ["metacv/algorithms/metric/matchingnet.py", "configs/algo/matchingnet.yaml"]
    assert [name for name, _ in files] == names
    for name, text in files:
        assert text == (ROOT / name).read_text()
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
    torch.testing.assert_close(logits.exp().sum(dim=-1), torch.ones(2, 6))


def test_the_method_in_the_readme_is_that_of_the_program():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    source = (ROOT / "metacv/algorithms/metric/matchingnet.py").read_text().splitlines()
    assert len(example.splitlines()) > 4
    assert {*example.splitlines()} <= {*source}


def commands(text: str) -> list[list[str]]:
    """The words of each command in the shell blocks of a page, with the variables that the page exports."""
    found, variables = [], {}
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line)
            if words[0] == "export":
                variables |= dict([words[1].split("=", 1)])
            else:
                found.append(words)
    return found


COMMANDS = {shlex.join(words): words for page in PAGES for words in commands(page.read_text())}
METACV = {line: words[words.index("metacv") + 1 :] for line, words in COMMANDS.items() if "metacv" in words}


@pytest.mark.parametrize("line", METACV)
def test_the_settings_of_every_command_in_the_documentation_exist(line):
    command, *words = METACV[line]
    for choice in PLUGINS.keys() & {*words}:
        pytest.importorskip(f"hydra_plugins.hydra_{PLUGINS[choice]}")
    overrides = [word for word in hydra_overrides(command, words) if word != "-m"]
    cfg = config.composed(command, [single for word in overrides if (single := first_of_sweep(word))])
    with open_dict(cfg):
        del cfg["hydra"]
    assert config.typed(cfg, getattr(config, f"{command.capitalize()}Config"))


PLUGINS = {
    "launcher=joblib": "joblib_launcher",
    "launcher=slurm": "submitit_launcher",
    "launcher=ray": "ray_launcher",
    "sweeper=optuna": "optuna_sweeper",
}


def first_of_sweep(word: str) -> str | None:
    """The word with the first of its values, in a sweep; None where a sweeper finds the value."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(word)
    if "interval(" in word:
        return None
    return BasicSweeper.split_arguments([override], None)[0][0][0] if override.is_sweep_override() else word


def test_every_other_command_in_the_documentation_is_a_program_or_script_that_exists():
    known = {"pip", "make", "tensorboard"}
    others = [words for line, words in COMMANDS.items() if line not in METACV]
    assert others
    for program, *words in others:
        if program == "python":
            assert (ROOT / words[0]).is_file()
        elif "=" in program or program.startswith(".venv"):
            assert (ROOT / words[-1]).exists()
        else:
            assert program in known


def test_every_module_in_the_table_of_files_exists():
    rows = re.findall(r"^\| (`metacv/.*?) \|", DOCS["extending.md"], re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        folder = ROOT
        for name in re.findall(r"`([\w/.]+)`", row):
            folder = (ROOT / name).parent if "/" in name else folder
            assert (ROOT / name if "/" in name else folder / name).exists(), name


def test_the_page_on_security_has_every_limit():
    rows = re.findall(r"^\| `([A-Z]+)` \| ([\d,]+) \|", (ROOT / "docs/security.md").read_text(), re.MULTILINE)
    own = {name: value for name, value in vars(limits).items() if name.isupper()}
    assert {name: int(number.replace(",", "")) for name, number in rows} == own


@pytest.mark.parametrize("group", ["algo", "dataset", "backbone", "head"])
def test_the_table_of_choices_names_every_file_of_configs(group):
    (row,) = re.findall(rf"^\| `{group}=` \| (.*) \|$", README, re.MULTILINE)
    assert sorted(re.findall(r"`([\w/]+)`", row)) == choices(group)


def test_the_page_of_methods_has_a_row_for_every_method_and_head():
    rows = re.findall(r"^\| `(\w+)` \|", DOCS["methods.md"], re.MULTILINE)
    assert sorted(rows) == sorted(choices("algo") + choices("head"))


def test_the_page_of_data_has_a_row_for_every_data_set():
    table = DOCS["data.md"].split("\n\n")[2]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == choices("dataset")


def test_the_page_of_commands_is_up_to_date():
    assert DOCS["cli.md"] == docs_cli.page(), "run scripts/docs_cli.py"
    assert not re.search(r"\$[A-Z]", DOCS["cli.md"])  # no placeholder of a template is left


def test_descriptions_of_choices_end_on_their_line_and_blocks_of_settings_are_not_empty():
    for path in CONFIG_DIR.glob("*/**/*.yaml"):
        description, after = [line for line in path.read_text().splitlines() if "@package" not in line][:2]
        assert description.startswith("# ")
        assert not re.match("# (?!metacv )[a-z]", after), path
    assert not re.search(r"```yaml\n(\w+:\n)*```", DOCS["cli.md"])


def anchors(page: str) -> set[str]:
    """The anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), target
        assert not heading or heading in anchors(place.read_text()), target


def test_every_page_is_in_the_navigation_of_the_site_which_loads_nothing_from_other_hosts():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    (index, *parts) = [own for entry in site["nav"] for own in entry.values()]
    shown = [index, *(page for part in parts for entry in part for page in entry.values())]
    assert sorted(shown) == sorted([*DOCS, "results.md"])  # results.md is RESULTS.md: scripts/docs_hooks.py
    assert site["theme"]["font"] is False
    assert site["plugins"] == ["search"]


def test_the_page_on_own_images_shows_the_numbers_on_file():
    page, place = DOCS["own-images.md"], REFERENCE / "own_images"
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
    table = [line.split("|")[1:-1] for line in (place / "report.md").read_text().splitlines() if line.startswith("| ")]
    shown += [cell.strip() for line in table[2:] for cell in line]
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
    page = DOCS["speed.md"]
    shown = page[page.index(header) :].split("\n\n")[0].splitlines()
    assert len(shown) >= 10
    assert {*shown} <= {*kept.splitlines()}


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_a_row_that_links_kept_results_shows_their_accuracies(page):
    rows = re.findall(r"^\|.*\]\((?:\.\./)?outputs/reference/.*$", (ROOT / page).read_text(), re.MULTILINE)
    assert len(rows) > 2
    for row in rows:
        (folder,) = re.findall(r"\]\((?:\.\./)?(outputs/reference/[^)]*)\)", row)
        kept = read_results(ROOT / folder / "result.json").results
        if page == "README.md":
            kept = [one for one in kept if one.batch_norm in row]
            assert re.search(rf"\b{kept[0].query} quer", row)
        shown = re.findall(r"\d+\.\d+ ± \d+\.\d+", row)
        assert shown[0] == percent(kept[0].accuracy, kept[0].ci95), row


def test_the_numbers_of_the_papers_in_the_readme_are_those_of_the_results_page():
    rows = re.findall(r"^\| .* \| \[(.*?)\]\((outputs/.*?)\) \| (.*?) \|", README, re.MULTILINE)
    results = (ROOT / "RESULTS.md").read_text()
    assert len(rows) == 8
    for ours, folder, paper in rows:
        assert f"| {paper} | [{ours}]({folder}) |" in results
