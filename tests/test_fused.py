"""Runs trained at once are what each is alone: on a CPU bit for bit; in a stack, as on a GPU, but for rounding.

Runs differ in seed, data, learning rates and all that `fused` lets differ. A stack is tested on the CPU too.
"""

import numpy as np
import pytest
import torch

from hdml_core import checkpoint, fused, training
from hdml_core.config import ConfigError, to_settings
from tests.test_training import VARIANTS, assert_equal_runs, labelled, small_config

RUNS = 3
THREADS = 2
WAYS = ("_side_by_side", "_stacked")
OF_TUPLES = [name for name in VARIANTS if name != "proxies"]
FREE_TO_SHIFT = ("triplet-paper", "triplet-authors", "daml-triplet", "ddml")
"""Of distances alone: the embedder's bias is free, its gradient rounding's, and Adam makes steps of that."""


@pytest.fixture(autouse=True)
def threads():
    """As many threads wherever the tests run."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Train at once in this way, whatever the device."""
    monkeypatch.setattr(fused, "_side_by_side", getattr(fused, request.param))
    return request.param


def configs(variant="npair-paper", **settings):
    """Runs that differ in every number that may differ; the first never pulls."""
    own = [
        {
            "seed": k,
            "hdml.alpha": float(k),
            "hdml.beta": 5.0 + k,
            "hdml.recon_weight": 1.0 + k,
            "optim.lr_embedder": 1e-3 * (1 + k),
            "optim.halve_at": (10 * k + 4,),
            "optim.clip": 0.1 if k else np.inf,
            "daml.lambda_adv": 1.0 + k,
            "loss.margin": 1.0 + k,
            "loss.threshold": 3.0 + k,
        }
        for k in range(RUNS)
    ]
    return [small_config(**{**VARIANTS[variant], **of_run, **settings}) for of_run in own]


def sets(equal=True):
    """What each run trains on: of one shape, or with classes and rows, and so steps, of its own."""
    return [labelled(k) if equal else labelled(k, classes=16 + 4 * (k % 2)) for k in range(RUNS)]


def begun(settings, trains, device="cpu"):
    return [training.new_run(config, train, device) for config, train in zip(settings, trains, strict=True)]


def together(runs, trains, report=lambda k, report: None):
    fused.fit_together(runs, trains, [labelled(9, 5)] * len(runs), report)
    return runs


def alone(settings, trains, device="cpu"):
    """Each run by itself, on one core."""
    runs, threads = begun(settings, trains, device), torch.get_num_threads()
    torch.set_num_threads(1)
    for run, train in zip(runs, trains, strict=True):
        training.fit(run, train, labelled(9, 5), lambda report: None)
    torch.set_num_threads(threads)
    return runs


def assert_close_runs(runs, others, rtol):
    for run, other in zip(runs, others, strict=True):
        assert (run.epoch, run.step, run.averages.steps) == (other.epoch, other.step, other.averages.steps)
        assert len(run.reports) == len(other.reports)
        for ours, theirs in zip(run.reports, other.reports, strict=True):
            assert (ours.epoch, ours.step) == (theirs.epoch, theirs.step)
            for part in ("losses", "hardness", "trace"):
                assert getattr(ours, part).keys() == getattr(theirs, part).keys()
                for name, value in getattr(ours, part).items():
                    np.testing.assert_allclose(value, getattr(theirs, part)[name], rtol, err_msg=name)
            if run.config.optim.precision == "float64":
                assert ours.validation.map_at_r == pytest.approx(theirs.validation.map_at_r, abs=1e-3)


@pytest.mark.parametrize("equal", [True, False], ids=["one shape", "unequal"])
@pytest.mark.parametrize("variant", OF_TUPLES)
def test_side_by_side_each_is_bitwise_what_it_is_alone(variant, equal):
    settings, trains = configs(variant), sets(equal)
    for run, other in zip(together(begun(settings, trains), trains), alone(settings, trains), strict=True):
        assert_equal_runs(run, other)


