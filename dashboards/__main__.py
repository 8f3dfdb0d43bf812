"""`python -m dashboards table DATASET` and `python -m dashboards figure STUDY`: what was found, to read."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dashboards import DashboardError

DONE, MISTAKE = 0, 2
"""Exit status: done; a mistake in the call, or nothing there to show."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dashboards", description="Tables and figures of what was found.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, does: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=does, description=does, allow_abbrev=False)
        added.add_argument(
            "--out", metavar="DIR", type=Path, help="where to write, instead of the folder of the studies"
        )
        added.add_argument(
            "--runs", metavar="DIR", type=Path, help="folder of the studies, instead of HDML_OUT or `runs`"
        )
        return added

    table = command("table", "the paper's table of a data set, published numbers beside ours")
    table.add_argument("dataset", metavar="DATASET", help="cub200, cars196, sop, or any other that studies were run on")
    table.add_argument(
        "--study",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="studies to show, instead of table_DATASET",
    )
    figure = command("figure", "what a study found: a curve over the setting that it searched, or its arms")
    figure.add_argument("study", metavar="STUDY", help="as MLflow has it")
    figure.add_argument("--over", choices=["epoch"], help="how the arms get on, epoch by epoch")
    given = parser.parse_args(arguments)

    runs: Path = given.runs or Path(os.environ.get("HDML_OUT", "runs"))
    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{runs.expanduser().absolute()}/mlflow.db")
    out: Path = given.out or runs
    try:
        if given.command == "table":
            written = show_table(uri, given.dataset, given.study, out)
        else:
            written = show_figure(uri, given.study, given.over, out)
    except DashboardError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    print(f"\nwritten: {', '.join(map(str, written))}")
    return DONE


def show_table(uri: str, dataset: str, studies: Sequence[str], out: Path) -> list[Path]:
    """Print a data set's table, and write it as Markdown, LaTeX and CSV; return where."""
    # MLflow takes seconds to import: a mistake in the call is told before.
    from dashboards import document, table
    from dashboards.comparison import compare
    from dashboards.runs import Tracker

    comparison = compare(Tracker(uri), dataset, studies)
    page = table.page(comparison)
    said = document.markdown(page)
    texts = {"md": said, "tex": document.latex(page), "csv": table.as_csv(comparison)}
    places = {ending: _folder(out) / f"table_{dataset}.{ending}" for ending in texts}
    for ending, place in places.items():
        place.write_text(texts[ending])
    print(said, end="")
    return [*places.values()]


def show_figure(uri: str, study: str, over: str | None, out: Path) -> list[Path]:
    """Draw what a study found, and print its numbers; return where it was drawn."""
    from dashboards import curves, document, drawing
    from dashboards.runs import Tracker

    found = curves.over_epochs(Tracker(uri), study) if over else curves.found(Tracker(uri), study)
    places = drawing.draw(found, _folder(out) / "_".join(filter(None, ("figure", study, over))))
    print(document.markdown_table(found.table()))
    return places


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DashboardError(f"--out must be a folder that can be written, got {out}: {error.strerror}") from error
    return out


if __name__ == "__main__":
    raise SystemExit(main())
