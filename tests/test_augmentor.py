"""Pulling equals its plain-loop twin and keeps its laws; the schedule is right at its ends."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdml_core.augmentor import gap_kept, harden, pull_factors, real_weight
from hdml_core.notation import Roles
from tests.objective_oracle import pull

SHARES = st.floats(0.0, 1.0)
SEEDS = st.integers(0, 10_000)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def triplets(seed, n=6, d=3):
    random = torch.Generator().manual_seed(seed)
    return Roles(*torch.randn(3, n, d, generator=random, dtype=torch.float64))


def distance(p, q):
    return (p - q).norm(dim=-1)


@given(SEEDS, st.floats(0.01, 10.0))
def test_equals_the_plain_loops(seed, j_avg):
    roles = triplets(seed)
    z_hat = harden(roles, pull_factors(roles, gap_kept(scalar(j_avg), 2.0)))
    for row, (anchor, positive, negative) in enumerate(zip(*roles, strict=True)):
        torch.testing.assert_close(z_hat[row], pull(anchor, positive, negative, j_avg, 2.0)[0], rtol=1e-10, atol=1e-10)


@given(SEEDS, SHARES)
def test_a_pulled_negative_keeps_its_share_of_the_gap(seed, kept):
    roles = triplets(seed)
    z_hat = harden(roles, pull_factors(roles, scalar(kept)))
    d_plus, d_minus = distance(roles.anchor, roles.positive), distance(roles.anchor, roles.negative)
    wanted = torch.where(d_minus > d_plus, d_plus + kept * (d_minus - d_plus), d_minus)
    torch.testing.assert_close(distance(roles.anchor, z_hat), wanted, rtol=1e-10, atol=1e-10)


@given(SEEDS)
def test_nothing_moves_where_all_is_kept(seed):
    roles = triplets(seed)
    torch.testing.assert_close(harden(roles, pull_factors(roles, scalar(1.0))), roles.negative, rtol=1e-12, atol=1e-12)


@given(SEEDS, st.floats(0.0, 100.0), st.floats(0.0, 100.0), st.floats(0.1, 10.0))
def test_a_larger_alpha_never_pulls_less(seed, alpha, more, j_avg):
    roles = triplets(seed)
    less_pulled, more_pulled = (pull_factors(roles, gap_kept(scalar(j_avg), a)) for a in (alpha, alpha + more))
    assert (more_pulled <= less_pulled + 1e-12).all()


def test_roles_broadcast_and_the_diagonal_of_pairs_stays():
    anchor, positive, _ = triplets(0)
    roles = Roles(anchor[:, None], positive[:, None], positive[None])
    lambda_0 = pull_factors(roles, scalar(0.0))
    assert lambda_0.shape == (6, 6, 1)
    assert (lambda_0.diagonal().flatten() == 1).all()
    for i in range(6):
        row = Roles(anchor[i].expand(6, 3), positive[i].expand(6, 3), positive)
        torch.testing.assert_close(lambda_0[i], pull_factors(row, scalar(0.0)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("equal", [("anchor", "positive"), ("anchor", "negative"), ("anchor", "positive", "negative")])
def test_gradients_are_finite_where_points_coincide(equal):
    parts = triplets(1)._asdict()
    parts |= {name: parts["anchor"].clone() for name in equal}
    roles = Roles(**{name: part.requires_grad_() for name, part in parts.items()})
    total = harden(roles, pull_factors(roles, scalar(0.5))).square().sum()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total, list(roles)))


@pytest.mark.parametrize("schedule", [gap_kept, real_weight])
def test_the_schedule_at_its_ends(schedule):
    assert float(schedule(scalar(math.inf), 90.0)) == 1.0
    assert float(schedule(scalar(0.0), 90.0)) == 0.0
    assert float(schedule(scalar(0.0), 0.0)) == 1.0
    assert float(schedule(scalar(4.0), 2.0)) == pytest.approx(math.exp(-0.5), abs=1e-15)
