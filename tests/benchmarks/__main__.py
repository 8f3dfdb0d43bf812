"""Run benchmarks, print their table, and write one JSON for each: `python -m tests.benchmarks [NAME ...] [--quick]`."""

import argparse
import importlib
import json
import pkgutil
from pathlib import Path

from tests import benchmarks
from tests.benchmarks import Count, Row, circumstances

FOLDER = Path(__file__).parent


def main(arguments: list[str] | None = None) -> None:
    modules = pkgutil.iter_modules(benchmarks.__path__)
    known = sorted(module.name for module in modules if not module.ispkg and not module.name.startswith("_"))
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; else all")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that they run")
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="folder of the JSON files")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(known))
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}: there are {', '.join(known)}")
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names or known:
        rows: list[Row | Count] = importlib.import_module(f"tests.benchmarks.{name}").run(given.quick)
        for row in rows:
            print(f"{name:10} {row}", flush=True)
        record = {
            "circumstances": circumstances("torch", "ray", "optuna", "mlflow"),
            "rows": [row.record() for row in rows],
        }
        (given.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
