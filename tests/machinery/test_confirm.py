"""Intervals, pairing, the seal on the test classes, and the row that every look at them leaves."""

import dataclasses
import json
from datetime import datetime
from types import SimpleNamespace

import pytest
from scipy import stats

from hdml_core.config import ConfigError
from studies.machinery import audit, confirm
from studies.machinery.audit import code_digest, floor_opened, new_opening, opened, openings
from studies.machinery.confirm import Arm, Asked, close_study, compare, confirm_study
from studies.machinery.driver import Places, terms
from studies.machinery.intervals import interval
from studies.machinery.lease import Lease, LeaseError
from studies.machinery.ledger import METRICS, REASON, TERMS, Ledger, Row
from studies.machinery.records import QUALITIES
from studies.machinery.resources import Resources
from studies.machinery.space import LogUniform
from studies.machinery.storage import LedgerError, open_storage
from studies.machinery.study import Study
from tests.conftest import ROOT

SPACE = {"hdml.alpha": LogUniform(0.1, 300.0)}
STUDY = Study("study", "Why?", SPACE, baseline={"synthesis": "none"})
DATA = SimpleNamespace(digest="0")


def row(number, arm, seed, value, state="COMPLETE", reason=""):
    metrics = {f"{split}/{quality}": value for quality in QUALITIES for split in ("test", "paper")}
    notes = {METRICS: metrics} if state == "COMPLETE" else {REASON: reason}
    return Row(number, {"arm": arm, "seed": seed}, state, (value,), {}, notes, datetime.now())


TWO = {"best": Arm(None, "best (0001)", "baseline"), "baseline": Arm(None, "baseline")}


def both_arms(best, baseline):
    rows = [row(i, "best", i, value) for i, value in enumerate(best)]
    return rows + [row(99 - i, "baseline", i, value) for i, value in enumerate(baseline)]


# Statistics -------------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_seed():
    best, baseline = [0.5, 0.6, 0.8], [0.4, 0.52, 0.69]
    found = compare(both_arms(best, baseline), TWO)["map_at_r"]
    assert found.intervals["best"].mean == pytest.approx(sum(best) / 3)
    assert found.intervals["best"].half_width > 0.1
    difference = found.intervals["difference"]
    assert difference.mean == pytest.approx(0.29 / 3)
    assert difference.half_width < 0.05
    p_value = found.p_values["difference"]
    assert p_value == pytest.approx(stats.ttest_1samp([0.1, 0.08, 0.11], 0.0).pvalue)
    # The test and the interval say the same.
    assert (p_value < 0.05) == (difference.mean > difference.half_width)


@pytest.mark.parametrize("ahead", [0.0, 0.1])
def test_differences_that_are_all_equal_leave_no_test(ahead):
    baseline = [0.4, 0.5, 0.7]
    found = compare(both_arms([value + ahead for value in baseline], baseline), TWO)
    assert [of.p_values for of in found.values()] == [{"difference": None}] * len(found)
    assert found["nmi"].intervals["difference"].half_width == pytest.approx(0.0, abs=1e-9)
    said = "\n".join(confirm._said(opening(), TWO, found, []))
    assert "nan" not in said
    assert confirm.NO_SPREAD in said


def test_a_difference_is_over_the_seeds_that_ended_in_both():
    failed = row(9, "baseline", 2, None, "FAIL", "NonFiniteLossError: j_m is nan")
    rows = [*both_arms([0.5, 0.6], [0.4, 0.55]), row(8, "best", 2, 0.9), failed]
    found = compare(rows, TWO)["nmi"]
    assert found.intervals["best"] == interval([0.5, 0.6, 0.9])
    assert found.intervals["difference"] == interval([0.5 - 0.4, 0.6 - 0.55])
    said = confirm._said(opening(seeds=3), TWO, compare(rows, TWO), rows)
    assert said[-1] == "left out: confirm 0009 arm=baseline seed=2: NonFiniteLossError: j_m is nan"
    assert any(line.startswith("difference, 2 seeds") for line in said[3].splitlines())
    with pytest.raises(LedgerError, match=r"two seeds or more .* got 1: confirm 0009 .*: NonFinite.*--again"):
        compare([rows[0], rows[2], rows[-2], failed], TWO)


