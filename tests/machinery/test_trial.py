"""A trial in its worker: what it reads, what it tells, and that it tells the same however often it was stopped."""

import dataclasses
import itertools
import math
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch

from hdml_core.config import recipe_config, to_settings
from hdml_core.datasets import DataError, Dataset, LabelledSet
from hdml_core.training import NonFiniteLossError
from studies.machinery import trial
from studies.machinery.records import (
    GPU_SECONDS,
    HELD_MEMORY,
    PEAK_MEMORY,
    SECONDS,
    TAG_ATTEMPT,
    TAG_SET_ASIDE,
    VALIDATED,
)
from studies.machinery.store import SupersededError, take_over
from studies.machinery.trial import TRIALS, GpuBusyError, demand_gpu_memory
from studies.machinery.worker import Job, Kept

TRAIN, TEST, ROWS = 8, 6, 6
EPOCHS, STEPS = 3, 2
FOLDS_AND_SEEDS = tuple({"seed": seed, "data.fold": fold} for seed in (0, 1) for fold in (0, 1))


def made(features=False):
    """Classes that can be told apart, a little: TRAIN to train on, then TEST."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(TRAIN + TEST), ROWS)
    if features:
        centres = rng.normal(size=(TRAIN + TEST, 12))[labels]
        values = (centres + rng.normal(size=centres.shape))[:, None].astype(np.float32)
    else:
        centres = rng.integers(64, 192, (TRAIN + TEST, 1, 16, 16))[labels]
        values = (centres + rng.integers(-60, 60, centres.shape)).astype(np.uint8)
    whole = LabelledSet(values, np.arange(len(labels)), labels, tuple(f"{i:02d}" for i in range(TRAIN + TEST)))
    train, test = whole.subset(range(TRAIN)), whole.subset(range(TRAIN, TRAIN + TEST))
    return Dataset("made", "0", train, test)


@pytest.fixture
def opens(monkeypatch):
    """Let trials open this data set from now on, in a worker that has kept none; return in what runs it is opened."""

    def these(dataset):
        opened = []

        def open_data(config, root, device):
            opened.append(config)
            return dataset

        monkeypatch.setattr(trial, "open_data", open_data)
        monkeypatch.setattr(trial, "DATA", Kept())
        return opened

    return these


@pytest.fixture(autouse=True)
def images(opens):
    opens(made())


@pytest.fixture
def a_job(tmp_path):
    """A job that all tests vary."""
    settings = {
        "data.image_size": 16,
        "data.crop_size": 14,
        "data.batch_size": 8,
        "data.folds": 2,
        "network.embedding_size": 8,
        "network.generator_hidden": 8,
        "optim.epochs": EPOCHS,
        "optim.steps_per_epoch": STEPS,
        "retrieval.clusterings": 1,
        "retrieval.ks": (1, 2),
        "hdml.alpha": 1.0,
    }
    settings = to_settings(recipe_config(settings))
    return Job("search", 0, 1, settings, ({},), tmp_path, tmp_path / "trial", 1, 0.0, 60.0)


def vary(job, **changes):
    return dataclasses.replace(job, **changes)


def records(job, until=None):
    """All that the job tells, or as much as it tells until it is stopped while it tells `until` records."""
    told = []

    class Stopped(Exception):
        pass

    def tell(record):
        told.append(record)
        if len(told) == until:
            raise Stopped

    with suppress(Stopped):
        TRIALS[job.kind](job, tell)
    return told


def lasting(record, but=(PEAK_MEMORY, HELD_MEMORY)):
    """A record without what is measured anew whenever it is told."""
    metrics = {name: value for name, value in record.metrics.items() if name not in but}
    return record._replace(metrics=metrics, tags={})


def timeless(record):
    """A record without what it took."""
    return lasting(record, (PEAK_MEMORY, HELD_MEMORY, SECONDS, GPU_SECONDS))._replace(seconds=0.0)


class Sealed(np.ndarray):
    """Images whose test classes can't be looked at."""

    def __getitem__(self, index):
        rows = np.arange(len(self))[index]
        if (rows >= TRAIN * ROWS).any():
            raise AssertionError(f"rows of the test classes were read: {rows}")
        return np.asarray(self)[index]

    def __array_ufunc__(self, *_, **__):
        raise AssertionError("all rows were read at once")

    __array_function__ = __array_ufunc__


