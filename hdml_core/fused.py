"""Several runs on frozen features at once: folds and seeds of a trial, or several trials. Each is what it is alone.

On a CPU each run has a core to itself, which its parameters stay near; what is small is not worth sharing between two.
Every run is bitwise what it is alone on one core. A GPU is not kept busy by one run: it takes the steps of all that are
of one shape as one model, their parameters stacked, each with its own batches, settings, averages and moments. The sum
of their losses has each run's own gradient. They are what they are alone but for rounding.

Between epochs a run is as any other: it can be saved, restored, and trained on by itself.
"""

import copy
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap

from hdml_core.config import ConfigError, to_settings
from hdml_core.datasets import LabelledSet
from hdml_core.methods import Objective, method_of
from hdml_core.metric_losses import TupleLoss
from hdml_core.networks import Networks
from hdml_core.notation import Averages, Batch, EpochReport, Hardness
from hdml_core.training import (
    NonFiniteLossError,
    Run,
    averaged,
    batches_of,
    close_trace,
    end_epoch,
    share_of_rate,
    take_epoch,
)

T = TypeVar("T")

OF_THE_OBJECTIVE = (
    *("hdml.alpha", "hdml.beta", "hdml.lambda_soft", "hdml.recon_weight"),
    *("daml.lambda_reg", "daml.lambda_adv", "daml.margin"),
    *("loss.margin", "loss.threshold", "loss.sharpness"),
)
"""Numbers in a method's formulas of which each run of a stack may have its own."""

AROUND_THE_OBJECTIVE = (
    *("seed", "data.fold", "data.resident", "optim.epochs", "optim.steps_per_epoch", "optim.clip", "optim.halve_at"),
    *("optim.lr_embedder", "optim.lr_generator", "optim.lr_head", "retrieval.ks", "retrieval.clusterings"),
)
"""Settings that no formula reads."""


def why_apart(runs: Sequence[Run]) -> str:
    """Return what keeps these runs from being trained at once, or nothing."""
    for run in runs:
        config = run.config
        if not isinstance(run.networks.extractor, nn.Identity):
            return "their extractor must be frozen: network.frozen must be 'all', or data.name 'features'"
        if isinstance(run.metric_loss, nn.Module):
            return f"loss.name must be a loss of tuples, got {config.loss.name!r}"
        if config.optim.compile:
            return "optim.compile must be False, got True"
        if config.optim.precision == "bfloat16":
            return "optim.precision must be float32 or float64, got 'bfloat16'"
    devices = sorted({str(run.device) for run in runs})
    return f"they must be on one device, got {', '.join(devices)}" if len(devices) > 1 else ""


def fit_together(
    runs: Sequence[Run],
    trains: Sequence[LabelledSet],
    validations: Sequence[LabelledSet | None],
    report: Callable[[int, EpochReport], None],
) -> None:
    """Train runs from where they are to their last epochs; after each epoch hand out their reports, in their order.

    Those that are behind come first, until all are at one epoch. A report's seconds are the run's share of the epoch's.

    Raises ConfigError for what `why_apart` returns, and NonFiniteLossError where a J of a run was not finite, once the
    others' reports of that epoch are handed out: without that run, they can go on.
    """
    if reason := why_apart(runs):
        raise ConfigError(f"runs that are trained at once: {reason}")
    take = _side_by_side if all(run.device.type == "cpu" for run in runs) else _stacked
    while behind := [k for k, run in enumerate(runs) if run.epoch < run.config.optim.epochs]:
        epoch = min(runs[k].epoch for k in behind)
        now = [k for k in behind if runs[k].epoch == epoch]
        begin = time.monotonic()
        ended = take([runs[k] for k in now], [trains[k] for k in now], [validations[k] for k in now])
        share = (time.monotonic() - begin) / len(now)
        for k, outcome in zip(now, ended, strict=True):
            if isinstance(outcome, EpochReport):
                runs[k].reports[-1] = outcome._replace(seconds=share)
                report(k, runs[k].reports[-1])
        for outcome in ended:
            if isinstance(outcome, NonFiniteLossError):
                raise outcome


Outcome = EpochReport | NonFiniteLossError


def _outcome(take: Callable[[], EpochReport]) -> Outcome:
    try:
        return take()
    except NonFiniteLossError as error:
        return error


# On a CPU ---------------------------------------------------------------------------------------------------------


def _side_by_side(
    runs: Sequence[Run], trains: Sequence[LabelledSet], validations: Sequence[LabelledSet | None]
) -> list[Outcome]:
    """Take an epoch of each run, as many at once as there are threads, each in one."""
    threads = torch.get_num_threads()
    epochs = [partial(take_epoch, *of_run) for of_run in zip(runs, trains, validations, strict=True)]
    try:
        with ThreadPoolExecutor(min(threads, len(runs)), initializer=partial(torch.set_num_threads, 1)) as pool:
            return list(pool.map(_outcome, epochs))
    finally:
        torch.set_num_threads(threads)


