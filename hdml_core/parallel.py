"""One run on several GPUs, a process (a rank) for each, that comes to what it would have come to on one.

Every rank runs the same program over the same whole batches: rows, crops, losses, optimiser steps. Only the extractor
f, the dear part, is shared out: each rank computes the features of its slice of the rows, and gets those of the others.
What follows, N x N negatives included, is computed by all on all rows, so no loss and no method knows that there are
ranks, and the numbers are those of a single process but for the order of sums:

    y = (f(x_1), ..., f(x_w)),   dJ/dtheta = sum over ranks r of (dJ/dy_r) (dy_r/dtheta),   theta the parameters of f

Batch norm of f, where it learns, normalises by the moments of all rows. A checkpoint knows of no ranks either: a run
may be continued on any number.

    start(rank, world, address, port, device)
    run = new_run(config, train, device)
    share_out(run)
    if rank == 0: checkpoint.load(run, folder)
    agree(run)
    fit(run, train, validation, report)     # whose report begins with agree(run)
    stop()

Whatever computes f, so `fit`, `evaluate` and `embed`, takes all ranks: one that calls it alone waits for the others.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from hdml_core.errors import ConfigError
from hdml_core.notation import Averages
from hdml_core.training import Run

PATIENCE = 600.0
"""Seconds for which a rank waits for another: longer than the first takes to hand a report out."""


def start(
    rank: int, world: int, address: str, port: int, device: torch.device | str, patience: float = PATIENCE
) -> None:
    """Join the `world` ranks that meet at `address`, a host of rank 0, and `port`, a free one there.

    They speak by NCCL where the device is a GPU, each rank's own, and by Gloo on the CPU. Where a rank ends or is
    silent for `patience` seconds, the others do not go on: by Gloo they raise RuntimeError from what they wait in; by
    NCCL, which can't take work back from a GPU, they end, their last words in the log.

    Raises RuntimeError where the ranks do not all come within `patience` seconds, or the port is taken.
    """
    device, timeout = torch.device(device), timedelta(seconds=patience)
    if device.index is not None:
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, f"tcp://{address}:{port}", timeout, world, rank)
    # A first word among all: ranks that can't hear one another are known here, and none leaves while others still meet.
    dist.all_reduce(torch.zeros(1, device=device))


def stop() -> None:
    """Leave the ranks, where this process is one; it may start again."""
    if dist.is_initialized():
        dist.destroy_process_group()


def demand_extractor(run: Run) -> None:
    """Raise ConfigError where the run has no extractor to share out, its rows being features already."""
    if isinstance(run.networks.extractor, nn.Identity):
        raise ConfigError(
            "a run on several GPUs must train an extractor, which they share out: data.name must not be 'features', "
            f"nor network.frozen 'all', got {run.config.data.name!r} and {run.config.network.frozen!r}; "
            "give it one GPU, or a share of one"
        )


def share_out(run: Run) -> None:
    """Let the ranks compute the run's extractor together, from now on; its state dict keeps its names.

    Slices are contiguous and differ by one row at most; one may be empty. The gradients of f's parameters are summed
    in one go. The step takes them by torch.autograd.grad, with which the hooks of DistributedDataParallel never fire,
    and hooks on the parameters would count what a loss has of them beside f, such as weight decay, once for each rank.

    Raises ConfigError as `demand_extractor` does.
    """
    demand_extractor(run)
    extractor = run.networks.extractor
    batch_norms: list[nn.Module] = [layer for layer in extractor.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in batch_norms:
        layer.forward = partial(_batch_norm, layer)
    trained = [parameter for parameter in extractor.parameters() if parameter.requires_grad]
    # Collectives are kept out of what is compiled: f runs as it is, and the rest of the objective compiles around it.
    shared = partial(_features, extractor.forward, trained)
    extractor.forward = torch.compiler.disable(shared)  # type: ignore[no-untyped-call]


def agree(run: Run) -> None:
    """Give the runs of all ranks the whole state of rank 0's: networks, moments, averages, how far it is, reports.

    Called before `fit`, it hands on what rank 0 was restored to; called after each epoch, it keeps ranks equal bit by
    bit where their GPUs are not.
    """
    begun = [name for name, optimiser in run.optimisers.items() if optimiser.state]
    place = [(run.epoch, run.step, run.averages.steps, run.reports, begun)]
    dist.broadcast_object_list(place, src=0, device=run.device)
    run.epoch, run.step, window_steps, run.reports[:], begun = place[0]
    for name, optimiser in run.optimisers.items():
        if name not in begun:
            optimiser.state.clear()
        elif not optimiser.state:
            _make_moments(optimiser)
    # In one order: an optimiser that was restored has its moments in another.
    moments = [
        moment
        for optimiser in run.optimisers.values()
        for _, of_parameter in sorted(optimiser.state_dict()["state"].items())
        for _, moment in sorted(of_parameter.items())
    ]
    averages = {name: value.clone() for name, value in run.averages._asdict().items() if isinstance(value, Tensor)}
    tensors = [*run.networks.state_dict().values(), *moments, *averages.values()]
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        own = [tensor for tensor in tensors if tensor.dtype == dtype]
        # Adam counts its steps on the CPU, where NCCL can't fetch them.
        of_rank_0 = _at_once(partial(dist.broadcast, src=0), [tensor.to(run.device) for tensor in own])
        for tensor, value in zip(own, of_rank_0, strict=True):
            tensor.copy_(value)
    run.averages = Averages(**averages, steps=window_steps)


def _make_moments(optimiser: torch.optim.Optimizer) -> None:
    """Take an empty step, for an optimiser has moments only then; what it moves is overwritten by its caller."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    optimiser.zero_grad()


