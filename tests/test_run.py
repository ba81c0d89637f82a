"""The state of a run: its lock, its log, and damaged files."""

import errno
import json

import pytest
import torch
from filelock import FileLock

from metacv.errors import UserError
from metacv.logger import Logger
from metacv.model import load_checkpoint
from metacv.run import load_state, lock_folder


def test_a_folder_has_one_lock(tmp_path):
    second = lock_folder(tmp_path)
    with lock_folder(tmp_path), pytest.raises(UserError, match="another run is writing there"):
        second.__enter__()
    with lock_folder(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, number):
    def refused(*_, **__):
        raise OSError(number, "no locks")

    monkeypatch.setattr(FileLock, "acquire", refused)
    with lock_folder(tmp_path):
        (tmp_path / "file").write_text("")
    assert (tmp_path / "file").exists()


def test_a_folder_that_is_read_only_is_refused(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".lock"))

    monkeypatch.setattr(FileLock, "acquire", refused)
    with pytest.raises(PermissionError), lock_folder(tmp_path):
        pass


def test_training_lines_up_to_the_step_are_kept_whatever_scalars_a_method_logs(tmp_path):
    lines = [{"step": 10, "val/accuracy": 0.5}, {"step": 15, "train/nll": 1.0}, {"step": 25, "train/nll": 0.5}]
    lines.append({"step": 20, "val/accuracy": 0.6})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Logger(tmp_path, step=20, validated=10):
        pass
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:2]


@pytest.mark.parametrize(
    "change", [{"overrides": [5]}, {"overrides": [""]}, {"overrides": 5}, {"best": {}}, {"best": 1}]
)
def test_a_damaged_state_is_refused_with_one_line(trained, tmp_path, change):
    content = torch.load(trained("protonet") / "last.pt", weights_only=True)
    torch.save(content | change, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last.pt is damaged"):
        load_state(tmp_path / "last.pt")


def test_a_format_that_is_no_number_is_refused(trained, tmp_path):
    content = torch.load(trained("protonet") / "best.pt", weights_only=True)
    torch.save(content | {"format": torch.tensor([1, 2])}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="has format"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("change", [{"algorithm": torch.zeros(2, 2)}, {"image_shape": torch.zeros(3)}, {"step": None}])
def test_fields_of_another_type_are_refused(trained, tmp_path, change):
    content = torch.load(trained("protonet") / "best.pt", weights_only=True)
    torch.save(content | change, tmp_path / "best.pt")
    with pytest.raises(UserError, match="is not a checkpoint of metacv, or is damaged"):
        load_checkpoint(tmp_path)
