"""The tables of Cars196 and Stanford Online Products run to their end, on small archives in the official layouts."""

import csv
import os
import subprocess
import sys

import pytest

from studies.machinery.tables import RIVALS, ROWS
from tests.conftest import ROOT
from tests.datasets.made import cars, products, write_tar, write_zip
from tests.datasets.small_tables import CLASSES, PER_CLASS

SMALL = {
    "data.image_size": 32,
    "data.crop_size": 32,
    "data.batch_size": 12,
    "network.extractor": "mobilenet_v2",
    "network.weights": "",
    "network.embedding_size": 8,
    "network.generator_hidden": 8,
    "optim.epochs": 2,
    "optim.steps_per_epoch": 1,
    "retrieval.clusterings": 1,
}


def make_archives(dataset, root):
    if dataset == "sop":
        write_zip(root / "Stanford_Online_Products.zip", products(PER_CLASS, CLASSES))
    else:
        files, table = cars(PER_CLASS, CLASSES)
        write_tar(root / "car_ims.tgz", files)
        (root / "cars_annos.mat").write_bytes(table)


@pytest.mark.cluster
@pytest.mark.parametrize(("dataset", "recalls"), [("cars196", "R@1 R@2 R@4 R@8"), ("sop", "R@1 R@10 R@100")])
def test_a_table_from_its_archive_to_its_latex(tmp_path, dataset, recalls):
    make_archives(dataset, tmp_path)
    arguments = [f"--set={name}={value}" for name, value in SMALL.items()]
    out = tmp_path / "runs"
    command = [dataset, f"--trials={len(ROWS)}", "--set=study.test_seeds=2", *arguments, f"--out={out}"]
    environment = {**os.environ, "HDML_DATA": str(tmp_path)}

    def run(module, *given):
        asked = [sys.executable, "-m", module, *given]
        done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run("tests.datasets.small_tables", *command)
    assert f"{len(ROWS)} of {len(ROWS)} trials: {len(ROWS)} COMPLETE" in said
    assert "over 2 seeds" in said

    table = run("dashboards", "table", dataset, "--runs", str(out))
    assert f"# {dataset}: published and ours" in table
    head = next(line for line in table.splitlines() if line.startswith("| method"))
    assert head.replace("|", " ").split() == ["method", "source", "NMI", "F1", *recalls.split(), "seeds"]
    assert table.count(f"| table_{dataset} †") == 3 * len(ROWS) + len(RIVALS)
    assert "† mobilenet_v2 trained end to end from random weights, 8-d, 32 of 32 px" in table
    with (out / f"table_{dataset}.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "recall_at_1"]
    assert [row["method"] for row in rows] == list(dict.fromkeys(row["method"] for row in rows))
    assert {row["method"] for row in rows} == ROWS.keys()
    for row in rows:
        assert 0 <= float(row["honest_percent"]) <= float(row["paper_mode_percent"]) + 1e-9 <= 100 + 1e-9
        assert row["published_percent"]
        assert (row["honest_seeds"], row["tuning_trials"], len(row["run_ids"].split())) == ("2", "1", 2)
    assert (out / f"table_{dataset}.tex").read_text().count("\\begin{table}") == 4
