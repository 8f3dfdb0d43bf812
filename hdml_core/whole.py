"""A folder of files, written whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def put(target: Path, files: Mapping[str, bytes]) -> None:
    """Have `target` hold these files and no others: written aside, flushed to the disk, and only then renamed.

    Raises OSError (no space left, read-only) with all as it was before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".writing-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for name, content in files.items():
            (aside / name).write_bytes(content)
        for path in (*aside.iterdir(), aside):
            _flush(path)
        replaced = target.parent / f".replaced-{os.getpid()}"
        if target.exists():
            target.rename(replaced)
        aside.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _flush(target.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
