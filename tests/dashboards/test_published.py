"""The paper's figures are all there, in the order of its tables."""

import pytest

from dashboards.published import METRICS, method_name, published, rank, rival


def test_every_table_is_whole():
    assert list(published()) == ["cub200", "cars196", "sop"]
    for dataset, methods in published().items():
        recalls = (1, 10, 100) if dataset == "sop" else (1, 2, 4, 8)
        wanted = [*METRICS, *(f"recall_at_{k}" for k in recalls)]
        assert len(methods) == 11
        assert {tuple(figures) for figures in methods.values()} == {tuple(wanted)}
        assert all(0 < figure.percent < 100 for figures in methods.values() for figure in figures.values())
        assert all(rival(method) in methods for method in methods if rival(method))


@pytest.mark.parametrize(
    ("dataset", "method", "metric", "percent", "confirmed"),
    [
        ("cub200", "contrastive", "nmi", 47.2, False),
        ("cub200", "hdml_npair", "recall_at_1", 53.7, True),
        ("sop", "hdml_npair", "recall_at_100", 92.4, True),
    ],
)
def test_figures_keep_their_status(dataset, method, metric, percent, confirmed):
    assert published()[dataset][method][metric] == (percent, confirmed)


def test_a_new_method_stands_behind_the_loss_that_it_builds_on_or_at_the_end():
    methods = ["multi_similarity", "hdml_npair", "npair", "hdml_lifted", "angular", "lifted", "contrastive", "floor"]
    assert sorted(methods, key=rank) == [
        "floor",
        "contrastive",
        "lifted",
        "hdml_lifted",
        "angular",
        "npair",
        "hdml_npair",
        "multi_similarity",
    ]
    assert len({method_name(method) for method in methods}) == len(methods)