def with_values(dataset, values):
    sets = {side: dataclasses.replace(getattr(dataset, side), values=values) for side in ("train", "test")}
    return dataclasses.replace(dataset, **sets)


# What a trial sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["search", "baseline"])
def test_no_trial_of_a_search_reads_a_test_image(kind, a_job, opens):
    job = vary(a_job, kind=kind, parts=FOLDS_AND_SEEDS)
    undisturbed = records(job)
    sealed = made().train.values.view(Sealed)
    opens(with_values(made(), sealed))
    assert [*map(timeless, records(vary(job, folder=job.folder / "sealed")))] == [*map(timeless, undisturbed)]
    # Nor do they have a say in what it comes to, whatever way they might be read.
    others = made().train.values.copy()
    others[TRAIN * ROWS :] = 0
    opens(with_values(made(), others))
    assert [*map(timeless, records(vary(job, folder=job.folder / "other")))] == [*map(timeless, undisturbed)]
    assert not [name for record in undisturbed for name in record.metrics if name.startswith(("test/", "paper/"))]


@pytest.fixture
def room_for_data(monkeypatch):
    """Trials may keep so many bytes on their device, as if that were a GPU; return what was put there."""
    put = []
    on = LabelledSet.on
    monkeypatch.setattr(LabelledSet, "on", lambda rows, device: put.append(rows) or on(rows, device))

    def of(bytes_):
        monkeypatch.setattr(trial, "_room_for_data", lambda job: bytes_)
        return put

    return of


def test_rows_kept_on_the_device_are_the_same_and_those_of_the_training_classes_alone(a_job, opens, room_for_data):
    job = vary(a_job, parts=FOLDS_AND_SEEDS)
    undisturbed = records(job)
    opens(with_values(made(), made().train.values.view(Sealed)))
    put = room_for_data(made().train.nbytes)
    assert [*map(timeless, records(vary(job, folder=job.folder / "resident")))] == [*map(timeless, undisturbed)]
    assert len(put) == 1


@pytest.mark.parametrize(("settings", "missing"), [({}, 1), ({"data.resident": False}, 0)])
def test_rows_stay_in_the_memory_map_where_they_do_not_fit_or_are_to(settings, missing, a_job, room_for_data):
    put = room_for_data(made().train.nbytes - missing)
    records(vary(a_job, settings=a_job.settings | settings), until=1)
    assert not put


@pytest.mark.parametrize(
    ("gpus", "ranks", "room"), [(0.0, 1, 0), (0.5, 1, 200), (1.0, 1, 400), (1.0, 2, 200), (2.0, 2, 400), (2.0, 1, 400)]
)
def test_data_may_take_a_quarter_of_what_a_trial_has_on_its_gpu(a_job, monkeypatch, gpus, ranks, room):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1600))
    assert trial._room_for_data(vary(a_job, gpus=gpus, processes=ranks)) == room


@pytest.mark.parametrize(("kind", "epochs"), [("confirm", EPOCHS - 1), ("paper", 0)])
def test_the_seal_would_be_seen_to_break(kind, epochs, a_job, opens):
    opens(with_values(made(), made().train.values.view(Sealed)))
    told = []
    with pytest.raises(AssertionError, match="rows of the test classes were read"):
        TRIALS[kind](vary(a_job, kind=kind), told.append)
    assert len(told) == epochs  # a sealed trial looks once, at its end


