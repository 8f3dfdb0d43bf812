"""Real photographs for the benchmarks: crops of CUB-200-2011 in the folder HDML_SHARED, where there is one."""

import math
import os
import tarfile
from collections import Counter
from pathlib import Path

from tests.conftest import ROOT

SHARED = Path(os.environ.get("HDML_SHARED", ROOT.parent / "shared"))
ARCHIVE = SHARED / "data/CUB_200_2011.tgz"


def unpack(folder: Path, classes: int, of_each: float = math.inf) -> None:
    """Unpack the first classes, each into a folder of its own, such as `001.Black_footed_Albatross`."""
    unpacked: Counter[str] = Counter()
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            path = Path(member.name)
            of_class = path.parent.name
            if path.suffix != ".jpg" or int(of_class[:3]) > classes or unpacked[of_class] >= of_each:
                continue
            content = archive.extractfile(member)
            assert content  # it is a file
            (folder / of_class).mkdir(parents=True, exist_ok=True)
            (folder / of_class / path.name).write_bytes(content.read())
            unpacked[of_class] += 1