# The seal ---------------------------------------------------------------------------------------------------------


class FakeRecorder:
    def __init__(self):
        self.notes = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def note(self, name, tags, metrics):
        self.notes.setdefault(name, (tags, metrics))


@pytest.fixture
def places(tmp_path):
    return Places(tmp_path, tmp_path, f"sqlite:///{tmp_path}/ledger.db", "")


def searched(places, study=STUDY):
    """The ledger of a study of two trials, of which 0001 is the better, and that nobody is at work on."""
    storage = open_storage(places.ledger_url)
    (places.out / study.name).mkdir()
    with Lease(storage.engine, study.name) as lease:
        ledger = Ledger(storage, study.name, study.space, lease)
        ledger.settle(terms(study, DATA), study.space)
        for value in (0.4, 0.6):
            ledger.end(ledger.next(2).number, "COMPLETE", [value])
    return ledger


@pytest.fixture
def ledger(places):
    return searched(places)


def opening(**changes):
    row = audit.Opening(1, "confirm", "f", "c", "abc", "then", "me@here", "0001", "baseline", 2)
    return row._replace(**changes)


@pytest.fixture
def trained(monkeypatch):
    """No training: trainings end at once, the best ahead, in the order in which they were begun."""
    monkeypatch.setattr(confirm, "prepare", lambda config, root, shared: DATA)
    recorder = FakeRecorder()
    monkeypatch.setattr(confirm, "recording", lambda *_: recorder)
    monkeypatch.setattr(confirm, "start_ray", lambda study: Resources(1, 0.0))
    jobs = []

    def execute(study, plan, recorder, resources, folder):
        (series,) = plan
        while (row := series.ledger.next(series.trials)) is not None:
            jobs.append(series.job(row))
            if len(jobs) in interrupted_at:
                raise KeyboardInterrupt
            value = 0.5 + 0.1 * (row.params["arm"] == "best") + 0.001 * row.number**2
            metrics = {f"test/{quality}": value for quality in QUALITIES}
            metrics |= {f"paper/{quality}": value + 0.2 for quality in QUALITIES if series.kind.startswith("paper")}
            series.ledger.end(row.number, "COMPLETE", [value], **{METRICS: metrics})

    interrupted_at = set()
    monkeypatch.setattr(confirm, "execute", execute)
    return SimpleNamespace(recorder=recorder, jobs=jobs, interrupted_at=interrupted_at)


def test_the_best_and_its_baseline_train_side_by_side_with_fresh_seeds(places, ledger, trained):
    said = confirm_study("study", places, Asked(seeds=3))
    best = ledger.best()
    alphas = [job.settings["hdml.alpha"] for job in trained.jobs if job.settings["synthesis"] == "hdml"]
    assert alphas == [best.params["hdml.alpha"]] * 3
    assert [job.settings["seed"] for job in trained.jobs] == [11000, 11000, 11001, 11001, 11002, 11002]
    assert {job.kind for job in trained.jobs} == {"confirm-1"}
    for part in (
        "best (0001)",
        "baseline",
        "difference",
        "p of difference, paired t-test",
        "over 3 seeds",
        "opening 1",
    ):
        assert part in said
    written = json.loads((places.out / "study" / "confirm.json").read_text())
    assert set(written["results"]["recall_at_1"]) == {"best", "baseline", "difference"}
    assert 0 < written["p_values"]["recall_at_1"]["difference"] < 1
    tags, metrics = trained.recorder.notes["confirm-1"]
    assert tags["frozen"] == written["frozen"]
    assert metrics["test/nmi_best"] == written["results"]["nmi"]["best"]["mean"]
    assert metrics["test/nmi_difference_p_value"] == written["p_values"]["nmi"]["difference"]


