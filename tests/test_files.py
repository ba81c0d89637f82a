"""Files are written completely or not at all, and errors name the file and the reason."""

import errno
import os
import time

import pytest
import torch
from conftest import largest_file

from metacv.files import _atomically, write_atomically, write_bytes_atomically


def test_two_programs_with_the_same_process_id_do_not_disturb_each_other(tmp_path):
    """This happens in two containers; the second process writes while the first does."""
    path = tmp_path / "file"

    def write(file):
        file.write(b"first")
        write_bytes_atomically(path, b"second")
        assert path.read_bytes() == b"second"

    _atomically(path, write)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("limit", [0, 50, 2_000, 200_000, 1_199_000, 1_200_300])
def test_a_full_disk_is_an_error_that_names_the_file_and_the_reason(tmp_path, limit):
    """At any position in the file where the disk is full: torch.save raises errors of several types there."""
    path = tmp_path / "file.pt"
    path.write_bytes(b"before")
    with largest_file(limit), pytest.raises(OSError, match="File too large") as caught:
        write_atomically(path, {"images": torch.zeros(300_000)})
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_temporary_files_of_killed_processes_are_removed_after_a_day(tmp_path):
    """For the cache folder, which no run locks. Recent files may belong to a process that is still writing."""
    old, young, of_another = (tmp_path / f".{name}.tmp" for name in ("a[1].pt.12", "a[1].pt.34", "b.pt.12"))
    for path in (old, young, of_another):
        path.write_bytes(b"half")
    two_days_ago = time.time() - 48 * 3600
    for path in (old, of_another):
        os.utime(path, (two_days_ago, two_days_ago))
    write_bytes_atomically(tmp_path / "a[1].pt", b"whole")
    assert {*tmp_path.iterdir()} == {tmp_path / "a[1].pt", young, of_another}


def test_other_errors_than_of_the_disk_are_not_changed(tmp_path):
    with pytest.raises(AttributeError):
        write_atomically(tmp_path / "file.pt", lambda: None)
    assert not list(tmp_path.iterdir())
