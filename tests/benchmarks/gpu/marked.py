"""The tests that are marked `gpu`, in a process of their own."""

import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.benchmarks.gpu import Given, Say

NOT_PASSED = ("failure", "error", "skipped")
ROOT = Path(__file__).parents[3]


def run(given: Given, until: float, record: dict[str, Any], say: Say) -> None:
    """Count how they ended, and keep the last words of those that failed."""
    with tempfile.TemporaryDirectory(prefix="marked-") as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={results}"]
        try:
            ended = subprocess.run(
                [*command, "tests/test_gpu.py"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=max(1.0, until - time.monotonic()),
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"the tests did not end in {error.timeout:.0f} s: {error.stdout}") from error
        if not results.exists():
            raise RuntimeError(f"pytest ended with status {ended.returncode}: {ended.stdout}")
        cases = list(ElementTree.parse(results).iter("testcase"))
    # pytest writes an element below a test that did not pass.
    outcomes = Counter(next((part.tag for part in case if part.tag in NOT_PASSED), "passed") for case in cases)
    record |= {
        "outcomes": {outcome: outcomes[outcome] for outcome in ("passed", *NOT_PASSED)},
        "exit_status": ended.returncode,
    }
    say(", ".join(f"{count} {outcome}" for outcome, count in record["outcomes"].items()))
    if ended.returncode:
        record["output"] = ended.stdout[-20_000:]
        say(ended.stdout)