def test_the_test_classes_are_opened_once(places, ledger, trained):
    confirm_study("study", places, Asked(seeds=2))
    for seeds in (2, 6):
        with pytest.raises(LedgerError, match=r"were opened on .* by .*@.*--again"):
            confirm_study("study", places, Asked(seeds=seeds))
    assert len(trained.jobs) == 4
    confirm_study("study", places, Asked(seeds=2, again=True))
    assert [job.settings["seed"] for job in trained.jobs[4:]] == [12000, 12000, 12001, 12001]
    assert [(row.number, bool(row.finished)) for row in openings(ledger)] == [(1, True), (2, True)]


def test_every_opening_leaves_its_row_before_anything_is_looked_at(places, ledger, trained):
    trained.interrupted_at.add(1)
    with pytest.raises(KeyboardInterrupt):
        confirm_study("study", places, Asked(seeds=2))
    (left,) = openings(ledger)
    assert (left.number, left.kind, left.best, left.against, left.seeds) == (1, "confirm", "best (0001)", "baseline", 2)
    assert left.finished is None
    assert left.code == code_digest(ROOT)
    assert "@" in left.by
    tags, metrics = trained.recorder.notes["confirm-1-opened"]
    assert (tags["frozen"], tags["code"], tags["by"], metrics) == (left.frozen, left.code, left.by, {})


def test_an_opening_that_was_broken_off_goes_on_and_is_no_second_one(places, ledger, trained):
    trained.interrupted_at |= {2, 4}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            confirm_study("study", places, Asked(seeds=2))
    confirm_study("study", places, Asked(seeds=2))
    assert [job.number for job in trained.jobs] == [0, 1, 1, 2, 2, 3]
    assert [job.attempt for job in trained.jobs] == [1, 1, 2, 1, 2, 1]
    (done,) = openings(ledger)
    assert done.finished


@pytest.mark.parametrize("change", ["seeds was 2, is 3", "kind was confirm, is paper", "code was .*, is other"])
def test_only_the_same_call_with_the_same_code_goes_on(change, places, ledger, trained, monkeypatch):
    trained.interrupted_at.add(1)
    with pytest.raises(KeyboardInterrupt):
        confirm_study("study", places, Asked(seeds=2))
    if change.startswith("code"):
        monkeypatch.setattr(audit, "code_digest", lambda root: "other")
    asked = Asked(seeds=3 if change.startswith("seeds") else 2, paper_mode=change.startswith("kind"))
    with pytest.raises(LedgerError, match=f"broken off, and only the same call goes on: {change}.*--again"):
        confirm_study("study", places, asked)


def test_another_study_s_best_may_be_the_rival(places, ledger, trained):
    other = dataclasses.replace(STUDY, name="other", base={"hdml.beta": 7.0}, baseline=None)
    rival = searched(places, other).best()
    said = confirm_study("study", places, Asked(seeds=2, against="other"))
    assert "other (0001)" in said
    betas = [job.settings["hdml.beta"] for job in trained.jobs]
    assert betas == [1e4, 7.0] * 2
    assert trained.jobs[1].settings["hdml.alpha"] == rival.params["hdml.alpha"]


