"""Which trial comes next, and which is given up: Optuna's samplers and pruners, held to a law.

The law: what a trial draws hangs on the study's seed, the trial's number and the trials in the ledger, and on nothing
that a process remembers. A search that was killed, even between two draws of one trial, goes on as if it had not been.
"""

import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner, WilcoxonPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from scipy.stats import qmc

from hdml_core.config import Setting
from studies.machinery.records import ARM
from studies.machinery.space import Choice, Space, ends, is_active, of_arm, quantile, suggest

STARTUP = 8
"""Trials drawn at random before a model of them says where to look."""
POPULATION = 16
"""Trials in a generation of NSGA-II: a study has dozens of trials, not thousands."""
GP_NEWEST = 200
"""Trials that a Gaussian process looks back on; its time grows with the cube of their number."""
GRID_POINTS = 5
"""Values of a dimension on a grid, where it is none of a few choices."""

ONE_GOAL = ("cmaes",)
"""Samplers that know neither several goals nor limits."""
WHOLE = ("nsga2", "hyperband")
"""Samplers and pruners that keep account of the study as a whole, and can't be had for each arm apart."""
PARTS = ("wilcoxon",)
"""Pruners whose steps are the parts of a trial, its folds and seeds; those of the others are its epochs."""

CELL = "grid:cell"
RETRY_OF = "retry_of"
"""Note of a row that another, which failed, is tried again in."""


