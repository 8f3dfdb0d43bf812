"""One process at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hdml_core.datasets.base import DataError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock at `path` and hold it; the system frees it when its holder dies, however it dies.

    Raises DataError where the folder can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise DataError(
            f"{path.parent} must be writable, got {error}: set HDML_DATA to a folder that is "
            "(the archives in it may be symbolic links)"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
