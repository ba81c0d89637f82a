"""Files that are whole at every instant, whenever the program is killed."""

import io
import os
from pathlib import Path
from typing import Any

import torch


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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
