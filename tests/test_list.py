"""`metacv list`: the available choices, with the papers' accuracies and ours."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from metacv import CONFIG_DIR, KEPT_DIR
from metacv.list import GROUPS
from metacv.text import columns, percent
from metacv.words import choices


@pytest.mark.parametrize("what", GROUPS)
def test_a_list_has_every_file_with_its_first_comment_in_80_columns(metacv, what, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = metacv("list", what)
    assert (code, err) == (0, "")
    title, *lines = out.splitlines()
    assert title == f"{what}: metacv train {GROUPS[what]}=NAME"
    assert 70 < max(map(columns, lines)) <= 80
    for name in choices(GROUPS[what]):
        assert [line for line in lines if line.startswith(f"{name} ")]
    if what != "experiments":
        text = " ".join(out.split())
        comments = [path.read_text() for path in (CONFIG_DIR / GROUPS[what]).glob("*.yaml")]
        for comment in comments:
            first = next(line for line in comment.splitlines() if "@package" not in line)
            assert first.lstrip("# ") in text
            assert first.endswith((".", ")"))  # not within a sentence


def test_experiments_have_the_papers_number_and_that_of_the_kept_model_in_the_same_mode(metacv):
    lines = metacv("list", "experiments")[1].splitlines()
    for name in choices("experiment"):
        paper = yaml.safe_load((CONFIG_DIR / f"experiment/{name}.yaml").read_text()).get("paper", [])
        kept = KEPT_DIR / name / "result.json"
        results = json.loads(kept.read_text())["results"] if kept.exists() else []
        ours = {one["batch_norm"]: percent(one["accuracy"], one["ci95"]) for one in results}
        shown = [line for line in lines if line.startswith(f"{name} ")]
        assert len(shown) == max(1, len(paper))
        for line, number in zip(shown, paper, strict=False):
            assert f"{number['batch_norm']} " in line
            assert f" {number['accuracy']:g}" in line
            assert ours.get(number["batch_norm"], "") in line
            assert len([part for part in ours.values() if part in line]) == (number["batch_norm"] in ours)


def test_list_without_arguments_prints_all_and_refuses_unknown_names(metacv):
    out = metacv("list")[1]
    assert [line.split(":")[0] for line in out.splitlines() if line.endswith("=NAME")] == [*GROUPS]
    assert metacv("list", "heads", "methods")[1] == metacv("list", "heads")[1] + metacv("list", "methods")[1]
    line = "metacv: metods: there is no such list; did you mean methods?\n"
    assert metacv("list", "metods") == (1, "", line)
    assert "one of: methods, datasets" in metacv("list", "nothing")[2]


def test_list_does_not_import_torch():
    code = "import sys; from metacv.cli import main; sys.argv[1:] = ['list']\n"
    code += "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