def test_a_sealed_trial_trains_on_all_training_classes_and_looks_once(a_job):
    told = records(vary(a_job, kind="confirm"))
    assert [record.last for record in told] == [False] * (EPOCHS - 1) + [True]
    looks = [{name for name in record.metrics if name.startswith(("test/", "validation/"))} for record in told]
    assert looks[:-1] == [set()] * (EPOCHS - 1)
    assert {"test/recall_at_1", "test/map_at_r", "test/nmi", "test/f1"} <= looks[-1]
    assert not [name for name in looks[-1] if name.startswith("validation/")]


def test_paper_mode_gives_the_honest_number_too(a_job):
    honest = records(vary(a_job, kind="confirm"))
    told = records(vary(a_job, kind="paper", folder=a_job.folder / "paper"))
    test = {name: value for name, value in honest[-1].metrics.items() if name.startswith("test/")}
    assert {name: told[-1].metrics[name] for name in test} == test
    chosen = [record.metrics["paper/recall_at_1"] for record in told]
    assert chosen == sorted(chosen)
    assert chosen[-1] >= test["test/recall_at_1"]
    assert not [name for record in told[:-1] for name in record.metrics if name.startswith("test/")]


def test_a_floor_is_the_same_of_rows_kept_on_the_device(a_job, opens, room_for_data):
    opens(made(features=True))
    (floor,) = records(vary(a_job, kind="floor"))
    opens(made(features=True))
    put = room_for_data(math.inf)
    (resident,) = records(vary(a_job, kind="floor"))
    assert len(put) == 1
    assert {n: v for n, v in floor.metrics.items() if "/" in n and not n.startswith("cost")} == {
        n: v for n, v in resident.metrics.items() if not n.startswith("cost")
    }


def test_a_floor_is_measured_on_the_same_folds_as_the_trials(a_job, opens):
    opens(made(features=True))
    (over_both,) = records(vary(a_job, kind="floor", parts=({"data.fold": 0}, {"data.fold": 1})))
    folds = [records(vary(a_job, kind="floor", parts=({"data.fold": fold},)))[0] for fold in (0, 1)]
    for name in VALIDATED:
        assert over_both.metrics[name] == pytest.approx(np.mean([fold.metrics[name] for fold in folds]))
    assert over_both.last
    assert "test/recall_at_1" in over_both.metrics


# Parts ------------------------------------------------------------------------------------------------------------


def test_parts_are_counted_through(a_job):
    told = records(vary(a_job, parts=FOLDS_AND_SEEDS))
    assert [record.epoch for record in told] == list(range(1, 4 * EPOCHS + 1))
    assert [record.step for record in told] == [STEPS * record.epoch for record in told]
    assert [record.part for record in told] == [part for part in range(4) for _ in range(EPOCHS)]
    assert [record.ends_part for record in told] == 4 * ([False] * (EPOCHS - 1) + [True])
    assert [record.last for record in told] == [False] * (4 * EPOCHS - 1) + [True]
    seconds = [record.seconds for record in told]
    assert seconds == sorted(seconds)
    assert seconds == [record.metrics[SECONDS] for record in told]
    points = [step for record in told for step, _ in record.trace["hardness/kept"]]
    assert points == sorted(set(points))
    assert points[-1] == 4 * EPOCHS * STEPS


def test_each_part_is_a_training_of_its_own(a_job):
    told = records(vary(a_job, parts=FOLDS_AND_SEEDS))
    for part, changes in enumerate(FOLDS_AND_SEEDS):
        alone = records(vary(a_job, parts=(changes,), folder=a_job.folder / f"alone-{part}"))
        within = told[part * EPOCHS : (part + 1) * EPOCHS]
        assert [record.part_qualities for record in within] == [record.part_qualities for record in alone]
        losses = [{n: v for n, v in record.metrics.items() if n.startswith("train/")} for record in within]
        assert losses == [{n: v for n, v in record.metrics.items() if n.startswith("train/")} for record in alone]


