"""What holds on the CPU holds on a CUDA GPU: the same numbers, bitwise the same again, and no step that waits.

Nothing is needed here but the core: `python -m pytest -m gpu tests/test_gpu.py`.
"""

import gc
import os
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from hdml_core import checkpoint, frozen, retrieval, training
from hdml_core.images import augment
from hdml_core.networks import Extractor
from tests.benchmarks.gpu import made_up
from tests.test_fused import OF_TUPLES, alone, assert_close_runs, begun, configs, sets, together
from tests.test_images import draw_images, generator
from tests.test_training import assert_equal_runs, labelled, small_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # Of the device itself, and of operations that may differ in the last bit: the tests look whether they do.
    pytest.mark.filterwarnings("default::UserWarning"),
]
# cuBLAS looks when it is first used; without it, what it gives may hang on what else it is doing.
if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Finite averages from the start, so that real and synthetic tuples both weigh something.
SCHEDULED = {"hdml.average_start": 3.0, "hdml.alpha": 1.0, "hdml.beta": 3.0}
DAML = {"synthesis": "daml", "daml.pretrain_share": 0.0}
VARIANTS = {
    "npair": {"synthesis": "none"},
    "triplet": {"synthesis": "none", "loss.name": "triplet"},
    "contrastive": {"synthesis": "none", "loss.name": "contrastive"},
    "semihard": {"synthesis": "none", "loss.name": "semihard"},
    "lifted": {"synthesis": "none", "loss.name": "lifted"},
    "angular": {"synthesis": "none", "loss.name": "angular"},
    "ddml": {"synthesis": "none", "loss.name": "ddml"},
    "hdml-npair": SCHEDULED,
    "hdml-triplet": {**SCHEDULED, "loss.name": "triplet"},
    "hdml-npair-authors": {"recipe": "authors", "hdml.lambda_soft": 1.0, **SCHEDULED},
    "hdml-triplet-authors": {"recipe": "authors", "hdml.lambda_soft": 1.0, "loss.name": "triplet", **SCHEDULED},
    "daml-npair": DAML,
    "daml-triplet": {**DAML, "loss.name": "triplet"},
}
IMAGES = {
    "data.name": "folder",
    "data.image_size": 40,
    "data.crop_size": 32,
    "network.extractor": "mobilenet_v2",
    "network.weights": "",
}


