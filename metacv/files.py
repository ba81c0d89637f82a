"""Write files atomically, and read them safely."""

import glob
import hashlib
import os
import secrets
import shutil
import stat
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from metacv import limits
from metacv.errors import UserError
from metacv.pickles import CheckpointUnpickler, check_extent

DAY = 24 * 3600  # seconds


def size_of(path: Path) -> int:
    """Return a file's size in bytes; UserError for a device or a pipe, which may be endless. OSError if missing."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file")
    return status.st_size


def check_file(path: Path, most: int) -> None:
    """Raise UserError if a file is not regular or is larger than `most` bytes; OSError if it is missing."""
    if size_of(path) > most:
        raise UserError(f"{path} is larger than {most} bytes, the limit for such a file")


def read_text(path: Path, errors: str = "strict") -> str:
    """Read a UTF-8 file; UserError if it is not regular or too large, OSError or UnicodeDecodeError if unreadable."""
    check_file(path, limits.TEXT)
    return path.read_text("utf-8", errors)


def read_checked(path: Path, mmap: bool = False) -> Any:
    """Load tensors and plain values by torch.load. With `mmap` tensors stay in the file, in memory shared by readers.

    Raises an error of any type if the file holds anything else, is damaged, or needs more memory than its size on disk.
    """
    size = size_of(path)
    with zipfile.ZipFile(path) as zipped:
        _check_as_torch_sees_it(path, size)
        entries = zipped.infolist()
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its parts are compressed, or overlap")
        if damaged := zipped.testzip():  # torch.load verifies no checksums
            raise ValueError(f"{damaged} is damaged")
        sizes = {entry.filename: entry.file_size for entry in entries}
        if len({name.lower() for name in sizes}) < len(entries):
            raise ValueError("two of its parts have the same name")
        root = entries[0].filename.split("/")[0]
        if sizes[f"{root}/data.pkl"] > limits.PICKLE:
            raise ValueError(f"its pickle is larger than {limits.PICKLE} bytes")
        storages = {name.removeprefix(f"{root}/data/"): own for name, own in sizes.items()}
        check_extent(CheckpointUnpickler(zipped.read(f"{root}/data.pkl"), storages).load(), limits.VALUES)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _check_as_torch_sees_it(path: Path, size: int) -> None:
    """Raise ValueError unless a zip's directory is where torch looks for it, which differs from where Python looks."""
    with path.open("rb") as file:
        file.seek(max(0, size - 98))
        end = file.read(98)
    if len(end) < 98 or (end[:4], end[56:60], end[76:80]) != (b"PK\6\6", b"PK\6\7", b"PK\5\6"):
        raise ValueError("it does not end as torch.save ends it")
    length, start, place = struct.unpack_from("<40xQQ8xQ", end)
    if start + length != size - 98 or place != size - 98:
        raise ValueError("it does not end as torch.save ends it")


def check_growth(path: Path, unpacked: int) -> None:
    """Raise ValueError if an archive would unpack to far more than its own size."""
    if unpacked > limits.GROWTH * size_of(path) + limits.SMALL:
        raise ValueError(f"it would unpack to more than {limits.GROWTH} times its size")


def rename_unless_there(folder: Path, target: Path) -> None:
    """Move a complete folder to `target`, unless another process has created it meanwhile."""
    try:
        os.rename(folder, target)
    except OSError:
        if not target.is_dir():
            raise


def write_atomically(path: Path, content: Any) -> None:
    """Save by torch.save to a temporary file, sync and rename: `path` is always the complete old or new file."""
    _atomically(path, lambda file: torch.save(content, file))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    _atomically(path, lambda file: file.write(content))


def user_path(place: str | Path) -> Path:
    """Expand a leading ~ to the home folder; unchanged if there is no such user."""
    return Path(os.path.expanduser(place))


def copy_atomically(source: Path, path: Path) -> None:
    """Copy a file in chunks and rename it, as `write_atomically` does."""
    with source.open("rb") as content:
        _atomically(path, lambda file: shutil.copyfileobj(content, file))


@contextmanager
def written_or_refused(path: Path) -> Iterator[None]:
    """Convert OSError to a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    # A random name, because processes in two containers may have the same id.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of killed processes; recent ones may be in use
        with suppress(OSError):
            if left.stat().st_mtime < time.time() - DAY:
                left.unlink()
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides an OSError
        if isinstance(cause, OSError):
            cause.filename = str(path)
            raise cause from None
        raise
