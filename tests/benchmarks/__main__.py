"""Run benchmarks, write one JSON for each, and print one table: `python -m tests.benchmarks [NAME ...] [--quick]`."""

import argparse
import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

from tests import benchmarks
from tests.benchmarks import _table, circumstances

FOLDER = Path(__file__).parent
LIBRARIES = ("torch", "torchvision", "ray", "optuna", "mlflow", "scikit-learn", "pytorch-metric-learning", "faiss-cpu")


def main(arguments: list[str] | None = None) -> None:
    modules = pkgutil.iter_modules(benchmarks.__path__)
    known = sorted(module.name for module in modules if not module.ispkg and not module.name.startswith("_"))
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; else all")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that they run")
    parser.add_argument("--runs", type=int, default=1, help="of each figure the one in the middle of so many is kept")
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="folder of the JSON files")
    parser.add_argument("--show", action="store_true", help="run nothing: the table of what is in that folder")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(known))
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}: there are {', '.join(known)}")
    if given.runs < 1:
        parser.error(f"--runs must be >= 1, got {given.runs}")
    if given.show:
        print(_table.table(_table.read(given.out)))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    records = []
    for name in given.names or known:
        runs: list[list[dict[str, Any]]] = []
        for _ in range(given.runs):
            rows = importlib.import_module(f"tests.benchmarks.{name}").run(given.quick)
            runs.append([row.record() for row in rows])
            for row in rows:
                print(f"{name:12} {row}", flush=True)
        records.append({"circumstances": circumstances(*LIBRARIES), "rows": _table.middle(runs)})
        for number, row in enumerate(records[-1]["rows"], start=1):
            if "points" in row:
                _table.draw(row, given.out / f"{name}-{number}")
        (given.out / f"{name}.json").write_text(json.dumps(records[-1], indent=1) + "\n")
    print(f"\n{_table.table(records)}")


if __name__ == "__main__":
    main()