@pytest.fixture
def deterministic():
    """Let torch take what gives the same bits again, where it has the choice; the tests see whether they are."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def photographs(device="cuda"):
    """Small colour images of 16 classes, on the device."""
    return made_up((3, 40, 40), classes=16, rows=6, device=torch.device(device))


def trained(config, train, validation, device="cuda"):
    run = training.new_run(config, train, device)
    training.fit(run, train, validation, lambda report: None)
    return run


def test_the_device_does_not_change_the_crops():
    images = draw_images()
    on_device = augment(images.cuda(), 8, True, generator())
    assert on_device.is_cuda
    torch.testing.assert_close(on_device.cpu(), augment(images, 8, True, generator()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_devices_give_the_same_losses_and_gradients(variant):
    config = small_config(**VARIANTS[variant], **{"optim.precision": "float64", "optim.steps_per_epoch": 1})
    columns, gradients = [], []
    for device in ("cpu", "cuda"):
        run = training.new_run(config, labelled(), device)
        columns.append(training._train_epoch(run, labelled()))
        gradients.append({n: p.grad.cpu() for n, p in run.networks.named_parameters() if p.grad is not None})
    assert columns[0].keys() == columns[1].keys()
    for name, values in columns[0].items():
        np.testing.assert_allclose(columns[1][name], values, rtol=1e-9, atol=1e-12, err_msg=name)
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_both_devices_give_the_same_gradients_of_a_convolution():
    config = small_config(
        **IMAGES, **SCHEDULED, **{"optim.precision": "float64", "optim.steps_per_epoch": 1, "optim.channels_last": True}
    )
    gradients = []
    for device in ("cpu", "cuda"):
        train = photographs(device)
        run = training.new_run(config, train, device)
        training._train_epoch(run, train)
        gradients.append(run.networks.extractor.body.features[0][0].weight.grad.cpu())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-8)


def test_both_devices_rank_alike_bit_for_bit():
    random = torch.Generator().manual_seed(0)
    # Few values, so that many similarities are equal.
    z = torch.randint(1, 4, (600, 6), generator=random).float()
    labels = torch.arange(600) % 40
    found = []
    for device in ("cpu", "cuda"):
        unit = retrieval._unit_rows(z.to(device))
        similarity = unit @ unit.T
        scores = retrieval._score_queries(unit, labels.to(device), labels.bincount().to(device), (1, 2, 8))
        found.append([part.cpu() for part in (unit, similarity, *map(torch.cat, zip(*scores, strict=True)))])
    (*exact, precision, r_precision), (*exact_there, precision_there, r_precision_there) = found
    assert all(map(torch.equal, (*exact, r_precision), (*exact_there, r_precision_there)))
    torch.testing.assert_close(precision_there, precision, rtol=1e-14, atol=1e-14)


def test_a_clustering_is_the_same_again():
    z = torch.randn(600, 16, generator=torch.Generator().manual_seed(0)).cuda()
    assert torch.equal(retrieval.kmeans(z, 40, 3, 0), retrieval.kmeans(z, 40, 3, 0))


@pytest.mark.filterwarnings("ignore:.*")
# DAML moves its networks by synthetic negatives alone: what J_m comes to there is another question.
@pytest.mark.parametrize(("synthesis", "left"), [("none", 0.8), ("hdml", 0.8), ("daml", np.inf)])
def test_bfloat16_compiled_and_channels_last_learns(synthesis, left):
    train = made_up((1, 32, 32), classes=16, rows=6, device=torch.device("cuda"))
    settings = {"optim.precision": "bfloat16", "optim.compile": True, "optim.channels_last": True, "optim.epochs": 8}
    run = trained(small_config(**settings, **{"data.name": "glyphs", "synthesis": synthesis}), train, None)
    losses = [report.losses["j_m"] for report in run.reports]
    assert all(np.isfinite([*report.losses.values(), *report.hardness.values()]).all() for report in run.reports)
    assert losses[-1] < left * losses[0]


DETERMINISTIC = {name: VARIANTS[name] for name in ("triplet", "hdml-npair-authors", "hdml-triplet", "daml-npair")} | {
    "hdml-npair-images": {**IMAGES, **SCHEDULED, "data.flip": True},
    "hdml-npair-images-bfloat16": {**IMAGES, **SCHEDULED, "optim.precision": "bfloat16", "optim.channels_last": True},
}


def sets_for(settings):
    return (photographs(), photographs()) if "data.name" in settings else (labelled(), labelled(1, 5))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("variant", DETERMINISTIC)
def test_the_same_seed_gives_the_same_run_bitwise_and_so_does_a_resumed_one(variant, tmp_path):
    config = small_config(**DETERMINISTIC[variant])
    train, validation = sets_for(DETERMINISTIC[variant])
    whole = trained(config, train, validation)
    again = training.new_run(config, train, "cuda")
    resumed = training.new_run(config, train, "cuda")

    def save_the_second(report):
        if report.epoch == 2:
            checkpoint.save(again, tmp_path)

    training.fit(again, train, validation, save_the_second)
    assert_equal_runs(again, whole)
    assert checkpoint.load(resumed, tmp_path)
    assert resumed.epoch == 2
    training.fit(resumed, train, validation, lambda report: None)
    assert_equal_runs(resumed, whole)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("images", [False, True])
def test_rows_on_the_device_are_those_of_the_host(images):
    config = small_config(**({"data.name": "glyphs", "data.flip": True} if images else {}))
    train, validation = labelled(images=images), labelled(1, 5, images=images)
    on_host = trained(config, train, validation)
    on_device = trained(config, train.on("cuda"), validation.on("cuda"))
    assert_equal_runs(on_device, on_host)


@pytest.mark.parametrize("variant", OF_TUPLES)
def test_in_a_stack_each_run_is_what_it_is_alone(variant):
    settings, trains = configs(variant, **{"optim.precision": "float64"}), sets()
    at_once = together(begun(settings, trains, "cuda"), trains)
    assert_close_runs(at_once, alone(settings, trains, "cuda"), rtol=1e-7)


def test_what_is_extracted_comes_in_its_place(monkeypatch):
    monkeypatch.setattr(frozen, "EXTRACTED_ROWS", 7)
    pixels = draw_images(b=40, h=40, w=40).numpy()
    stem = Extractor(torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten()), batch_norm_frozen=False)
    config = small_config(**IMAGES, **{"data.flip": True, "data.feature_crops": 3})
    host, device = (torch.cat(list(frozen._views(stem, pixels, config, torch.device(of)))) for of in ("cpu", "cuda"))
    assert host.shape == device.shape == (40, 3, 48)
    torch.testing.assert_close(device, host)


@contextmanager
def waits():
    """Collect the calls for which the host waits for the device."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        seen.clear()  # setting it warns as well
        found = []
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing CUDA operation" in str(w.message)]


@pytest.mark.parametrize("images", [False, True], ids=["features", "images"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_host_waits_once_in_an_epoch(variant, images):
    settings = {**VARIANTS[variant], **(IMAGES if images else {}), "optim.steps_per_epoch": 3, "data.flip": images}
    train = photographs() if images else labelled().on("cuda")
    run = training.new_run(small_config(**settings), train, "cuda")
    training._train_epoch(run, train)  # libraries that start wait
    with waits() as found:
        training._train_epoch(run, train)
    assert len(found) == 1, found


def test_that_a_wait_is_seen():
    with waits() as found:
        torch.ones(3, device="cuda").sum().item()
    assert len(found) == 1


def test_a_run_gives_its_memory_back():
    config = small_config(**IMAGES, **SCHEDULED, **{"optim.epochs": 1})
    train, held = photographs(), []
    for _ in range(3):
        trained(config, train, train)
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[2] == held[1]  # what the first leaves are the libraries' own workspaces
