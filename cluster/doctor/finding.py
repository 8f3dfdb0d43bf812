"""What the doctor says: a line for each thing looked at, with its figure, or with what mends it."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

OK: Literal["ok"] = "ok"
BAD: Literal["BAD"] = "BAD"
UNSEEN: Literal["--"] = "--"


class Finding(NamedTuple):
    """A line: all is well, something is wrong, or it could not be looked at."""

    mark: Literal["ok", "BAD", "--"]
    text: str

    def __str__(self) -> str:
        return f"{self.mark:<3} {self.text}"


Findings = Iterator[Finding]


def ok(text: str) -> Finding:
    """Something is as it should be; `text` has the figure."""
    return Finding(OK, text)


def bad(wrong: str, way_out: str) -> Finding:
    """Something is wrong, and this command or setting mends it."""
    return Finding(BAD, f"{wrong}: {way_out}")


def unseen(what: str, why: object) -> Finding:
    """Something could not be looked at."""
    return Finding(UNSEEN, f"{what}: {why}")


def first_line(error: BaseException) -> str:
    """What went wrong, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def count(number: int, thing: str) -> str:
    """So many of a thing.

    >>> count(1, "node"), count(3, "node")
    ('1 node', '3 nodes')
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"


def span(values: list[float], unit: str) -> str:
    """From the least to the most of some figures.

    >>> span([81.6, 410.2], "MB/s"), span([5.0], "ms")
    ('82 to 410 MB/s', '5 ms')
    """
    least, most = f"{min(values):.0f}", f"{max(values):.0f}"
    return f"{least} {unit}" if least == most else f"{least} to {most} {unit}"
