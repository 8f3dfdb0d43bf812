"""Layouts of clusters from one site file: `python -m cluster write`, `check FILE ...` and `doctor`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import layouts, site
from hdml_core.errors import ConfigError

DONE, MISTAKE, WRONG = 0, 2, 3
"""Exit status: done; a mistake in the call or the site file; something is wrong with a layout or a cluster."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["doctor"]:
        from cluster.doctor import main as doctor

        return doctor(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    does = "render every layout from the site file"
    write = commands.add_parser("write", help=does, description=does, allow_abbrev=False)
    write.add_argument("--site", metavar="FILE", type=Path, default=site.FILE, help="else cluster/site.toml")
    write.add_argument("--to", metavar="DIR", type=Path, default=site.FILE.parent, help="else beside the site file")
    does = "tell what is unset, misspelt, open to the world or left out; nothing is started, no one is asked"
    check = commands.add_parser("check", help=does, description=does, allow_abbrev=False)
    check.add_argument("files", metavar="FILE", type=Path, nargs="+", help="a layout, such as cluster/gpu.yaml")
    commands.add_parser("doctor", help="look at a cluster before it is paid for, and once it runs")
    given = parser.parse_args(arguments)
    try:
        return _write(given.site, given.to) if given.command == "write" else _check(given.files)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE


def _write(file: Path, folder: Path) -> int:
    loaded = site.load(file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, render in layouts.LAYOUTS.items():
            (folder / name).write_text(render(loaded))
    except OSError as error:
        raise ConfigError(f"layouts can't be written to {folder}: {error.strerror}; name a folder with --to") from error
    print(f"wrote {', '.join(layouts.LAYOUTS)} to {folder}")
    return DONE


def _check(files: Sequence[Path]) -> int:
    from cluster.check import check  # here: it loads Ray, which takes a while

    complaints = {file: check(file) for file in files}
    for file, found in complaints.items():
        print(f"{file}: {'nothing to complain of' if not found else ''}".rstrip())
        print("".join(f"  {complaint}\n" for complaint in found), end="")
    return WRONG if any(complaints.values()) else DONE


if __name__ == "__main__":
    raise SystemExit(main())
