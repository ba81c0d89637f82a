"""RESULTS.md: its numbers are those of the files in outputs/reference, and these belong to the kept checkpoints."""

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from metacv.config import to_dict
from metacv.files import sha256
from metacv.model import WEIGHTS, load_checkpoint
from metacv.results import Result, ResultFile, read_results

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import results_table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "outputs/reference"
KEPT = sorted(path for path in REFERENCE.glob("*/*_*w*s") if path.is_dir())
OTHER_FORMATS = ("benchmark.json", "h100.json", "predictions.json")
RESULT_FILES = sorted(path for path in REFERENCE.rglob("*.json") if path.name not in OTHER_FORMATS)


def result(**changes) -> Result:
    own = Result(0.9, 0.01, "Omniglot", "test", "none", 5, 1, 1, 50, 0, "transductive", method="Reptile")
    return dataclasses.replace(own, **changes)


def test_results_md_is_up_to_date():
    assert (ROOT / "RESULTS.md").read_text() == results_table.page(), "run scripts/results_table.py"
    methods = results_table.METHODS_PAGE.read_text()
    assert methods == results_table.with_costs(methods), "run scripts/results_table.py"


def test_the_settings_listed_are_those_that_differ_from_the_experiment():
    def changes(name: str) -> str:
        return results_table.Experiment(name, results_table.experiment_configs()[name]).changes

    assert changes("omniglot/maml_5w1s") == "steps=6400 eval_every=400"
    assert changes("miniimagenet/protonet_init_5w1s") == ""  # its overrides repeat the experiment


@pytest.mark.parametrize("path", RESULT_FILES, ids=lambda path: path.relative_to(REFERENCE).as_posix())
def test_every_result_file_has_the_one_schema_and_belongs_to_its_checkpoint(path):
    assert json.loads(path.read_text())["schema"] == 2
    file = read_results(path)
    assert file.results
    best = path.with_name("best.pt")
    if best.exists() and file.training is None:
        digest = hashlib.sha256(best.read_bytes()).hexdigest()
        assert {result.checkpoint_sha256 for result in file.results} == {digest}
        assert {result.checkpoint for result in file.results} == {best.relative_to(ROOT).as_posix()}


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.relative_to(REFERENCE).as_posix())
def test_a_kept_model_is_small_complete_and_has_the_settings_of_its_config_file(folder):
    assert {path.name for path in folder.iterdir()} == {*results_table.FILES}
    assert (folder / "best.pt").stat().st_size < 2_000_000  # the layer for 4112 classes of Omniglot takes 1 MB
    assert (folder / "metrics.jsonl").stat().st_size > 0
    checkpoint = load_checkpoint(folder)
    assert checkpoint.content.keys() - {"splits", "format", "training"} == WEIGHTS | {"validation"}
    assert checkpoint.content.get("splits") is None  # only data sets of users have them
    content = torch.load(folder / "best.pt", weights_only=True)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == content["config"]


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.relative_to(REFERENCE).as_posix())
def test_a_kept_model_was_tested_under_both_protocols(folder):
    checkpoint = load_checkpoint(folder)
    config, kept = checkpoint.config, results_table.Kept(folder)
    assert kept.complete
    own = {name: getattr(config, name) for name in ("way", "shot", "query", "episodes")}
    own |= {"split": "test", "seed": 0, "rotation": config.dataset["test_rotation"], "step": checkpoint.step}
    assert config.batch_norm in kept.results
    assert all(dataclasses.asdict(result).items() >= own.items() for result in kept.results.values())
    common = {"way": config.way, "shot": config.shot, "query": 15, "episodes": 2000, "rotation": "none"}
    common |= {"split": "test", "seed": 0, "batch_norm": "inductive", "step": checkpoint.step}
    assert dataclasses.asdict(kept.common).items() >= common.items()
    (validation,) = kept.trained.results
    assert validation.split == "val"
    expected = checkpoint.content["validation"]
    assert {name: getattr(validation, name) for name in expected} == expected


def test_models_of_one_task_were_compared_on_the_same_episodes():
    hashes: dict[tuple, set[str]] = {}
    for kept in map(results_table.Kept, KEPT):
        config = kept.config
        # The hash covers the pixels, and those of Reptile are not inverted.
        key = (config.dataset["_target_"], config.way, config.shot, config.dataset.get("invert"))
        hashes.setdefault(key, set()).add(kept.common.episodes_sha256)
    assert hashes
    assert all(len(same) == 1 for same in hashes.values())


