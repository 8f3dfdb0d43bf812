"""One step, one epoch, the running averages, and the loop.

A run leaves its results through the callable handed to `fit`, once an epoch. All that an epoch draws at random is a
function of (seed, epoch), so a run restored at an epoch goes on bitwise as if it had never stopped.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch._functorch.config
from jaxtyping import Float, Int
from torch import Tensor, nn

from hdml_core import images
from hdml_core.config import Config, HdmlConfig
from hdml_core.datasets import LabelledSet
from hdml_core.metric_losses import METRIC_LOSSES, MetricLoss
from hdml_core.networks import Networks, build_networks, demand_channels, mix_precision
from hdml_core.notation import Averages, EpochReport, Hardness, Losses, RetrievalReport
from hdml_core.objective import decayed, hdml_losses, plain_losses
from hdml_core.retrieval import evaluate_retrieval
from hdml_core.sampling import RoleBatches

EVALUATION_ROWS = 512
"""Rows embedded at once in evaluation; results do not depend on it."""


class NonFiniteLossError(FloatingPointError):
    """A J came out infinite or NaN; the message says which, where, and under what schedule."""


@dataclass
class Run:
    """A run of training: its config, what learns, and how far it is. `checkpoint` keeps and restores all of it."""

    config: Config
    device: torch.device
    networks: Networks
    metric_loss: MetricLoss
    batches: RoleBatches
    optimisers: dict[str, torch.optim.Adam]
    averages: Averages
    objective: Callable[..., tuple[Losses, Hardness]]
    epoch: int = 0
    step: int = 0
    reports: list[EpochReport] = field(default_factory=list)


def new_run(
    config: Config, train: LabelledSet, device: torch.device | str = "cpu", rank: int = 0, world: int = 1
) -> Run:
    """Return a run at its start: networks drawn from the seed, averages at their start.

    Raises ConfigError where `train` has too few classes for a batch, or images or weights don't fit the network.
    """
    device = torch.device(device)
    if train.feature_size is None:
        demand_channels(config.network, train.values.shape[1])
    metric_loss = METRIC_LOSSES[config.loss.name](config.loss)
    batches = RoleBatches(
        train.labels,
        metric_loss.layout,
        config.data.batch_size,
        config.optim.steps_per_epoch,
        config.seed,
        rank,
        world,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        networks = build_networks(config.network, train.num_classes, train.feature_size)
    dtype = torch.float64 if config.optim.precision == "float64" else torch.float32
    layout = torch.channels_last if config.optim.channels_last else torch.preserve_format
    networks.to(device, dtype).to(memory_format=layout)
    if config.network.frozen:
        networks.extractor.requires_grad_(False)
    if config.optim.precision == "bfloat16":
        mix_precision(networks)
    start = torch.tensor(config.hdml.average_start, device=device, dtype=dtype)
    zero = torch.zeros_like(start)
    return Run(
        config,
        device,
        networks,
        metric_loss,
        batches,
        _optimisers(networks, config),
        Averages(start, start, zero, zero, steps=0),
        _compiled() if config.optim.compile else hdml_losses,
    )


def fit(run: Run, train: LabelledSet, validation: LabelledSet | None, report: Callable[[EpochReport], None]) -> None:
    """Train from where the run is to its last epoch; after each, validate, append the report and hand it out.

    Where `validation` is None, all there is trains, and nothing is measured.

    Raises NonFiniteLossError at the end of the epoch in which a J was not finite; that epoch is not reported.
    """
    while run.epoch < run.config.optim.epochs:
        begin = time.monotonic()
        trace = _train_epoch(run, train)
        run.epoch += 1
        run.reports.append(
            EpochReport(
                epoch=run.epoch,
                step=run.step,
                losses={name: float(trace[name].mean()) for name in _loss_names(run.config.hdml)},
                hardness={name: float(trace[name].mean()) for name in _hardness_names(run.config.hdml)},
                trace={name: tuple(trace[name].tolist()) for name in _hardness_names(run.config.hdml)},
                validation=None if validation is None else evaluate(run, validation),
                seconds=time.monotonic() - begin,
            )
        )
        report(run.reports[-1])


def evaluate(run: Run, rows: LabelledSet) -> RetrievalReport:
    """Return the retrieval quality of `rows` under the run's networks as they are, in inference mode."""
    z = embed(run, rows)
    labels = torch.from_numpy(rows.labels).to(run.device)
    return evaluate_retrieval(z, labels, run.config.retrieval.ks, run.config.retrieval.clusterings, run.config.seed)


