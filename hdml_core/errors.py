"""What a mistake in a setting raises, with the way out."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type or out of its range. The message names the way out."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return a hint at the nearest known name, to end a message with; empty where none is near.

    >>> did_you_mean("triplets", ["npair", "triplet"])
    "; did you mean 'triplet'?"
    """
    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
