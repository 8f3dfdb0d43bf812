"""A study over three machines without a common disk, of which one goes and one is cut off in the middle."""

import json
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from studies.machinery.ledger import CRASHES, LOST_AT, MLFLOW_RUN
from tests.cluster.machines import machines
from tests.faults.invariants import settled
from tests.machinery.toys import EPOCHS

pytestmark = pytest.mark.cluster

TRIALS = 8
# So that a lost link is noticed after 3 x (1 + 2) seconds at most; by itself Ray takes 5 x (3 + 10).
HEALTH = {"failure_threshold": 3, "period_ms": 1000, "timeout_ms": 2000, "initial_delay_ms": 1000}
NOTICED = 9
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
    "RAY_ADDRESS": "10.77.0.1:6379",
    **{f"RAY_health_check_{name}": str(value) for name, value in HEALTH.items()},
}
HEAD = ["--port=6379", "--include-dashboard=false"]
NODE = ["--num-cpus=2", "--num-gpus=2", "--object-store-memory=100000000", "--disable-usage-stats"]


@pytest.fixture
def three():
    """Three machines, a Ray node with two GPUs in name on each, joined under a token."""
    ray = str(Path(sys.executable).with_name("ray"))
    with machines(3) as (head, *others):
        head.run(ray, "start", "--head", f"--node-ip-address={head.address}", *HEAD, *NODE, environment=ENVIRONMENT)
        for each in others:
            address = [f"--address={ENVIRONMENT['RAY_ADDRESS']}", f"--node-ip-address={each.address}"]
            each.run(ray, "start", *address, *NODE, environment=ENVIRONMENT)
        yield head, *others


def test_a_machine_goes_and_another_is_cut_off(three, tmp_path):
    head, killed, lost = three
    out = head.path("/tmp/out")
    settings = ["gpus_per_trial=1", "parallel=8", "pause=5.0", 'sampler="random"']
    toy = [sys.executable, "-m", "tests.machinery.toy_study", "/tmp/out", str(TRIALS), *settings]
    driver = head.start(*toy, environment=ENVIRONMENT, log="driver")

    def said():
        return head.path("/tmp/driver").read_text()

    def until(holds, seconds=120):
        deadline = time.monotonic() + seconds
        while not holds():
            assert driver.poll() is None, said()
            assert time.monotonic() < deadline, said()
            time.sleep(0.1)

    def epochs(trial):
        path = out / f"toy/{trial:04d}/kept/epochs.json"
        return json.loads(path.read_text()) if path.exists() else []

    # Six trials at once, two on each machine, and each has been through two epochs.
    until(lambda: all(len(epochs(trial)) >= 2 for trial in range(6)))
    nodes = [json.loads((out / f"toy/{trial:04d}/attempt.json").read_text())["nodes"][0] for trial in range(6)]
    assert sorted(Counter(nodes).values()) == [2, 2, 2]
    killed.kill()
    until(lambda: said().count("lost its machine") == 2)
    cut = time.monotonic()
    lost.cut()
    until(lambda: said().count("lost its machine") == 4)
    noticed = time.monotonic() - cut
    print(f"a cut link was noticed after {noticed:.1f} s")
    assert noticed < NOTICED + 6
    assert driver.wait(180) == 0, said()
    copy = shutil.copytree(out, tmp_path / "out")
    addresses = {"HDML_LEDGER": f"sqlite:///{copy}/ledger.db", "MLFLOW_TRACKING_URI": f"sqlite:///{copy}/mlflow.db"}
    rows = settled(SimpleNamespace(out=copy, trials=TRIALS, environment=addresses))
    victims = [row for row in rows if LOST_AT in row.notes]
    assert len(victims) == 4
    # To lose a machine is no failure, and costs no more than the epoch that was at work.
    assert not any(CRASHES in row.notes for row in rows)
    for row in victims:
        (told,) = row.notes[LOST_AT]
        by_first = [epoch for epoch, attempt in epochs(row.number) if attempt == 1]
        assert 0 < told <= len(by_first) < EPOCHS
        assert [epoch for epoch, _ in epochs(row.number)] == list(range(1, EPOCHS + 1))
    # What is known of the end of an attempt is kept with the trial's run.
    for row in victims:
        (kept,) = copy.glob(f"mlruns/**/{row.notes[MLFLOW_RUN]}/artifacts/logs/attempt-1.txt")
        assert re.search("The actor.*(went with its machine|can't be read)", kept.read_text(), re.DOTALL)