@pytest.mark.parametrize("method", results_table.LOSS_SCALE)
def test_runs_of_the_loss_scale_table_differ_in_the_inner_loss_alone(method):
    folders = (REFERENCE / "omniglot" / folder for folder in results_table.LOSS_SCALE[method])
    one, other = (to_dict(results_table.Kept(folder).config) for folder in folders)
    assert [config["algo"].pop("inner_loss") for config in (one, other)] == ["mean", "sum_per_shot"]
    assert [config.pop("eval_every") for config in (one, other)] == [400, 400]
    assert {**one, "steps": 0} == {**other, "steps": 0}


@pytest.fixture
def reptile(tmp_path, monkeypatch) -> Path:
    """A made-up result of reptile_5w1s, which is all that the table has."""
    monkeypatch.setattr(results_table, "TRANSDUCTIVE", tmp_path / "outputs/transductive")
    monkeypatch.setattr(results_table, "FINETUNE", tmp_path / "outputs/finetune")
    monkeypatch.setattr(results_table, "FASTER_RUNS", tmp_path / "outputs/faster")
    monkeypatch.setattr(results_table, "ROOT", tmp_path)
    monkeypatch.setattr(results_table, "REFERENCE", tmp_path / "outputs/reference")
    folder = tmp_path / "outputs/reference/omniglot/reptile_5w1s"
    folder.mkdir(parents=True)
    config = to_dict(results_table.experiment_configs()["omniglot/reptile_5w1s"])
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"steps": 400, "episodes": 50}))
    (folder / "metrics.jsonl").write_text("")
    (folder / "best.pt").write_text("weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    both = [
        result(accuracy=0.9765, ci95=0.001, checkpoint_sha256=digest),
        result(accuracy=0.95, ci95=0.002, batch_norm="inductive", checkpoint_sha256=digest),
    ]
    ResultFile(both).write(folder / "result.json")
    ResultFile([result(episodes=600, checkpoint_sha256=digest)]).write(folder / "common.json")
    overrides = ["experiment=omniglot/reptile_5w1s", "data_dir=here", "steps=300", "episodes=50", "steps=400"]
    training = {"steps": 400, "seconds": 600, "overrides": overrides}
    ResultFile([result(split="val", device="abacus")], training).write(folder / "train.json")
    return folder


def test_a_row_compares_with_the_interval_of_the_paper(reptile):
    transductive, inductive = [line for line in results_table.page().splitlines() if "Reptile | 5w1s" in line][:2]
    link = "(outputs/reference/omniglot/reptile_5w1s)"
    # 97.65 is within 97.68 ± 0.04; 95.00 is not within 95.39 ± 0.09
    assert f"| 97.68 ± 0.04 | [97.65 ± 0.10]{link} | -0.03 | yes | 400 of 100000 | 10 min | abacus |" in transductive
    assert f"| 95.39 ± 0.09 | [95.00 ± 0.20]{link} | -0.39 | no | 400 of 100000 | 10 min | abacus |" in inductive
    assert "inductive, rotation none, 50 episodes" in inductive


def test_the_table_lists_changed_settings_and_unusual_numbers_of_episodes(reptile):
    page = results_table.page().splitlines()
    assert "- `omniglot/reptile_5w1s`: `steps=400 episodes=50`" in page
    assert "| Reptile | 90.00 ± 1.00 % (600 episodes) | not run | not run | not run |" in page


def test_the_table_shows_which_experiments_were_not_run(reptile):
    lines = [line for line in results_table.page().splitlines() if "| not run |" in line]
    papers, common = (5 * 4 - 1) + (4 - 1) + 5 * 2 + 2, 9 + 9  # each with two rows for Reptile; all methods
    others = (
        "cifar_fs/",
        "fc100/",
        "quick/",
        "omniglot/classifier_",
        "omniglot/mamlpp_",
        "miniimagenet/classifier_5w",
        "miniimagenet/protonet_init",
        "miniimagenet/maml_init",
        "miniimagenet/fomaml_init",
        "omniglot/fomaml_fast_",
        "omniglot/relationnet_fast_",
    )
    heads = len(results_table.QUERY_SET_HEADS) + 1  # and the nearest class mean
    named = len([name for name in results_table.EXPERIMENTS if name.startswith(others)])
    assert len(lines) == papers + common + named + heads + len(results_table.TUNED)


