"""What was published of a data set and what studies measured on its test classes, side by side."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from dashboards import DashboardError
from dashboards.protocol import Protocol, protocol
from dashboards.published import Figure, method_name, published, rank, rival
from dashboards.runs import DATA, StudyRuns, Tracker, TrialRun, among
from studies.machinery.intervals import Interval, interval, paired
from studies.machinery.records import GPU_SECONDS, PAPER, QUALITIES, SECONDS, TAG_REASON, TEST

FLOOR = "floor"
GOAL = QUALITIES[0]


@dataclass(frozen=True)
class Arm:
    """A method in a study, measured on the test classes."""

    study: str
    opening: str
    method: str
    protocol: Protocol
    trainings: Mapping[int, TrialRun]
    """By seed."""
    tuned: int
    """How many trials its settings were chosen from."""
    gpu_hours: float
    cpu_hours: float
    """Of work where no GPU was used."""

    def values(self, metric: str, split: str = TEST) -> dict[int, float]:
        """A metric by seed, of the trainings that have it."""
        name = f"{split}/{metric}"
        return {seed: run.metrics[name] for seed, run in self.trainings.items() if name in run.metrics}

    def honest(self, metric: str) -> Interval | None:
        """Its mean on the test classes, with its interval."""
        values = self.values(metric)
        return interval([*values.values()]) if values else None

    def paper_mode(self, metric: str) -> float | None:
        """Its mean in paper mode, where that was asked for."""
        values = self.values(metric, PAPER)
        return fmean(values.values()) if values else None


@dataclass(frozen=True)
class Difference:
    """What an arm gains in GOAL over its rival, the loss that it builds on, in the same study."""

    arm: Arm
    rival: Arm
    ours: Interval
    """Paired by seed."""
    published: Figure | None


@dataclass(frozen=True)
class Comparison:
    """All that a table says."""

    dataset: str
    metrics: Sequence[str]
    arms: Sequence[Arm]
    left_out: Sequence[str]
    """Trainings that did not end."""

    @property
    def figures(self) -> Mapping[str, Mapping[str, Figure]]:
        """What was published, by method and metric."""
        return published().get(self.dataset, {})

    @property
    def methods(self) -> list[str]:
        """All methods, in the table's order."""
        return sorted({*self.figures, *(arm.method for arm in self.arms)}, key=rank)

    def of(self, method: str) -> list[Arm]:
        """A method in every study that has it."""
        return [arm for arm in self.arms if arm.method == method]

    def difference(self, arm: Arm) -> Difference | None:
        """What an arm gains over its rival, where both have a seed in common."""
        for other in self.of(rival(arm.method) or ""):
            ours = paired(arm.values(GOAL), other.values(GOAL))
            if other.study == arm.study and ours is not None:
                both = [self.figures.get(each.method, {}).get(GOAL) for each in (arm, other)]
                return Difference(arm, other, ours, _minus(*both))
        return None


def compare(tracker: Tracker, dataset: str, studies: Sequence[str] = ()) -> Comparison:
    """Collect the studies that are named, else the data set's own, table_DATASET.

    Raises DashboardError for a data set or a study that is unknown, of other data, without arms, or not opened yet.
    """
    if dataset not in published() and dataset not in (known := tracker.datasets()):
        raise DashboardError(
            f"unknown data set {dataset!r}: published or in MLflow are {among(dataset, sorted({*published(), *known}))}"
        )
    arms: list[Arm] = []
    left_out: list[str] = []
    for name in dict.fromkeys(studies or [f"table_{dataset}"]):
        study = tracker.study(name)
        of_study = list(arms_of(study, dataset))
        arms += of_study
        ended = {(arm.method, seed) for arm in of_study for seed in arm.trainings}
        for run in study.opened():
            if (run.arm, seed_of(run)) not in ended:
                what = (name, method_name(run.arm or "?"), f"seed {seed_of(run)}", run.state, run.tags.get(TAG_REASON))
                left_out.append(", ".join(filter(None, what)))
    return Comparison(dataset, _metrics(dataset, arms), arms, left_out)


def arms_of(study: StudyRuns, dataset: str) -> Iterator[Arm]:
    """Every method of a study's newest opening, and the frozen features alone where they were measured."""
    _demand_data(study, dataset)
    opened = study.opened()
    if not opened:
        raise DashboardError(
            f"study {study.name!r} must have opened its test classes, got no training on them that is COMPLETE: run it "
            "to the end"
        )
    ended = [run for run in opened if run.ended]
    if any(run.arm is None for run in ended):
        raise DashboardError(
            f"a table is of a study with arms, and the trainings of study {study.name!r} name none: python -m studies "
            f"show {study.name} shows what it found"
        )
    for method in dict.fromkeys(run.arm for run in ended if run.arm):
        trainings = {seed_of(run): run for run in ended if run.arm == method}
        searched = [run for run in study.runs if run.kind == "search" and run.arm == method]
        paid = searched + [run for run in opened if run.arm == method]
        yield Arm(
            study.name,
            ended[0].kind,
            method,
            protocol(next(iter(trainings.values()))),
            dict(sorted(trainings.items())),
            len(searched),
            sum(run.metrics.get(GPU_SECONDS, 0.0) for run in paid) / 3600,
            sum(run.metrics.get(SECONDS, 0.0) for run in paid if not run.metrics.get(GPU_SECONDS)) / 3600,
        )
    for run in [run for run in study.runs if run.kind == FLOOR and run.ended and f"{TEST}/{GOAL}" in run.metrics][:1]:
        yield Arm(study.name, FLOOR, FLOOR, protocol(run), {seed_of(run): run}, 0, 0.0, 0.0)


def seed_of(run: TrialRun) -> int:
    """The seed that a run was trained with."""
    return int(run.params["seed"])


def _demand_data(study: StudyRuns, dataset: str) -> None:
    for other in {run.params.get(DATA, "?") for run in study.runs} - {dataset}:
        raise DashboardError(
            f"study {study.name!r} must be of {dataset}, got {other}: python -m dashboards table {other} --study "
            f"{study.name}"
        )


def _metrics(dataset: str, arms: Sequence[Arm]) -> list[str]:
    """Return the metrics of the paper's table; of data that it does not have, the same with what K there are."""
    for figures in published().get(dataset, {}).values():
        return list(figures)
    names = {name for arm in arms for run in arm.trainings.values() for name in run.metrics}
    ks = sorted({int(k) for name in names for k in re.findall(rf"{TEST}/recall_at_(\d+)$", name)})
    return ["nmi", "f1", *(f"recall_at_{k}" for k in ks)]


def _minus(ours: Figure | None, theirs: Figure | None) -> Figure | None:
    if ours is None or theirs is None:
        return None
    return Figure(ours.percent - theirs.percent, ours.confirmed and theirs.confirmed)
