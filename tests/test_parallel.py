"""Ranks that share an extractor out come to what one process comes to: its losses, gradients, parameters, reports.

The ranks are processes on the CPU, which speak by Gloo over the loopback; the single process is their oracle. Where
there are GPUs, each has one, and they speak by NCCL.
"""

import os
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import multiprocessing, nn

from hdml_core import checkpoint, parallel, training
from hdml_core.config import ConfigError
from tests.services import HOST, free_port
from tests.test_training import CLASSES, ROWS, labelled, same, small_config

IMAGES = {"data.name": "glyphs", "data.flip": True, "optim.precision": "float64", "optim.steps_per_epoch": 2}
# Finite averages from the start, so that real and synthetic tuples both weigh something; decay must count once. The
# generator hardly moves: where its batch norm takes a bias away, the gradient is rounding's, and Adam makes it a step.
HDML = {
    "hdml.average_start": 3.0,
    "hdml.alpha": 1.0,
    "hdml.beta": 3.0,
    "optim.weight_decay": 1e-2,
    "optim.lr_generator": 1e-6,
}
AUTHORS = {"recipe": "authors", "hdml.lambda_soft": 1.0, "hdml.average_window": 4, **HDML}
VARIANTS = {
    "npair": {"synthesis": "none", "optim.weight_decay": 1e-2},
    "triplet": {"synthesis": "none", "loss.name": "triplet"},
    "hdml-npair": HDML,
    "hdml-triplet": {**HDML, "loss.name": "triplet"},
    "hdml-npair-authors": AUTHORS,
    "hdml-triplet-authors": {**AUTHORS, "loss.name": "triplet"},
    "daml": {"synthesis": "daml"},
    "proxies": {"synthesis": "none", "loss.name": "pml.ProxyAnchorLoss", "loss.options": "alpha=16"},
}
BATCH_NORMS = ("trained", "frozen")


# Processes that meet as ranks, do what they are told, all the same, and part


def serve(line):
    """Do what comes down the line, until nothing does; answer what a call returned, or what it raised."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while task := line.recv():
        place, function, arguments = task
        try:
            parallel.start(*place)
            line.send(function(*arguments))
        except RuntimeError as error:
            line.send(error)
        finally:
            parallel.stop()


class Processes:
    """As many as are asked for, each kept for the next call."""

    def __init__(self):
        self._spawn = multiprocessing.get_context("spawn")
        self._held = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process, line in self._held:
            if process.is_alive():
                line.send(None)
            process.join(10)
            process.kill()
            process.join()

    def call(self, world, function, *arguments, device="cpu", patience=60.0):
        """What each of `world` ranks returns of the call, or the error that it raised; EOFError where it died."""
        while len(self._held) < world:
            line, theirs = self._spawn.Pipe()
            process = self._spawn.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._held.append((process, line))
        ranks, port = self._held[:world], free_port()
        for rank, (_, line) in enumerate(ranks):
            own = device if device == "cpu" else f"{device}:{rank}"
            line.send(((rank, world, HOST, port, own, patience), function, arguments))
        answers = []
        for process, line in ranks:
            try:
                answers.append(line.recv())
            except EOFError as error:
                process.join()
                self._held.remove((process, line))
                answers.append(error)
        return answers


@pytest.fixture(scope="module")
def processes():
    with Processes() as held:
        yield held


# What they do: a run, its extractor shared out where there are ranks to share it


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else None


def device():
    on_gpu = rank() is not None and torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def begin(settings, train=None):
    train = train or labelled(images=True)
    run = training.new_run(small_config(**{**IMAGES, **settings}), train, device())
    if rank() is not None:
        parallel.share_out(run)
    return run


def validation():
    return labelled(1, 5, images=True)


def outcome(run):
    """All that a run has, as arrays: networks, moments, averages; its reports; how far it is."""
    state = {name: value.cpu().numpy() for name, value in checkpoint._tensors(run).items()}
    return SimpleNamespace(state=state, reports=list(run.reports), place=(run.epoch, run.step, run.averages.steps))


def first_step(settings):
    """The values and the gradients of one step."""
    run = begin({**settings, "optim.steps_per_epoch": 1, "daml.pretrain_share": 0.0})
    columns = training._train_epoch(run, labelled(images=True))
    named = run.networks.named_parameters()
    return columns, {name: p.grad.cpu().numpy() for name, p in named if p.grad is not None}


def trained(settings, folder=None):
    """A run from its checkpoint, where there is a folder with one, to its end, where it leaves one."""
    run = begin(settings)
    if folder is not None and rank() in (None, 0):
        checkpoint.load(run, folder)
    if folder is not None and rank() is not None:
        parallel.agree(run)
    training.fit(run, labelled(images=True), validation(), lambda report: None)
    if folder is not None and rank() in (None, 0):
        checkpoint.save(run, folder)
    return outcome(run)


def assert_close(ours, theirs, rtol, atol):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol, atol, err_msg=name)


def assert_like(ours, single):
    """Equal to 1e-8; moments to 1e-6, for a single process's differ by as much where its start does by 1e-15."""
    assert ours.place == single.place
    assert ours.state.keys() == single.state.keys()
    for name, value in single.state.items():
        tolerance = 1e-6 if name.startswith("optimisers") else 1e-8
        np.testing.assert_allclose(ours.state[name], value, tolerance, tolerance, err_msg=name)
    for report, other in zip(ours.reports, single.reports, strict=True):
        assert (report.epoch, report.step, report.validation) == (other.epoch, other.step, other.validation)
        assert_close(report.losses, other.losses, rtol=1e-8, atol=1e-8)
        assert_close(report.trace, other.trace, rtol=1e-8, atol=1e-8)


