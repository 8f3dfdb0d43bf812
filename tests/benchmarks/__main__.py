"""Run benchmarks, print their table, and write one JSON for each: `python -m tests.benchmarks [NAME ...] [--quick]`."""

import argparse
import importlib
import json
import os
import pkgutil
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests import benchmarks
from tests.benchmarks import Count, Row

FOLDER = Path(__file__).parent


def circumstances() -> dict[str, Any]:
    """What the numbers were measured on, and of which commit."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": described.stdout.strip() or "unknown",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{library: version(library) for library in ("torch", "ray", "optuna", "mlflow")},
    }


def main(arguments: list[str] | None = None) -> None:
    known = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name != "__main__")
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
        record = {"circumstances": circumstances(), "rows": [row.record() for row in rows]}
        (given.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
