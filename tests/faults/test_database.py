"""A real PostgreSQL that goes away for a while at every seam, as ledger and as what the tracker stands on."""

import time

import pytest

from tests.faults import chosen
from tests.faults.drivers import LEDGER_SEAMS, SEAMS, Fault
from tests.faults.invariants import settled

pytestmark = pytest.mark.cluster
OUTAGE = chosen(20.0, 2.0)


@pytest.mark.parametrize("seam", chosen(range(len(LEDGER_SEAMS)), [1, 4]), ids=lambda seam: str(SEAMS[seam]))
def test_gone_at_a_seam(drivers, undisturbed, postgresql, tmp_path, seam):
    study = drivers(environment={"HDML_LEDGER": postgresql.url(f"ledger_{seam}")})
    process = study.start(Fault(seam, nth=3, act="pause"))
    while not (study.out / "at-seam").exists():
        assert process.is_alive(), study.said()
        time.sleep(0.02)
    postgresql.stop()
    (study.out / "go").touch()
    time.sleep(OUTAGE)
    postgresql.start()
    process.join(120)
    assert process.exitcode == 0, f"{SEAMS[seam]}: {study.said()}"
    settled(study, undisturbed)