@pytest.mark.parametrize(
    ("name", "title", "lowest"),  # the lower end of the paper's interval, without a first stage
    [("protonet", "ProtoNet", 49.42 - 0.78), ("fomaml", "FOMAML", 48.07 - 1.75)],
)
def test_a_second_stage_is_shown_beside_the_papers_number_of_its_method(name, title, lowest):
    page = results_table.page().split("## miniImageNet, each")[1]
    rows = [line for line in page.splitlines() if line.startswith(f"| {title} | 5w1s")]
    stage = read_results(REFERENCE / f"miniimagenet/{name}_init_5w1s/result.json").results[0]
    assert 100 * stage.accuracy > lowest
    assert rows[0].endswith(f"| {results_table.percent(stage.accuracy, stage.ci95)}, reached |")


def test_results_of_another_checkpoint_are_not_shown(reptile):
    assert "[97.65" in results_table.page()
    (reptile / "best.pt").write_text("other weights")
    assert "[97.65" not in results_table.page()


@pytest.mark.parametrize(
    ("paper", "ci95", "accuracy", "own_ci95", "reproduced"),
    [
        (98.9, 0.2, 0.987, 0.0, True),  # the lower end of the interval
        (98.9, 0.2, 0.9869, 0.01, False),
        (98.9, None, 0.9875, 0.001, True),  # our interval reaches 98.85, which rounds to 98.9
        (98.9, None, 0.9874, 0.001, False),
        (98.90, None, 0.9884, 0.0, False),
    ],
)
def test_reproduced_means_within_an_interval(paper, ci95, accuracy, own_ci95, reproduced):
    published = results_table.Published(paper, ci95, "inductive", "", decimals=1)
    assert published.reproduced_by(accuracy + 1e-9, own_ci95) == reproduced


def test_published_numbers_keep_their_decimals():
    config = results_table.experiment_configs()
    assert [str(one) for one in results_table.published(config["omniglot/reptile_5w5s"].paper)] == [
        "99.48 ± 0.06",
        "98.90 ± 0.10",
    ]
    assert [str(one) for one in results_table.published(config["omniglot/protonet_20w1s"].paper)] == ["96.0"]


def test_heads_that_use_the_whole_query_set_have_a_table_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(results_table, "TRANSDUCTIVE", tmp_path)
    (tmp_path / "tim_5w5s").mkdir()
    measured = [
        result(accuracy=accuracy, uses_query_set=whole, query_balance=balance)
        for accuracy, whole, balance in (
            (0.8, True, "balanced"),
            (0.65, True, "dirichlet"),
            (0.7, False, "balanced"),
            (0.705, False, "dirichlet"),
        )
    ]
    ResultFile(measured).write(tmp_path / "tim_5w5s/result.json")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results_table.query_set().splitlines()]
    missing = ["not run", "", ""]
    kinds = ("balanced", "unbalanced", "difference")
    assert lines[0] == ["head", *(f"{cell}, {kind}" for cell in ("5w1s", "5w5s") for kind in kinds)]
    table = {name: cells for name, *cells in lines[2:]}
    assert table["TIM"] == [*missing, "80.00 ± 1.00", "65.00 ± 1.00", "-15.00"]
    assert table["nearest class mean"] == [*missing, "70.00 ± 1.00", "70.50 ± 1.00", "+0.50"]
    assert table["PT-MAP"] == missing * 2


def test_last_blocks_are_compared_with_each_head(tmp_path, monkeypatch):
    monkeypatch.setattr(results_table, "BLOCKS_RUNS", tmp_path)
    for name, accuracy in {"ncm_5w1s": 0.5, "augmented_5w5s": 0.75}.items():
        (tmp_path / name).mkdir()
        measured = [result(accuracy=accuracy, checkpoint="outputs/blocks/poolmean_augmented/best.pt")]
        ResultFile(measured).write(tmp_path / f"{name}/result.json")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results_table.blocks().splitlines()]
    assert lines[0][3:] == [
        f"{cell}, {head}"
        for cell in ("5w1s", "5w5s")
        for head in ("nearest mean", "nearest centred mean", "logistic", "logistic, augmented")
    ]
    assert len(lines) == 2 + 8
    assert ["max pool", "mean", "none", *[""] * 8] in lines
    assert ["max pool", "mean", "crop, flip", "50.00", *[""] * 6, "75.00"] in lines


