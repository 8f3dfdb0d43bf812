"""What is said of an image that is not laid out equals what is said of it when it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdml_core.linear_image import Affine, LinearImage, laid_out, moments_of, pooled

SEEDS = st.integers(0, 2**32 - 1)


def draw(seed, *shapes):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=random) for shape in shapes]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(seed=SEEDS, counts=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_moments_pool_to_those_of_all_rows(seed, counts):
    blocks = [10 * block for block in draw(seed, *[(count, 3) for count in counts])]
    rows = torch.cat(blocks)
    for covariance in (False, True):
        found = pooled([moments_of(block, covariance) for block in blocks])
        assert found.count == len(rows)
        same(found.mean, rows.mean(0))
        same(found.variance, rows.var(0, correction=0))
        if covariance:
            same(found.covariance, (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows))
        else:
            assert found.covariance is None


@given(seed=SEEDS)
def test_products_of_layers_are_layers_one_after_another(seed):
    x, w1, b1, w2, b2, scale, shift = draw(seed, (7, 3), (4, 3), 4, (5, 4), 5, 3, 3)
    first, second = Affine(w1, b1), Affine(w2, b2)
    same(x @ second.after(first).weight.T + second.after(first).bias, (x @ w1.T + b1) @ w2.T + b2)
    scaled = first.after_scaling(scale, shift)
    same(x @ scaled.weight.T + scaled.bias, (scale * x + shift) @ w1.T + b1)


@given(seed=SEEDS)
def test_an_image_answers_as_its_rows_do(seed):
    rows, scale, shift, w1, b1, w2, b2, p = draw(seed, (4, 6, 3), 3, 3, (7, 3), 7, (5, 7), 5, (4, 1, 5))
    wanted = ((scale * rows + shift) @ w1.T + b1) @ w2.T + b2
    for covariance in (False, True):
        layers = Affine(w1, b1), Affine(w2, b2)
        image = LinearImage(rows, moments_of(rows, covariance), (scale, shift), layers)
        same(image.laid_out(), wanted)
        same(laid_out(image), wanted)
        same(image.inner_product(p), torch.stack([row @ of for row, of in zip(wanted, p[:, 0], strict=True)]))
        same(image.mean_square_norm(), wanted.square().sum(-1).mean())
    under = moments_of(rows, True).under(image.whole)
    same(under.mean, wanted.flatten(0, 1).mean(0))
    same(under.variance, wanted.flatten(0, 1).var(0, correction=0))


def test_rows_that_are_laid_out_stay_as_they_are():
    rows = torch.ones(2, 3)
    assert laid_out(rows) is rows


def test_the_moments_of_an_image_want_the_covariance():
    with pytest.raises(AssertionError):
        moments_of(torch.ones(2, 3), False).under(Affine(torch.ones(4, 3), torch.ones(4)))
