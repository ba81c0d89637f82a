"""The state of a run: its lock, its log, and damaged files."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import largest_file
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metacv.errors import UserError
from metacv.logger import Logger, errors_of_threads_once
from metacv.model import load_checkpoint
from metacv.run import load_state, lock_folder


def test_two_processes_cannot_lock_the_same_folder(tmp_path):
    second = lock_folder(tmp_path)
    with lock_folder(tmp_path), pytest.raises(UserError, match="another process is writing there"):
        second.__enter__()
    with lock_folder(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_supported(tmp_path, monkeypatch, number):
    def refused(*_, **__):
        raise OSError(number, "no locks")

    monkeypatch.setattr(FileLock, "acquire", refused)
    with lock_folder(tmp_path):
        (tmp_path / "file").write_text("")
    assert (tmp_path / "file").exists()


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".lock"))

    monkeypatch.setattr(FileLock, "acquire", refused)
    with pytest.raises(PermissionError), lock_folder(tmp_path):
        pass


def test_training_metrics_up_to_the_step_are_kept_for_any_scalars(tmp_path):
    lines = [{"step": 10, "val/accuracy": 0.5}, {"step": 15, "train/nll": 1.0}, {"step": 25, "train/nll": 0.5}]
    lines.append({"step": 20, "val/accuracy": 0.6})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Logger(tmp_path, step=20, validated=10):
        pass
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:2]


def test_a_resumed_log_keeps_training_up_to_the_step_and_saved_validations(tmp_path):
    """A signal saved the run at step 3; its validation there was logged, but not saved, before a kill."""
    curve = {}
    for validated in (-1, 2):
        with Logger(tmp_path, step=max(0, 3 * validated // 2), validated=validated) as logger:
            for step in (1, 2, 3, 4) if validated < 0 else (4,):
                logger.scalars(step, {"train/loss": float(step)})
            for step in (2, 3):
                if step > validated:
                    logger.scalars(step, {"val/accuracy": float(step + validated)})
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("train/loss", "val/accuracy"):
        curve[name] = [(event.step, event.value) for event in events.Scalars(name)]
    assert sorted(curve["train/loss"]) == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert sorted(curve["val/accuracy"]) == [(2, 1), (3, 5)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["val/accuracy"]) for line in lines if "val/accuracy" in line] == curve["val/accuracy"]


def test_resuming_a_finished_run_adds_no_points_to_its_curves(metacv, trained):
    shutil.copytree(trained("protonet"), "run")
    before = EventAccumulator("run").Reload()
    assert metacv("train", "resume=run")[0] == 0
    after = EventAccumulator("run").Reload()
    assert len(list(Path("run").glob("events.*"))) == 2
    for name in before.Tags()["scalars"]:
        assert [event.step for event in after.Scalars(name)] == [event.step for event in before.Scalars(name)]
    assert [event.step for event in after.Scalars("val/best_accuracy")] == [2, 4]


def test_temporary_files_of_a_killed_run_are_removed_at_the_next_start(tmp_path):
    (tmp_path / ".hydra").mkdir()
    left = [tmp_path / ".last.pt.12.tmp", tmp_path / ".hydra/.config.yaml.12.tmp"]
    kept = [tmp_path / ".hydra/config.yaml", tmp_path / "notes.tmp"]
    for path in (*left, *kept):
        path.write_text("")
    with lock_folder(tmp_path):
        assert [path.exists() for path in (*left, *kept)] == [False, False, True, True]


@pytest.mark.parametrize("file", ["metrics.jsonl", "events.out.tfevents.*"])
def test_an_unwritable_log_is_one_error_that_names_the_file(tmp_path, capfd, file):
    """The error names the file that reaches the limit first. TensorBoard writes on a separate thread."""
    earlier = json.dumps({"step": 0, "val/accuracy": 0.5}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(earlier * (100 if file == "metrics.jsonl" else 1))

    def fill() -> None:
        with errors_of_threads_once(), Logger(tmp_path, 0, 0) as logger, largest_file(100 * len(earlier)):
            for step in range(1, 1000):
                logger.scalars(step, {"train/loss": 1.0})
                logger.sync()

    with pytest.raises(UserError) as caught:
        fill()
    assert str(caught.value) == f"{tmp_path / file} cannot be written: File too large"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "change", [{"overrides": [5]}, {"overrides": [""]}, {"overrides": 5}, {"best": {}}, {"best": 1}]
)
def test_a_damaged_state_is_refused_with_one_line(trained, tmp_path, change):
    content = torch.load(trained("protonet") / "last.pt", weights_only=True)
    torch.save(content | change, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last.pt is damaged"):
        load_state(tmp_path / "last.pt")


def test_a_checkpoint_format_that_is_not_an_integer_is_refused(trained, tmp_path):
    content = torch.load(trained("protonet") / "best.pt", weights_only=True)
    torch.save(content | {"format": torch.tensor([1, 2])}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="has format"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("change", [{"algorithm": torch.zeros(2, 2)}, {"image_shape": torch.zeros(3)}, {"step": None}])
def test_checkpoint_fields_of_a_wrong_type_are_refused(trained, tmp_path, change):
    content = torch.load(trained("protonet") / "best.pt", weights_only=True)
    torch.save(content | change, tmp_path / "best.pt")
    with pytest.raises(UserError, match="is not a checkpoint of metacv, or is damaged"):
        load_checkpoint(tmp_path)
