"""Accounts that agree are said to; each disagreement is found, and nothing beside it; what is named mends it."""

import os
import shutil
import time
from pathlib import Path

import mlflow.runs
import pytest
from mlflow.entities import Metric
from sqlalchemy import create_engine, text

from hdml_core import checkpoint
from hdml_core.training import fit, new_run
from studies.machinery import audit, tracking
from studies.machinery.cli import commands
from studies.machinery.driver import Places
from studies.machinery.experiment import TrackerError
from studies.machinery.lease import Lease
from studies.machinery.ledger import CHECKPOINTS, EPOCHS, METRICS, MLFLOW_RUN, PRICE, REASON, SPENT, Ledger
from studies.machinery.records import GPU_SECONDS, PART, SECONDS, Record
from studies.machinery.review import list_studies, show, sync, verify
from studies.machinery.space import Choice, Integer, LogUniform, to_json
from studies.machinery.spool import REFUSED
from studies.machinery.storage import LedgerError, open_storage
from tests.machinery.toy_study import run_toy
from tests.services import free_port
from tests.test_training import labelled, small_config

GOAL = "validation/recall_at_1"
SEALED = "test/recall_at_1"
SPACE = {"hdml.alpha": LogUniform(0.1, 300.0)}
LENGTH = 3


@pytest.fixture(scope="session")
def schema(tmp_path_factory):
    """An MLflow database without a run; making its schema takes seconds."""
    path = tmp_path_factory.mktemp("schema") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The checkpoints of a training."""
    folder = tmp_path_factory.mktemp("trained")
    train = labelled()
    run = new_run(small_config(), train)
    fit(run, train, labelled(1, 5), lambda report: checkpoint.save(run, folder))
    return folder


@pytest.fixture
def places(tmp_path, schema):
    return places_in(tmp_path, schema)


def places_in(folder, schema):
    shutil.copy(schema, folder / "mlflow.db")
    return Places(folder, folder, f"sqlite:///{folder}/ledger.db", f"sqlite:///{folder}/mlflow.db")


@pytest.fixture
def client(places):
    return mlflow.MlflowClient(places.tracking_uri)


def record(epoch, value, *, parts=1, goal=GOAL):
    """An epoch of a trial, which has `parts` of LENGTH epochs each."""
    own = {goal: value}
    ends_part = epoch % LENGTH == 0
    told = own if parts == 1 else {goal.replace("validation", PART): value} | (own if ends_part else {})
    return Record(
        epoch=epoch,
        step=10 * epoch,
        seconds=2.0 * epoch,
        metrics={SECONDS: 2.0 * epoch, GPU_SECONDS: 1.0 * epoch} | told,
        part=(epoch - 1) // LENGTH,
        part_qualities=own,
        ends_part=ends_part,
        trace={},
        tags={},
        last=epoch == parts * LENGTH,
    )


class Driver:
    """What a driver does to the three accounts, nothing trained."""

    def __init__(self, places, lease, storage):
        self.places, self.lease, self.storage = places, lease, storage
        self.search = self.ledger("")
        self.recorder = places.recorder("study", self.search.identity())

    def ledger(self, end, space=SPACE, **options):
        return Ledger(self.storage, f"study{end}", space, self.lease, **options)

    def begin(self, kind="search", ledger=None):
        """Take a trial in hand; return its number."""
        ledger = ledger or self.search
        row = ledger.next(100)
        self.recorder.begin(kind, row, {"hdml.alpha": 1.0})
        ledger.note_of(row.number, CHECKPOINTS, str(self.folder(row.number)))
        return row.number

    def report(self, number, record, kind="search", ledger=None, step=None):
        ledger = ledger or self.search
        step = record.epoch if step is None else step
        self.recorder.log(kind, number, record)
        spent = {SECONDS: record.seconds, GPU_SECONDS: record.metrics[GPU_SECONDS], EPOCHS: record.epoch}
        ledger.note_of(number, SPENT, spent)
        (value,) = record.part_qualities.values()
        ledger.report(number, step, value)

    def end(self, number, state, values=(), kind="search", ledger=None, **notes):
        self.recorder.end(kind, number, state, notes.get(REASON, ""))
        (ledger or self.search).end(number, state, values, **notes)

    def trial(self, value=0.5, kind="search", ledger=None, goal=GOAL):
        """A trial from begin to end."""
        number = self.begin(kind, ledger)
        for epoch in range(1, LENGTH + 1):
            last = record(epoch, value * (epoch / LENGTH), goal=goal)
            self.report(number, last, kind, ledger)
        self.end(number, "COMPLETE", [value], kind, ledger, **{METRICS: dict(last.metrics)})

    def folder(self, number):
        return self.places.out / "study" / "trials" / f"{number:04d}"


def drive(places, act):
    """Have a driver do something, to its end."""
    storage = open_storage(places.ledger_url)
    with Lease(storage.engine, "study") as lease:
        driver = Driver(places, lease, storage)
        driver.recorder.open("Why?", {"commit": "abc"})
        with driver.recorder:
            act(driver)


def terms(**changes):
    return {
        "settings": {"data.name": "glyphs"},
        "baseline": {},
        "goals": {GOAL: "maximize"},
        "folds": 1,
        "seeds": 1,
        "data": "0123456789abcdef",
        "question": "Why?\n\nBecause.",
        "base": {},
        "space": to_json(SPACE),
        **changes,
    }


def everything(driver):
    """A baseline, trials that ended in all ways, the best of them trained, and an opening of the test classes."""
    driver.search.settle(terms(), SPACE)
    driver.search.note(PRICE, 1800.0)
    driver.trial(0.4, "baseline", driver.ledger(".baseline", {}))
    driver.trial(0.5)
    pruned = driver.begin()
    driver.report(pruned, record(1, 0.1))
    driver.end(pruned, "PRUNED")
    failed = driver.begin()
    driver.report(failed, record(1, 0.1))
    driver.end(failed, "FAIL", **{REASON: "NonFiniteLossError: j_m is nan"})
    driver.trial(0.6)
    opening = audit.Opening(1, "confirm", "f", "c", "abc", "2026-01-01T00:00:00", "me@here", "0003", "baseline", 2)
    with audit.opened(driver.search, driver.recorder, opening):
        sealed = driver.ledger(".confirm-1", {"arm": Choice(("best", "baseline")), "seed": Integer(0, 9)})
        for value in (0.3, 0.2):
            driver.trial(value, "confirm-1", sealed, SEALED)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, schema, trained):
    """The folder of a study that has all kinds of trials."""
    places = places_in(tmp_path_factory.mktemp("undisturbed"), schema)
    drive(places, everything)
    shutil.copytree(trained, places.out / "study" / "trials" / "0003" / "part-00")
    return places.out


@pytest.fixture
def study(places, undisturbed):
    """A copy of it, to be disturbed."""
    shutil.copytree(undisturbed, places.out, dirs_exist_ok=True)
    moved = "UPDATE trial_user_attributes SET value_json = replace(value_json, :old, :new)"
    spoil(places.ledger_url, moved, old=str(undisturbed), new=str(places.out))
    return "study"


@pytest.fixture
def run_of(places, client):
    """The run of a trial, by kind and number."""

    def found(number, kind="search"):
        experiment = client.get_experiment_by_name("study").experiment_id
        asked = f"tags.kind = '{kind}' and tags.trial = '{number:04d}'"
        (run,) = client.search_runs([experiment], asked)
        return run

    return found


def only(places, *parts):
    """One disagreement is found, with all these parts."""
    (line,) = verify("study", places)
    assert "\n" not in line
    for part in parts:
        assert part in line
    return line


@pytest.fixture
def mend(places, monkeypatch):
    """Do what a line says after its last colon."""
    monkeypatch.setenv("HDML_OUT", str(places.out))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", places.tracking_uri)

    def done(line):
        for command in line.rpartition(": ")[2].split(" && "):
            match command.split():
                case ["python", "-m", "studies", *arguments]:
                    assert commands(arguments) == 0
                case ["mlflow", "runs", *arguments]:
                    mlflow.runs.commands(arguments, standalone_mode=False)
                case ["rm", path, *_]:
                    Path(path).unlink()
                case _:
                    raise AssertionError(f"no command: {command}")
        assert verify("study", places) == []

    return done


@pytest.fixture
def noted(places, study):
    """The run of a trial of a driver that lived to note in the ledger which it is."""
    found = []

    def act(driver):
        number = driver.begin()
        driver.report(number, record(1, 0.1))
        while (run_id := driver.recorder.run_id("search", number)) is None:
            time.sleep(0.05)
        driver.search.note_of(number, MLFLOW_RUN, run_id)
        driver.end(number, "PRUNED")
        found.append(run_id)

    drive(places, act)
    return found[0]


def twin_of(run, client, **changes):
    """Make another run of the same trial, on which nothing was told; return its id."""
    twin = client.create_run(run.info.experiment_id, tags={**run.data.tags, **changes}).info.run_id
    client.set_terminated(twin, run.info.status)
    return twin


def spoil(database, statement, **values):
    """Do to a database what its owner does not do."""
    engine = create_engine(database)
    with engine.begin() as connection:
        assert connection.execute(text(statement), values).rowcount > 0
    engine.dispose()


def damage(epoch):
    """Flip a bit of a checkpoint."""
    path = epoch / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DELETE = "DELETE FROM metrics WHERE run_uuid = :run_id"
SYNC = "python -m studies sync study"


def test_accounts_that_agree(places, study):
    assert verify(study, places) == []
    assert sync(study, places) == "nothing left to send"


def test_what_is_on_its_way_is_no_disagreement(places, study):
    found = []

    def look(driver):
        driver.begin()
        driver.trial(0.2)
        found.append(verify(study, places))
        driver.end(4, "FAIL")

    drive(places, look)
    assert found == [[]]


def test_a_row_left_running(places, study):
    def interrupt(driver):
        driver.begin()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive(places, interrupt)
    line = only(places, "trial 0004 of study is RUNNING, and nobody is at work on it")
    assert line.endswith("give the command again that began it")


def test_a_run_that_was_deleted(places, study, client, noted, mend):
    client.delete_run(noted)
    line = only(places, "trial 0004 of study is PRUNED and has no run in MLflow", f"restore --run-id {noted}")
    mend(line)


def test_a_run_that_nobody_knows_of(places, study, client, run_of):
    client.delete_run(run_of(0, "baseline").info.run_id)
    only(places, "trial 0000 of study.baseline is COMPLETE and has no run in MLflow", "put its spool back into", SYNC)


def test_two_runs_of_a_trial(places, study, client, run_of, mend):
    run = run_of(1)
    twin = twin_of(run, client)
    mend(only(places, "trial 0001 of study has 2 runs in MLflow", run.info.run_id, twin))
    assert client.get_run(run.info.run_id).info.lifecycle_stage == "active"


def test_another_run_than_was_noted(places, study, client, noted, mend):
    client.delete_run(noted)
    twin = twin_of(client.get_run(noted), client)
    mend(only(places, f"trial 0004 of study has run {twin} in MLflow, and {noted} was noted"))


@pytest.mark.parametrize("status", ["FAILED", "RUNNING"])
def test_a_run_of_another_status(places, study, client, run_of, mend, status):
    run_id = run_of(0, "confirm-1").info.run_id
    client.update_run(run_id, status)
    mend(only(places, f"trial 0000 of study.confirm-1 is COMPLETE, its run {run_id} {status} with state COMPLETE"))


def test_a_run_of_another_state(places, study, client, run_of, mend):
    run = run_of(2)
    client.set_tag(run.info.run_id, "state", "RUNNING")
    client.delete_tag(run.info.run_id, "reason")
    mend(only(places, f"trial 0002 of study is FAIL, its run {run.info.run_id} FAILED with state RUNNING"))
    assert run_of(2).data.tags["reason"] == "NonFiniteLossError: j_m is nan"


def test_a_run_of_no_trial(places, study, client, run_of, mend):
    run_id = twin_of(run_of(0), client, trial="0099")
    mend(only(places, f"run {run_id} is of search 0099, which no ledger has"))


def test_a_study_left_running(places, study, client, mend):
    experiment = client.get_experiment_by_name("study").experiment_id
    (parent,) = client.search_runs([experiment], "tags.kind = 'study'")
    client.update_run(parent.info.run_id, "RUNNING")
    mend(only(places, f"run {parent.info.run_id} of study is RUNNING, and nobody is at work on it"))
    assert client.get_run(parent.info.run_id).info.status == "KILLED"


@pytest.mark.parametrize("metric", [SECONDS, GOAL])
def test_a_step_that_a_run_has_twice(places, study, client, run_of, metric):
    run = run_of(1)
    point = client.get_metric_history(run.info.run_id, metric)[0]
    client.log_batch(run.info.run_id, [Metric(metric, point.value, point.timestamp + 1, point.step)])
    only(places, f"trial 0001 of study: run {run.info.run_id} has {metric} more than once at step 10;")


@pytest.mark.parametrize("metric", [SECONDS, GOAL])
@pytest.mark.parametrize("step", [20, 30])
def test_a_step_that_a_run_lacks(places, study, run_of, metric, step):
    run_id = run_of(3).info.run_id
    spoil(places.tracking_uri, f"{DELETE} AND key = :metric AND step = :step", run_id=run_id, metric=metric, step=step)
    only(places, f"trial 0003 of study: run {run_id} lacks {metric} at step {step};")


def test_an_epoch_that_a_run_lacks(places, study, run_of):
    run_id = run_of(3).info.run_id
    spoil(places.tracking_uri, f"{DELETE} AND step = 20", run_id=run_id)
    only(places, f"trial 0003 of study: run {run_id} has 2 epochs, and the ledger heard of 3;")


@pytest.mark.parametrize(("kind", "metric"), [("search", GOAL), ("baseline", GOAL), ("confirm-1", SEALED)])
def test_a_run_that_ends_at_another_value(places, study, run_of, kind, metric):
    run_id = run_of(0, kind).info.run_id
    ends = "UPDATE latest_metrics SET value = 0.9 WHERE run_uuid = :run_id AND key = :metric"
    spoil(places.tracking_uri, ends, run_id=run_id, metric=metric)
    only(places, f"run {run_id} ends at {metric} 0.9, and the ledger has 0.")


def test_what_was_never_sent(places, study, monkeypatch, mend, capsys):
    def gone(*_):
        raise TrackerError("MLflow is gone")

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "forward", gone)
        patch.setattr(tracking, "LOOK_EVERY", 0.01)
        drive(places, lambda driver: driver.trial(0.1))
    mend(only(places, "7 events in", "were not sent to MLflow"))
    assert "7 events sent to MLflow" in capsys.readouterr().out


def test_what_mlflow_refused(places, study, mend):
    (places.out / "study" / "spool" / REFUSED).write_text('{"do": "log", "refused": "why"}\n')
    mend(only(places, "1 events were refused by MLflow", REFUSED))


@pytest.mark.parametrize("harm", [shutil.rmtree, lambda part: damage(min(part.iterdir()))])
def test_a_best_trial_without_its_checkpoint(places, study, harm):
    part = places.out / "study" / "trials" / "0003" / "part-00"
    damage(max(part.iterdir()))
    assert verify(study, places) == []  # the one before it serves
    harm(part)
    only(places, f"{part} has no checkpoint that can be read", "best trial, 0003", "--warm-start study --name OTHER")


@pytest.mark.parametrize("by_part", [False, True])
def test_trials_of_several_parts(places, trained, run_of, by_part):
    """Of two folds the ledger hears after every epoch, or as they end; MLflow has the mean once both have ended."""

    def act(driver):
        driver.search.settle(terms(folds=2), SPACE)
        number = driver.begin()
        for epoch in range(1, 2 * LENGTH + 1):
            told = record(epoch, 0.1 * epoch, parts=2)
            driver.report(number, told, step=told.part if by_part else epoch)
        driver.end(number, "COMPLETE", [told.metrics[GOAL]], **{METRICS: dict(told.metrics)})
        for part in range(2):
            shutil.copytree(trained, driver.folder(number) / f"part-{part:02d}")

    drive(places, act)
    assert verify("study", places) == []
    part = GOAL.replace("validation", PART)
    run_id = run_of(0).info.run_id
    spoil(places.tracking_uri, f"{DELETE} AND step = 30 AND key = :metric", run_id=run_id, metric=part)
    only(places, f"lacks {part} at step 30")
    spoil(places.tracking_uri, f"{DELETE} AND step = 30", run_id=run_id)
    only(places, f"run {run_id} has 5 epochs, and the ledger heard of 6")


def test_a_study_of_which_nothing_is_recorded_yet(places):
    Ledger(open_storage(places.ledger_url), "study", SPACE)
    assert verify("study", places) == []
    assert sync("study", places) == "nothing left to send"
    assert "nobody is at work on it" in show("study", places)


@pytest.mark.parametrize("review", [show, sync, verify])
def test_a_study_that_there_is_not(places, study, review):
    with pytest.raises(LedgerError, match=r"no study 'sudy' in the ledger: it has \[study\]; did you mean 'study'\?"):
        review("sudy", places)


@pytest.mark.parametrize("command", ["sync", "verify"])
def test_a_tracker_that_does_not_answer_is_told(places, study, monkeypatch, capsys, command):
    nobody = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody)
    assert commands([command, study, "--out", str(places.out)]) == 2
    assert f"error: MLflow at {nobody} can't be used" in capsys.readouterr().err


def test_the_status_of_verify(places, study, client, run_of, capsys):
    assert commands(["verify", study, "--out", str(places.out)]) == 0
    assert capsys.readouterr().out == "ledger, MLflow and checkpoints agree\n"
    client.delete_run(run_of(1).info.run_id)
    assert commands(["verify", study, "--out", str(places.out)]) == 3
    assert "trial 0001 of study" in capsys.readouterr().out


def test_the_list_of_studies(places, study):
    storage = open_storage(places.ledger_url)
    with Lease(storage.engine, "other") as lease:
        Ledger(storage, "other", SPACE, lease).next(1)
        header, other, own = list_studies(places).splitlines()
        assert f"at work: process {os.getpid()} on " in other
    assert header.split() == ["study", "trials", "best", "openings", "now"]
    assert " ".join(own.split()) == "study 2 COMPLETE, 1 PRUNED, 1 FAIL recall_at_1 0.6000 (trial 0003) 1"
    assert list_studies(places).splitlines()[1].endswith("left RUNNING: the same command goes on")


def test_no_list_before_the_first_study(places):
    assert list_studies(places) == "no study has been run yet"


def test_a_study_shown(places, study):
    said = show(study, places)
    facts = dict(line.split(maxsplit=1) for line in said.partition("\n\n")[2].partition("\n\n")[0].splitlines())
    assert facts.pop("look").endswith("(experiment study)")
    assert facts.pop("opened").startswith(
        "confirm-1 by me@here, 0003 against baseline, 2 seeds: begun 2026-01-01T00:00:00, over"
    )
    assert facts.pop("spent").startswith("in all ")
    assert facts == {
        "question": "Why?",
        "data": "glyphs, digest 0123456789ab",
        "goals": f"maximize {GOAL}",
        "parts": "1 folds, 1 seeds",
        "space": "hdml.alpha LogUniform 0.1, 300",
        "trials": "2 COMPLETE, 1 PRUNED, 1 FAIL",
        "baseline": "recall_at_1 0.4000 (trial 0000)",
        "best": "recall_at_1 0.6000 (trial 0003)",
        "now": "nobody is at work on it",
    }
    header, *rows = said.rpartition("\n\n")[2].splitlines()
    assert header.split() == ["trial", "alpha", "state", "value", "attempts", "seconds", "GPU-s", "cost"]
    assert rows[0].split() == ["baseline", "COMPLETE", "0.4000", "1", "6.0", "3.0", "3.00"]
    assert [row.split()[0] for row in rows] == ["baseline", "0000", "0001", "0002", "0003"]
    assert "PRUNED at 1" in rows[2]
    assert rows[3].endswith("NonFiniteLossError: j_m is nan")


@pytest.mark.cluster
def test_an_undisturbed_study_agrees(tmp_path, schema):
    shutil.copy(schema, tmp_path / "mlflow.db")
    run_toy(tmp_path, 4, pruner="median", raises=2)
    places = Places.under(tmp_path)
    assert verify("toy", places) == []
    assert "4 COMPLETE" in list_studies(places)
