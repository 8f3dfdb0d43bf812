"""Every benchmark runs at toy size and leaves its numbers with their circumstances."""

import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.benchmarks import Count, Curve, Point, Row
from tests.benchmarks.__main__ import FOLDER, main
from tests.benchmarks._table import middle, read, table
from tests.benchmarks.gpu import Given, finetuning, parts, timings
from tests.benchmarks.gpu import __main__ as gpu
from tests.conftest import ROOT

# What drives and shows studies, and what of the core's own is wanted for one data set or one loss only.
NOT_NEEDED = ("matplotlib", "mlflow", "optuna", "psutil", "psycopg", "pytorch_metric_learning", "ray", "sqlalchemy")


STUDIES = [pytest.param(name, marks=pytest.mark.cluster) for name in ("growth", "overheads", "scale")]


@pytest.mark.parametrize("name", ["fused", "images", "retrieval", "step", *STUDIES])
def test_a_benchmark_leaves_its_ratios(name, tmp_path, capsys):
    rows = quick(name, tmp_path)
    assert all(row["ratio"] == row["ours"] / row["peer"] > 0 for row in rows)
    assert name in capsys.readouterr().out


@pytest.mark.cluster
def test_curves_are_drawn_and_say_how_steep_they_are(tmp_path):
    rows = quick("curves", tmp_path)
    assert [row["against"] for row in rows] == ["N", "classes", "rows", "trials", "nodes"]
    for number, row in enumerate(rows, start=1):
        assert all(point["seconds"] > 0 < point["megabytes"] for point in row["points"])
        assert all(map(math.isfinite, row["exponents"]))
        assert (tmp_path / f"curves-{number}.png").stat().st_size > 10_000
        assert "<svg" in (tmp_path / f"curves-{number}.svg").read_text()


def test_a_power_law_is_found():
    points = [Point(size, 3 * size**2.0, 5 * size**0.5) for size in (1.0, 10.0, 40.0)]
    assert Curve("cost", "size", points).exponents == pytest.approx((2.0, 0.5))


@pytest.mark.cluster
def test_a_killed_study_loses_nothing_whatever_its_peer_loses(tmp_path):
    counts = {row["what"]: row["ours"] for row in quick("restore", tmp_path)}
    assert counts.pop("trials that there should be") == counts.pop("trials ended once, and told so alike")
    assert not any(counts.values())


@pytest.mark.cluster
def test_the_study_and_the_plain_recipe_train_the_same(tmp_path):
    rows = quick("plain_recipe", tmp_path)
    assert all(row["ratio"] > 0 for row in rows if "ratio" in row)
    assert {row["peer_name"] for row in rows} == {"what everyone writes", "the same on features cached once"}


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
    said = capsys.readouterr().err
    assert "unknown benchmark 'retrival': there are " in said
    assert ", retrieval, " in said


def test_of_several_runs_each_figure_keeps_the_one_in_the_middle():
    runs = [
        [Row("step", ours, "floor", 10.0, 5, target=0.5).record(), Count("lost", lost, "peer", 7, 3).record()]
        for ours, lost in ((6.0, 0), (4.0, 2), (5.0, 1))
    ]
    rows = middle(runs)
    assert [(row["ours"], row["of_runs"]) for row in rows] == [(5.0, [0.6, 0.4, 0.5]), (1, [0, 2, 1])]
    with pytest.raises(ValueError, match="every run must have the same figures"):
        middle([runs[0], runs[0][:1]])


def test_the_table_says_which_targets_are_met():
    rows = [
        Row("fast", 1.0, "floor", 2.0, 5, target=0.5),
        Row("slow", 1.1, "floor", 2.0, 5, target=0.5),
        Row("seen", 3.0, "peer", 2.0, 5, "ms"),
        Count("lost", 0, "peer", 7, 3),
    ]
    assert table([{"rows": [row.record() for row in rows]}]).splitlines()[2:] == [
        "| fast | 1 s | 2 s (floor) | 0.5 | ≤ 0.5 | yes |",
        "| slow | 1.1 s | 2 s (floor) | 0.55 | ≤ 0.5 | **no** |",
        "| seen | 3 ms | 2 ms (peer) | 1.5 |  |  |",
        "| lost | 0 | 7 (peer) |  |  |  |",
    ]
    judged = table([{"rows": [row.record() for row in rows]}], judged=True)
    assert [line.split()[1] for line in judged.splitlines()[2:]] == ["fast", "slow"]


