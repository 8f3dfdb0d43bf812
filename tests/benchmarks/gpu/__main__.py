"""Run the suite on one CUDA GPU: test, time, fine-tune; print what comes out, and write it all into one JSON."""

import argparse
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from hdml_core.config import parse_setting
from hdml_core.datasets import data_root
from hdml_core.errors import ConfigError
from tests.benchmarks import circumstances
from tests.benchmarks.gpu import Given, Part, finetuning, marked, parts, roofline, timings

FOLDER = Path(__file__).parents[1]
LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "safetensors")

# Name -> the part, and the share of the time at which it has to stop beginning anything.
PARTS: dict[str, tuple[Part, float]] = {
    "tests": (marked.run, 0.25),
    "roofline": (roofline.run, 0.25),
    "parts": (parts.run, 0.28),
    "retrieval": (timings.retrieval, 0.33),
    "steps": (timings.steps, 0.55),
    "finetuning": (finetuning.run, 1.0),
}


def main(arguments: list[str] | None = None) -> int:
    """Return 0 where every part came to its end and no test failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--data", type=Path, default=data_root(), help="data root with CUB_200_2011.tgz")
    parser.add_argument("--weights", type=Path, default=Path("weights.safetensors"), help="of MobileNetV2, folded")
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="folder of gpu.json")
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes on made-up data, to see that it runs; also on a CPU"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="in which to end, one step of a part more or less")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="of fine-tuning"
    )
    parser.add_argument("--commit", help="of what is run, where there is no git to ask")
    given = parser.parse_args(arguments)
    if not given.quick and not torch.cuda.is_available():
        parser.error("a CUDA device is needed: --quick shows without one that everything runs")
    try:
        settings = dict(map(parse_setting, given.settings))
    except ConfigError as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = Given(device, given.quick, given.data, given.weights, settings)
    given.out.mkdir(parents=True, exist_ok=True)

    begin = time.monotonic()
    around = circumstances(*LIBRARIES) | hardware() | ({"commit": given.commit} if given.commit else {})
    record: dict[str, Any] = {"circumstances": around, "command": arguments or sys.argv[1:], "quick": given.quick}
    for name, (part, share) in PARTS.items():
        began, found = time.monotonic(), record.setdefault(name, {})

        def say(words: object, name: str = name) -> None:
            print(f"{name:10} {words}", flush=True)

        try:
            part(asked, begin + 60 * given.minutes * share, found, say)
        except Exception:  # noqa: BLE001 - what the other parts found must not be lost
            found["error"] = traceback.format_exc()
            say(found["error"])
        found["seconds"] = time.monotonic() - began
        record["seconds"] = time.monotonic() - begin
        (given.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    well = record["tests"].get("exit_status") == 0 and not any("error" in record[name] for name in PARTS)
    print(f"{record['seconds']:.0f} s; written to {given.out / 'gpu.json'}")
    return 0 if well else 1


def hardware() -> dict[str, Any]:
    """The GPU and the processor beside it, and with which versions the one is driven."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    found: dict[str, Any] = {"processor": names[0]} if names else {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu_memory_gb": properties.total_memory / 1e9,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
