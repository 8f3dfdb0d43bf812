"""What a number was measured with, so that unlike numbers are never put side by side unmarked."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dashboards import published
from dashboards.runs import TrialRun
from studies.machinery.records import TAG_DATA, TAG_IMAGE_SIDE

MARKS = "†‡§¶‖"
"""Of protocols, in the order in which they appear; doubled where these do not suffice."""
PUBLISHED = ("googlenet", True, "", "512", "227", "256")
"""The settings of the published rows, in the order of Protocol."""
EARLIER = {"False": "", "True": "all"}
"""What network.frozen was written as, when it was no more than a choice of two."""
DIGITS = 8
"""Of a digest or a run's id, where it is read by people."""


class Protocol(NamedTuple):
    """What has to be alike for numbers to be compared."""

    extractor: str
    weights: bool
    """Whether the extractor began with weights that it was given."""
    frozen: str
    """Nothing (empty), `all`, or up to where."""
    embedding_size: str
    crop_size: str
    image_size: str
    digest: str
    """Of the data."""
    split: str
    """What train and test share none of, where there is a choice."""
    image_side: str
    """Median of the shorter side of the images as they were found, in pixels; empty where that was not recorded."""

    def __str__(self) -> str:
        """All of it in a line."""
        trained = {"": "trained end to end", "all": "frozen"}.get(self.frozen, f"frozen up to {self.frozen}")
        parts = (
            f"{self.extractor} {trained}" + ("" if self.weights else " from random weights"),
            f"{self.embedding_size}-d",
            f"{self.crop_size} of {self.image_size} px",
            f"images of {float(self.image_side):.0f} px" if self.image_side else "",
            f"data digest {self.digest[:DIGITS] or 'unknown'}",
            f"disjoint by {self.split}" if self.split else "",
        )
        return ", ".join(filter(None, parts))


def protocol(run: TrialRun) -> Protocol:
    """The protocol of a run, from its settings and tags."""
    asked = run.params.get
    return Protocol(
        asked("network.extractor", "?"),
        asked("network.weights", "") != "",
        EARLIER.get(asked("network.frozen", "?"), asked("network.frozen", "?")),
        asked("network.embedding_size", "?"),
        asked("data.crop_size", "?"),
        asked("data.image_size", "?"),
        run.tags.get(TAG_DATA, ""),
        asked("data.disjoint_by", "") if asked("data.name") == "omniglot" else "",
        run.tags.get(TAG_IMAGE_SIDE, ""),
    )


def marked(protocols: Iterable[Protocol]) -> dict[Protocol, str]:
    """Give each protocol a mark of its own; equal ones share it."""
    unlike = dict.fromkeys(protocols)
    return {each: MARKS[i % len(MARKS)] * (1 + i // len(MARKS)) for i, each in enumerate(unlike)}


def footnotes(marks: Mapping[Protocol, str], beside_published: bool) -> list[str]:
    """Say what each mark stands for, and what may not be compared with its rows."""
    notes = []
    for of, mark in marks.items():
        unlike = ["rows of another mark"] if len(marks) > 1 else []
        like = ""
        if beside_published and of[: len(PUBLISHED)] == PUBLISHED:
            like = "; settings as published, but nothing tells whether the images are"
        elif beside_published:
            unlike.insert(0, f"the published rows ({published.PROTOCOL})")
        refused = f"; not comparable with {' nor '.join(unlike)}" if unlike else ""
        notes.append(f"{mark} {of}{like}{refused}.")
    return notes
