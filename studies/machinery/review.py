"""What can be said of studies that have run, and whether their three accounts agree: the ledger, MLflow, the disk.

The ledger is believed. Only `sync` changes anything, and only in MLflow. What a living driver has in hand is that
driver's business: it may well be in one account already and not yet in another.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hdml_core.checkpoint import CheckpointError, newest
from studies.machinery.audit import Opening, openings
from studies.machinery.confirm import GOAL as SEALED_GOAL
from studies.machinery.driver import Places
from studies.machinery.experiment import Experiment, SeenRun
from studies.machinery.lease import Holder, holders
from studies.machinery.ledger import (
    ATTEMPTS,
    CHECKPOINTS,
    MLFLOW_RUN,
    OWNER,
    PRICE,
    REASON,
    SPENT,
    STUDY_ID,
    TERMS,
    Ledger,
    Row,
    existing,
    studies,
)
from studies.machinery.progress import look, spending, states, table
from studies.machinery.records import (
    FINISHED,
    GPU_SECONDS,
    PART,
    RUN_STATUS,
    SECONDS,
    VALIDATED,
    State,
    describe,
    short,
    trial_id,
)
from studies.machinery.space import Dimension, ends, from_json
from studies.machinery.spool import REFUSED, refused, waiting
from studies.machinery.storage import Storage, open_storage
from studies.machinery.tracking import synchronise
from studies.machinery.worker import part_folder

SEARCH = "search"
UNSEALED = ("floor", "baseline", SEARCH)
"""Kinds of trials that are measured on validation classes, after every epoch, in the order in which they are run."""

Points = Sequence[tuple[int, float]]
"""A metric's (step, value) points."""
ByTrial = Mapping[tuple[str, int], Sequence[SeenRun]]
"""The runs of every trial, by its kind and number; an empty sequence of one that has none."""


class Entry(NamedTuple):
    """A trial as one of the study's ledgers has it."""

    ledger: str
    kind: str
    row: Row

    def __str__(self) -> str:
        return f"trial {trial_id(self.row.number)} of {self.ledger}"


