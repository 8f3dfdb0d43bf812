"""The factored way comes to what the literal one does: every value, gradient and running statistic."""

import copy
from unittest import mock

import pytest
import torch
from torch.func import functional_call, stack_module_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hdml_core import synthesis
from hdml_core.methods.hdml import hdml_losses
from hdml_core.metric_losses import METRIC_LOSSES
from hdml_core.networks import mix_precision
from hdml_core.synthesis import _PulledActivations, factored, literal
from tests.methods.made import small_case

PAIR_LOSSES = [name for name in METRIC_LOSSES if name != "triplet"]
MOVED = {"j_metric": ["extractor", "embedder"], "j_gen": ["generator"], "j_class": ["head"]}
GRADED = torch.tensor(3.0, dtype=torch.float64), torch.tensor(40.0, dtype=torch.float64)


def stepped(case, way):
    """The J's by name, and the networks, of which each way has its own to take note of statistics in."""
    config, networks, metric_loss, batch = case
    networks = copy.deepcopy(networks)
    batch = batch._replace(j_avg=GRADED[0], j_gen_avg=GRADED[1])
    with mock.patch("hdml_core.methods.hdml.synthesise", way):
        losses, hardness = hdml_losses(networks, batch, metric_loss, config)
    return {**losses._asdict(), **hardness._asdict()}, networks


@pytest.mark.parametrize("roles", ["negative", "all"])
@pytest.mark.parametrize("recipe", ["paper", "authors"])
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_both_ways_come_to_the_same(loss, recipe, roles):
    case = small_case(recipe, loss, **{"hdml.generated_roles": roles})
    (ours, networks), (theirs, twin) = stepped(case, factored), stepped(case, literal)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-10, msg=name)
    for name, children in MOVED.items():
        own, other = (
            torch.autograd.grad(
                of[name], [p for child in children for p in getattr(nets, child).parameters()], retain_graph=True
            )
            for of, nets in ((ours, networks), (theirs, twin))
        )
        assert any(gradient.abs().max() > 0 for gradient in own), name
        for a, b in zip(own, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)
    for (name, ours_noted), theirs_noted in zip(networks.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours_noted, theirs_noted, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("tile", [1, 7, 2**18])
@pytest.mark.parametrize("covariance", [False, True])
def test_gradients_of_the_activations_do_not_depend_on_tiles(tile, covariance, monkeypatch):
    monkeypatch.setattr(synthesis, "TILE", tile)
    random = torch.Generator().manual_seed(0)
    shapes = ((4, 1, 3), (1, 5, 3), (4, 5, 1))
    given = [torch.rand(shape, dtype=torch.float64, generator=random) - 0.4 for shape in shapes]
    given = [part.requires_grad_() for part in given]
    outputs = 4 if covariance else 3

    def activations(*parts):
        return _PulledActivations.apply(*parts, covariance)[:outputs]

    assert torch.autograd.gradcheck(activations, given)


class Sizes(TorchDispatchMode):
    """Notes how many numbers every tensor has that is made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.seen |= {leaf.numel() for leaf in tree_leaves(made) if torch.is_tensor(leaf)}
        return made


@pytest.mark.parametrize("recipe", ["paper", "authors"])
def test_no_synthetic_feature_and_no_difference_is_laid_out(recipe):
    case = small_case(recipe, "npair", **{"network.generator_hidden": 3, "loss.l2_reg": 0.0})
    features, differences = 6 * 6 * 5, 6 * 6 * 4
    laid_out = []
    for way in (factored, literal):
        with Sizes() as sizes:
            losses, networks = stepped(case, way)
            for name, child in (("j_metric", networks.embedder), ("j_gen", networks.generator)):
                torch.autograd.grad(losses[name], list(child.parameters()), retain_graph=True)
        laid_out.append(sizes.seen & {features, differences})
    assert laid_out == [set(), {features, differences}]


class Objective(torch.nn.Module):
    """The J's of networks whose state is handed in."""

    def __init__(self, case):
        super().__init__()
        self.config, self.networks, self.metric_loss, self.batch = case

    def forward(self, x):
        batch = self.batch._replace(x=x, j_avg=GRADED[0], j_gen_avg=GRADED[1])
        return hdml_losses(self.networks, batch, self.metric_loss, self.config)[0]._asdict()


@pytest.mark.parametrize("recipe", ["paper", "authors"])
def test_networks_side_by_side_come_to_what_each_does_alone(recipe):
    """In one vectorised pass over their stacked state."""
    config, networks, metric_loss, batch = small_case(recipe, "npair", **{"optim.weight_decay": 0.0})
    several = [copy.deepcopy(networks) for _ in range(3)]
    for seed, own in enumerate(several):
        random = torch.Generator().manual_seed(seed)
        for parameter in own.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=random))
    cases = [(config, own, metric_loss, batch) for own in several]
    parameters, buffers = stack_module_state([Objective(case) for case in cases])

    def objective(parameters, buffers, x):
        return functional_call(Objective(cases[0]), (parameters, buffers), (x,))

    together = torch.vmap(objective)(parameters, buffers, torch.stack([batch.x] * 3))
    for i, case in enumerate(cases):
        alone, own = stepped(case, factored)
        for name, value in together.items():
            torch.testing.assert_close(value[i], alone[name], rtol=1e-10, atol=1e-10, msg=name)
        for j, child in (("j_metric", "extractor"), ("j_gen", "generator.0"), ("j_class", "head")):
            name = f"networks.{child}.weight"
            (of_all,) = torch.autograd.grad(together[j].sum(), [parameters[name]], retain_graph=True)
            (of_one,) = torch.autograd.grad(alone[j], [own.get_submodule(child).weight], retain_graph=True)
            torch.testing.assert_close(of_all[i], of_one, rtol=1e-10, atol=1e-10, msg=name)
        for name, value in own.named_buffers():
            torch.testing.assert_close(buffers[f"networks.{name}"][i], value, rtol=1e-10, atol=1e-10, msg=name)


def test_mixed_precision_stays_near():
    config, networks, metric_loss, batch = small_case("authors", "npair")
    networks = networks.float()
    case = (config, networks, metric_loss, batch._replace(x=batch.x.float()))
    exact = stepped(case, factored)[0]
    mix_precision(networks)
    mixed = stepped(case, factored)[0]
    assert mixed["j_syn"].dtype == torch.float32
    for name in ("j_syn", "j_recon", "j_soft"):
        assert mixed[name] != exact[name], name
        torch.testing.assert_close(mixed[name], exact[name], rtol=0.05, atol=0.05, msg=name)
