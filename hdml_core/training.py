"""One step, one epoch, the running averages, and the loop.

A run leaves its results through the callable handed to `fit`, once an epoch. All that an epoch draws at random is a
function of (seed, epoch), so a run restored at an epoch goes on bitwise as if it had never stopped.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
import torch._functorch.config
from jaxtyping import Float, Int
from torch import Tensor, nn

from hdml_core import images
from hdml_core.config import Config, ConfigError, HdmlConfig
from hdml_core.datasets import LabelledSet
from hdml_core.methods import Method, Objective, method_of
from hdml_core.metric_losses import MetricLoss, build_metric_loss
from hdml_core.networks import Networks, build_networks, decayed, demand_channels, mix_precision
from hdml_core.notation import Averages, Batch, EpochReport, Hardness, HdmlLosses, RetrievalReport
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
    epoch: int = 0
    step: int = 0
    reports: list[EpochReport] = field(default_factory=list)


def new_run(config: Config, train: LabelledSet, device: torch.device | str = "cpu") -> Run:
    """Return a run at its start: networks drawn from the seed, averages at their start.

    Raises ConfigError where `train` has too few classes for a batch, or its rows or the weights don't fit the network.
    """
    device = torch.device(device)
    if train.kind == "images":
        demand_channels(config.network, train.values.shape[1])
        if config.network.frozen:
            raise ConfigError(
                f"network.frozen must be '' for a run on images, got {config.network.frozen!r}: frozen.open_data gives "
                "what the rest of the extractor takes"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        networks = build_networks(config.network, train.num_classes, train.feature_size, config.synthesis)
        metric_loss = build_metric_loss(config.loss, train.num_classes, config.network.embedding_size)
    if isinstance(metric_loss, nn.Module):
        networks.loss = metric_loss
    batches = RoleBatches(
        train.labels,
        metric_loss.layout,
        config.data.batch_size,
        config.optim.steps_per_epoch,
        config.seed,
    )
    dtype = torch.float64 if config.optim.precision == "float64" else torch.float32
    layout = torch.channels_last if config.optim.channels_last else torch.preserve_format
    networks.to(device, dtype).to(memory_format=layout)
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
        # Two tensors: the compiler would take one twice for a case of its own, and compile again when they differ.
        Averages(start, start.clone(), zero, zero, steps=0),
    )


def fit(run: Run, train: LabelledSet, validation: LabelledSet | None, report: Callable[[EpochReport], None]) -> None:
    """Train from where the run is to its last epoch; after each, validate, append the report and hand it out.

    Where `validation` is None, all there is trains, and nothing is measured.

    Raises NonFiniteLossError at the end of the epoch in which a J was not finite; that epoch is not reported.
    """
    while run.epoch < run.config.optim.epochs:
        report(take_epoch(run, train, validation))


def take_epoch(run: Run, train: LabelledSet, validation: LabelledSet | None) -> EpochReport:
    """Train for one epoch and validate; return the report, which the run has by then too.

    Raises NonFiniteLossError, as `fit` does.
    """
    begin = time.monotonic()
    return end_epoch(run, _train_epoch(run, train), validation, begin)


def end_epoch(run: Run, trace: Mapping[str, np.ndarray], validation: LabelledSet | None, begin: float) -> EpochReport:
    """Validate after an epoch's last step; append and return the report of what its steps came to, by name."""
    method = method_of(run.config, run.epoch)
    hardness = Hardness._fields if method.has_hardness else ()
    run.epoch += 1
    run.reports.append(
        EpochReport(
            epoch=run.epoch,
            step=run.step,
            losses={name: float(trace[name].mean()) for name in method.losses._fields},
            hardness={name: float(trace[name].mean()) for name in hardness},
            trace={name: tuple(trace[name].tolist()) for name in hardness},
            validation=None if validation is None else evaluate(run, validation),
            seconds=time.monotonic() - begin,
        )
    )
    return run.reports[-1]


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
    run.networks.train()
    trace = [_step(run, x, labels) for x, labels in batches_of(run, train)]
    # The one wait for the device in an epoch.
    return close_trace(run, torch.stack(trace).double().cpu().numpy())


def batches_of(run: Run, train: LabelledSet) -> Iterator[tuple[Float[Tensor, "b ..."], Int[Tensor, " b"]]]:
    """Yield the rows and the labels of each of the epoch's batches, as f takes them."""
    seed = np.random.SeedSequence([run.config.seed, run.epoch]).generate_state(1).item()
    random = torch.Generator().manual_seed(seed)
    for positions in run.batches.epoch(run.epoch):
        x = _inputs(run, train, positions, random)
        yield x, torch.from_numpy(train.labels[positions]).to(run.device, non_blocking=True)