def test_validation_is_the_mean_over_the_parts_that_ended(a_job):
    told = records(vary(a_job, parts=FOLDS_AND_SEEDS))
    ended = [record.part_qualities for record in told if record.ends_part]
    for record in told:
        for name in VALIDATED:
            assert record.metrics[name.replace("validation/", "part/")] == record.part_qualities[name]
            if record.ends_part:
                mean = np.mean([part[name] for part in ended[: record.part + 1]])
                assert record.metrics[name] == pytest.approx(mean, abs=1e-15)
            else:
                assert name not in record.metrics


def test_a_single_part_is_validated_after_every_epoch(a_job):
    for record in records(a_job):
        assert {name: record.metrics[name] for name in VALIDATED} == {n: record.part_qualities[n] for n in VALIDATED}
        assert not [name for name in record.metrics if name.startswith("part/")]


# Told again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["search", "confirm", "paper"])
def test_told_twice_is_told_the_same(kind, a_job):
    job = vary(a_job, kind=kind, parts=FOLDS_AND_SEEDS if kind == "search" else ({},))
    first = records(job)
    again = records(vary(job, attempt=2))
    assert [*map(lasting, again)] == [*map(lasting, first)]
    assert {record.tags[TAG_ATTEMPT] for record in again} == {"2"}