@dataclass(frozen=True)
class Past:
    """A study that has run, or is running, and where its accounts are."""

    name: str
    places: Places
    ledgers: Mapping[str, Ledger]
    """Its own as SEARCH, the others by the end of their names."""
    at_work: Sequence[Holder]
    """Drivers that lived when the study was opened."""

    @property
    def search(self) -> Ledger:
        """The study's own ledger."""
        return self.ledgers[SEARCH]

    @property
    def goals(self) -> list[str]:
        """What the study pursues; where no terms are settled yet, what is usual."""
        return list(self.search.notes.get(TERMS, {"goals": VALIDATED[:1]})["goals"])

    @property
    def identity(self) -> str:
        """What its runs are known by; a study of which nothing was ever recorded has none."""
        return str(self.search.notes.get(STUDY_ID, ""))

    @property
    def spool(self) -> Path:
        """Where drivers keep what they have to tell MLflow."""
        return self.places.spool(self.name)

    def experiment(self) -> Experiment:
        """Its record. Raises TrackerError where there can be none."""
        return Experiment(self.places.tracking_uri, self.name, self.identity)

    def entries(self) -> list[Entry]:
        """All trials of all its ledgers as they are now."""
        return [Entry(ledger.name, kind, row) for kind, ledger in self.ledgers.items() for row in ledger.rows()]

    def settled(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those trials that ended, and not just now in the hands of a driver that lives."""
        living = {holder.token for holder in self.at_work}
        return [e for e in entries if e.row.state in FINISHED and e.row.notes.get(OWNER) not in living]

    def now(self) -> str:
        """Who is at work on it, or what was left undone."""
        if self.at_work:
            return "at work: " + "; ".join(map(str, self.at_work))
        left = any(entry.row.state not in FINISHED for entry in self.entries())
        return "left RUNNING: the same command goes on" if left else ""


def open_past(storage: Storage, name: str, places: Places) -> Past:
    """Open a study as it is found. Raises LedgerError where there is none of that name."""
    ledgers = {SEARCH: existing(storage, name)}
    for known in sorted(study.study_name for study in storage.get_all_studies()):
        if known.startswith(f"{name}."):
            ledgers[known.removeprefix(f"{name}.")] = Ledger(storage, known, {})
    return Past(name, places, ledgers, [holder for holder in holders(storage.engine, name) if not holder.is_gone()])


def list_studies(places: Places) -> str:
    """A table of the studies: how far each is, the best it has, how often it was opened, who is at work on it."""
    storage = open_storage(places.ledger_url)
    lines = []
    for name in studies(storage):
        past = open_past(storage, name, places)
        opened = sum(opening.kind != "floor" for opening in openings(past.search))
        best = _best(past.search, past.goals)
        lines.append([name, states(past.search.rows()), best, str(opened or ""), past.now()])
    return table(["study", "trials", "best", "openings", "now"], lines) if lines else "no study has been run yet"


def show(study: str, places: Places) -> str:
    """One study: its terms, how far it is, what it found and spent, and a row for every trial.

    Raises LedgerError where it is unknown.
    """
    past = open_past(open_storage(places.ledger_url), study, places)
    shown = {kind: past.ledgers[kind] for kind in UNSEALED if kind in past.ledgers}
    facts = [
        *_terms(past.search),
        ("trials", states(past.search.rows())),
        *((kind if kind != SEARCH else "best", _best(ledger, past.goals)) for kind, ledger in shown.items()),
        *([("front", ", ".join(trial_id(row.number) for row in past.search.front()))] if len(past.goals) > 1 else []),
        *(("spent", said.removeprefix("spent: ")) for said in spending(shown.values())),
        *(("opened", _opened(opening)) for opening in openings(past.search)),
        ("now", past.now() or "nobody is at work on it"),
        ("look", f"{look(places.tracking_uri)}   (experiment {study})"),
    ]
    width = max(len(name) for name, _ in facts)
    return "\n".join([study, "", *(f"{name:<{width}}  {fact}" for name, fact in facts), "", _trials(shown)])


def sync(study: str, places: Places) -> str:
    """Send MLflow what it has not been told yet, and tell it again how trials ended that it has otherwise.

    Raises LedgerError where the study is unknown, TrackerError where MLflow does not answer.
    """
    past = open_past(open_storage(places.ledger_url), study, places)
    at_work = bool(past.at_work)
    sent = synchronise(places.tracking_uri, study, past.identity, past.spool, places.artifacts, at_work)
    experiment = past.experiment()
    runs = _by_trial(experiment.runs())
    for _, kind, row in past.settled(past.entries()):
        own = runs[kind, row.number]
        if own and (len(own) > 1 or not _ended_alike(row, own[0])):
            experiment.end(kind, row.number, row.notes[ATTEMPTS], row.state, row.notes.get(REASON, ""))
            sent += 1
    return f"{sent} events sent to MLflow" if sent else "nothing left to send"


def verify(study: str, places: Places) -> list[str]:
    """Say where the study's ledgers, MLflow and the disk disagree, a line for each, with what mends it.

    Raises LedgerError where the study is unknown, TrackerError where MLflow does not answer.
    """
    past = open_past(open_storage(places.ledger_url), study, places)
    unsent = waiting(past.spool)
    experiment = past.experiment()
    runs = experiment.runs()
    # Read after the runs: one that is begun meanwhile has its row.
    entries = past.entries()
    found = [] if past.at_work else list(_left_running(entries))
    if unsent:
        # It may be what MLflow seems to lack.
        found.append(f"{unsent} events in {past.spool} were not sent to MLflow: {_sync(past)}")
    else:
        found += _of_runs(past, entries, runs)
        found += _of_series(past, entries, runs, experiment)
    if count := refused(past.spool):
        path = past.spool / REFUSED
        found.append(f"{count} events were refused by MLflow, {path} says why: rm {path} once that is seen to")
    return [*found, *_of_checkpoints(past.search)]


def _left_running(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        if entry.row.state not in FINISHED:
            yield f"{entry} is RUNNING, and nobody is at work on it: give the command again that began it"


def _of_runs(past: Past, entries: Sequence[Entry], runs: Sequence[SeenRun]) -> Iterator[str]:
    """Trials that ended and do not have one run that ended as they did; runs that are of none, or left RUNNING."""
    by_trial = _by_trial(runs)
    for entry in past.settled(entries):
        row = entry.row
        own = by_trial[entry.kind, row.number]
        noted = row.notes.get(MLFLOW_RUN)
        restore = f"{_mlflow(past)} restore --run-id {noted}"
        if not own:
            way_out = restore if noted else f"put its spool back into {past.spool}, then {_sync(past)}"
            yield f"{entry} is {row.state} and has no run in MLflow: {way_out}"
        elif len(own) > 1:
            yield f"{entry} has {len(own)} runs in MLflow, {', '.join(run.run_id for run in own)}: {_sync(past)}"
        elif noted not in (None, own[0].run_id):
            yield f"{entry} has run {own[0].run_id} in MLflow, and {noted} was noted: {restore} && {_sync(past)}"
        elif not _ended_alike(row, own[0]):
            (run,) = own
            yield f"{entry} is {row.state}, its run {run.run_id} {run.status} with state {run.state}: {_sync(past)}"
    states: dict[tuple[str, int | None], State] = {(e.kind, e.row.number): e.row.state for e in entries}
    for run in runs:
        name = run.kind if run.trial is None else f"{run.kind} {trial_id(run.trial)}"
        state = states.get((run.kind, run.trial))
        if run.trial is not None and state is None:
            delete = f"{_mlflow(past)} delete --run-id {run.run_id}"
            yield f"run {run.run_id} is of {name}, which no ledger has: {delete}"
        elif run.status == "RUNNING" and state not in FINISHED and not past.at_work:
            yield f"run {run.run_id} of {name} is RUNNING, and nobody is at work on it: {_sync(past)}"


def _of_series(past: Past, entries: Sequence[Entry], runs: Sequence[SeenRun], experiment: Experiment) -> Iterator[str]:
    """Metrics of trials that ended which have a step twice, lack one, or have another value than the ledger."""
    by_trial = _by_trial(runs)
    pairs = [
        (entry, run)
        for entry in past.settled(entries)
        if len(own := by_trial[entry.kind, entry.row.number]) == 1
        for run in own
        if entry.row.notes.get(MLFLOW_RUN, run.run_id) == run.run_id
    ]
    goal = past.goals[0]
    # Of a trial with several folds or seeds, every epoch tells that of its own, and the goal is the mean at their ends.
    part = f"{PART}/{goal.partition('/')[2]}"
    unsealed = [run for entry, run in pairs if entry.kind in UNSEALED]
    series = {
        SECONDS: experiment.series([run for _, run in pairs], SECONDS),
        goal: experiment.series([run for run in unsealed if part not in run.metrics], goal),
        part: experiment.series([run for run in unsealed if part in run.metrics], part),
    }
    for entry, run in pairs:
        told = {name: points[run.run_id] for name, points in series.items() if run.run_id in points}
        ends = goal if entry.kind in UNSEALED else SEALED_GOAL
        last = run.metrics.get(ends)
        faults = list(_of_steps(told, entry.row.epochs))
        if not faults and entry.row.state == "COMPLETE" and last != entry.row.value:
            faults = [f"ends at {ends} {last}, and the ledger has {entry.row.value}"]
        for fault in faults:
            yield f"{entry}: run {run.run_id} {fault}; nothing is left that could mend it, and the ledger stands"


def _of_steps(series: Mapping[str, Points], epochs: int) -> Iterator[str]:
    """Steps of series that are told together, at every epoch, which one has more than once, or lacks."""
    steps = sorted({step for points in series.values() for step, _ in points})
    for name, points in series.items():
        times = Counter(step for step, _ in points)
        if twice := [step for step in steps if times[step] > 1]:
            yield f"has {name} more than once at step {', '.join(map(str, twice))}"
        if lacking := [step for step in steps if not times[step]]:
            yield f"lacks {name} at step {', '.join(map(str, lacking))}"
    if len(steps) != epochs:
        yield f"has {len(steps)} epochs, and the ledger heard of {epochs}"


def _of_checkpoints(search: Ledger) -> Iterator[str]:
    """Checkpoints of the best trial that are not there; those of others the disk cap may have taken."""
    terms = search.notes.get(TERMS)
    if terms is None or not search.front():
        return
    best = search.best()
    for part in range(terms["folds"] * terms["seeds"]):
        folder = part_folder(Path(best.notes[CHECKPOINTS]), part)
        with suppress(CheckpointError):
            if newest(folder) is not None:
                continue
        yield (
            f"{folder} has no checkpoint that can be read, of the best trial, {trial_id(best.number)}: "
            f"give the study's command with --warm-start {search.name} --name OTHER to train it anew"
        )


def _by_trial(runs: Sequence[SeenRun]) -> ByTrial:
    found = defaultdict(list)
    for run in runs:
        if run.trial is not None:
            found[run.kind, run.trial].append(run)
    return found


def _ended_alike(row: Row, run: SeenRun) -> bool:
    return (run.status, run.state) == (RUN_STATUS[row.state], row.state)


def _sync(past: Past) -> str:
    return f"python -m studies sync {past.name}"


def _mlflow(past: Past) -> str:
    known = "MLFLOW_TRACKING_URI" in os.environ
    return "mlflow runs" if known else f"MLFLOW_TRACKING_URI={past.places.tracking_uri} mlflow runs"


def _best(ledger: Ledger, goals: Sequence[str]) -> str:
    """What the best trial by the first goal reached, and where; empty where none is COMPLETE."""
    for row in ledger.ranked()[:1]:
        reached = [f"{goal.rpartition('/')[2]} {value:.4f}" for goal, value in zip(goals, row.values, strict=True)]
        return ", ".join(reached) + f" (trial {trial_id(row.number)})"
    return ""


def _terms(search: Ledger) -> list[tuple[str, str]]:
    """What the study's trials have in common, in short."""
    terms = search.notes.get(TERMS)
    if terms is None:
        return []
    space = from_json(terms["space"])
    return [
        ("question", (terms["question"].strip().splitlines() or [""])[0]),
        ("data", f"{terms['settings']['data.name']}, digest {terms['data'][:12]}"),
        ("goals", ", ".join(f"{direction} {goal}" for goal, direction in terms["goals"].items())),
        ("parts", f"{terms['folds']} folds, {terms['seeds']} seeds"),
        *([("arms", ", ".join(terms["arms"]))] if terms.get("arms") else []),
        *(("space", f"{name} {_range(dimension)}") for name, dimension in space.items()),
    ]


def _range(dimension: Dimension) -> str:
    when = f" when {describe(dimension.when)}" if dimension.when else ""
    return f"{type(dimension).__name__} {', '.join(map(short, ends(dimension)))}{when}"


def _opened(opening: Opening) -> str:
    rival = f" against {opening.against}" if opening.against else ""
    compared = f", {opening.best}{rival}, {opening.seeds} seeds" if opening.best else ""
    over = f"over {opening.finished}" if opening.finished else "broken off or under way"
    return f"{opening.label} by {opening.by}{compared}: begun {opening.begun}, {over}"


def _trials(ledgers: Mapping[str, Ledger]) -> str:
    """A row for every trial."""
    price = ledgers[SEARCH].notes.get(PRICE, 0.0)
    rows = [(kind, row) for kind, ledger in ledgers.items() for row in ledger.rows()]
    names = list(dict.fromkeys(name for _, row in rows for name in row.params))
    header = ["trial", *(name.rpartition(".")[2] for name in names), "state", "value", "attempts", "seconds", "GPU-s"]
    lines = [
        [
            trial_id(row.number) if kind == SEARCH else kind,
            *(short(row.params.get(name, "")) for name in names),
            f"{row.state} at {max(row.reports)}" if row.state == "PRUNED" and row.reports else row.state,
            "" if row.value is None else f"{row.value:.4f}",
            str(row.notes.get(ATTEMPTS, 0)),
            f"{row.seconds:.1f}",
            f"{row.notes.get(SPENT, {}).get(GPU_SECONDS, 0.0):.1f}",
            *([f"{price * row.seconds / 3600:.2f}"] if price else []),
        ]
        for kind, row in rows
    ]
    reasons = ["", *(row.notes.get(REASON, "") for _, row in rows)]
    said = table([*header, *(["cost"] if price else [])], lines).splitlines()
    return "\n".join(f"{line}  {reason}".rstrip() for line, reason in zip(said, reasons, strict=True))
