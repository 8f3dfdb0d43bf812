"""The schedule at its ends, the band in which a pulled negative lies, and the plain-loop twin."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdml_core.augmentor import gap_kept, harden, pull_factors, real_weight
from hdml_core.notation import Roles
from tests import oracles

FINITE = st.floats(0.0, 1e3)
POSITIVE = st.floats(1e-3, 1e3)
KEPT = st.floats(0.0, 1.0)
SEEDS = st.integers(0, 2**32 - 1)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def draw_triplets(seed, n=6, d=3):
    """Roles of n rows each. The negatives are spread over scales, so that some are nearer than the positives."""
    random = torch.Generator().manual_seed(seed)
    anchor, positive, negative = torch.randn(3, n, d, dtype=torch.float64, generator=random)
    return Roles(anchor, positive, negative * torch.logspace(-1, 2, n, dtype=torch.float64)[:, None])


def draw_pairs(seed, n=5, d=3):
    """Roles as N-pair has them: every anchor faces every positive."""
    random = torch.Generator().manual_seed(seed)
    anchor, positive = torch.randn(2, n, d, dtype=torch.float64, generator=random)
    return Roles(anchor[:, None], positive[:, None], positive[None, :])


def distances(roles):
    d_plus = torch.linalg.vector_norm(roles.positive - roles.anchor, dim=-1)
    d_minus = torch.linalg.vector_norm(roles.negative - roles.anchor, dim=-1)
    return torch.broadcast_tensors(d_plus, d_minus)


def pulled(roles, kept):
    return harden(roles, pull_factors(roles, scalar(kept)))


@pytest.mark.parametrize("schedule", [gap_kept, real_weight])
class TestSchedule:
    @given(scale=FINITE, average=POSITIVE)
    def test_is_the_equation(self, schedule, scale, average):
        assert schedule(scalar(average), scale).item() == pytest.approx(math.exp(-scale / average), rel=1e-12)

    @given(scale=FINITE)
    def test_is_one_while_nothing_is_averaged(self, schedule, scale):
        assert schedule(scalar(math.inf), scale) == 1

    @given(scale=POSITIVE)
    def test_is_zero_at_an_average_of_zero(self, schedule, scale):
        assert schedule(scalar(0.0), scale) == 0

    @pytest.mark.parametrize("average", [0.0, 1e-300, 1.0, math.inf])
    def test_a_scale_of_zero_is_never(self, schedule, average):
        assert schedule(scalar(average), 0.0) == 1

    @given(scales=st.tuples(FINITE, FINITE), average=POSITIVE)
    def test_falls_as_the_scale_grows(self, schedule, scales, average):
        smaller, larger = sorted(scales)
        assert schedule(scalar(average), larger) <= schedule(scalar(average), smaller)

    @given(scale=FINITE, averages=st.tuples(POSITIVE, POSITIVE))
    def test_grows_with_the_average(self, schedule, scale, averages):
        smaller, larger = sorted(averages)
        assert schedule(scalar(smaller), scale) <= schedule(scalar(larger), scale)

    def test_keeps_the_dtype(self, schedule):
        for scale in (0.0, 2.0):
            assert schedule(torch.tensor(3.0), scale).dtype == torch.float32


@pytest.mark.parametrize("draw", [draw_triplets, draw_pairs])
class TestPulling:
    @pytest.mark.parametrize(("j_avg", "alpha"), [(3.0, 2.0), (40.0, 7.0), (0.1, 90.0), (1.0, 0.0)])
    @given(seed=SEEDS)
    def test_equals_the_plain_loops(self, draw, j_avg, alpha, seed):
        roles = Roles(*(role.requires_grad_() for role in draw(seed)))
        lambda_0 = pull_factors(roles, gap_kept(scalar(j_avg), alpha))
        z_hat = harden(roles, lambda_0)

        rows = Roles(*(role.flatten(0, -2) for role in torch.broadcast_tensors(*roles)))
        twins = [oracles.pull(*row, j_avg, alpha) for row in zip(*rows, strict=True)]
        wanted = torch.stack([vector for vector, _ in twins]).view_as(z_hat)
        factors = scalar([factor for _, factor in twins]).view_as(lambda_0)
        torch.testing.assert_close(z_hat, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(lambda_0, factors, rtol=1e-10, atol=1e-10)

        toward = torch.randn_like(z_hat)
        gradients = torch.autograd.grad((z_hat * toward).sum(), roles)
        wanted_gradients = torch.autograd.grad((wanted * toward).sum(), roles)
        torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-10, atol=1e-9)

    @given(seed=SEEDS, kept=KEPT)
    def test_a_pulled_negative_keeps_its_share_of_the_gap(self, draw, seed, kept):
        roles = draw(seed)
        d_plus, d_minus = distances(roles)
        _, d_hat = distances(roles._replace(negative=pulled(roles, kept)))
        wanted = torch.where(d_minus > d_plus, d_plus + kept * (d_minus - d_plus), d_minus)
        torch.testing.assert_close(d_hat, wanted, rtol=1e-10, atol=1e-10)

    @given(seed=SEEDS, kept=KEPT)
    def test_it_lies_between_the_positive_and_where_it_was(self, draw, seed, kept):
        roles = draw(seed)
        d_plus, d_minus = distances(roles)
        _, d_hat = distances(roles._replace(negative=pulled(roles, kept)))
        assert (d_hat >= torch.minimum(d_plus, d_minus) - 1e-10).all()
        assert (d_hat <= d_minus + 1e-10).all()

    @given(seed=SEEDS, kept=KEPT)
    def test_it_stays_on_the_line_to_its_anchor(self, draw, seed, kept):
        roles = draw(seed)
        cosine = torch.cosine_similarity(pulled(roles, kept) - roles.anchor, roles.negative - roles.anchor, dim=-1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))

    @given(seed=SEEDS, kept=KEPT)
    def test_the_factor_lies_in_kept_to_one(self, draw, seed, kept):
        lambda_0 = pull_factors(draw(seed), scalar(kept))
        assert (lambda_0 >= kept).all()
        assert (lambda_0 <= 1).all()

    @given(seed=SEEDS)
    def test_keeping_the_whole_gap_moves_nothing(self, draw, seed):
        roles = draw(seed)
        assert (pull_factors(roles, scalar(1.0)) == 1).all()
        z_hat = pulled(roles, 1.0)
        torch.testing.assert_close(z_hat, roles.negative.expand_as(z_hat), rtol=1e-12, atol=1e-12)

    @given(seed=SEEDS, alphas=st.tuples(FINITE, FINITE))
    def test_a_larger_alpha_never_pulls_less(self, draw, seed, alphas):
        roles = draw(seed)
        smaller, larger = (pull_factors(roles, gap_kept(scalar(5.0), alpha)) for alpha in sorted(alphas))
        assert (larger <= smaller).all()

    @given(seed=SEEDS, kept=KEPT)
    def test_a_nearer_negative_stays(self, draw, seed, kept):
        roles = draw(seed)
        d_plus, d_minus = distances(roles)
        assert (pull_factors(roles, scalar(kept)).squeeze(-1)[d_minus <= d_plus] == 1).all()


@given(seed=SEEDS, kept=KEPT)
def test_the_diagonal_of_npair_is_unmoved(seed, kept):
    """There the negative is the positive, so that d_minus = d_plus."""
    assert (pull_factors(draw_pairs(seed), scalar(kept)).squeeze(-1).diagonal() == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("coinciding", ["positive", "negative", "both"])
def test_gradients_are_finite_where_points_coincide(coinciding, dtype):
    """At d_plus = 0 the negative is pulled onto the anchor as far as kept allows; at d_minus = 0 it stays."""
    anchor = torch.tensor([[1.0, 2.0]], dtype=dtype)
    apart = torch.tensor([[4.0, 6.0]], dtype=dtype)
    roles = Roles(
        anchor.clone().requires_grad_(),
        (apart if coinciding == "negative" else anchor).clone().requires_grad_(),
        (apart if coinciding == "positive" else anchor).clone().requires_grad_(),
    )
    lambda_0 = pull_factors(roles, torch.tensor(0.25, dtype=dtype))
    assert lambda_0.item() == (0.25 if coinciding == "positive" else 1)
    z_hat = harden(roles, lambda_0)
    gradients = torch.autograd.grad(z_hat.sum(), roles, allow_unused=True, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
