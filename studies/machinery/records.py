"""The names that a study is written down under: metrics, tags, states and kinds of trials.

The ledger, the recorder and whoever reads them take every name from here; nothing else spells one. Needs neither
torch nor ray, so that a reader of results starts at once.
"""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from hdml_core.notation import EpochReport, RetrievalReport

Direction = Literal["maximize", "minimize"]
State = Literal["RUNNING", "COMPLETE", "PRUNED", "FAIL"]
FINISHED: tuple[State, ...] = ("COMPLETE", "PRUNED", "FAIL")

RUN_STATUS: Mapping[State, str] = {
    "RUNNING": "KILLED",
    "COMPLETE": "FINISHED",
    "PRUNED": "FINISHED",
    "FAIL": "FAILED",
}
"""Status of an MLflow run once nobody works on its trial; a row still RUNNING was interrupted and will be resumed."""

Kind = str
"""What a trial is of: `search`, its `baseline`, the `floor` under both; or an opening of the sealed test classes, such
as `confirm-1`, or `paper-2`, where they were looked at after every epoch, as published numbers mostly were."""

ARM = "arm"
"""Which of several variants side by side a trial is of: a parameter in the ledger, a tag in MLflow."""

NOTE = "note"
"""Kind of a run that is no trial's; one bears the name of an opening, once all of its trainings have ended."""

# Metrics are split/name.
TRAIN = "train"
HARDNESS = "hardness"
VALIDATION = "validation"
PART = "part"
"""Validation of one fold and seed, where a trial has several; `validation/...` is then the mean of those that ended."""
TEST = "test"
PAPER = "paper"
"""The test classes again, at the epoch that they themselves chose: the published way, and no honest number."""
SECONDS = "cost/seconds"
GPU_SECONDS = "cost/gpu_seconds"
PEAK_MEMORY = "cost/peak_memory_mb"
HELD_MEMORY = "cost/held_memory_mb"
"""What the worker held when it told the epoch; from one trial to the next it must not grow."""

LOSSES = ("j_m", "j_syn", "j_metric", "j_recon", "j_soft", "j_hard", "j_reg", "j_adv", "j_gen", "j_class")
"""Of all methods; a report has those of its own."""
HARDNESS_TRACE = (
    *("j_avg", "j_gen_avg", "kept", "w_real", "lambda_0_mean", "pulled_share"),
    *("synthetic_accuracy", "real_accuracy"),
)
QUALITIES = ("recall_at_1", "map_at_r", "nmi", "f1")
"""What tables show of a split, in their order."""
VALIDATED = tuple(f"{VALIDATION}/{name}" for name in (*QUALITIES, "r_precision"))
COSTS = (SECONDS, GPU_SECONDS, PEAK_MEMORY)
GOALS = (*VALIDATED, *COSTS)
"""What a study may pursue: the first of its goals is one of VALIDATED."""

TRACE_POINTS = 2000
"""At most so many points of each metric's per-step trace are kept of a trial."""

# Tags of an MLflow run.
TAG_STUDY = "study_id"
TAG_TRIAL = "trial"
TAG_ATTEMPT = "attempt"
TAG_DRIVER = "driver"
"""Of the parent run: which driver has the say of how it ends."""
TAG_KIND = "kind"
TAG_STATE = "state"
TAG_REASON = "reason"
TAG_COMMIT = "commit"
TAG_DATA = "data_digest"
TAG_IMAGE_SIDE = "image_side"
"""Median of the shorter side of the images as they were found, in pixels."""
TAG_RECIPE = "recipe"
TAG_DEVICE = "device"
TAG_HOST = "host"
TAG_SET_ASIDE = "checkpoint_set_aside"
"""Where checkpoints went that could not be read; the trial began anew."""


class Record(NamedTuple):
    """What a trial says after an epoch: the one message from a worker to ledger and recorder.

    Epochs, steps and seconds are counted over all parts of the trial, its folds and seeds, in the order told; when an
    epoch is told a second time they are the same.
    """

    epoch: int
    step: int
    seconds: float
    """Of work since the trial began, its resumptions included."""
    metrics: Mapping[str, float]
    part: int
    """Which fold and seed, counted from 0."""
    part_qualities: Mapping[str, float]
    """What this part alone reached, by the names in VALIDATED."""
    ends_part: bool
    trace: Mapping[str, tuple[tuple[int, float], ...]]
    """(step, value) points by metric."""
    tags: Mapping[str, str]
    last: bool


def retrieval_metrics(split: str, report: "RetrievalReport") -> dict[str, float]:
    """Name every number of a retrieval report on a split."""
    recalls = {f"{split}/recall_at_{k}": value for k, value in report.recall_at.items()}
    others = ("map_at_r", "r_precision", "nmi", "nmi_std", "f1", "f1_std")
    return recalls | {f"{split}/{name}": getattr(report, name) for name in others}


def training_metrics(report: "EpochReport") -> dict[str, float]:
    """Name the losses of an epoch, each the mean over its steps."""
    return {f"{TRAIN}/{name}": value for name, value in report.losses.items()}


def hardness_trace(
    report: "EpochReport", epochs: int, steps_before: int = 0
) -> dict[str, tuple[tuple[int, float], ...]]:
    """Name an epoch's hardness by step, thinned so that `epochs` such epochs keep within TRACE_POINTS.

    Steps are counted on from `steps_before`. An average is infinite until its first window closes; there is nothing to
    plot of it before.
    """
    points = {}
    for name, values in report.trace.items():
        first = steps_before + report.step - len(values)
        every = math.ceil(len(values) * epochs / TRACE_POINTS)
        points[f"{HARDNESS}/{name}"] = tuple(
            (first + i + 1, value) for i, value in enumerate(values) if (first + i) % every == 0 and value != math.inf
        )
    return points


def trial_id(number: int) -> str:
    """The trial number as it is written everywhere: in names, tags and folders.

    >>> trial_id(7)
    '0007'
    """
    return f"{number:04d}"


def short(value: object) -> str:
    """A parameter's value, to read.

    >>> short(31.6227766), short(12000.0), short(1e-05), short("median")
    ('31.6', '1.2e4', '1e-5', 'median')
    """
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.3g}") if isinstance(value, float) else str(value)


def describe(params: Mapping[str, object]) -> str:
    """A trial's parameters in a line, by the last part of their names.

    >>> describe({"hdml.alpha": 90.0, "hdml.beta": 1e4})
    'alpha=90 beta=1e4'
    """
    return " ".join(f"{name.rpartition('.')[2]}={short(value)}" for name, value in params.items())


def run_name(kind: Kind, number: int, params: Mapping[str, object]) -> str:
    """A trial's name in MLflow and on the terminal; what there is only one of is named by its kind.

    >>> run_name("search", 7, {"hdml.alpha": 90.0}), run_name("confirm-1", 0, {"seed": 1}), run_name("floor", 0, {})
    ('0007 alpha=90', 'confirm-1 0000 seed=1', 'floor')
    """
    if not params:
        return kind
    named = f"{trial_id(number)} {describe(params)}"
    return named if kind == "search" else f"{kind} {named}"
