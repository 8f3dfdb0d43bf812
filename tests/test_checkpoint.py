"""A checkpoint is whole or not there: damage is seen, the one before it serves, nothing half is left behind."""

import json

import pytest

from hdml_core import checkpoint, training
from hdml_core.checkpoint import CheckpointError
from tests.test_training import assert_equal_runs, finished, labelled, small_config


@pytest.fixture
def saved(tmp_path):
    """A run of three epochs, saved after each."""
    train = labelled()
    run = training.new_run(small_config(), train)
    training.fit(run, train, labelled(1, 5), lambda report: checkpoint.save(run, tmp_path))
    return run


def fresh(**settings):
    return training.new_run(small_config(**settings), labelled())


def test_round_trip(saved, tmp_path):
    run = fresh()
    assert checkpoint.load(run, tmp_path)
    assert_equal_runs(run, saved)
    assert run.reports == saved.reports


def test_nothing_there(tmp_path):
    run = fresh()
    assert not checkpoint.load(run, tmp_path / "absent")
    assert run.epoch == 0


def test_the_newest_two_are_kept(saved, tmp_path):
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-00002", "epoch-00003"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.safetensors").write_bytes(b"\0" * 10),
        lambda folder: (folder / "run.json").write_text('{"epoch": 3'),
        lambda folder: (folder / "run.json").unlink(),
        lambda folder: (folder / "state.safetensors").unlink(),
        lambda folder: flip_a_bit(folder / "state.safetensors"),
    ],
    ids=["truncated state", "truncated record", "no record", "no state", "one bit flipped"],
)
def test_a_damaged_one_gives_way_to_the_one_before(saved, tmp_path, damage):
    damage(tmp_path / "epoch-00003")
    run = fresh()
    assert checkpoint.load(run, tmp_path)
    assert run.epoch == 2
    training.fit(run, labelled(), labelled(1, 5), lambda report: None)
    assert_equal_runs(run, finished(small_config()))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_all_damaged_is_an_error_that_names_the_way_out(saved, tmp_path):
    for folder in tmp_path.iterdir():
        flip_a_bit(folder / "state.safetensors")
    with pytest.raises(CheckpointError, match="does not have its checksum.*remove the folder to start anew"):
        checkpoint.load(fresh(), tmp_path)


def test_another_runs_checkpoint_is_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"of another run: hdml.alpha 1.0 there, 9.0 here"):
        checkpoint.load(fresh(**{"hdml.alpha": 9.0}), tmp_path)


def test_more_epochs_continue_a_finished_run(saved, tmp_path):
    run = fresh(**{"optim.epochs": 5})
    assert checkpoint.load(run, tmp_path)
    training.fit(run, labelled(), labelled(1, 5), lambda report: None)
    assert_equal_runs(run, finished(small_config(**{"optim.epochs": 5})))


def test_a_failed_write_leaves_what_was_there(saved, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.whole, "_flush", full)
    saved.epoch += 1
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(saved, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == before
    assert not list(tmp_path.glob(".writing-*"))


def test_the_files_are_no_pickle(saved, tmp_path):
    names = {path.name for path in (tmp_path / "epoch-00003").iterdir()}
    assert names == {"state.safetensors", "run.json"}
    record = json.loads((tmp_path / "epoch-00003" / "run.json").read_text())
    assert record["settings"]["hdml.alpha"] == 1.0
