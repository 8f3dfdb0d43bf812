"""The full retrieval report at the size of CUB's test set, beside the bare product and pytorch-metric-learning."""

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.cluster import KMeans

from hdml_core.retrieval import evaluate_retrieval
from tests.benchmarks import Row, compare


def run(quick: bool) -> list[Row]:
    """Time the whole report of one clustering."""
    m, d, classes, repeats = (400, 16, 10, 1) if quick else (5924, 512, 100, 5)
    torch.manual_seed(0)
    labels = torch.arange(m) % classes
    z = torch.randn(classes, d)[labels] + 4 * torch.randn(m, d)

    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r", "r_precision", "precision_at_1", "NMI"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity()),
        kmeans_func=lambda query, count: torch.from_numpy(KMeans(count, n_init=1).fit_predict(query.numpy())),
    )

    def report() -> object:
        return evaluate_retrieval(z, labels, (1, 2, 4, 8), 1, 0)

    return [
        compare("whole report, one clustering", report, "product z z'", lambda: z @ z.T, repeats),
        compare(
            "whole report, one clustering",
            report,
            "AccuracyCalculator and scikit-learn's k-means",
            lambda: calculator.get_accuracy(torch.nn.functional.normalize(z, dim=1), labels),
            repeats,
        ),
    ]