# On a GPU ---------------------------------------------------------------------------------------------------------


def _stacked(
    runs: Sequence[Run], trains: Sequence[LabelledSet], validations: Sequence[LabelledSet | None]
) -> list[Outcome]:
    """Take an epoch of each run, those of one shape as one model."""
    begin = time.monotonic()
    of_shape: dict[Hashable, list[int]] = {}
    # Who has more steps comes first, so that those that have steps left are always the first of a stack.
    for k in sorted(range(len(runs)), key=lambda k: -runs[k].batches.steps):
        of_shape.setdefault(_shape(runs[k]), []).append(k)
    tables: dict[int, np.ndarray] = {}
    for together in of_shape.values():
        found = _Stack([runs[k] for k in together]).train_epoch([trains[k] for k in together])
        tables |= dict(zip(together, found, strict=True))

    def ended(k: int) -> EpochReport:
        return end_epoch(runs[k], close_trace(runs[k], tables[k]), validations[k], begin)

    return [_outcome(partial(ended, k)) for k in range(len(runs))]


def _shape(run: Run) -> Hashable:
    """What runs of one stack have in common."""
    settings = to_settings(run.config)
    apart = [*OF_THE_OBJECTIVE, *AROUND_THE_OBJECTIVE]
    if not run.config.hdml.weight_decay_in_j_m:
        apart.append("optim.weight_decay")
    common = tuple((name, value) for name, value in settings.items() if name not in apart)
    sizes = tuple(value.shape for value in run.networks.state_dict().values())
    return common, sizes, id(method_of(run.config, run.epoch).objective), run.averages.steps


class _Objective(nn.Module):
    """A method's objective as a module of its networks, so that it can be called with the parameters of any run."""

    def __init__(self, networks: Networks, objective: Objective) -> None:
        super().__init__()
        self.networks = networks
        self.objective = objective

    def forward(self, batch: Batch, metric_loss: TupleLoss, config: Any) -> tuple[Tensor, ...]:
        losses, hardness = self.objective(self.networks, batch, metric_loss, config)
        return (*losses, *(hardness or ()))