def assert_same(ours, other):
    assert (ours.place, list(map(same, ours.reports))) == (other.place, list(map(same, other.reports)))
    assert ours.state.keys() == other.state.keys()
    for name, value in ours.state.items():
        assert np.array_equal(value, other.state[name]), name


# Two ranks


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_of_two_has_the_values_and_the_gradients_of_one(processes, variant, batch_norm):
    settings = {**VARIANTS[variant], "network.batch_norm": batch_norm}
    values, gradients = first_step(settings)
    assert any(name.startswith("extractor") and np.abs(g).max() > 1e-6 for name, g in gradients.items())
    for their_values, their_gradients in processes.call(2, first_step, settings):
        assert_close(their_values, values, rtol=1e-10, atol=1e-10)
        assert_close(their_gradients, gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_of_two_is_that_of_one(processes, variant, batch_norm):
    settings = {**VARIANTS[variant], "network.batch_norm": batch_norm}
    first, second = processes.call(2, trained, settings)
    assert_same(first, second)
    assert_like(first, trained(settings))
    moved = [name for name in first.state if name.endswith("num_batches_tracked") and first.state[name] > 0]
    assert any(name.startswith("networks.extractor") for name in moved) == (batch_norm == "trained")


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_a_run_of_one_rank_is_that_of_none(monkeypatch, batch_norm):
    settings = {**HDML, "network.batch_norm": batch_norm}
    single = trained(settings)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    parallel.start(0, 1, HOST, free_port(), "cpu")
    try:
        assert_like(trained(settings), single)
    finally:
        parallel.stop()


def test_so_it_is_in_float32_but_for_rounding(processes):
    settings = {"synthesis": "none", "optim.precision": "float32", "optim.epochs": 1, "optim.lr_extractor": 1e-4}
    first, second = processes.call(2, first_step, settings)
    values, gradients = first_step(settings)
    assert_close(first[0], values, rtol=1e-5, atol=1e-6)
    assert_close(first[1], gradients, rtol=1e-3, atol=1e-5)
    assert_close(first[1], second[1], rtol=0, atol=0)


MIXED = {"optim.precision": "bfloat16", "optim.channels_last": True}


def mixed_step(settings):
    run = begin({**settings, **MIXED})
    dtypes = []
    run.networks.extractor.body[0].register_forward_hook(lambda _, x, y: dtypes.append(y.dtype))
    losses = training._train_epoch(run, labelled(images=True))["j_metric"]
    weight = run.networks.extractor.body[4].weight
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert not weight.grad.is_contiguous()
    return losses, set(dtypes)


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_mixed_precision_and_channels_last_stay_what_they_are(processes, batch_norm):
    settings = {**HDML, "network.batch_norm": batch_norm}
    single, _ = mixed_step(settings)
    for losses, dtypes in processes.call(2, mixed_step, settings):
        assert dtypes == {torch.bfloat16}
        np.testing.assert_allclose(losses[0], single[0], rtol=2e-2)


def compiled(settings):
    """A step whose objective is traced and differentiated as for the compiler, and then run as it is, to save time."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    training._compiled = lambda objective: torch.compile(objective, backend=counted)
    return first_step({**settings, "optim.compile": True}), len(graphs)


@pytest.mark.parametrize("variant", ["hdml-npair", "daml"])
def test_what_is_around_the_extractor_compiles(processes, variant):
    values, gradients = first_step(VARIANTS[variant])
    for (their_values, their_gradients), graphs in processes.call(2, compiled, VARIANTS[variant]):
        assert graphs > 0
        assert_close(their_values, values, rtol=1e-10, atol=1e-10)
        assert_close(their_gradients, gradients, rtol=1e-10, atol=1e-10)


def activations():
    """As the convnet gives them after its second block."""
    values = np.random.default_rng(0).normal(size=(CLASSES * ROWS, 1, 64, 8, 8))
    return replace(labelled(), values=values.astype(np.float32))


def on_activations(settings):
    run = begin(settings | {"network.frozen": "7"}, activations())
    training.fit(run, activations(), activations(), lambda report: None)
    return outcome(run)


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_what_comes_after_a_frozen_stem_is_shared_out_too(processes, batch_norm):
    settings = {**HDML, "network.batch_norm": batch_norm}
    first, second = processes.call(2, on_activations, settings)
    assert_same(first, second)
    assert_like(first, on_activations(settings))


# Three ranks, with slices of unlike sizes


def on_batches(tuples, settings):
    run = begin(settings)
    run.batches.tuples = tuples  # fewer than a config may ask for
    training.fit(run, labelled(images=True), validation(), lambda report: None)
    return outcome(run)


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
@pytest.mark.parametrize(("tuples", "variant"), [(7, "hdml-npair"), (1, "proxies")], ids=["4-5-5", "0-1-1"])
def test_slices_may_be_unequal_and_empty(processes, tuples, variant, batch_norm):
    settings = {**VARIANTS[variant], "network.batch_norm": batch_norm, "optim.epochs": 1}
    first, *others = processes.call(3, on_batches, tuples, settings)
    for other in others:
        assert_same(first, other)
    assert_like(first, on_batches(tuples, settings))


def embeddings():
    training.EVALUATION_ROWS = 7  # of 30 rows: the last two are for three ranks
    return training.embed(begin({}), validation()).numpy()


def test_rows_are_embedded_together(processes, monkeypatch):
    monkeypatch.setattr(training, "EVALUATION_ROWS", 7)
    z = embeddings()
    for theirs in processes.call(3, embeddings):
        np.testing.assert_allclose(theirs, z, rtol=1e-10, atol=1e-10)


def normalised(dtype):
    """Batch norm of rows far from zero, and its gradients; as torch has it, where no ranks are."""
    random = torch.Generator().manual_seed(0)
    x = (1000 + torch.randn(10, 3, 4, 5, generator=random, dtype=torch.float64)).to(dtype)
    weights = torch.randn(x.shape, generator=random, dtype=torch.float64).to(dtype)
    layer = nn.BatchNorm2d(3, momentum=0.3).to(dtype)
    rows = slice(0, len(x)) if rank() is None else parallel._own_rows(len(x))
    own = x[rows].clone().requires_grad_()
    y = layer(own) if rank() is None else parallel._batch_norm(layer, own)
    gradients = torch.autograd.grad((y * weights[rows]).sum(), (own, layer.weight, layer.bias))
    found = {"y": y, "x": gradients[0], "sums": torch.stack(gradients[1:]), **dict(layer.named_buffers())}
    return {name: value.detach().double().numpy() for name, value in found.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_batch_norm_is_that_of_torch_far_from_zero_too(processes, dtype, tolerance):
    whole, parts = normalised(torch.float64), processes.call(3, normalised, dtype)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in ("y", "x")}
    joined["sums"] = sum(part["sums"] for part in parts)
    for part in parts:
        assert_close(part | joined, whole, rtol=tolerance, atol=tolerance)


# One state of all ranks


def handed_over(settings):
    """Two epochs, after the first of which rank 1 has nothing left but a run at its start."""
    run = begin({**settings, "optim.epochs": 1})
    training.fit(run, labelled(images=True), validation(), lambda report: None)
    if rank() == 1:
        run = begin({**settings, "optim.epochs": 1})
    parallel.agree(run)
    first = outcome(run)
    run.config = small_config(**{**IMAGES, **settings, "optim.epochs": 2})
    training.fit(run, labelled(images=True), validation(), lambda report: None)
    return first, outcome(run)


@pytest.mark.parametrize("variant", ["npair", "hdml-npair-authors", "proxies"])
def test_rank_0_hands_on_all_that_it_has(processes, variant):
    settings = {**VARIANTS[variant], "optim.channels_last": True}
    (first, last), (first_there, last_there) = processes.call(2, handed_over, settings)
    assert len(first.reports) == 1
    assert first.reports == first_there.reports
    assert_same(first, first_there)
    assert_same(last, last_there)
    moved = "networks.extractor.body.0.weight"
    assert not np.array_equal(first.state[moved], last.state[moved])


def drifted(settings):
    run = begin(settings)
    drift = 1e-3 * (rank() or 0)

    def report(report):
        for parameter in run.networks.parameters():
            parameter.data += drift
        if rank() is not None:
            parallel.agree(run)

    training.fit(run, labelled(images=True), validation(), report)
    return outcome(run)


def test_what_agrees_after_each_epoch_does_not_drift_apart(processes):
    first, second = processes.call(2, drifted, HDML)
    assert first.reports == second.reports
    assert_same(first, second)
    assert_like(first, drifted(HDML))


@pytest.mark.parametrize(("ranks", "later"), [(2, 1), (1, 2), (3, 2)])
def test_a_checkpoint_is_continued_on_any_number_of_ranks(processes, tmp_path, ranks, later):
    whole = {**HDML, "optim.epochs": 3}
    for number, epochs in ((ranks, 2), (later, 3)):
        settings = {**whole, "optim.epochs": epochs}
        runs = processes.call(number, trained, settings, tmp_path) if number > 1 else [trained(settings, tmp_path)]
        for run in runs:
            assert_same(run, runs[0])
    assert runs[0].place[0] == 3
    assert_like(runs[0], trained(whole))


# What can't go on


def left_alone(leave):
    """How long it takes a rank to see that rank 1 has left."""
    if rank() == 1:
        return leave()
    begun = time.monotonic()
    try:
        first_step({})
    except RuntimeError:
        return time.monotonic() - begun
    return None


def fall_silent():
    time.sleep(7)


def die():
    os._exit(1)


@pytest.mark.parametrize(("leave", "patience", "at_most"), [(fall_silent, 2.0, 6.5), (die, 60.0, 30.0)])
def test_where_one_leaves_the_others_do_not_go_on(processes, leave, patience, at_most):
    assert processes.call(3, rank) == [0, 1, 2]
    first, _, other = processes.call(3, left_alone, leave, patience=patience)
    assert max(first, other) < at_most


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever():
    with pytest.raises(RuntimeError, match="1/2 clients joined"):
        parallel.start(0, 2, HOST, free_port(), "cpu", patience=1.0)
    assert rank() is None


@pytest.mark.parametrize(
    ("settings", "got"),
    [({}, "'features' and ''"), ({"data.name": "cub200", "network.frozen": "all"}, "'cub200' and 'all'")],
)
def test_features_leave_nothing_to_share_out(settings, got):
    run = training.new_run(small_config(**settings), labelled())
    with pytest.raises(ConfigError) as error:
        parallel.share_out(run)
    assert str(error.value) == (
        "a run on several GPUs must train an extractor, which they share out: data.name must not be 'features', nor "
        f"network.frozen 'all', got {got}; give it one GPU, or a share of one"
    )


# Several GPUs


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gpus_share_an_extractor_out(processes, variant, batch_norm):
    settings = {**VARIANTS[variant], "network.batch_norm": batch_norm}
    values, gradients = first_step(settings)
    for their_values, their_gradients in processes.call(2, first_step, settings, device="cuda"):
        assert_close(their_values, values, rtol=1e-9, atol=1e-12)
        assert_close(their_gradients, gradients, rtol=1e-5, atol=1e-8)
    (first, last), (first_there, last_there) = processes.call(2, handed_over, {**settings, **MIXED}, device="cuda")
    assert first.reports == first_there.reports
    assert_same(first, first_there)
    assert last.place == last_there.place