@torch.no_grad()
def embed(run: Run, rows: LabelledSet) -> Float[Tensor, "m d"]:
    """Return the embeddings of all rows, of their centre crops, in inference mode."""
    run.networks.eval()
    chunks = [np.arange(i, min(i + EVALUATION_ROWS, len(rows))) for i in range(0, len(rows), EVALUATION_ROWS)]
    z = [run.networks.embedder(run.networks.extractor(_inputs(run, rows, chunk, None))) for chunk in chunks]
    run.networks.train()
    return torch.cat(z)


def _train_epoch(run: Run, train: LabelledSet) -> dict[str, np.ndarray]:
    """Take the epoch's steps; return the value of every J and of the hardness at each, by name."""
    hdml = run.config.hdml
    seed = np.random.SeedSequence([run.config.seed, run.epoch]).generate_state(1).item()
    random = torch.Generator().manual_seed(seed)
    run.networks.train()
    trace = []
    for positions in run.batches.epoch(run.epoch):
        x = _inputs(run, train, positions, random)
        labels = torch.from_numpy(train.labels[positions]).to(run.device)
        trace.append(_step(run, x, labels))
    if hdml.enabled and hdml.average_window == 0:
        run.averages = _close_window(run.averages)
    # The one wait for the device in an epoch.
    table = torch.stack(trace).double().cpu().numpy()
    columns = dict(zip((*Losses._fields, *Hardness._fields), table.T, strict=True))
    _check_finite(run, columns, first_step=run.step - len(trace))
    return columns