class Steady(BaseSampler):
    """A sampler of Optuna's, made anew for each draw with a seed of the draw's own, and told the space.

    Left alone, Optuna infers the space from past trials, and there a setting whose range was widened is lost. What is
    searched at some points only is drawn by itself. None of the samplers it is for has anything to do before or after
    a trial.
    """

    def __init__(self, make: Callable[..., BaseSampler], space: Space, seed: int, number: int) -> None:
        self._make = make
        self._space = space
        self._entropy = (seed, number)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return what is searched at every point."""
        everywhere = {name: dimension for name, dimension in sorted(self._space.items()) if not dimension.when}
        stand_in = FixedTrial({name: ends(dimension)[0] for name, dimension in everywhere.items()})
        suggest(stand_in, everywhere)
        return {name: found for name, found in stand_in.distributions.items() if not found.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw jointly what is searched at every point, or nothing while there is too little to go by."""
        return self._seeded().sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one setting by itself, whatever else was drawn."""
        sampler = self._seeded(zlib.crc32(param_name.encode()))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _seeded(self, *entropy: int) -> BaseSampler:
        seed = np.random.SeedSequence((*self._entropy, *entropy)).generate_state(1)[0]
        return self._make(seed=int(seed))


class GaussianProcess(GPSampler):
    """Expected improvement under a Gaussian process, of the newest trials and the best."""

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw jointly."""
        self._number = trial.number
        return super().sample_relative(study, trial, search_space)

    def _sample_relative_impl(
        self,
        study: Study,
        completed_trials: list[FrozenTrial],
        running_trials: list[FrozenTrial],
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        looked_at = {trial.number: trial for trial in completed_trials[-GP_NEWEST:]}
        for goal, direction in enumerate(study.directions):
            sign = 1 if direction == StudyDirection.MAXIMIZE else -1
            best = max(completed_trials, key=lambda trial: sign * trial.values[goal])
            looked_at[best.number] = best
        # What a killed driver had drawn of this very trial must not keep it away from there.
        others = [trial for trial in running_trials if trial.number != self._number]
        return super()._sample_relative_impl(study, list(looked_at.values()), others, search_space)


class CmaEs(CmaEsSampler):
    """Covariance matrix adaptation, of the numbers; choices are drawn at random. Its state is in the ledger."""

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw the numbers jointly."""
        numbers = {name: d for name, d in search_space.items() if not isinstance(d, CategoricalDistribution)}
        return super().sample_relative(study, trial, numbers)


class Nsga2(NSGAIISampler):
    """Evolution toward the Pareto front. Its generations are in the ledger."""

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        """Return the parents in the order in which the ledger will give them back: that of their numbers."""
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


class Grid(RandomSampler):
    """Each cell of a grid once, shuffled by the seed, without those that were points to try first.

    Optuna's own knows no settings that are searched at some points only, and can't be told and asked to its end.
    """

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(seed)
        self._cells = grid(space)
        np.random.default_rng(seed).shuffle(self._cells)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Give a trial that has neither a cell nor a point of its own the next cell."""
        if trial.system_attrs.keys().isdisjoint((CELL, "fixed_params")):
            # None is left where a driver was killed right here, and another took the last: then one is tried twice.
            cell = (self.left(study) or self._cells)[0]
            study._storage.set_trial_system_attr(trial._trial_id, CELL, cell)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the setting in the trial's cell."""
        return study._storage.get_trial(trial._trial_id).system_attrs[CELL][param_name]

    def left(self, study: Study) -> list[dict[str, Setting]]:
        """The cells that no trial was begun in or waits for."""
        taken = {
            frozenset(trial.system_attrs.get(CELL, trial.system_attrs.get("fixed_params", trial.params)).items())
            for trial in study._storage.get_all_trials(study._study_id, deepcopy=False)
        }
        return [cell for cell in self._cells if frozenset(cell.items()) not in taken]


class Sobol(RandomSampler):
    """A scrambled Sobol sequence, of which each trial has the point of its number.

    Optuna's own counts the points drawn, also those of a driver that was killed before it could use them.
    """

    def __init__(self, space: Space, seed: int, number: int) -> None:
        super().__init__(seed)
        sequence = qmc.Sobol(len(space), rng=seed)
        if number > 0:  # scipy can't skip none
            sequence.fast_forward(number)
        shares = zip(sorted(space.items()), sequence.random()[0].tolist(), strict=True)
        self._point = {name: quantile(dimension, share) for (name, dimension), share in shares}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the setting at the trial's point."""
        return self._point[param_name]


class OneArm(Study):
    """A study as it would be without the trials of its other arms."""

    def __init__(self, study: Study, arm: str) -> None:
        self.__dict__.update(study.__dict__)
        self._arm = arm

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [trial for trial in super()._get_trials(deepcopy, states, use_cache) if arm_of(trial) == self._arm]

    def _get_best_trial(self, deepcopy: bool) -> FrozenTrial:
        complete = [trial for trial in self._get_trials(deepcopy, (TrialState.COMPLETE,)) if within_limits(trial)]
        if not complete:
            raise ValueError("no trial of the arm is COMPLETE within its limits")
        sign = 1 if self.direction == StudyDirection.MAXIMIZE else -1
        return max(complete, key=lambda trial: sign * trial.values[0])


class Arms(BaseSampler):
    """As many trials for each arm, the arm drawn by a sampler that knows of no other."""

    def __init__(self, make: Callable[[Space, int, int], BaseSampler], space: Space, seed: int) -> None:
        self._make = make
        self._space = space
        self._seed = seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Settle which arm it is; return what that arm's sampler draws jointly."""
        self._arm = arm_of(trial) or self._next_arm(study, trial)
        before = [other for other in study.get_trials(deepcopy=False)[: trial.number] if arm_of(other) == self._arm]
        self._of_arm = self._make(of_arm(self._space, self._arm), self._seed, len(before))
        return self._of_arm.infer_relative_search_space(OneArm(study, self._arm), trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw jointly, as the arm's sampler does."""
        return self._of_arm.sample_relative(OneArm(study, self._arm), trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the arm, or draw as the arm's sampler does."""
        if param_name == ARM:
            return self._arm
        return self._of_arm.sample_independent(OneArm(study, self._arm), trial, param_name, param_distribution)

    def _next_arm(self, study: Study, trial: FrozenTrial) -> str:
        """The arm with the fewest trials, the first of several."""
        arms = self._space[ARM]
        assert isinstance(arms, Choice)
        others = [other for other in counted(study.get_trials(deepcopy=False)) if other.number != trial.number]
        taken = Counter(map(arm_of, others))
        return str(min(arms.values, key=lambda arm: taken[str(arm)]))


class WithinArm(BasePruner):
    """A pruner that compares a trial with those of its own arm."""

    def __init__(self, pruner: BasePruner) -> None:
        self._pruner = pruner

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial is given up."""
        arm = arm_of(trial)
        return self._pruner.prune(study if arm is None else OneArm(study, arm), trial)


def arm_of(trial: FrozenTrial) -> str | None:
    """The arm that a trial is of, or will be; None in a study without arms, or where it is not settled yet."""
    return trial.params.get(ARM) or trial.system_attrs.get("fixed_params", {}).get(ARM)


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that count toward a budget: those that FAILed and are tried again do not."""
    retried = {trial.user_attrs[RETRY_OF] for trial in trials if RETRY_OF in trial.user_attrs}
    return [trial for trial in trials if trial.number not in retried]


def within_limits(trial: FrozenTrial) -> bool:
    """Whether a trial is above none of the study's limits."""
    return all(excess <= 0 for excess in trial.constraints.values())


def wilcoxon() -> BasePruner:
    """Signed-rank test against the best trial over their parts; it gives up after four that are all worse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return WilcoxonPruner(p_threshold=0.1)


SAMPLERS: Mapping[str, Callable[[Space, int, int], BaseSampler]] = {
    # Running trials count as bad ones.
    "tpe": partial(Steady, partial(TPESampler, n_startup_trials=STARTUP, multivariate=True, constant_liar=True)),
    "gp": partial(Steady, partial(GaussianProcess, n_startup_trials=STARTUP, warn_independent_sampling=False)),
    "cmaes": partial(Steady, partial(CmaEs, warn_independent_sampling=False)),
    "nsga2": partial(Steady, partial(Nsga2, population_size=POPULATION)),
    "random": partial(Steady, RandomSampler),
    "grid": lambda space, seed, number: Grid(space, seed),
    "qmc": Sobol,
}
PRUNERS: Mapping[str, Callable[[int], BasePruner]] = {
    "median": lambda steps: MedianPruner(n_startup_trials=4, n_warmup_steps=2),
    "halving": lambda steps: SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    # Left to find it out, Hyperband prunes nothing until the first trial has ended.
    "hyperband": lambda steps: HyperbandPruner(min_resource=1, max_resource=steps, reduction_factor=3),
    "wilcoxon": lambda steps: wilcoxon(),
    "none": lambda steps: NopPruner(),
}


def make_sampler(name: str, space: Space, seed: int, number: int) -> BaseSampler:
    """What draws trial `number` of a study with this space and seed."""
    if ARM in space and name != "grid":  # each cell of a grid is of an arm
        return Arms(SAMPLERS[name], space, seed)
    return SAMPLERS[name](space, seed, number)


def exhausted(sampler: BaseSampler, study: Study) -> bool:
    """Whether there is nothing left to begin: each cell of a grid was begun, and no point waits to be."""
    if not isinstance(sampler, Grid):
        return False
    return not sampler.left(study) and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,))


def make_pruner(name: str, steps: int) -> BasePruner:
    """What gives up trials that report `steps` times in all, by what other trials of their arm reported."""
    return WithinArm(PRUNERS[name](steps))


def grid(space: Space) -> list[dict[str, Setting]]:
    """Each combination of all choices and GRID_POINTS of each other dimension, evenly in its own scale."""
    cells: list[dict[str, Setting]] = [{}]
    for name, dimension in space.items():
        shares = (i / (GRID_POINTS - 1) for i in range(GRID_POINTS))
        values = dimension.values if isinstance(dimension, Choice) else [quantile(dimension, share) for share in shares]
        steps = [{name: value} for value in dict.fromkeys(values)]
        cells = [cell | step for cell in cells for step in (steps if is_active(dimension, cell) else [{}])]
    return cells
