"""Omniglot: handwritten characters of 50 alphabets (Lake, Salakhutdinov, Tenenbaum, Science 350, 2015)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from hdml_core.config import DataConfig
from hdml_core.datasets.archives import Archive, fetch, find, identity, members
from hdml_core.datasets.base import DataError, Sample, Source, first_half
from hdml_core.datasets.cache import image_decoder

ADDRESS = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
BACKGROUND = Archive(
    "images_background.zip",
    address=f"{ADDRESS}images_background.zip",
    md5="68d2efa1b9178cc56df9314c21c6e718",
)
EVALUATION = Archive(
    "images_evaluation.zip",
    address=f"{ADDRESS}images_evaluation.zip",
    md5="6b91aef0f799c5bb55b94e3f2daec811",
)
WHOLE = (BACKGROUND, EVALUATION)
# Excerpts of the background set. They do where the user put them; nothing downloads them.
EXCERPTS = (Archive("images_background_small1.zip"), Archive("images_background_small2.zip"))
DRAWINGS = 20


def read(config: DataConfig, root: Path, whole: Sequence[Archive] = WHOLE) -> Source:
    """Find the drawings: of the archives in the data root, or of the whole data set where there is none.

    A class is a character of an alphabet; the first half of the characters trains, or of the alphabets where
    `data.disjoint_by` says so. Ink is bright on dark. Raises DataError where a character has not its 20 drawings.
    """
    size = config.image_size
    present = [place for archive in (*whole, *EXCERPTS) if (place := find(root, archive))]
    places = present or [fetch(root, archive) for archive in whole]

    def samples() -> tuple[tuple[int, ...], Iterator[Sample]]:
        # By name: a character of an excerpt is also in the background set.
        drawings = {}
        for place in places:
            for path, content in members(place, (".png",)):
                character = f"{path.parent.parent.name}/{path.parent.name}"
                name = f"{character}/{path.name}"
                drawings[name] = Sample(name, character, content)
        for character, count in Counter(sample.class_name for sample in drawings.values()).items():
            if count != DRAWINGS:
                raise DataError(
                    f"each character of omniglot must have {DRAWINGS} drawings, got {count} of {character} in {root}: "
                    "fetch it again"
                )
        return (len(drawings), 1, size, size), iter(drawings.values())

    return Source(
        name="omniglot",
        place=root,
        identity=[f"{size} px", *(line for place in places for line in identity(place))],
        read=samples,
        decode=image_decoder(size, channels=1, invert=True),
        train_classes=first_half_of_alphabets if config.disjoint_by == "alphabet" else first_half,
    )


def first_half_of_alphabets(characters: Sequence[str]) -> Sequence[int]:
    """Train on the characters of the first half of the alphabets."""
    alphabets = [character.partition("/")[0] for character in characters]
    names = sorted(set(alphabets))
    train = {names[i] for i in first_half(names)}
    return [i for i, alphabet in enumerate(alphabets) if alphabet in train]
