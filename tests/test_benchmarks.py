"""Every benchmark runs at toy size and leaves its numbers with their circumstances."""

import json

import pytest

from tests.benchmarks.__main__ import main


@pytest.mark.parametrize("name", ["retrieval", "step", pytest.param("growth", marks=pytest.mark.cluster)])
def test_a_benchmark_leaves_its_ratios(name, tmp_path, capsys):
    rows = quick(name, tmp_path)
    assert all(row["ratio"] == row["ours"] / row["peer"] > 0 for row in rows)
    assert name in capsys.readouterr().out


@pytest.mark.cluster
def test_a_killed_study_loses_nothing_whatever_its_peer_loses(tmp_path):
    counts = {row["what"]: row["ours"] for row in quick("restore", tmp_path)}
    assert counts.pop("trials that there should be") == counts.pop("trials ended once, and told so alike")
    assert not any(counts.values())


def quick(name, out):
    """The rows of a benchmark at toy size."""
    main([name, "--quick", "--out", str(out)])
    record = json.loads((out / f"{name}.json").read_text())
    assert {"commit", "cores", "threads", "torch"} <= record["circumstances"].keys()
    assert record["rows"]
    return record["rows"]


def test_an_unknown_benchmark_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["retrival"])
    assert "unknown benchmark 'retrival': there are growth, restore, retrieval, step" in capsys.readouterr().err
