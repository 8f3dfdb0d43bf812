"""Intervals, pairing, and the seal on the test classes."""

from datetime import datetime

import pytest
from scipy import stats

from studies.machinery.confirm import _close, _opened, compare, interval
from studies.machinery.ledger import Ledger, LedgerError, Row
from studies.machinery.records import QUALITIES


def row(number, arm, seed, value, state="COMPLETE"):
    metrics = {f"test/{quality}": value for quality in QUALITIES}
    params = {"arm": arm, "seed": seed}
    return Row(number, params, state, value, {}, {"metrics": metrics}, datetime.now(), 1.0)


def test_the_interval_is_students():
    values = [0.41, 0.43, 0.40, 0.47, 0.44]
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = interval(values)
    assert found.mean - found.half_width == pytest.approx(low)
    assert found.mean + found.half_width == pytest.approx(high)


def test_differences_are_paired_by_seed():
    best, baseline = [0.5, 0.6, 0.8], [0.4, 0.5, 0.7]
    rows = [row(i, "best", i, value) for i, value in enumerate(best)]
    rows += [row(9 - i, "baseline", i, value) for i, value in enumerate(baseline)]
    found = compare(rows)["map_at_r"]
    assert found["best"].mean == pytest.approx(sum(best) / 3)
    assert found["difference"].mean == pytest.approx(0.1)
    assert found["difference"].half_width == pytest.approx(0.0, abs=1e-9)
    assert found["best"].half_width > 0.1


def test_a_seed_counts_only_in_both_arms():
    rows = [row(0, "best", 0, 0.5), row(1, "baseline", 0, 0.4), row(2, "best", 1, 0.5)]
    failed = row(3, "baseline", 1, None, "FAIL")
    with pytest.raises(LedgerError, match="1 seeds trained to the end in both arms"):
        compare([*rows, failed])


def test_the_test_classes_are_opened_once(storage):
    ledger = Ledger(storage, "study", {})
    frozen = {"terms": {"epochs": 8}, "commit": "abc"}

    def opened(again=False, seeds=5):
        return _opened(ledger, again, "0007", "baseline", seeds, frozen)

    first = opened()
    assert opened() == first  # interrupted, it goes on
    with pytest.raises(LedgerError, match=r"were opened on .*--again"):
        opened(seeds=6)
    _close(ledger, first)
    with pytest.raises(LedgerError, match=r"were opened on .*--again"):
        opened()
    assert opened(again=True)["number"] == 2
    assert [opening["number"] for opening in ledger.notes["openings"]] == [1, 2]
    assert ledger.notes["openings"][0]["finished"] is not None
