"""A loss of pytorch-metric-learning trains as the library has it, what it learns is kept, and bad calls are refused."""

import pytest
import torch
from pytorch_metric_learning import losses

from hdml_core import library_losses, training
from hdml_core.config import ConfigError, recipe_config, with_settings
from hdml_core.library_losses import build_library_loss, check_library_loss
from hdml_core.methods.plain import plain_losses
from hdml_core.metric_losses import MetricLoss, TupleLoss
from hdml_core.notation import Batch
from tests.test_training import finished, labelled, small_config


def sub_center_arcface():
    return losses.SubCenterArcFaceLoss(num_classes=6, embedding_size=4, sub_centers=2)


PROXIES = {"synthesis": "none", "loss.name": "pml.ProxyAnchorLoss"}


@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        ("MultiSimilarityLoss", "", lambda: losses.MultiSimilarityLoss()),
        ("MultiSimilarityLoss", "alpha=3, beta=40", lambda: losses.MultiSimilarityLoss(alpha=3, beta=40)),
        ("ContrastiveLoss", "neg_margin=0.5", lambda: losses.ContrastiveLoss(neg_margin=0.5)),
        ("RankedListLoss", "margin=0.4,Tn=1", lambda: losses.RankedListLoss(margin=0.4, Tn=1)),
        ("ProxyAnchorLoss", "alpha=16", lambda: losses.ProxyAnchorLoss(6, 4, alpha=16)),
        ("SubCenterArcFaceLoss", "sub_centers=2", sub_center_arcface),
        ("NormalizedSoftmaxLoss", "temperature=0.1", lambda: losses.NormalizedSoftmaxLoss(6, 4, temperature=0.1)),
    ],
)
def test_it_is_the_librarys(name, options, theirs):
    z, labels = torch.randn(12, 4, requires_grad=True), torch.arange(6).repeat(2)
    torch.manual_seed(5)
    ours = build_library_loss(f"pml.{name}", options, num_classes=6, embedding_size=4)
    torch.manual_seed(5)
    loss = theirs()
    value, wanted = ours.of_rows(z, labels), loss(z, labels)
    assert torch.equal(value, wanted)
    own, their = [z, *ours.parameters()], [z, *loss.parameters()]
    for gradient, other in zip(torch.autograd.grad(value, own), torch.autograd.grad(wanted, their), strict=True):
        assert torch.equal(gradient, other)


def test_it_is_a_metric_loss_and_has_no_tuples():
    loss = build_library_loss("pml.ProxyAnchorLoss", "", num_classes=6, embedding_size=4)
    assert isinstance(loss, MetricLoss)
    assert not isinstance(loss, TupleLoss)


def test_the_run_takes_the_librarys_loss_of_its_batches():
    train = labelled()
    run = training.new_run(small_config(**PROXIES), train)
    x, labels = torch.from_numpy(train.values[:12, 0]), torch.from_numpy(train.labels[:12])
    batch = Batch(x, labels, run.averages.j_avg, run.averages.j_gen_avg)
    j, _ = plain_losses(run.networks, batch, run.metric_loss, run.config)
    assert torch.equal(j.j_metric, run.networks.loss.loss(run.networks.embedder(x), labels))


def test_proxies_are_drawn_from_the_seed_beside_the_same_embedder():
    first, again, other = (training.new_run(small_config(seed=s, **PROXIES), labelled()).networks for s in (0, 0, 1))
    assert first.state_dict()["loss.loss.proxies"].shape == (16, 8)
    assert torch.equal(first.loss.loss.proxies, again.loss.loss.proxies)
    assert not torch.equal(first.loss.loss.proxies, other.loss.loss.proxies)
    without = training.new_run(small_config(synthesis="none"), labelled()).networks
    assert torch.equal(first.embedder.weight, without.embedder.weight)


@pytest.mark.parametrize(("moving", "moved"), [("lr_loss", {"loss"}), ("lr_embedder", {"embedder"})])
def test_proxies_move_at_their_own_rate_and_do_not_decay(moving, moved):
    rates = {f"optim.{name}": 1e-2 if name == moving else 0.0 for name in ("lr_loss", "lr_embedder")}
    config = small_config(**PROXIES, **rates, **{"optim.weight_decay": 0.1})
    before = dict(training.new_run(config, labelled()).networks.named_parameters())
    run = finished(config)
    after = dict(run.networks.named_parameters())
    assert {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])} == moved
    proxies = list(run.networks.loss.parameters())
    (group,) = [g for g in run.optimisers["metric"].param_groups if any(p is proxies[0] for p in g["params"])]
    assert group["weight_decay"] == 0.0