class _Stack:
    """Runs of one shape as one model; their own parameters and buffers become views of what it stacks."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.method = method_of(runs[0].config, runs[0].epoch)
        self.objective = _Objective(runs[0].networks, self.method.objective)
        self.parameters = _shared([dict(run.networks.named_parameters()) for run in runs])
        self.buffers = _shared([dict(run.networks.named_buffers()) for run in runs])
        self.moves = {name: _JointAdam(runs, name) for name in self.method.moves}
        every = [to_settings(run.config) for run in runs]
        differing = [name for name in OF_THE_OBJECTIVE if len({settings[name] for settings in every}) > 1]
        like = runs[0].averages.j_avg
        self.own_values = {name: like.new_tensor([settings[name] for settings in every]) for name in differing}
        self.clips = like.new_tensor([run.config.optim.clip for run in runs])

    def train_epoch(self, trains: Sequence[LabelledSet]) -> list[Float[np.ndarray, "_ values"]]:
        """Take the epoch's steps; return each run's table of what its steps gave. Who has none left sits out."""
        batches = [batches_of(run, train) for run, train in zip(self.runs, trains, strict=True)]
        steps = [run.batches.steps for run in self.runs]
        rows = []
        for run in self.runs:
            run.networks.train()
        for step in range(steps[0]):
            active = sum(step < own for own in steps)
            rows.append(self._step([next(batch) for batch in batches[:active]]))
        for adam in self.moves.values():
            adam.hand_back()
        # The one wait for the device in an epoch.
        table = torch.cat(rows).double().cpu().numpy()
        starts = np.cumsum([0, *map(len, rows)])
        return [table[starts[:own] + k] for k, own in enumerate(steps)]

    def _step(
        self, batches: Sequence[tuple[Float[Tensor, "b ..."], Int[Tensor, " b"]]]
    ) -> Float[Tensor, "active values"]:
        """Take a step of the first runs, for which there are batches: `training._step` of all of them."""
        runs = self.runs[: len(batches)]
        x, labels = (torch.stack(of_runs) for of_runs in zip(*batches, strict=True))
        averages = _stacked_averages(runs)
        parameters = {name: value[: len(runs)].detach().requires_grad_() for name, value in self.parameters.items()}
        buffers, own_values = (
            {name: value[: len(runs)] for name, value in of_stack.items()}
            for of_stack in (self.buffers, self.own_values)
        )
        values = vmap(self._values)(parameters, buffers, own_values, Batch(x, labels, averages[0], averages[1]))
        losses: Any = self.method.losses(*values[: len(self.method.losses._fields)])
        if self.method.has_hardness:
            hardness = Hardness(*values[len(losses) :])
            averages = averaged(averages, losses, hardness, runs[0].config.hdml)

        gradients = {
            name: torch.autograd.grad(
                getattr(losses, j).sum(), [parameters[moved] for moved in self.moves[name].names], retain_graph=True
            )
            for name, j in self.method.moves.items()
        }
        for name, of_parameters in gradients.items():
            self.moves[name].step([self._clipped(gradient) for gradient in of_parameters])
        for k, run in enumerate(runs):
            j_avg, j_gen_avg, sum_j_avg, sum_j_gen = (part[k] for part in averages[:4])
            run.averages = Averages(j_avg, j_gen_avg, sum_j_avg, sum_j_gen, averages.steps)
            run.step += 1
        return torch.stack(values, dim=1).detach()

    def _values(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], own: Mapping[str, Tensor], batch: Batch
    ) -> tuple[Tensor, ...]:
        """Every J and the hardness of one run."""
        config, metric_loss = self.runs[0].config, self.runs[0].metric_loss
        for name, value in own.items():
            section, _, leaf = name.partition(".")
            config = _with(config, section, _with(getattr(config, section), leaf, value))
            metric_loss = _with(metric_loss, leaf, value) if section == "loss" else metric_loss
        state = {f"networks.{name}": value for name, value in (*parameters.items(), *buffers.items())}
        return functional_call(self.objective, state, (batch, metric_loss, config))

    def _clipped(self, gradient: Tensor) -> Tensor:
        bound = self.clips[: len(gradient)].view(-1, *[1] * (gradient.ndim - 1))
        return gradient.clamp(-bound, bound)


class _JointAdam:
    """The runs' optimisers of one name as one: their parameters and moments, in groups of equal settings."""

    def __init__(self, runs: Sequence[Run], name: str) -> None:
        self._owns = [run.optimisers[name] for run in runs]
        groups: dict[Hashable, dict[str, Any]] = {}
        self._leads: list[Run] = []
        """Of each group, a run that says what is left of its learning rate; the others halve it at the same steps."""
        for run, own in zip(runs, self._owns, strict=True):
            for group in own.param_groups:
                settings = {word: value for word, value in group.items() if word not in ("params", "lr")}
                key = (*settings.items(), run.config.optim.halve_at, run.step, run.batches.steps)
                if key not in groups:
                    groups[key] = {**settings, "lr": group["initial_lr"], "params": []}
                    self._leads.append(run)
                groups[key]["params"] += group["params"]
        self._adam = torch.optim.Adam(groups.values())
        for own in self._owns:
            self._adam.state.update(own.state)
        self._moved = [[parameter for group in own.param_groups for parameter in group["params"]] for own in self._owns]
        of_name = {id(parameter): name for name, parameter in runs[0].networks.named_parameters()}
        self.names = [of_name[id(parameter)] for parameter in self._moved[0]]
        """Of the parameters of a run that it moves."""

    def step(self, gradients: Sequence[Float[Tensor, "active ..."]]) -> None:
        """Take a step of the first runs, for which there are gradients, in the order of `names`."""
        for parameters in self._moved:
            for parameter in parameters:
                parameter.grad = None
        for j, gradient in enumerate(gradients):
            for parameters, of_run in zip(self._moved, gradient, strict=False):
                parameters[j].grad = of_run
        for group, lead in zip(self._adam.param_groups, self._leads, strict=True):
            group["lr"] = group["initial_lr"] * share_of_rate(lead)
        self._adam.step()

    def hand_back(self) -> None:
        """Give the moments to the runs' own optimisers."""
        for own, parameters in zip(self._owns, self._moved, strict=True):
            own.state.update({parameter: self._adam.state[parameter] for parameter in parameters})


def _shared(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of all runs stacked by name, and make each run's own a view of its part."""
    stacked = {name: torch.stack([of_run[name].detach() for of_run in tensors]) for name in tensors[0]}
    for k, of_run in enumerate(tensors):
        for name, own in of_run.items():
            own.data = stacked[name][k]
    return stacked


def _stacked_averages(runs: Sequence[Run]) -> Averages:
    of_parts = zip(*(run.averages[:4] for run in runs), strict=True)
    j_avg, j_gen_avg, sum_j_avg, sum_j_gen = (torch.stack(of_runs) for of_runs in of_parts)
    return Averages(j_avg, j_gen_avg, sum_j_avg, sum_j_gen, runs[0].averages.steps)


def _with(thing: T, name: str, value: object) -> T:
    """A copy with one attribute set, unchecked: a frozen dataclass would take no tensor for a number."""
    changed = copy.copy(thing)
    object.__setattr__(changed, name, value)
    return changed
