"""A trial in two processes comes to what it comes to in one, and leaves checkpoints that know of neither."""

import threading
import time

import numpy as np
import psutil
import pytest

from hdml_core.config import ConfigError
from studies.alpha_beta import STUDY
from studies.machinery.driver import Places, run_study
from studies.machinery.ledger import ATTEMPTS, CRASHES, METRICS
from studies.machinery.study import variant

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


def run(out, processes, epochs=2):
    """The first trial of a tiny study, in so many processes."""
    study = variant(
        STUDY,
        tiny=True,
        overrides={"optim.epochs": epochs, "optim.precision": "float64"},
        name="ranks",
        trials=1,
        processes_per_trial=processes,
        pruner="none",
    )
    ledgers = run_study(study, Places.under(out))
    return {kind: ledger.rows()[0] for kind, ledger in ledgers.items()}


def quality(row):
    """What was found, but for what it took."""
    return {name: value for name, value in row.notes[METRICS].items() if not name.startswith("cost/")}


def test_two_processes_find_what_one_finds(tmp_path):
    one, two = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    for kind in ("baseline", "search"):
        assert one[kind].state == two[kind].state == "COMPLETE"
        assert quality(two[kind]) == pytest.approx(quality(one[kind]), rel=1e-6)
        (folder,) = (tmp_path / "two/ranks").glob(f"{'trials' if kind == 'search' else kind}/0000/part-00")
        assert sorted(path.name for path in folder.iterdir()) == ["epoch-00001", "epoch-00002"]


def test_a_rank_that_dies_has_its_trial_tried_again(tmp_path):
    killed = threading.Event()

    def kill():
        while not list(tmp_path.glob("two/ranks/trials/0000/part-00/epoch-*")):
            time.sleep(0.01)
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith("ray::run_beside"):
                process.kill()
                killed.set()

    threading.Thread(target=kill, daemon=True).start()
    row = run(tmp_path / "two", 2, epochs=20)["search"]
    assert killed.is_set()
    assert (row.state, row.notes[ATTEMPTS], row.epochs) == ("COMPLETE", 2, 20)
    (crash,) = row.notes[CRASHES]
    assert crash.startswith("WorkerCrashedError")


def test_features_have_no_extractor_to_share_out(tmp_path):
    file = tmp_path / "own.npz"
    np.savez(file, features=np.random.rand(120, 8).astype("float32"), labels=np.repeat(np.arange(20), 6))
    settings = {"data.path": str(file), "data.batch_size": 8, "network.embedding_size": 4}
    study = variant(STUDY, dataset="features", overrides=settings, trials=1, processes_per_trial=2)
    with pytest.raises(ConfigError, match="a run on several GPUs must train an extractor"):
        run_study(study, Places.under(tmp_path / "runs"))