def test_the_kept_last_blocks_were_trained_and_tested_alike_except_for_what_their_names_say():
    runs = [f"{block}_{augmented}" for block in results_table.BLOCKS for augmented in results_table.AUGMENTED]
    alike = []
    for name in runs:
        block, augmented = name.split("_")
        checkpoint = load_checkpoint(results_table.BLOCKS_RUNS / name)
        config = to_dict(checkpoint.config)
        assert (config["steps"], checkpoint.content["step"]) == (1200, 1200)
        pool, features = results_table.BLOCKS[block]
        backbone, augment, head = (config.pop(group) for group in ("backbone", "augment", "head"))
        assert backbone["global_pool"] == (features == "mean")
        last = backbone["downsample"]
        assert (last if isinstance(last, str) else last[3]) == {"none": "none", "max pool": "max_pool"}[pool]
        assert (augment["crop"], augment["flip"]) == ((4, True) if augmented == "augmented" else (0, False))
        assert (head["augment"], head["flip"]) == ((5, True) if augmented == "augmented" else (0, False))
        alike.append(config)
    assert all(config == alike[0] for config in alike)
    heads = {"ncm": "NearestMean", "cl2n": "CL2N", "logistic": "Logistic", "augmented": "Logistic"}
    for cell in ("5w1s", "5w5s"):
        episodes = set()
        for key, head in heads.items():
            own = read_results(results_table.BLOCKS_RUNS / f"{key}_{cell}/result.json").results
            tested = [name for name in runs if key != "augmented" or "augmented" in name]
            assert {one.checkpoint for one in own} == {f"outputs/blocks/{name}/best.pt" for name in tested}
            episodes |= {one.episodes_sha256 for one in own}
            for one in own:
                assert one.checkpoint_sha256 == sha256(ROOT / one.checkpoint)
                assert (one.head, one.way, one.shot, one.query) == (head, 5, int(cell[2]), 15)
                assert (one.split, one.episodes, one.batch_norm) == ("val", 2000, "inductive")
                plain = key != "augmented" and "augmented" in one.checkpoint  # its head in training had both
                assert (one.changes.get("head.augment"), one.changes.get("head.flip")) == (
                    (0, False) if plain else (None, None)
                )
        assert len(episodes) == 1


def test_runs_with_averaged_weights_differ_in_nothing_else():
    *averages, last = read_results(results_table.EMA / "result.json").results
    assert last.checkpoint == "outputs/blocks/rfs_augmented/best.pt"
    configs = []
    for result in (*averages, last):
        assert result.checkpoint_sha256 == sha256(ROOT / result.checkpoint)
        assert (result.split, result.episodes, result.way, result.shot) == ("val", 2000, 5, 1)
        configs.append(to_dict(load_checkpoint(ROOT / result.checkpoint).config))
    assert [config.pop("ema") for config in configs] == [0.99, 0.999, None]
    assert configs[0] == configs[1] == configs[2]
    assert round(0.999**1199, 2) == 0.3


def test_the_ranges_below_the_table_of_last_blocks_are_those_of_the_table():
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results_table.blocks().splitlines()]
    table = {tuple(line[:3]): [float(cell or "nan") for cell in line[3:]] for line in lines[2:]}
    blocks = [(pool, features) for pool in ("none", "max pool") for features in ("mean", "flattened")]

    def span(pairs, columns):
        """The least and the largest difference between two rows of each pair, rounded, in these columns."""
        found = [table[one][c] - table[other][c] for one, other in pairs for c in columns]
        return round(min(found), 1), round(max(found), 1)

    plain, augmented = "none", "crop, flip"
    mean = [((pool, "mean", a), (pool, "flattened", a)) for pool in ("none", "max pool") for a in (plain, augmented)]
    assert (span(mean, range(3)), span(mean, range(4, 7))) == ((1.2, 4.3), (0.3, 2.2))
    known = [pair for pair in mean if pair[0][2] == augmented]
    assert (span(known, [3]), span(known, [7])) == ((1.2, 1.6), (-0.6, 0.3))
    pool = {(f, a): [(("max pool", f, a), ("none", f, a))] for f in ("mean", "flattened") for a in (plain, augmented)}
    every, without = range(8), [0, 1, 2, 4, 5, 6]
    assert span(pool["flattened", augmented], every) == (0.6, 2.1)
    assert span(pool["flattened", plain], without) == (0.9, 1.8)
    assert (span(pool["mean", augmented], every), span(pool["mean", plain], without)) == ((0.7, 1.5), (-0.5, 0.3))
    trained = {block: [((*block, augmented), (*block, plain))] for block in blocks}
    assert span(trained.pop(("none", "mean")), without) == (-1.2, -0.9)
    assert span([pair for pairs in trained.values() for pair in pairs], without) == (-0.1, 1.1)
    for first in (0, 4):
        assert max(max(row[first : first + 3]) - min(row[first : first + 3]) for row in table.values()) < 0.7
    added = [row[last] - row[last - 1] for row in table.values() for last in (3, 7) if row[last] == row[last]]
    assert (round(min(added), 1), round(max(added), 1)) == (0.4, 1.4)