def test_paper_mode_is_labelled_everywhere_and_stands_beside_the_honest_number(places, ledger, trained):
    said = confirm_study("study", places, Asked(seeds=2, paper_mode=True))
    assert {job.kind for job in trained.jobs} == {"paper-1"}
    assert confirm.PAPER_MODE in said
    lines = [line for line in said.split("\n") if "0." in line]
    assert [line.partition("  ")[0] for line in lines] == [
        "best (0001)",
        "baseline",
        "difference",
        "p of difference, paired t-test",
        "paper mode: best (0001)",
        "paper mode: baseline",
        "paper mode: difference",
    ]
    assert ["±" in line for line in lines] == [True] * 3 + [False] * 4

    (row,) = openings(ledger)
    assert row.label == "paper-1"
    assert {"paper-1", "paper-1-opened"} == trained.recorder.notes.keys()
    assert {tags["opening"] for tags, _ in trained.recorder.notes.values()} == {"paper-1"}
    metrics = trained.recorder.notes["paper-1"][1]
    assert metrics["paper/nmi_best"] == pytest.approx(metrics["test/nmi_best"] + 0.2)
    assert not [name for name in metrics if name.startswith("paper/") and ("p_value" in name or "width" in name)]
    written = json.loads((places.out / "study" / "confirm.json").read_text())
    assert written["kind"] == "paper"
    assert written["paper_mode"]["what"] == confirm.PAPER_MODE
    assert written["results"]["nmi"]["best"]["mean"] == metrics["test/nmi_best"]


def test_without_paper_mode_there_is_no_word_of_it(places, ledger, trained):
    assert "paper mode" not in confirm_study("study", places, Asked(seeds=2))
    assert "paper_mode" not in (places.out / "study" / "confirm.json").read_text()


# Several arms -----------------------------------------------------------------------------------------------------

ARMS = Study(
    "arms",
    "Which?",
    SPACE,
    arms={
        "plain": {"synthesis": "none"},
        "hdml": {},
        "daml": {"synthesis": "daml"},
    },
    rivals={"hdml": "plain", "daml": "plain"},
    trials=6,
    test_seeds=3,
)


def searched_arms(places, trials=6, failing=()):
    """The ledger of a study of three arms whose later trials are the better ones; some arms never succeed."""
    storage = open_storage(places.ledger_url)
    (places.out / "arms").mkdir(exist_ok=True)
    with Lease(storage.engine, "arms") as lease:
        ledger = Ledger(storage, "arms", ARMS.search_space, lease)
        ledger.settle(terms(ARMS, DATA), ARMS.space)
        while (row := ledger.next(trials)) is not None:
            failed = row.params["arm"] in failing
            ledger.end(row.number, *(("FAIL",) if failed else ("COMPLETE", [0.1 * row.number])))
    return ledger


def test_the_best_trial_of_each_arm_is_opened_and_compared_with_its_rival(places, trained):
    ledger = searched_arms(places)
    said = confirm_study("arms", places, Asked(seeds=3))
    best = ledger.best_of_arms()
    assert {arm: row.number for arm, row in best.items()} == {"plain": 3, "hdml": 4, "daml": 5}
    assert [job.settings["synthesis"] for job in trained.jobs] == ["none", "hdml", "daml"] * 3
    assert [job.settings["seed"] for job in trained.jobs] == [11000] * 3 + [11001] * 3 + [11002] * 3
    assert {job.settings["hdml.alpha"] for job in trained.jobs[1::3]} == {best["hdml"].params["hdml.alpha"]}
    for part in ("plain (0003)", "hdml (0004)", "daml (0005)", "hdml-plain", "p of daml-plain", "over 3 seeds"):
        assert part in said
    (row,) = openings(ledger)
    assert (row.best, row.against) == ("plain (0003), hdml (0004), daml (0005)", "")
    written = json.loads((places.out / "arms" / "confirm.json").read_text())
    assert list(written["results"]["nmi"]) == ["plain", "hdml", "daml", "hdml-plain", "daml-plain"]
    assert trained.recorder.notes["confirm-1"][1]["test/nmi_hdml-plain_p_value"] > 0


def test_an_arm_of_which_no_trial_ended_is_left_out_by_those_who_say_so(places, trained):
    ledger = searched_arms(places, failing=("plain",))
    assert close_study(ARMS, ledger, places).startswith(
        "the test classes stay closed, for no trial is COMPLETE of plain:"
    )
    assert not trained.jobs
    said = confirm_study("arms", places, Asked(seeds=2))
    assert "not opened, for no trial of theirs is COMPLETE: plain" in said
    assert len(trained.jobs) == 4


