"""Drivers of toy studies in processes of their own, with a fault put in at a seam."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import mlflow
import optuna

from studies.machinery import lease as leases
from studies.machinery import ledger as ledgers
from studies.machinery.lease import Lease
from studies.machinery.ledger import Ledger
from studies.machinery.tracking import Recorder
from tests.machinery.toy_study import run_toy

PROCESSES = multiprocessing.get_context("forkserver")
# Forked from a process that has imported everything, a driver starts at once.
PROCESSES.set_forkserver_preload(["tests.faults.drivers", "ray.tune"])


class Seam(NamedTuple):
    """A place in a driver's work where a fault may strike: before or after a call."""

    when: str
    owner: object
    call: str

    def __str__(self):
        owner = getattr(self.owner, "__name__", str(self.owner)).rpartition(".")[2]
        return f"{self.when} {owner}.{self.call}"


def both(owner, call):
    return [Seam("before", owner, call), Seam("after", owner, call)]


LEDGER_SEAMS = [
    *both(optuna.Study, "ask"),
    *both(ledgers, "suggest"),
    Seam("after", Ledger, "next"),
    *both(Ledger, "report"),
    *both(Ledger, "note_of"),
    Seam("after", Ledger, "should_prune"),
    *both(optuna.Study, "tell"),
    Seam("after", Ledger, "end"),
]
RECORDER_SEAMS = [*both(Recorder, "begin"), *both(Recorder, "log"), *both(Recorder, "end")]
TRACKER_SEAMS = [
    *both(mlflow.MlflowClient, "create_run"),
    *both(mlflow.MlflowClient, "log_batch"),
    *both(mlflow.MlflowClient, "set_terminated"),
]
LAST_SEAMS = [*both(Recorder, "__exit__"), *both(Lease, "__exit__")]
SEAMS = LEDGER_SEAMS + RECORDER_SEAMS + TRACKER_SEAMS + LAST_SEAMS


SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}


class Fault(NamedTuple):
    """What happens at a seam, the nth time that the driver comes there."""

    seam: int
    """Of SEAMS."""
    nth: int = 1
    act: str = "kill"
    """`kill` ends the driver with no word; `freeze` stops it until it is told to go on; `pause` waits there for `go`;
    `jump H` moves its clock by H hours."""


def put_in(fault, out):
    """Have the fault strike in this process."""
    seam = SEAMS[fault.seam]
    original = getattr(seam.owner, seam.call)
    count = 0

    def strike():
        nonlocal count
        count += 1
        if count != fault.nth:
            return
        if fault.act in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.act])
            return
        if fault.act.startswith("jump"):
            jump(float(fault.act.split()[1]))
            return
        (out / "at-seam").touch()
        while not (out / "go").exists():
            time.sleep(0.01)

    def hooked(*args, **kwargs):
        if seam.when == "before":
            strike()
        result = original(*args, **kwargs)
        if seam.when == "after":
            strike()
        return result

    setattr(seam.owner, seam.call, hooked)


def jump(hours):
    """Move the clock of this process, as far as it looks at one."""
    before = time.time

    class Moved(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(hours=hours)

    time.time = lambda: before() + 3600 * hours
    optuna.storages._rdb.storage.datetime = leases.datetime = Moved


def drive(out, trials, fault, environment, settings):
    os.environ.update(environment)
    with (out / "driver.err").open("a", buffering=1) as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
        os.dup2(log.fileno(), sys.stdout.fileno())
        if fault is not None:
            put_in(fault, out)
        try:
            run_toy(out, trials, **settings)
        except KeyboardInterrupt:
            status = 130
        except BaseException:  # noqa: BLE001 -- whatever it was, it is the driver's end, and the test reads it
            traceback.print_exc()
            status = 1
        else:
            status = 0
    os._exit(status)


class Drivers:
    """Starts drivers of one study, with the same command each time."""

    def __init__(self, out: Path, trials: int, environment, **settings):
        self.out, self.trials, self.environment, self.settings = out, trials, environment, settings
        self._started = []

    def start(self, fault=None, **settings):
        """Start a driver, and return its process."""
        arguments = (self.out, self.trials, fault, self.environment, {**self.settings, **settings})
        process = PROCESSES.Process(target=drive, args=arguments)
        process.start()
        self._started.append(process)
        return process

    def run(self, fault=None, limit=120, **settings):
        """Run a driver to its end, and return its exit status, negative where a signal ended it."""
        process = self.start(fault, **settings)
        process.join(limit)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"the driver was still at work after {limit} s:\n{self.said()}")
        return process.exitcode

    def end(self):
        """Kill what is still there of all drivers."""
        for process in self._started:
            process.kill()
            process.join()

    def said(self):
        """What all drivers wrote to the terminal."""
        return (self.out / "driver.err").read_text()