def close_trace(run: Run, table: Float[np.ndarray, "steps values"]) -> dict[str, np.ndarray]:
    """Close the epoch's window; return the columns of what its steps gave by name. Raises NonFiniteLossError."""
    method = method_of(run.config, run.epoch)
    if method.has_hardness and run.config.hdml.average_window == 0:
        run.averages = _close_window(run.averages)
    names = (*method.losses._fields, *(Hardness._fields if method.has_hardness else ()))
    columns = dict(zip(names, table.T, strict=True))
    _check_finite(run, method, columns, first_step=run.step - len(table))
    return columns


def _step(run: Run, x: Float[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> Float[Tensor, " values"]:
    """Take one step: one forward pass, each J's gradient over its own networks, an optimiser step of each."""
    optim, method = run.config.optim, method_of(run.config, run.epoch)
    batch = Batch(x, labels, run.averages.j_avg, run.averages.j_gen_avg)
    compiles = optim.compile and "generator" in method.moves
    objective = _compiled(method.objective) if compiles else method.objective
    losses, hardness = objective(run.networks, batch, run.metric_loss, run.config)
    if hardness is not None:
        run.averages = averaged(run.averages, losses, hardness, run.config.hdml)

    gradients = {name: _gradients(run.optimisers[name], getattr(losses, j)) for name, j in method.moves.items()}
    for name, of_parameter in gradients.items():
        for group in run.optimisers[name].param_groups:
            group["lr"] = group["initial_lr"] * share_of_rate(run)
        for parameter, gradient in of_parameter:
            parameter.grad = gradient.clamp(-optim.clip, optim.clip)
        run.optimisers[name].step()
    run.step += 1
    return torch.stack([*losses, *(hardness or ())]).detach()


def share_of_rate(run: Run) -> float:
    """Return what the halvings before the run's next step have left of its learning rates."""
    halvings = sum(step <= run.step for step in run.config.optim.halve_at)
    return float(0.5**halvings)


def _gradients(optimiser: torch.optim.Adam, j: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    return list(zip(parameters, torch.autograd.grad(j, parameters, retain_graph=True), strict=True))


@cache
def _compiled(objective: Objective) -> Objective:
    # Several gradients are taken of one forward pass: its buffers have to outlive the first.
    torch._functorch.config.donated_buffer = False
    return torch.compile(objective)


def _optimisers(networks: Networks, config: Config) -> dict[str, torch.optim.Adam]:
    """Return Adam for the metric (f, g, and what the metric loss learns), the generator and the head.

    f and g decay here unless J_m has it.
    """
    optim = config.optim
    decay = 0.0 if config.hdml.weight_decay_in_j_m else optim.weight_decay
    decays = {id(parameter) for parameter in decayed(networks)}
    metric = []
    learns = (
        (networks.extractor, optim.lr_extractor),
        (networks.embedder, optim.lr_embedder),
        (networks.loss, optim.lr_loss),
    )
    for network, lr in learns:
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


def averaged(averages: Averages, losses: HdmlLosses, hardness: Hardness, hdml: HdmlConfig) -> Averages:
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
    """Return the rows at these positions as f takes them: the centre crops, or where `random` is given random ones."""
    data, dtype = run.config.data, run.averages.j_avg.dtype
    if rows.kind != "images":
        views = torch.zeros(len(positions), dtype=torch.int64)
        if random is not None:
            views.random_(rows.values.shape[1], generator=random)
        return rows.take(positions, run.device, views.numpy()).to(dtype)
    values = rows.take(positions, run.device)
    if random is None:
        return images.centre(values, data.crop_size).to(dtype)
    return images.augment(values, data.crop_size, data.flip, random).to(dtype)


def _check_finite(run: Run, method: Method, columns: dict[str, np.ndarray], first_step: int) -> None:
    """Raise for the first step at which a J was not finite; of several there, the first to be computed."""
    table = np.stack([columns[name] for name in method.losses._fields])
    bad = ~np.isfinite(table)
    if not bad.any():
        return
    step = int(bad.any(axis=0).argmax())
    name = method.losses._fields[int(bad[:, step].argmax())]
    schedule = ""
    if method.has_hardness:
        hdml, (j_avg, j_gen) = run.config.hdml, (columns[name][step] for name in ("j_avg", "j_gen_avg"))
        schedule = f": alpha {hdml.alpha:g}, beta {hdml.beta:g}, J_avg {j_avg:g}, J_gen {j_gen:g}"
    raise NonFiniteLossError(
        f"{name} is {columns[name][step]} at epoch {run.epoch + 1}, step {first_step + step + 1}{schedule}. "
        "A lower learning rate or optim.clip often helps."
    )