@pytest.mark.parametrize("kind", ["search", "confirm", "paper"])
@pytest.mark.parametrize("stopped_at", [[1], [EPOCHS], [EPOCHS + 1], [1, 2, EPOCHS + 2]])
def test_stopped_anywhere_it_ends_as_if_it_had_not_been(kind, stopped_at, a_job):
    job = vary(a_job, kind=kind, parts=FOLDS_AND_SEEDS if kind == "search" else ({},))
    undisturbed = records(vary(job, folder=job.folder / "undisturbed"))
    for attempt, until in enumerate(stopped_at, start=1):
        records(vary(job, attempt=attempt), until)
    resumed = records(vary(job, attempt=len(stopped_at) + 1))
    assert [*map(timeless, resumed)] == [*map(timeless, undisturbed)]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    """Of what was measured, where that is written in digits."""
    content = bytearray(path.read_bytes())
    measured = b'"map_at_r": '
    content[content.find(measured) + len(measured) if measured in content else len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = [
    pytest.param(damage, name, id=f"{damage.__name__} {name}")
    for damage, name in itertools.product((truncate, flip_a_bit), ("state.safetensors", "run.json"))
]


@pytest.mark.parametrize(("damage", "name"), DAMAGES)
@pytest.mark.parametrize("all_of_them", [False, True], ids=["the newest", "all"])
def test_a_damaged_checkpoint_costs_time_and_nothing_else(damage, name, all_of_them, a_job):
    job = vary(a_job, parts=FOLDS_AND_SEEDS[:2])
    undisturbed = records(vary(job, folder=job.folder / "undisturbed"))
    records(job, until=2 * EPOCHS - 1)
    checkpoints = sorted((job.folder / "part-01").iterdir())
    assert len(checkpoints) == 2
    for checkpoint in checkpoints if all_of_them else checkpoints[-1:]:
        damage(checkpoint / name)

    resumed = records(vary(job, attempt=2))
    assert [*map(timeless, resumed)] == [*map(timeless, undisturbed)]
    aside = str(job.folder / "part-01.unreadable-2")
    tags = [record.tags.get(TAG_SET_ASIDE) for record in resumed]
    assert tags == [None] * EPOCHS + [aside if all_of_them else None] * EPOCHS
    assert (job.folder / "part-01.unreadable-2").exists() == all_of_them


def test_checkpoints_that_are_gone_are_made_again(a_job):
    first = records(a_job, until=2)
    shutil.rmtree(a_job.folder)
    assert [*map(timeless, records(vary(a_job, attempt=2)))][:2] == [*map(timeless, first)]


def test_an_attempt_that_was_superseded_writes_nothing_more(a_job):
    told = []

    def tell(record):
        told.append(record)
        take_over(vary(a_job, attempt=2))

    take_over(a_job)
    with pytest.raises(SupersededError, match="attempt 1 at .* was superseded by attempt 2"):
        TRIALS[a_job.kind](a_job, tell)
    assert len(told) == 1
    assert [path.name for path in (a_job.folder / "part-00").iterdir()] == ["epoch-00001"]


# Data, opened once -----------------------------------------------------------------------------------------------


def test_a_worker_opens_its_data_once_for_all_parts_and_trials(opens, a_job, room_for_data):
    opened, put = opens(made()), room_for_data(math.inf)
    parts = vary(a_job, parts=FOLDS_AND_SEEDS)
    records(parts)
    records(vary(parts, folder=a_job.folder / "next", settings=parts.settings | {"hdml.alpha": 2.0}))
    assert len(opened) == len(put) == 1


@pytest.mark.parametrize(
    "change", [{"data.image_size": 20}, {"data.flip": True}, {"data.resident": False}, {"network.frozen": "all"}]
)
def test_other_data_are_opened_anew(opens, a_job, change):
    opened = opens(made(features=True))
    records(a_job, until=1)
    records(vary(a_job, folder=a_job.folder / "next", settings=a_job.settings | change), until=1)
    assert len(opened) == 2


@pytest.mark.parametrize("file", ["data.path", "network.weights"])
def test_a_file_that_changed_is_noticed_by_the_next_trial(opens, a_job, tmp_path, file):
    path = tmp_path / "file.npz"
    path.write_bytes(b"before")
    opened = opens(made(features=True))
    job = vary(a_job, settings=a_job.settings | {"data.name": "features", file: str(path)})
    if file != "data.path":
        (tmp_path / "features.npz").touch()
        job = vary(job, settings=job.settings | {"data.path": str(tmp_path / "features.npz")})
    for content in (b"before", b"after"):
        path.write_bytes(content)
        records(vary(job, folder=job.folder / content.decode()), until=1)
    assert len(opened) == 2


def test_data_that_changed_into_others_than_the_study_s_are_refused(opens, a_job):
    opens(made())
    records(vary(a_job, data="0"), until=1)
    with pytest.raises(DataError, match="must be the study's data, digest 1, got 0"):
        records(vary(a_job, data="1", folder=a_job.folder / "next"), until=1)


# Parts at once ----------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(a_job, opens):
    """A job on features, whose parts train together."""
    opens(made(features=True))
    return vary(a_job, parts=FOLDS_AND_SEEDS)


def of_parts(told):
    """What each epoch of each part came to, and nothing of when it was told."""
    return {
        (record.part, sum(other.part == record.part for other in told[: i + 1])): (
            record.part_qualities,
            {name: value for name, value in record.metrics.items() if name.startswith("train/")},
            record.trace,
            record.ends_part,
        )
        for i, record in enumerate(told)
    }


def test_parts_on_features_are_told_epoch_by_epoch(at_once):
    told = records(at_once)
    assert [record.part for record in told] == EPOCHS * [0, 1, 2, 3]
    assert [record.epoch for record in told] == list(range(1, 4 * EPOCHS + 1))
    assert [record.step for record in told] == [STEPS * record.epoch for record in told]
    assert [record.ends_part for record in told] == 4 * (EPOCHS - 1) * [False] + 4 * [True]
    assert [record.last for record in told] == [False] * (4 * EPOCHS - 1) + [True]
    seconds = [record.seconds for record in told]
    assert seconds == sorted(seconds)
    assert seconds == [record.metrics[SECONDS] for record in told]


@pytest.fixture(params=[1, 3])
def threads(request):
    """So many for what is done at once, and one for all else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(before)


def test_parts_at_once_are_what_they_are_in_turn(at_once, threads):
    in_turn = records(vary(at_once, folder=at_once.folder / "in turn", in_turn=True))
    assert [record.part for record in in_turn] == [part for part in range(4) for _ in range(EPOCHS)]
    torch.set_num_threads(threads)
    told = records(at_once)
    assert of_parts(told) == of_parts(in_turn)
    final = [
        {name: value for name, value in records_of[-1].metrics.items() if name.startswith(("validation/", "part/"))}
        for records_of in (told, in_turn)
    ]
    assert final[0] == final[1]
    assert {*VALIDATED} < final[0].keys()


def test_parts_at_once_told_twice_are_told_the_same(at_once):
    first = records(at_once)
    assert [*map(lasting, records(vary(at_once, attempt=2)))] == [*map(lasting, first)]


@pytest.mark.parametrize("stopped_at", [[1], [4], [6], [3, 7, 9]])
def test_parts_at_once_stopped_anywhere_end_as_if_they_had_not_been(stopped_at, at_once):
    undisturbed = records(vary(at_once, folder=at_once.folder / "undisturbed"))
    for attempt, until in enumerate(stopped_at, start=1):
        records(vary(at_once, attempt=attempt), until)
    resumed = records(vary(at_once, attempt=len(stopped_at) + 1))
    assert [*map(timeless, resumed)] == [*map(timeless, undisturbed)]


@pytest.mark.parametrize("ahead", [{0}, {2}, {0, 1, 3}], ids=str)
def test_parts_that_are_behind_catch_up_before_anything_is_told(ahead, at_once):
    """As after checkpoints that could not be read, or a power cut between two of them."""
    undisturbed = records(vary(at_once, folder=at_once.folder / "undisturbed"))
    records(at_once, until=2 * 4)
    for part in {0, 1, 2, 3} - ahead:
        for epoch in (2,) if part else (1, 2):
            shutil.rmtree(at_once.folder / f"part-{part:02d}" / f"epoch-{epoch:05d}")
    resumed = records(vary(at_once, attempt=2))
    assert [*map(timeless, resumed)] == [*map(timeless, undisturbed)]


def test_a_part_whose_loss_is_not_finite_ends_the_trial_with_its_own_error(at_once, opens):
    dataset = made(features=True)
    dataset.train.values[: ROWS * TRAIN : 2 * ROWS] = 1e30  # in classes that validate in fold 0, and train in fold 1
    opens(dataset)
    told = []
    with pytest.raises(NonFiniteLossError, match=r"^j_\w+ is (inf|nan) at epoch \d+, step \d+"):
        TRIALS["search"](at_once, told.append)
    assert {record.part for record in told} <= {0}


# A GPU that is shared ---------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 100 bytes with so much free at each look, and what was asked of it."""
    asked = {}

    def with_free(*looks):
        free = iter(looks)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 100))
        return asked

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.setdefault("emptied", True))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share: asked.setdefault("fraction", share)
    )
    monkeypatch.setattr(trial.time, "sleep", lambda seconds: asked.update(waited=asked.get("waited", 0) + seconds))
    return with_free


def test_a_trial_waits_for_its_share_of_the_gpu_and_keeps_to_it(gpu):
    asked = gpu(10, 44, 45)
    demand_gpu_memory(0.5)
    assert asked == {"emptied": True, "waited": 2, "fraction": 0.5}


def test_a_whole_gpu_has_no_bound(gpu):
    asked = gpu(90)
    demand_gpu_memory(2.0)
    assert asked == {"emptied": True}


def test_what_a_worker_keeps_of_the_gpu_is_its_own(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 30)
    assert gpu(15).setdefault("waited", 0) == 0
    demand_gpu_memory(0.5)


def test_a_gpu_that_stays_busy_is_told_with_its_numbers(gpu):
    asked = gpu(*[20] * trial.GPU_PATIENCE)
    with pytest.raises(GpuBusyError, match=r"0.5 GPU must find 45% .* free, got 20% for 60 s: .* --gpus-per-trial"):
        demand_gpu_memory(0.5)
    assert asked["waited"] == 60
    assert "fraction" not in asked
