"""How many trials one driver bears, and what each costs driver, database and tracker: what a fleet's size hangs on.

As many actors as the machine holds run toys that take no time, so that the driver is never idle. That is the load of
any fleet that ends as many trials a second: of 200 actors, for example, with trials of 200 / (trials a second) seconds.
"""

import json
import tempfile
from pathlib import Path

from tests.benchmarks import Count, Row
from tests.benchmarks._toys import run_driver
from tests.machinery.toys import EPOCHS


def run(quick: bool) -> list[Row | Count]:
    """Set the toy study, ledger and tracker on servers, beside the same trials under Ray Tune alone."""
    trials = 48 if quick else 400
    ours, plain, kept = (measure(whose, trials) for whose in ("ours", "plain", "keeper"))
    peer = "of Ray Tune alone"

    def each(name: str, costs: dict[str, float] = ours) -> float:
        return 1000 * costs[name] / costs["trials"]

    rates = [costs["trials"] / costs["seconds"] for costs in (ours, plain)]
    speeds = [kept["megabytes"] / kept[how] for how in ("handed over", "written")]
    shares = [100 * costs["driver"] / costs["seconds"] for costs in (ours, plain)]
    return [
        Row(f"trials a second, {trials} of {EPOCHS} reports", rates[0], peer, rates[1], 1, "/s"),
        Row("driver's processor time for a trial", each("driver"), peer, each("driver", plain), 1, "ms"),
        Row("driver's share of a core", shares[0], peer, shares[1], 1, "%"),
        Row("PostgreSQL's processor time for a trial", each("database"), "of our driver", each("driver"), 1, "ms"),
        Row("MLflow server's processor time for a trial", each("tracker"), "of our driver", each("driver"), 1, "ms"),
        Row("checkpoints of 100 MB through the keeper", speeds[0], "of the disk, one by one", speeds[1], 1, "MB/s"),
    ]


def measure(whose: str, trials: int) -> dict[str, float]:
    """Seconds, and processor seconds by process, of so many trials."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        out = Path(folder)
        run_driver(out, "tests.benchmarks._fleet", out, whose, trials)
        return json.loads((out / "costs.json").read_text())
