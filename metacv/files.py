"""Files of tensors that are whole at every instant, whenever the program is killed, and checked when they are read."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch


def read_checked(path: Path) -> Any:
    """torch.load of tensors and plain values, after the checksums of the file, which torch does not look at."""
    with path.open("rb") as file:
        if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()):
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def write_atomically(path: Path, content: Any) -> None:
    """torch.save to a temporary file, synced and renamed: at every instant `path` is the old file or the new one."""
    buffer = io.BytesIO()  # torch's zip writer hides a full disk behind an error of its own
    torch.save(content, buffer)
    write_bytes_atomically(path, buffer.getbuffer())


def write_bytes_atomically(path: Path, content: bytes | memoryview) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