def test_the_readme_shows_what_was_measured_last():
    assert table(read(FOLDER / "results"), judged=True) in (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The GPU suite at toy size on the CPU, where nothing can be imported that it does not need: what it wrote."""
    folder = tmp_path_factory.mktemp("gpu")
    for name in NOT_NEEDED:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is out of reach')")
    environment = os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}

    def python(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert all(f"{name} is out of reach" in python("-c", f"import {name}").stderr for name in NOT_NEEDED)
    ended = python("-m", "tests.benchmarks.gpu", "--quick", "--out", folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads((folder / "gpu.json").read_text())


def test_the_gpu_suite_says_what_it_ran_on(dry_run):
    assert {"commit", "processor", "gpu", "python", "torch", "torchvision", "scipy"} <= dry_run["circumstances"].keys()
    assert dry_run["quick"]


def test_the_gpu_suite_counts_the_marked_tests(dry_run):
    outcomes = dry_run["tests"]["outcomes"]
    assert outcomes.pop("skipped") > 40
    assert outcomes == {"passed": 0, "failure": 0, "error": 0}


def test_the_gpu_suite_measures_what_the_card_can_do(dry_run):
    rates = dry_run["roofline"]["tflops"]
    assert rates.keys() == {"float32", "tf32", "bfloat16", "float64"}
    assert all(rate > 0 for rate in (*rates.values(), dry_run["roofline"]["copy_gb_per_s"]))


@pytest.mark.parametrize("part", ["steps", "retrieval", "parts"])
def test_the_gpu_suite_times_beside_peers(part, dry_run):
    rows = dry_run[part]["rows"]
    assert all(math.isfinite(row["ratio"]) and row["ratio"] == row["ours"] / row["peer"] > 0 for row in rows)
    said = [f"{row['what']} {row['peer_name']}" for row in rows]
    wanted = {
        "steps": ("HDML(npair)", "HDML(triplet)", "paper", "authors", "mobilenet", "googlenet", "bfloat16", "compiled"),
        "retrieval": ("report", "k-means", "Recall@K", "float32 product"),
        "parts": ("literal formulas", "images of a step", "memory map", "extraction", "runs as one"),
    }
    assert not [word for word in wanted[part] if not any(word in line for line in said)]
    assert not dry_run[part].get("left_out")


def test_the_gpu_suite_pairs_seeds(dry_run):
    found = dry_run["finetuning"]
    arms = [(run["loss"], run["synthesis"], run["seed"]) for run in found["runs"]]
    assert sorted(arms) == sorted(product(("npair", "triplet"), ("none", "hdml"), range(3)))
    for run in found["runs"]:
        assert all(0 <= run[quality] <= 1 for quality in finetuning.QUALITIES)
        assert run["recall_by_epoch"][-1] == run["recall_at_1"]
        assert all(map(math.isfinite, (*run["losses"].values(), *run["hardness"].values(), run["seconds"])))
    assert [(line["loss"], line["quality"]) for line in found["summary"]] == list(
        product(("npair", "triplet"), finetuning.QUALITIES)
    )
    for line in found["summary"]:
        assert {line[arm]["n"] for arm in ("plain", "hdml", "difference")} == {3}
        assert line["difference"]["mean"] == pytest.approx(line["hdml"]["mean"] - line["plain"]["mean"])
        assert line["difference"]["half_width"] >= 0
    assert not found["left_out"]


@pytest.fixture
def toy():
    return Given(torch.device("cpu"), True, Path("nowhere"), Path("nothing"), {})


@pytest.mark.parametrize(("part", "filled"), [(timings.steps, "rows"), (parts.run, "rows"), (finetuning.run, "runs")])
def test_a_part_of_the_gpu_suite_begins_nothing_when_time_is_up(part, filled, toy):
    record, said = {}, []
    part(toy, 0.0, record, said.append)
    assert record[filled] == []
    assert record["left_out"]
    assert said == [said[0]]
    assert f"left out for want of time: {len(record['left_out'])}" in said[0]


def test_fine_tuning_without_its_data_is_left_out_with_a_reason(toy, tmp_path):
    record = {}
    finetuning.run(toy._replace(quick=False), math.inf, record, lambda words: None)
    assert record == {"reason": "CUB_200_2011.tgz not found in nowhere: give its folder by --data"}
    (tmp_path / "CUB_200_2011.tgz").touch()
    record.clear()
    finetuning.run(toy._replace(quick=False, data=tmp_path), math.inf, record, lambda words: None)
    assert record == {"reason": "weights not found at nothing: give them by --weights"}


@pytest.mark.parametrize("broken", ["a test", "a part"])
def test_the_gpu_suite_writes_what_it_has_and_fails_where_something_did(broken, tmp_path, monkeypatch, capsys):
    def tests(given, until, record, say):
        record["exit_status"] = int(broken == "a test")

    def steps(given, until, record, say):
        record["rows"] = ["kept"]
        if broken == "a part":
            raise ZeroDivisionError

    monkeypatch.setattr(gpu, "PARTS", {"tests": (tests, 0.5), "steps": (steps, 1.0)})
    assert gpu.main(["--quick", "--out", str(tmp_path)]) == 1
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["steps"]["rows"] == ["kept"]
    assert ("ZeroDivisionError" in record["steps"].get("error", "")) == (broken == "a part")


def test_the_gpu_suite_wants_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert "a CUDA device is needed: --quick" in capsys.readouterr().err
