"""The figures that the paper's tables print, and the words for methods and metrics."""

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

PROTOCOL = "GoogLeNet trained end to end, 512-d, 227 of 256 px, whole images"
"""What every published row was measured with."""

NAMES = {
    "contrastive": "contrastive",
    "ddml": "DDML",
    "triplet": "triplet",
    "triplet_semihard": "triplet, semi-hard",
    "lifted": "lifted structure",
    "angular": "angular",
    "npair": "N-pair",
    "multi_similarity": "multi-similarity",
    "proxy_anchor": "proxy anchor",
    "floor": "frozen features alone",
}
"""Losses by the names that studies give them, as within a sentence; and what stands below them all."""
SYNTHETIC = ("hdml", "daml")
"""What makes negatives for another loss, its rival."""

METRICS = {"nmi": "NMI", "f1": "F1"}


class Figure(NamedTuple):
    """A published number."""

    percent: float
    confirmed: bool
    """False where it is known second-hand alone."""


@cache
def published() -> Mapping[str, Mapping[str, Mapping[str, Figure]]]:
    """Every figure by data set, method and metric, each in the order of the paper's tables."""
    figures: dict[str, dict[str, dict[str, Figure]]] = {}
    with Path(__file__).with_name("published.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            of_method = figures.setdefault(row["dataset"], {}).setdefault(row["method"], {})
            of_method[row["metric"]] = Figure(float(row["value_percent"]), row["status"] == "confirmed")
    return MappingProxyType(figures)


def rival(method: str) -> str | None:
    """The loss that a method makes negatives for.

    >>> rival("hdml_npair"), rival("npair")
    ('npair', None)
    """
    maker, _, loss = method.partition("_")
    return loss if maker in SYNTHETIC else None


def method_name(arm: str) -> str:
    """A method, to read; any other arm keeps the name that its study gave it.

    >>> method_name("hdml_npair"), method_name("triplet_semihard"), method_name("without J_soft")
    ('HDML (N-pair)', 'Triplet, semi-hard', 'without J_soft')
    """
    loss = rival(arm)
    if loss is not None:
        return f"{arm.partition('_')[0].upper()} ({NAMES.get(loss, loss)})"
    name = NAMES.get(arm, arm)
    return name[0].upper() + name[1:] if arm in NAMES else name


def metric_name(metric: str) -> str:
    """A metric, to read.

    >>> metric_name("recall_at_1"), metric_name("nmi")
    ('R@1', 'NMI')
    """
    return METRICS.get(metric) or metric.replace("recall_at_", "R@")


def rank(method: str) -> tuple[int, int, str]:
    """Where a method stands in a table: as in the paper, a new one after the loss that it builds on or at the end."""
    order = [*dict.fromkeys(method for methods in published().values() for method in methods)]
    loss = rival(method)
    if method in order:
        return order.index(method), 0, ""
    if loss in order:
        return order.index(loss), 1, method
    return (-1 if method == "floor" else len(order)), 0, method
