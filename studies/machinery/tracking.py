"""The recorder: what happens to a study and its trials, on its way into MLflow. Lives in the driver.

All is written into the spool, and nothing ever waits for more than that. A thread sends it on from there, for as long
as it takes; what a driver leaves unsent the next one sends first, or `python -m studies sync` does.
"""

import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from hdml_core.config import Setting
from studies.machinery.experiment import Experiment, Machine, TrackerError, now
from studies.machinery.ledger import ATTEMPTS, Row
from studies.machinery.records import ARM, RUN_STATUS, TAG_ATTEMPT, TAG_RECIPE, Kind, Record, State, run_name
from studies.machinery.redaction import redacted
from studies.machinery.spool import REFUSED, Event, Spool, refused

CHUNK = 100
"""Events that are sent before that is noted."""
LOOK_EVERY, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two looks at the spool; twice as many after each try that nobody answers, and at most so many."""
LAST_TRIES, STALLED = 2, 30.0
"""At a driver's end, tries without an answer, or seconds without progress, until the rest is left for later."""
OBSERVE_EVERY = 5.0
"""Seconds between two looks at the machine."""


class Recorder:
    """Writes one study's trials to MLflow. As a context, once opened, it leaves no run RUNNING."""

    def __init__(self, uri: str, study: str, study_id: str, folder: Path, artifacts: Path | None = None) -> None:
        """`folder` is where the spool is kept; for the rest see Experiment, and what it raises."""
        self._driver = uuid.uuid4().hex
        self._experiment = Experiment(uri, study, study_id, artifacts, self._driver)
        self._study = study
        self._folder = folder
        self._in_hand: dict[tuple[Kind, int], int] = {}
        self._over = threading.Event()
        self._closed = threading.Event()
        self._observer = threading.Thread(target=self._observe, name="observer", daemon=True)
        self._sender = threading.Thread(target=self._send, name="sender", daemon=True)

    def open(self, question: str, tags: Mapping[str, str]) -> None:
        """Open the study's run, a new one or that of earlier drivers, and begin to send. Every run gets the tags.

        Raises TrackerError where the spool can't be written.
        """
        self._tags = dict(tags)
        try:
            left, living = Spool.left(self._folder)
            self._own = Spool.begin(self._folder)
        except OSError as error:
            raise TrackerError(f"the spool {self._folder} can't be written: {error.strerror}") from error
        for each in left:
            say_last_words(each, living)
        self._spools = [*left, self._own]
        self._write("open", question=question, tags=self._tags)
        self._observer.start()
        self._sender.start()

    def begin(self, kind: Kind, row: Row, settings: Mapping[str, Setting]) -> None:
        """Open the trial's run, a new one or the one that it had."""
        self._in_hand[kind, row.number] = row.notes[ATTEMPTS]
        self._write(
            "begin",
            kind=kind,
            number=row.number,
            attempt=row.notes[ATTEMPTS],
            began=int(1000 * row.began.timestamp()),
            name=run_name(kind, row.number, row.params),
            tags={**self._tags, **_own_tags(row, settings)},
            params={name: str(value) for name, value in settings.items()},
        )

    def log(self, kind: Kind, number: int, record: Record) -> None:
        """Log a record's metrics, trace and tags, unless the run has that epoch."""
        self._write(
            "log",
            kind=kind,
            number=number,
            step=record.step,
            seconds=record.seconds,
            metrics=dict(record.metrics),
            trace=dict(record.trace),
            # An attempt is told as it begins.
            tags={name: value for name, value in record.tags.items() if name != TAG_ATTEMPT},
        )

    def end(self, kind: Kind, number: int, state: State, reason: str = "") -> None:
        """Give the trial's run its state, the reason if it failed, and its status."""
        attempt = self._in_hand.pop((kind, number))
        self._write("end", True, kind=kind, number=number, attempt=attempt, state=state, reason=reason)

    def attach(self, kind: Kind, number: int, name: str, text: str) -> None:
        """Keep a text with a trial's run, as logs/NAME."""
        self._write("attach", kind=kind, number=number, name=name, text=text)

    def note(self, name: str, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """Record what is no trial, in a run of its own; once for each name."""
        self._write("note", True, name=name, tags=dict(tags), metrics=dict(metrics))

    def run_id(self, kind: Kind, number: int) -> str | None:
        """The run of a trial in hand, as soon as it is known."""
        return self._experiment.run_ids.get((kind, number))

    @property
    def unsent(self) -> int:
        """Events that MLflow has not taken yet."""
        return sum(each.unsent for each in self._spools)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """End the study's run truthfully, and the trials in hand as interrupted; send what can be sent."""
        self._over.set()
        self._observer.join()
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        status = "FINISHED" if kind is None else "KILLED" if interrupted else "FAILED"
        self._own.append(_last_words(self._driver, now(), status, self._in_hand), durable=True)
        self._closed.set()
        while self._sender.is_alive():
            before = self.unsent
            self._sender.join(STALLED)
            if self.unsent == before:
                break
        if self.unsent:
            way_out = f"python -m studies sync {self._study}"
            print(f"unsent events: {self.unsent}, kept in {self._folder}; {way_out} sends them", file=sys.stderr)
        if count := refused(self._folder):
            print(f"events that MLflow refused: {count}, kept in {self._folder / REFUSED}", file=sys.stderr)

    def _write(self, do: str, durable: bool = False, **what: Any) -> None:
        self._own.append({"do": do, "driver": self._driver, "time": now(), **redacted(what)}, durable)

    def _observe(self) -> None:
        machine = Machine()
        while not self._over.wait(OBSERVE_EVERY):
            self._write("observe", metrics=machine.look())

    def _send(self) -> None:
        failures = 0
        while True:
            last = self._closed.is_set()
            try:
                for each in self._spools:
                    while forward(each, self._experiment):
                        failures = 0
            except (TrackerError, OSError) as error:
                failures += 1
                # The first may be no more than a connection that the server has closed meanwhile.
                if failures == LAST_TRIES:
                    print(f"{error}; what it misses is kept", file=sys.stderr)
            else:
                failures = 0
            if last and (not failures or failures >= LAST_TRIES):
                break
            pause = min(LOOK_EVERY * 2 ** min(failures, 9), LONGEST_PAUSE)
            (time.sleep if last else self._closed.wait)(pause)
        for each in self._spools:
            each.close()


def _own_tags(row: Row, settings: Mapping[str, Setting]) -> dict[str, str]:
    """What a trial's tags say of it that those of its study do not."""
    arm = {ARM: str(row.params[ARM])} if ARM in row.params else {}
    return arm | ({TAG_RECIPE: str(settings["recipe"])} if "recipe" in settings else {})


def synchronise(
    uri: str, study: str, study_id: str, folder: Path, artifacts: Path | None = None, at_work: bool = False
) -> int:
    """Send what drivers that are gone have left, and end the runs that they left RUNNING; return how many events.

    A driver that lives is left to send what is its own; where one is `at_work`, maybe on another machine, no run is
    ended. Raises TrackerError where nobody answers.
    """
    experiment = Experiment(uri, study, study_id, artifacts)
    left, living = Spool.left(folder)
    sent = 0
    try:
        for each in left:
            say_last_words(each, living)
            while count := forward(each, experiment):
                sent += count
    finally:
        for each in left:
            each.close()
    if living:
        print(f"drivers at work on {study}: {living}; they send what is theirs themselves", file=sys.stderr)
    elif not at_work:
        experiment.end_running()
    return sent


def set_aside(uri: str, study: str, aside: str) -> None:
    """Rename the study's experiment, its runs ended. Raises TrackerError where nobody answers."""
    Experiment(uri, study, "").set_aside(aside)


def forward(spool: Spool, experiment: Experiment) -> int:
    """Send a spool's next events, and note that; return how many there were. What is refused is set aside.

    Raises TrackerError where they have to wait.
    """
    events = spool.read(CHUNK)
    if events:
        for event, reason in experiment.tell(events):
            spool.refuse(event, reason)
        spool.acknowledge()
    return len(events)


def say_last_words(left: Spool, living: int) -> None:
    """End what a driver had in hand that is gone without a word; the study too, where no other driver lives."""
    in_hand: dict[tuple[Kind, int], int] = {}
    driver, time = "", 0
    for event in left.everything():
        driver, time = event.get("driver", driver), event.get("time", time)
        match event:
            case {"do": "begin", "kind": kind, "number": number, "attempt": attempt}:
                in_hand[kind, number] = attempt
            case {"do": "end", "kind": kind, "number": number}:
                in_hand.pop((kind, number), None)
            case {"do": "close"}:
                return
    if driver:
        left.append(_last_words(driver, time, None if living else RUN_STATUS["RUNNING"], in_hand), durable=True)


def _last_words(driver: str, time: int, status: str | None, in_hand: Mapping[tuple[Kind, int], int]) -> Event:
    trials = [(kind, number, attempt) for (kind, number), attempt in in_hand.items()]
    return {"do": "close", "driver": driver, "time": time, "status": status, "in_hand": trials}