def test_each_arm_has_its_own_seeds_and_each_difference_those_of_both():
    arms = {"a": Arm(None, "a"), "b": Arm(None, "b", "a"), "c": Arm(None, "c", "a")}
    rows = [row(i, arm, i // 3, 0.1 * i) for i, arm in enumerate("abc" * 3)]
    rows[2] = rows[2]._replace(state="FAIL")  # c has two seeds left
    found = compare(rows, arms)["nmi"]
    assert {name: of.n for name, of in found.intervals.items()} == {"a": 3, "b": 3, "c": 2, "b-a": 3, "c-a": 2}
    assert found.intervals["b-a"].mean == pytest.approx(0.1)
    rows[5] = rows[5]._replace(state="FAIL")  # and now one
    found = compare(rows, arms)["nmi"]
    assert set(found.intervals) == {"a", "b", "b-a"}


def test_several_arms_have_their_rivals_among_themselves(places, ledger, trained):
    searched_arms(places)
    with pytest.raises(ConfigError, match="--against must be left out for a study of several arms, got 'study'"):
        confirm_study("arms", places, Asked(against="study"))


def test_a_study_may_end_by_opening_its_test_classes_once(places, trained):
    ledger = searched_arms(places, trials=5)
    assert close_study(ARMS, ledger, places).startswith("the test classes stay closed until all trials have ended")
    assert not trained.jobs
    ledger = searched_arms(places)
    first = close_study(ARMS, ledger, places)
    assert len(trained.jobs) == 9
    *again, when = close_study(ARMS, ledger, places).split("\n")
    assert len(trained.jobs) == 9
    assert "\n".join(again) in first
    assert when.endswith("of plain (0003), hdml (0004), daml (0005)")
    assert {opening.label for opening in openings(ledger)} == {"confirm-1"}


def test_what_was_opened_keeps_its_names_when_the_study_is_extended(places, trained):
    close_study(ARMS, searched_arms(places), places)
    extended = dataclasses.replace(ARMS, trials=9)
    said = close_study(extended, searched_arms(places, trials=9), places)
    assert len(trained.jobs) == 9
    assert "(0007)" not in said
    assert said.endswith("of plain (0003), hdml (0004), daml (0005)")


def test_a_study_is_closed_as_it_was_run(places, trained, monkeypatch):
    ran = []
    monkeypatch.setattr(confirm, "start_ray", lambda study: ran.append(study) or Resources(1, 0.0))
    study = dataclasses.replace(ARMS, parallel=1, cpus_per_trial=2, hang_minutes=3.0)
    close_study(study, searched_arms(places), places)
    assert ran == [study]
    assert {job.hang_seconds for job in trained.jobs} == {180.0}


def test_such_an_end_that_was_broken_off_goes_on(places, trained):
    ledger = searched_arms(places)
    trained.interrupted_at.add(4)
    with pytest.raises(KeyboardInterrupt):
        close_study(dataclasses.replace(ARMS, paper_mode=True), ledger, places)
    close_study(dataclasses.replace(ARMS, paper_mode=True), ledger, places)
    assert [job.number for job in trained.jobs] == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8]
    assert {opening.label for opening in openings(ledger)} == {"paper-1"}


# At the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (Asked(seeds=1), r"--seeds must be in \[2, 1000\].*got 1"),
        (Asked(seeds=1001), r"--seeds must be in \[2, 1000\].*got 1001"),
        (Asked(against="study"), "--against must name another study, got 'study'"),
        (Asked(against="nobody"), r"no study 'nobody' in the ledger: it has \[study\]"),
        (Asked(gpus_per_trial=0.0), "gpus_per_trial of study 'study' must be > 0, got 0.0"),
    ],
)
def test_a_call_that_makes_no_sense_opens_nothing(asked, says, places, ledger, trained):
    with pytest.raises(ConfigError, match=says):
        confirm_study("study", places, asked)
    assert openings(ledger) == []