def _step(run: Run, x: Float[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> Float[Tensor, " values"]:
    """Take one step: one forward pass, each J's gradient over its own networks, three optimiser steps."""
    hdml, optim = run.config.hdml, run.config.optim
    weight_decay = optim.weight_decay if hdml.weight_decay_in_j_m else 0.0
    if hdml.enabled:
        averages = run.averages
        losses, hardness = run.objective(
            run.networks, x, labels, run.metric_loss, hdml, weight_decay, averages.j_avg, averages.j_gen_avg
        )
        moves = {"metric": losses.j_metric, "generator": losses.j_gen, "head": losses.j_class}
        run.averages = _averaged(averages, losses, hardness, hdml)
    else:
        losses = plain_losses(run.networks, x, run.metric_loss, weight_decay)
        hardness = Hardness(*torch.zeros(len(Hardness._fields), device=run.device, dtype=losses.j_m.dtype))
        moves = {"metric": losses.j_metric}

    gradients = {name: _gradients(run.optimisers[name], j) for name, j in moves.items()}
    halvings = sum(step <= run.step for step in optim.halve_at)
    for name, of_parameter in gradients.items():
        for group in run.optimisers[name].param_groups:
            group["lr"] = group["initial_lr"] * 0.5**halvings
        for parameter, gradient in of_parameter:
            parameter.grad = gradient.clamp(-optim.clip, optim.clip)
        run.optimisers[name].step()
    run.step += 1
    return torch.stack([*losses, *hardness]).detach()


def _gradients(optimiser: torch.optim.Adam, j: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    return list(zip(parameters, torch.autograd.grad(j, parameters, retain_graph=True), strict=True))


def _compiled() -> Callable[..., tuple[Losses, Hardness]]:
    # Three gradients are taken of one forward pass: its buffers have to outlive the first.
    torch._functorch.config.donated_buffer = False
    return torch.compile(hdml_losses)


def _optimisers(networks: Networks, config: Config) -> dict[str, torch.optim.Adam]:
    """Return Adam for the metric (f and g), the generator and the head; f and g decay here unless J_m has it."""
    optim = config.optim
    decay = 0.0 if config.hdml.weight_decay_in_j_m else optim.weight_decay
    decays = {id(parameter) for parameter in decayed(networks)}
    metric = []
    for network, lr in ((networks.extractor, optim.lr_extractor), (networks.embedder, optim.lr_embedder)):
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        for weight_decay, parameters in (
            (decay, [p for p in trained if id(p) in decays]),
            (0.0, [p for p in trained if id(p) not in decays]),
        ):
            metric.append({"params": parameters, "lr": lr, "weight_decay": weight_decay})
    groups = {
        "metric": [group for group in metric if group["params"]],
        "generator": [{"params": list(networks.generator.parameters()), "lr": optim.lr_generator}],
        "head": [{"params": list(networks.head.parameters()), "lr": optim.lr_head}],
    }
    for of_optimiser in groups.values():
        for group in of_optimiser:
            group["initial_lr"] = group["lr"]
    return {name: torch.optim.Adam(of_optimiser) for name, of_optimiser in groups.items()}


def _averaged(averages: Averages, losses: Losses, hardness: Hardness, hdml: HdmlConfig) -> Averages:
    """Take one step into the open window; where that fills it, close it."""
    j = losses.j_m * hardness.w_real if hdml.average_of == "weighted_j_m" else losses.j_m
    averages = averages._replace(
        sum_j_avg=averages.sum_j_avg + j.detach(),
        sum_j_gen=averages.sum_j_gen + losses.j_gen.detach(),
        steps=averages.steps + 1,
    )
    return _close_window(averages) if averages.steps == hdml.average_window else averages


def _close_window(averages: Averages) -> Averages:
    """The means of the window become the averages, and an empty window opens."""
    zero = torch.zeros_like(averages.sum_j_avg)
    return Averages(averages.sum_j_avg / averages.steps, averages.sum_j_gen / averages.steps, zero, zero, steps=0)


def _inputs(
    run: Run, rows: LabelledSet, positions: Int[np.ndarray, " b"], random: torch.Generator | None
) -> Float[Tensor, "b ..."]:
    """Return the rows at these positions as f takes them: augmented where `random` is given, else the centre crop."""
    values = torch.from_numpy(rows.values[rows.rows[positions]]).to(run.device)
    dtype = run.averages.j_avg.dtype
    data = run.config.data
    if rows.feature_size is not None:
        if random is None:
            return values[:, 0].to(dtype)
        views = torch.randint(values.shape[1], (len(values),), generator=random).to(run.device)
        return values[torch.arange(len(values), device=run.device), views].to(dtype)
    if random is None:
        return images.centre(values, data.crop_size).to(dtype)
    return images.augment(values, data.crop_size, data.flip, random).to(dtype)


def _loss_names(hdml: HdmlConfig) -> Sequence[str]:
    return Losses._fields if hdml.enabled else ("j_m", "j_metric")


def _hardness_names(hdml: HdmlConfig) -> Sequence[str]:
    return Hardness._fields if hdml.enabled else ()


def _check_finite(run: Run, columns: dict[str, np.ndarray], first_step: int) -> None:
    """Raise for the first step at which a J was not finite; of several there, the first to be computed."""
    table = np.stack([columns[name] for name in Losses._fields])
    bad = ~np.isfinite(table)
    if not bad.any():
        return
    step = int(bad.any(axis=0).argmax())
    name = Losses._fields[int(bad[:, step].argmax())]
    hdml = run.config.hdml
    raise NonFiniteLossError(
        f"{name} is {columns[name][step]} at epoch {run.epoch + 1}, step {first_step + step + 1}: "
        f"alpha {hdml.alpha:g}, beta {hdml.beta:g}, J_avg {columns['j_avg'][step]:g}, "
        f"J_gen {columns['j_gen_avg'][step]:g}. A lower learning rate or optim.clip often helps."
    )
