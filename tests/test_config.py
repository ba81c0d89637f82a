"""Settings: their types, which of them are paths, and what a checkpoint may hold."""

import pytest
from hydra import compose, initialize_config_dir

from metacv import CONFIG_DIR
from metacv.config import (
    LOCAL,
    TrainConfig,
    flat,
    from_dict,
    is_resumable,
    merged,
    to_dict,
    typed,
)
from metacv.errors import UserError


@pytest.fixture
def train_config():
    def composed(*overrides: str) -> TrainConfig:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return typed(compose("train", list(overrides)), TrainConfig)

    return composed


def test_a_folder_of_split_lists_keeps_its_name_wherever_the_command_runs(train_config, tmp_path, monkeypatch):
    (tmp_path / "splits-vinyals").mkdir()
    monkeypatch.chdir(tmp_path)
    assert train_config("dataset=omniglot").dataset["split_dir"] == "splits-vinyals"


def test_settings_survive_the_way_through_a_checkpoint(train_config):
    config = train_config("algo=protonet", "way=7", "clip_norm=0.5", "seed=9000000000000000000")
    assert from_dict(TrainConfig, to_dict(config, with_local=True)) == config
    kept = to_dict(config)
    assert LOCAL.isdisjoint(kept)
    assert from_dict(TrainConfig, kept).way == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"way": "5"}, "way='5': must be a whole number from 2 to 10000"),
        ({"way": True}, "way=true: must be a whole number from 2 to 10000"),
        ({"clip_norm": float("inf")}, "clip_norm=inf: must be a number above 0 and at most 1000000000 or null"),
        ({"algo": 3}, "algo=3: must be a group of settings"),
        ({"shots": 5}, "shots: there is no such setting"),
        ({"augment": {"crop": 1.5}}, "augment.crop=1.5: must be a whole number from 0 to 4096"),
        ({"augment": {"turn": 1}}, "augment.turn: there is no such setting"),
    ],
)
def test_a_wrong_value_in_a_checkpoint_is_refused_with_its_name(train_config, change, message):
    content = to_dict(train_config(), with_local=True)
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, content | change)


def test_a_missing_setting_is_refused_with_its_name(train_config):
    content = to_dict(train_config())
    del content["way"]
    with pytest.raises(ValueError, match="way is missing"):
        from_dict(TrainConfig, content)


def test_interpolations_in_a_checkpoint_stay_text(train_config):
    content = to_dict(train_config()) | {"dataset": {"root": "${oc.env:HOME}"}}
    assert from_dict(TrainConfig, content).dataset["root"] == "${oc.env:HOME}"


def test_nested_settings_are_merged_and_other_values_replaced():
    one = {"counts": {"train": 3, "val": 2}, "size": 28}
    assert merged(one, {"counts": {"val": 5}, "size": 84}) == {"counts": {"train": 3, "val": 5}, "size": 84}


def test_local_settings_are_resumable_and_never_compared(train_config):
    assert is_resumable("device")
    assert is_resumable("steps")
    assert not is_resumable("way")
    names = dict(flat(to_dict(train_config(), with_local=True)))
    assert "device" not in names
    assert names["algo"] == "MAML"


def test_an_unknown_choice_is_refused_with_the_choices(train_config):
    with pytest.raises(UserError, match="precision=fp64: must be one of fp32, tf32, bf16"):
        train_config("precision=fp64")