def test_a_study_without_a_rival_or_without_a_result_opens_nothing(places, trained):
    searched(places, dataclasses.replace(STUDY, name="alone", baseline=None))
    with pytest.raises(ConfigError, match="study 'alone' has no baseline: .*--against STUDY"):
        confirm_study("alone", places, Asked())
    Ledger(open_storage(places.ledger_url), "new", SPACE)
    with pytest.raises(LedgerError, match="study 'new' has no COMPLETE trial"):
        confirm_study("new", places, Asked())


@pytest.mark.parametrize("against", [None, "other"])
def test_other_data_than_were_searched_are_not_opened(against, places, ledger, trained, monkeypatch):
    searched(places, dataclasses.replace(STUDY, name="other"))
    monkeypatch.setattr(confirm, "prepare", lambda config, root, shared: SimpleNamespace(digest="1"))
    with pytest.raises(LedgerError, match=r"study 'study' must be measured on the data .* digest 0, got 1: .*--fresh"):
        confirm_study("study", places, Asked(against=against))
    assert openings(ledger) == []


def test_a_study_that_is_at_work_is_not_opened(places, ledger, trained):
    with Lease(open_storage(places.ledger_url).engine, "study"), pytest.raises(LeaseError, match="is at work already"):
        confirm_study("study", places, Asked())
    assert openings(ledger) == []


# What is written down ---------------------------------------------------------------------------------------------


def test_a_floor_leaves_a_row_too_and_seals_nothing(places, ledger, trained):
    ledgers = {"floor": ledger, "search": ledger}
    for _ in range(2):  # a study is run, and run again
        with floor_opened(ledgers, trained.recorder, "abc"):
            (begun,) = openings(ledger)
    (floor,) = openings(ledger)
    assert (floor.number, floor.kind, floor.commit) == (0, "floor", "abc")
    assert begun == floor
    assert floor.finished
    assert list(trained.recorder.notes) == ["floor-0-opened"]
    confirm_study("study", places, Asked(seeds=2))
    assert [row.label for row in openings(ledger)] == ["floor-0", "confirm-1"]


def test_where_there_is_no_floor_there_is_no_row(ledger):
    with floor_opened({"search": ledger}, FakeRecorder(), "abc"):
        pass
    assert openings(ledger) == []


def test_a_look_that_is_broken_off_has_no_end(ledger):
    with pytest.raises(KeyboardInterrupt), opened(ledger, FakeRecorder(), opening()):
        raise KeyboardInterrupt
    assert openings(ledger) == [opening()]


def test_what_is_frozen_is_space_data_settings_and_code(ledger, monkeypatch):
    def frozen(arms=None, **changes):
        ledger.note(TERMS, {**noted, **changes})
        return new_opening(ledger, 1, "confirm", "abc", arms).frozen

    noted = ledger.notes[TERMS]
    first = frozen()
    assert frozen(question="Why not?") == first
    others = [
        frozen(space={}),
        frozen(data="1"),
        frozen(settings={**noted["settings"], "optim.epochs": 99}),
        frozen(goals={"validation/nmi": "maximize"}),
        frozen(arms={"best": {"hdml.alpha": 1.0}}),
    ]
    monkeypatch.setattr(audit, "code_digest", lambda root: "other")
    others.append(frozen())
    assert len({first, *others}) == len(others) + 1


def test_the_code_is_every_module_of_core_and_machinery(tmp_path):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        return code_digest(tmp_path)

    digests = [
        write("hdml_core/a.py", "1"),
        write("hdml_core/datasets/b.py", "1"),
        write("studies/machinery/c.py", "1"),
        write("studies/machinery/c.py", "2"),
    ]
    (tmp_path / "hdml_core/a.py").rename(tmp_path / "hdml_core/z.py")
    digests.append(code_digest(tmp_path))
    assert len(set(digests)) == len(digests)
    assert write("studies/alpha_beta.py", "1") == write("hdml_core/a.txt", "1") == digests[-1]