@pytest.mark.parametrize("equal", [True, False], ids=["one shape", "unequal"])
@pytest.mark.parametrize("variant", OF_TUPLES)
def test_in_a_stack_each_is_what_it_is_alone(variant, equal, monkeypatch):
    monkeypatch.setattr(fused, "_side_by_side", fused._stacked)
    settings, trains = configs(variant, **{"optim.precision": "float64"}), sets(equal)
    assert_close_runs(together(begun(settings, trains), trains), alone(settings, trains), rtol=1e-8)


@pytest.mark.parametrize("variant", OF_TUPLES)
def test_in_a_stack_an_epoch_in_float32_is_what_it_is_alone(variant, monkeypatch):
    monkeypatch.setattr(fused, "_side_by_side", fused._stacked)
    settings, trains = configs(variant, **{"optim.epochs": 1}), sets()
    rtol = 2e-3 if variant in FREE_TO_SHIFT else 1e-5
    assert_close_runs(together(begun(settings, trains), trains), alone(settings, trains), rtol)


def test_in_a_stack_networks_moments_and_averages_are_what_they_are_alone(monkeypatch):
    monkeypatch.setattr(fused, "_side_by_side", fused._stacked)
    settings, trains = configs(**{"optim.precision": "float64", "optim.weight_decay": 1e-2}), sets()
    for run, other in zip(together(begun(settings, trains), trains), alone(settings, trains), strict=True):
        ours, theirs = checkpoint._tensors(run), checkpoint._tensors(other)
        assert ours.keys() == theirs.keys()
        # The batch norm behind this bias takes it away: its gradient is rounding's, which Adam makes steps of.
        idle = ("networks.generator.0.bias", "optimisers.generator.1.", "networks.generator.2.running_mean")
        for name in [name for name in ours if not name.startswith(idle)]:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-12, msg=lambda m, n=name: n + m)


def test_runs_of_unequal_steps_sit_out_in_one_stack(monkeypatch):
    """Of one shape, but some have fewer steps in an epoch than others."""
    monkeypatch.setattr(fused, "_side_by_side", fused._stacked)
    sizes = []
    stack = fused._Stack
    monkeypatch.setattr(fused, "_Stack", lambda runs: sizes.append(len(runs)) or stack(runs))
    settings = [
        small_config(
            **{"seed": k, "optim.steps_per_epoch": 2 + k, "optim.precision": "float64", "optim.halve_at": (5,)}
        )
        for k in range(RUNS)
    ]
    trains = sets()
    assert_close_runs(together(begun(settings, trains), trains), alone(settings, trains), rtol=1e-8)
    assert sizes == [RUNS] * settings[0].optim.epochs


def test_reports_come_epoch_by_epoch_in_the_order_of_the_runs(way):
    told, trains = [], sets()
    settings = configs()
    settings[1] = small_config(**{"optim.epochs": 2})
    runs = together(begun(settings, trains), trains, lambda k, report: told.append((report.epoch, k, report)))
    assert [place[:2] for place in told] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 2)]
    assert all(report is runs[k].reports[epoch - 1] for epoch, k, report in told)


@pytest.mark.parametrize("stopped_at", [(1, 0), (2, 1)])
def test_resumed_they_go_on_bitwise_as_if_they_had_never_stopped(way, stopped_at, tmp_path):
    """Stopped between two checkpoints, some are an epoch ahead of the others, which come first then."""
    settings, trains = configs(), sets()
    whole = together(begun(settings, trains), trains)

    class Stop(Exception):
        pass

    def save(k, report):
        checkpoint.save(first[k], tmp_path / str(k))
        if (report.epoch, k) == stopped_at:
            raise Stop

    first = begun(settings, trains)
    with pytest.raises(Stop):
        together(first, trains, save)
    resumed = begun(settings, trains)
    for k, run in enumerate(resumed):
        checkpoint.load(run, tmp_path / str(k))
    epochs = [run.epoch for run in resumed]
    assert epochs == [stopped_at[0] if k <= stopped_at[1] else stopped_at[0] - 1 for k in range(RUNS)]
    for run, other in zip(together(resumed, trains), whole, strict=True):
        if way == "_side_by_side":
            assert_equal_runs(run, other)
    # A stack of fewer runs may round otherwise.
    assert_close_runs(resumed, whole, rtol=1e-4)


