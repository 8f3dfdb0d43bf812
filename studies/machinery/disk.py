"""The study's checkpoints on disk, kept under a cap: those of the best trial and of what runs stay, the oldest go."""

import math
import shutil
from pathlib import Path

from studies.machinery.ledger import CHECKPOINTS, Row
from studies.machinery.records import FINISHED
from studies.machinery.search import Series


class DiskCap:
    """Drops the checkpoints of trials that ended, oldest first, while those of all take more than the cap."""

    def __init__(self, gigabytes: float) -> None:
        self._cap = gigabytes * 1e9
        self._sizes: dict[Path, int] = {}

    def keep(self, series: Series, ended: Row) -> None:
        """Make room where a trial has ended; its own checkpoints, the newest, stay like those of the best."""
        if self._cap == math.inf:
            return
        rows = [row for row in series.ledger.rows() if CHECKPOINTS in row.notes]
        stay = {ended.number} | ({series.ledger.best().number} if series.ledger.ranked() else set())
        for row in rows:
            folder = Path(row.notes[CHECKPOINTS])
            if folder not in self._sizes or row.state not in FINISHED or row.number == ended.number:
                self._sizes[folder] = _size(folder)
        for row in rows:
            if sum(self._sizes.values()) <= self._cap:
                break
            if row.state in FINISHED and row.number not in stay:
                folder = Path(row.notes[CHECKPOINTS])
                shutil.rmtree(folder, ignore_errors=True)
                self._sizes[folder] = 0


def _size(folder: Path) -> int:
    """Bytes of all files below a folder, of which a trial that runs may take some away just now."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
