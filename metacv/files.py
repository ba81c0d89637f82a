"""Write files atomically, and read them safely."""

import hashlib
import os
import secrets
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from metacv.errors import UserError


def read_checked(path: Path, mmap: bool = False) -> Any:
    """torch.load of tensors and plain values. With `mmap` they stay in the file, in memory that its readers share."""
    with path.open("rb") as file:  # torch.load verifies no checksums
        if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()):
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def rename_unless_there(folder: Path, target: Path) -> None:
    """Move a complete folder to `target`, unless another program has put one there meanwhile."""
    try:
        os.rename(folder, target)
    except OSError:
        if not target.is_dir():
            raise


def write_atomically(path: Path, content: Any) -> None:
    """torch.save to a temporary file, synced and renamed: at every instant `path` is the old file or the new one."""
    _atomically(path, lambda file: torch.save(content, file))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    _atomically(path, lambda file: file.write(content))


def user_path(place: str | Path) -> Path:
    """`place` with the home folder for a leading ~; unchanged if there is no such user."""
    return Path(os.path.expanduser(place))


@contextmanager
def written_or_refused(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    # A random name: programs in two containers may have the same process id.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
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