def test_resumed_where_all_stand_a_stack_goes_on_bitwise(way, tmp_path):
    settings, trains = configs(), sets()
    runs = begun(settings, trains)

    def save(k, report):
        if report.epoch == 2:
            checkpoint.save(runs[k], tmp_path / str(k))

    together(runs, trains, save)
    resumed = begun(settings, trains)
    for k, run in enumerate(resumed):
        checkpoint.load(run, tmp_path / str(k))
    for run, other in zip(together(resumed, trains), runs, strict=True):
        assert_equal_runs(run, other)


def test_a_run_goes_on_alone_where_a_stack_has_left_it(way):
    short, trains = configs(**{"optim.epochs": 1, "optim.precision": "float64"}), sets()
    runs = together(begun(short, trains), trains)
    whole = configs(**{"optim.precision": "float64"})
    for run, config, train in zip(runs, whole, trains, strict=True):
        run.config = config
        training.fit(run, train, labelled(9, 5), lambda report: None)
    assert_close_runs(runs, alone(whole, trains), rtol=1e-8)


def test_what_goes_wrong_in_one_run_is_said_as_alone_and_the_others_go_on(way):
    settings, trains = configs(), sets()
    trains[1].values[:] = 1e30
    with pytest.raises(training.NonFiniteLossError) as said_alone:
        alone(settings[1:2], trains[1:2])
    told, runs = [], begun(settings, trains)
    with pytest.raises(training.NonFiniteLossError) as said:
        together(runs, trains, lambda k, report: told.append((report.epoch, k)))
    assert str(said.value) == str(said_alone.value)
    assert told == [(1, 0), (1, 2)]
    others = [0, 2]
    left = together([runs[k] for k in others], [trains[k] for k in others])
    assert_close_runs(left, alone([settings[k] for k in others], [trains[k] for k in others]), rtol=1e-4)


def test_seconds_add_up_to_what_all_took_together(way):
    begin = training.time.monotonic()
    runs = together(begun(configs(), sets()), sets())
    took = training.time.monotonic() - begin
    assert 0 < sum(report.seconds for run in runs for report in run.reports) <= took


def test_threads_are_as_many_afterwards_as_before():
    together(begun(configs(), sets()), sets())
    assert torch.get_num_threads() == THREADS


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"loss.name": "pml.ProxyAnchorLoss", "synthesis": "none"}, "loss.name must be a loss of tuples, got 'pml.Pro"),
        ({"optim.compile": True}, "optim.compile must be False, got True"),
        ({"optim.precision": "bfloat16"}, "optim.precision must be float32 or float64, got 'bfloat16'"),
    ],
)
def test_what_can_not_be_trained_at_once_is_said(settings, reason):
    trains = [labelled(), labelled()]
    runs = begun([small_config(), small_config(**settings)], trains)
    assert reason in fused.why_apart(runs)
    with pytest.raises(ConfigError, match="runs that are trained at once: .*" + reason[:20]):
        together(runs, trains)
    assert all(run.epoch == 0 for run in runs)


def test_images_are_trained_apart():
    train = labelled(images=True)
    run = training.new_run(small_config(**{"data.name": "glyphs"}), train)
    assert "network.frozen must be 'all', or data.name 'features'" in fused.why_apart([run])
    assert fused.why_apart(begun(configs(), sets())) == ""


def test_all_that_may_differ_is_a_setting():
    assert {*fused.OF_THE_OBJECTIVE, *fused.AROUND_THE_OBJECTIVE} <= to_settings(small_config()).keys()