def _features(
    extractor: Callable[[Tensor], Tensor], trained: Sequence[nn.Parameter], x: Float[Tensor, "b ..."]
) -> Float[Tensor, "b f"]:
    if torch.is_grad_enabled():
        return _Features.apply(extractor, x, *trained)
    own = _own_rows(len(x))
    return _of_all_rows(extractor(x[own]), own, len(x))


class _Features(torch.autograd.Function):
    """f of all rows, of which this rank computes its own; backward, the sum of all ranks' gradients of f."""

    @staticmethod
    def forward(
        ctx: Any, extractor: Callable[[Tensor], Tensor], x: Float[Tensor, "b ..."], *trained: nn.Parameter
    ) -> Float[Tensor, "b f"]:
        ctx.own, ctx.trained = _own_rows(len(x)), trained
        with torch.enable_grad():
            ctx.y = extractor(x[ctx.own])
        return _of_all_rows(ctx.y.detach(), ctx.own, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "b f"]) -> tuple[Tensor | None, ...]:
        # As the graph around it, that of f outlives the first gradient.
        partial_sums = torch.autograd.grad(ctx.y, ctx.trained, gradient[ctx.own], retain_graph=True)
        return None, None, *_at_once(dist.all_reduce, partial_sums)


def _own_rows(rows: int) -> slice:
    rank, world = dist.get_rank(), dist.get_world_size()
    return slice(rank * rows // world, (rank + 1) * rows // world)


def _of_all_rows(y: Float[Tensor, "own f"], own: slice, rows: int) -> Float[Tensor, "b f"]:
    """Return the features of all ranks. A sum with zeros: nothing is rounded, and slices may have any size."""
    whole = y.new_zeros(rows, *y.shape[1:])
    whole[own] = y
    dist.all_reduce(whole)
    return whole


def _at_once(collective: Callable[[Tensor], Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what the collective makes of tensors of one type, sent as one; each is laid out in memory as before."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    collective(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [torch.empty_like(t).copy_(part.view(t.shape)) for t, part in zip(tensors, parts, strict=True)]


def _batch_norm(layer: Any, x: Float[Tensor, "own c h w"]) -> Float[Tensor, "own c h w"]:
    """Take a BatchNorm2d over the rows of all ranks; its running statistics move as those of a single process would."""
    if not layer.training:
        return nn.BatchNorm2d.forward(layer, x)
    y, mean, variance, count = _BatchNorm.apply(x, layer.weight, layer.bias, layer.eps)
    with torch.no_grad():
        layer.num_batches_tracked += 1
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(variance * count / (count - 1), layer.momentum)
    return y


class _BatchNorm(torch.autograd.Function):
    """weight (x - mean) / sqrt(variance + eps) + bias, with the moments of each channel over the rows of all ranks.

    The gradients of weight and bias are sums over this rank's rows alone, as those of all other parameters. Torch's
    SyncBatchNorm takes no tensors on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "own c h w"], weight: Float[Tensor, " c"], bias: Float[Tensor, " c"], eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(weight.dtype)
        own_count = x.numel() // x.shape[1]
        own_mean = wide.sum((0, 2, 3)) / max(own_count, 1)
        own_squares = (wide - _by_channel(own_mean)).square().sum((0, 2, 3)).double()
        # In float64, the moments of the ranks can be added about zero and not about the mean that they have in common.
        own_mean = own_mean.double()
        moments = torch.stack(
            [torch.full_like(own_mean, own_count), own_count * own_mean, own_squares + own_count * own_mean.square()]
        )
        dist.all_reduce(moments)
        count, mean, square = moments[0], moments[1] / moments[0], moments[2] / moments[0]
        variance = square - mean.square()
        count, mean, variance = (moment.to(weight.dtype) for moment in (count, mean, variance))
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        y = torch.addcmul(_by_channel(bias), wide - _by_channel(mean), _by_channel(weight * scale))
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "own c h w"], *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        normal = (x.to(weight.dtype) - _by_channel(mean)) * _by_channel(scale)
        own_sums = torch.stack([gradient.sum((0, 2, 3)), (gradient * normal).sum((0, 2, 3))])
        sums = own_sums.clone()
        dist.all_reduce(sums)
        of_mean, of_normal = (_by_channel(total / count) for total in sums)
        of_x = _by_channel(weight * scale) * (gradient - of_mean - normal * of_normal)
        return of_x.to(x.dtype), own_sums[1], own_sums[0], None


def _by_channel(values: Float[Tensor, " c"]) -> Float[Tensor, "1 c 1 1"]:
    return values[:, None, None].unsqueeze(0)
