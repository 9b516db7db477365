"""Files that are whole at every moment, whatever kills the process that writes them."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that whoever reads it, at any moment, sees all of the old text or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes renames within a directory survive a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
