"""Whether a Python has what studies need: `python requirements.py`, by any Python, with nothing else installed.

Prints what lacks, and ends with status 1 if anything does; with `--list` it prints what is needed. That stands in
`pyproject.toml`, for a study and for the clouds, and in which version in `constraints.txt`.
"""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def needed(root: Path = ROOT) -> list[str]:
    """The requirements of a project's studies and of Ray's launcher on clouds."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["cloud"]]


def missing(root: Path = ROOT) -> list[str]:
    """What this Python lacks, a line for each package; a build's own mark, such as `+cu130`, does not count."""
    pinned = dict(line.split("==") for line in (root / "constraints.txt").read_text().split() if "==" in line)
    lines = []
    for requirement in needed(root):
        name = re.split(r"[\[<>=!~ ]", requirement, maxsplit=1)[0]
        try:
            there = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            there = "none"
        wanted = pinned[name]
        if there != wanted:
            lines.append(f"{name}: {wanted} wanted, {there} there")
    return lines


if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        print("\n".join(needed()))
    elif lacking := missing():
        sys.exit(f"{sys.executable} lacks\n  " + "\n  ".join(lacking))