def test_proxies_learn():
    reports = finished(small_config(**PROXIES, **{"optim.epochs": 12})).reports
    assert reports[-1].losses["j_metric"] < 0.9 * reports[0].losses["j_metric"]


# They have a memory, take another loss, labels of another kind, or arguments that only the options give.
REFUSED = {
    "DynamicSoftMarginLoss",
    "GenericPairLoss",
    "ManifoldLoss",
    "P2SGradLoss",
    "RankedListLoss",
    "SelfSupervisedLoss",
    "VICRegLoss",
}


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("name", sorted(library_losses._losses()))
def test_each_of_the_library_trains_or_is_refused_at_the_door(name):
    settings = {"synthesis": "none", "loss.name": f"pml.{name}", "optim.epochs": 1, "optim.steps_per_epoch": 2}
    if name in REFUSED:
        with pytest.raises(ConfigError, match=f"pml.{name}"):
            small_config(**settings)
    else:
        assert finished(small_config(**settings)).reports[0].losses.keys() == {"j_m", "j_metric"}


def test_trying_a_loss_draws_nothing_of_the_users():
    before = torch.random.get_rng_state()
    check_library_loss.__wrapped__("pml.ProxyAnchorLoss", "alpha=8")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss.name": "pml.ProxyAnchor"},
            r"loss.name must be a loss of pytorch-metric-learning, one of pml\.AngularLoss, .*, "
            r"got 'pml\.ProxyAnchor'; did you mean 'pml\.ProxyAnchorLoss'\?",
        ),
        (
            {"loss.name": "pml.CrossBatchMemory"},
            r"loss.name must be a loss of pytorch-metric-learning, .*, got 'pml\.CrossBatchMemory'.*",
        ),
        (
            {"loss.name": "pml.MultiSimilarityLoss", "loss.options": "alpa=2"},
            r"loss.options must be of pml\.MultiSimilarityLoss, which takes alpha, beta, base, .*, "
            r"got 'alpa'; did you mean 'alpha'\?",
        ),
        (
            {"loss.name": "pml.ProxyAnchorLoss", "loss.options": "num_classes=2"},
            r"loss.options must be of pml\.ProxyAnchorLoss, which takes margin, alpha, .*, got 'num_classes'",
        ),
        (
            {"loss.name": "pml.MultiSimilarityLoss", "loss.options": "alpha=high"},
            r"loss.options must be numbers by keyword, as 'alpha=2, beta=50', got 'alpha=high'",
        ),
        (
            {"loss.name": "pml.MultiSimilarityLoss", "loss.options": "2"},
            r"loss.options must be numbers by keyword, as 'alpha=2, beta=50', got '2'",
        ),
        (
            {"loss.name": "pml.RankedListLoss"},
            r"loss.options must suit pml\.RankedListLoss, got '': .* 'margin' and 'Tn'",
        ),
        (
            {"loss.name": "pml.VICRegLoss"},
            r"pml\.VICRegLoss can't be called as loss\(embeddings, labels\): .*",
        ),
        (
            {"loss.name": "pml.DynamicSoftMarginLoss"},
            r"loss.name must be a loss that gives the same number for the same batch, "
            r"got 'pml\.DynamicSoftMarginLoss' with loss.options = ''",
        ),
    ],
)
def test_what_cannot_be_called_is_refused(settings, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        recipe_config({"synthesis": "none", **settings})


@pytest.mark.parametrize("synthesis", ["hdml", "daml"])
def test_it_carries_no_synthesis(synthesis):
    message = (
        f"synthesis must be 'none' for loss.name = 'pml.ProxyAnchorLoss', which has no tuples to make synthetic "
        f"negatives of, got '{synthesis}'"
    )
    with pytest.raises(ConfigError, match=message):
        with_settings(recipe_config(PROXIES), {"synthesis": synthesis})
