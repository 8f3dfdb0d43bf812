"""The full retrieval report at the size of CUB's test set, beside the bare product and pytorch-metric-learning."""

import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from hdml_core.retrieval import evaluate_retrieval, kmeans, neighbour_hits
from tests.benchmarks import Row, compare


def run(quick: bool) -> list[Row]:
    """Time ranks and clusters apart and together."""
    m, d, classes, repeats = (400, 16, 10, 1) if quick else (5924, 512, 100, 5)
    torch.manual_seed(0)
    labels = torch.arange(m) % classes
    z = torch.nn.functional.normalize(torch.randn(classes, d)[labels] + 2 * torch.randn(m, d), dim=1)

    def product() -> torch.Tensor:
        return z @ z.T

    def exact_neighbours(query, k, reference, ref_includes_query):
        similarity = query @ reference.T
        similarity.fill_diagonal_(-torch.inf)
        return similarity.topk(k, dim=1)

    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r", "r_precision", "precision_at_1", "NMI"),
        k="max_bin_count",
        knn_func=exact_neighbours,
        kmeans_func=lambda query, count: kmeans(query, count, 0),
    )
    return [
        compare("Recall@K, MAP@R, R-precision", lambda: neighbour_hits(z, labels, 8), "product z z'", product, repeats),
        compare(
            "whole report, one clustering",
            lambda: evaluate_retrieval(z, labels, (1, 2, 4, 8), 1, 0),
            "AccuracyCalculator on the same neighbours and clusters",
            lambda: calculator.get_accuracy(z, labels),
            repeats,
        ),
    ]
