"""The spool: what is to be told elsewhere, kept on this machine's disk from when it happens until it has been sent.

A folder with a file for each start of a driver, which holds it locked for as long as it lives: an event a line, only
ever appended to, and beside it how many of its bytes were sent. What is written outlives the driver, however it dies;
what was sent and not yet noted as sent is sent again. Knows nothing of who is told.
"""

import fcntl
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

Event = dict[str, Any]
"""What to do, under the name `do`, and with what, all of it JSON."""

REFUSED = "refused.jsonl"
"""Holds, with the reason, the events that whoever was told would not take."""


class Spool:
    """The events of one driver, for one process at a time."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        """Open the file, and cut off a last line that its driver did not live to finish.

        Raises BlockingIOError where another process has it, FileNotFoundError where it is gone.
        """
        self._path = path
        self._noted = path.with_suffix(".sent")
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._file).st_nlink == 0:
                raise FileNotFoundError(f"{path} was sent and removed by another process")
        except OSError:
            os.close(self._file)
            raise
        size = os.fstat(self._file).st_size
        self._sent = min(_sent(path), size)
        left = [len(line) for line in self._lines(self._sent)]
        os.ftruncate(self._file, self._sent + sum(left))
        self.unsent = len(left)
        self._read = (0, self._sent)
        self._unwritten = b""
        self._told = False
        self._lock = threading.Lock()

    @classmethod
    def begin(cls, folder: Path) -> Self:
        """Open a new spool, to be sent after all that are in the folder.

        Raises OSError where the folder can't be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            last = max((int(path.stem) for path in _paths(folder)), default=0)
            # Another driver may begin, or look at what was left, at this very moment.
            with suppress(FileExistsError, BlockingIOError, FileNotFoundError):
                return cls(folder / f"{last + 1:06d}.jsonl", os.O_CREAT | os.O_EXCL)

    @classmethod
    def left(cls, folder: Path) -> tuple[list[Self], int]:
        """Open what drivers that are gone have left, the oldest first; return it, and how many drivers live."""
        spools = []
        living = 0
        for path in _paths(folder):
            try:
                spools.append(cls(path))
            except BlockingIOError:
                living += 1
            except FileNotFoundError:
                continue
        return spools, living

    def append(self, event: Event, durable: bool = False) -> None:
        """Write an event, flushed through to the disk if it is to outlive the machine too.

        A disk without room loses nothing that is not killed meanwhile: the event is kept, and written with the next.
        """
        with self._lock:
            self.unsent += 1
            self._unwritten += json.dumps(event).encode() + b"\n"
            try:
                while self._unwritten:
                    self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
                if durable:
                    os.fsync(self._file)
            except OSError as error:
                if not self._told:
                    print(f"{self._path} can't be written, kept in memory until it can: {error}", file=sys.stderr)
                self._told = True

    def read(self, most: int) -> list[Event]:
        """The next events that were not sent, in their order."""
        lines = list(itertools.islice(self._lines(self._sent), most))
        self._read = (len(lines), self._sent + sum(map(len, lines)))
        return [_parse(line) for line in lines]

    def acknowledge(self) -> None:
        """Note that what was read last has been sent."""
        count, self._sent = self._read
        self._read = (0, self._sent)
        with self._lock:
            self.unsent -= count
        # Where it can't be noted it is sent once more.
        with suppress(OSError):
            aside = self._noted.with_suffix(".part")
            aside.write_text(str(self._sent))
            aside.rename(self._noted)

    def everything(self) -> Iterator[Event]:
        """All its events, from the first."""
        return map(_parse, self._lines(0))

    def refuse(self, event: Mapping[str, Any], reason: str) -> None:
        """Set an event aside that will not be taken; of the first, say so."""
        path = self._path.with_name(REFUSED)
        if not path.exists():
            print(f"what is refused is kept in {path}: {reason}", file=sys.stderr)
        with path.open("a") as file:
            file.write(json.dumps({**event, "refused": reason}) + "\n")

    def close(self) -> None:
        """Let go of the file; one that was sent to its end is removed."""
        if not self.unsent:
            # In this order: what was noted of this file must never be taken for another's of its name.
            self._noted.unlink(missing_ok=True)
            self._path.unlink()
        os.close(self._file)

    def _lines(self, start: int) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            file.seek(start)
            yield from (line for line in file if line.endswith(b"\n"))


def waiting(folder: Path) -> int:
    """How many events drivers that are gone have left unsent; nothing is changed, and nobody kept from sending them."""
    count = 0
    for path in _paths(folder):
        # It is a living driver's, or was sent and removed just now.
        with suppress(BlockingIOError, FileNotFoundError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            file.seek(_sent(path))
            count += sum(line.endswith(b"\n") for line in file)
    return count


def refused(folder: Path) -> int:
    """How many events of all drivers were refused."""
    path = folder / REFUSED
    return len(path.read_text().splitlines()) if path.exists() else 0


def _sent(path: Path) -> int:
    """How many bytes of a file were noted as sent."""
    noted = path.with_suffix(".sent")
    said = noted.read_text() if noted.exists() else ""
    return int(said) if said.isdigit() else 0


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.jsonl"))


def _parse(line: bytes) -> Event:
    """An event; of a line that a failing disk has spoilt, one that nobody takes."""
    try:
        return dict(json.loads(line))
    except (TypeError, ValueError):
        return {"do": "unreadable", "line": line.decode(errors="replace")}
