"""What became of a worker: why its attempt at a trial ended, whether its machine was lost, what it last wrote."""

import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ray
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.tune.experiment import Trial
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from studies.machinery.redaction import redacted
from studies.machinery.store import Attempt, latest_attempt
from studies.machinery.worker import FreshProcessError, Job

LOG_TAIL = 64 * 2**10
"""Bytes of a worker's output that are kept, the last ones."""
PATIENCE = 5.0
"""Seconds for which a machine is asked for the output of a worker that it had."""


class Postmortem(NamedTuple):
    """How an attempt at a trial ended."""

    error: BaseException
    reason: str
    """In a line, as the ledger keeps it."""
    lost: bool
    """Whether the machine went, a spot instance taken back for example: no doing of the trial's."""
    text: str
    """All that is known, to read."""


def examine(trial: Trial, job: Job) -> Postmortem:
    """Find out what ended the latest attempt at a trial that Tune says has failed."""
    with Path(trial.pickled_error_file).open("rb") as file:
        raised = cloudpickle.load(file)
    error = raised.cause if isinstance(raised, RayTaskError) else raised
    attempt = latest_attempt(job.folder)
    if attempt is None or attempt.number != job.attempt:
        # It ended before its worker could say where it was.
        attempt = Attempt(job.attempt, [], str(job.folder), {})
    if isinstance(error, FreshProcessError):
        return Postmortem(error, _line(error), False, "")
    hung, written = _last_words(job, attempt)
    lost = _is_of_a_lost_machine(error, attempt)
    if hung:
        reason = f"hung: told nothing for {job.hang_seconds:.0f} s, see {Path(attempt.folder) / job.hung.name}"
    else:
        reason = ("lost its machine: " if lost else "") + _line(error)
    sections = {"what was raised": _told(raised), "where every thread was": hung, **written}
    text = "\n".join(f"== {title}\n{content.rstrip()}\n" for title, content in sections.items() if content)
    return Postmortem(error, redacted(reason), lost, redacted(text))


def _last_words(job: Job, attempt: Attempt) -> tuple[str, Mapping[str, str]]:
    """What the worker's watch wrote of a hang, and the end of its output by file, from whichever machine it was on."""
    hung = str(Path(attempt.folder) / job.hung.name)
    asked = {hung: 0, **attempt.logs}
    node = next(iter(attempt.nodes), "")
    if node in ("", ray.get_runtime_context().get_node_id()):
        found = tails(asked)
    elif _is_gone(node):
        found = dict.fromkeys(attempt.logs, "went with its machine")
    else:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        reading = ray.remote(num_cpus=0, max_retries=0)(tails).options(scheduling_strategy=there).remote(asked)
        try:
            found = ray.get(reading, timeout=PATIENCE)
        except (RayError, GetTimeoutError) as failure:
            found = {path: f"can't be read: {_line(failure)}" for path in attempt.logs}
    return found.pop(hung, ""), found


def tails(paths: Mapping[str, int]) -> dict[str, str]:
    """Return the ends of those files that are on this machine, in whole lines, none from before an offset in bytes."""
    found = {}
    for path, start in paths.items():
        if os.path.exists(path):
            with open(path, "rb") as file:
                cut = os.fstat(file.fileno()).st_size - LOG_TAIL
                file.seek(max(start, cut))
                if cut > start:
                    file.readline()  # half a line may hold half a secret
                found[path] = file.read().decode(errors="replace")
    return found


def _is_of_a_lost_machine(error: BaseException, attempt: Attempt) -> bool:
    """Whether a worker ended with its machine, or with one of its ranks'.

    Ray says so, names a node that is gone, or does not reach it any more; or a node that it was on is gone.
    """
    if isinstance(error, RayActorError) and (error.preempted or isinstance(error, ActorUnavailableError)):
        return True
    gone = [node["NodeID"] for node in ray.nodes() if not node["Alive"]]
    return any(node in attempt.nodes or node in str(error) for node in gone)


def _is_gone(node: str) -> bool:
    return not any(known["NodeID"] == node and known["Alive"] for known in ray.nodes())


def _told(raised: BaseException) -> str:
    """What was raised, with the worker's own traceback where it came from there."""
    return str(raised) if isinstance(raised, RayError) else "".join(traceback.format_exception(raised))


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