def test_the_second_stage_is_compared_with_its_own_first_stage():
    first = read_results(REFERENCE / "cifar_fs/second_stage/seed0/result.json").results[0]
    accuracy = results_table.percent(first.accuracy, first.ci95)
    assert f"| 0 | 5w1s | {accuracy} |" in results_table.second_stage()
    for path in REFERENCE.glob("cifar_fs/second_stage/seed*/result.json"):
        second, start = read_results(path).results
        assert second.episodes_sha256 == start.episodes_sha256
        assert any(start.checkpoint_sha256[:16] in stage for stage in second.stages)
        for one in (second, start):
            assert one.checkpoint_sha256 == sha256(ROOT / one.checkpoint)


def test_short_trainings_are_compared_with_those_of_the_same_seeds_without_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(results_table, "FASTER_RUNS", tmp_path)
    assert results_table.faster() == "Not run."
    for name, accuracies in {"base": (0.8, 0.9), "ema": (0.83, 0.88)}.items():
        for seed, accuracy in enumerate(accuracies):
            (tmp_path / f"{name}_{seed}").mkdir()
            words = ["experiment=omniglot/fomaml_5w1s", f"seed={seed}", "steps=300", *(["ema=0.98"] * (name == "ema"))]
            file = ResultFile([result(accuracy=accuracy)], {"steps": 300, "overrides": words})
            file.write(tmp_path / f"{name}_{seed}/result.json")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results_table.faster().splitlines()]
    assert lines[0] == ["change", "settings", "seed 0", "seed 1", "mean", "gain"]
    assert lines[2] == ["none", "`steps=300`", "80.00", "90.00", "85.00", ""]
    # gains 3 and -2: mean 0.5, standard error 2.5, and Student's factor of one degree of freedom 12.706
    assert lines[3] == ["averaged weights", "`steps=300` `ema=0.98`", "83.00", "88.00", "85.50", "+0.50 ± 31.77"]
    shutil.rmtree(tmp_path / "ema_0")
    assert len(results_table.faster().splitlines()) == 3  # a change is shown once all of its seeds are there


def test_the_kept_short_trainings_saw_as_many_tasks_and_were_validated_alike_at_their_ends():
    files = [path for name in results_table.FASTER for path in results_table.FASTER_RUNS.glob(f"{name}_?/result.json")]
    results = [read_results(path).results[0] for path in files]
    assert len(files) == 3 * len(results_table.FASTER)
    names = ("split", "way", "shot", "query", "episodes", "rotation", "batch_norm", "images_sha256")
    (protocol,) = {tuple(getattr(one, name) for name in names) for one in results}
    assert protocol[:-1] == ("val", 5, 1, 1, 600, "per_class", "transductive")
    for one, path in zip(results, files, strict=True):
        train_query = 5 if path.parent.name.startswith("q5_") else 1
        assert one.train_images == 9600 * 5 * (1 + train_query), path
    assert all(one.step == read_results(path).training["steps"] for one, path in zip(results, files, strict=True))


@pytest.mark.parametrize("path", sorted(results_table.TRANSDUCTIVE.glob("*/result.json")), ids=lambda p: p.parent.name)
def test_a_kept_result_of_such_a_head_is_of_the_kept_classifier_on_the_episodes_of_its_inductive_result(path):
    head, _, cell = path.parent.name.rpartition("_")
    own = {(one.uses_query_set, one.query_balance): one for one in read_results(path).results}
    inductive = read_results(REFERENCE / f"cifar_fs/classifier_{cell}/result.json").results[0]
    assert head in results_table.QUERY_SET_HEADS
    assert {one.checkpoint for one in own.values()} == {"outputs/reference/cifar_fs/classifier_5w1s/best.pt"}
    for balance in ("balanced", "dirichlet"):
        assert own[True, balance].episodes_sha256 == own[False, balance].episodes_sha256
    assert own[True, "balanced"].episodes_sha256 == inductive.episodes_sha256 != own[True, "dirichlet"].episodes_sha256
