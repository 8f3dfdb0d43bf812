"""Every benchmark runs at toy size and leaves its numbers with their circumstances."""

import json

import pytest

from tests.benchmarks.__main__ import main


@pytest.mark.parametrize("name", ["retrieval", "step"])
def test_a_benchmark_leaves_its_ratios(name, tmp_path, capsys):
    main([name, "--quick", "--out", str(tmp_path)])
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"commit", "cores", "threads", "torch"} <= record["circumstances"].keys()
    assert record["rows"]
    assert all(row["ratio"] == row["ours"] / row["peer"] > 0 for row in record["rows"])
    assert name in capsys.readouterr().out


def test_an_unknown_benchmark_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["retrival"])
    assert "unknown benchmark 'retrival': there are retrieval, step" in capsys.readouterr().err
