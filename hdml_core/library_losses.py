"""Any loss of pytorch-metric-learning by its name there, as a plain baseline.

Musgrave, Belongie, Lim, "PyTorch Metric Learning", arXiv 2008.09164. The library is imported only where one of its
losses is asked for.
"""

import inspect
import math
import warnings
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hdml_core.errors import ConfigError, did_you_mean
from hdml_core.notation import Layout

PREFIX = "pml."
"""What the name of such a loss begins with: `pml.ProxyAnchorLoss`."""


class LibraryLoss(nn.Module):
    """A loss of the library over embeddings and labels, with what it learns itself, such as proxies."""

    layout: ClassVar[Layout] = "pairs"

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def of_rows(self, z: Float[Tensor, "b d"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the library's loss of these rows."""
        return self.loss(z, labels)


def build_library_loss(name: str, options: str, num_classes: int, embedding_size: int) -> LibraryLoss:
    """Return the loss with these options; what it learns is drawn from torch's global generator.

    The number of classes and the embedding size are handed to a loss that wants them. Raises ConfigError where the
    library has no such loss, or the loss no such options.
    """
    kind = _losses().get(name.removeprefix(PREFIX))
    if kind is None:
        known = [PREFIX + other for other in _losses()]
        raise ConfigError(
            f"loss.name must be a loss of pytorch-metric-learning, one of {', '.join(known)}, "
            f"got {name!r}{did_you_mean(name, known)}"
        )
    given, defaults = _numbers(options), _defaults(kind)
    sizes = {"num_classes": num_classes, "embedding_size": embedding_size}
    own = [word for word, default in defaults.items() if word not in sizes and _may_be_a_number(default)]
    for word in given:
        if word not in own:
            raise ConfigError(
                f"loss.options must be of {name}, which takes {', '.join(own)}, got {word!r}{did_you_mean(word, own)}"
            )
    try:
        return LibraryLoss(kind(**given, **{word: size for word, size in sizes.items() if word in defaults}))
    except (TypeError, ValueError, AttributeError, AssertionError) as error:
        raise ConfigError(f"loss.options must suit {name}, got {options!r}: {error}") from error


@cache
def check_library_loss(name: str, options: str) -> None:
    """Raise ConfigError unless there is such a loss, and it can be called as loss(embeddings, labels) in a run.

    It is tried on a batch of four pairs, twice: it has to be a number that can be differentiated, and no memory and no
    chance may come in, or a run could not be resumed.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        loss = build_library_loss(name, options, num_classes=4, embedding_size=4)
        z, labels = torch.randn(8, 4, requires_grad=True), torch.arange(4).repeat(2)
        try:
            values = [loss.of_rows(z, labels) for _ in range(2)]
        except Exception as error:
            raise ConfigError(f"{name} can't be called as loss(embeddings, labels): {error}") from error
    if any(value.shape != () or not value.requires_grad for value in values) or not torch.equal(*values):
        raise ConfigError(
            f"loss.name must be a loss that gives the same number for the same batch, got {name!r} "
            f"with loss.options = {options!r}"
        )


@cache
def _losses() -> dict[str, type[nn.Module]]:
    from pytorch_metric_learning import losses

    # Beside losses of a batch it has bases and wrappers of other losses, under other names.
    return {name: getattr(losses, name) for name in vars(losses) if name.endswith("Loss")}


def _defaults(kind: type[nn.Module]) -> dict[str, object]:
    """What the class and those that it derives from take by keyword, each with its default."""
    bases = [base for base in kind.__mro__ if base.__module__.startswith("pytorch_metric_learning")]
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    defaults: dict[str, object] = {}
    for base in bases:
        for word in inspect.signature(base).parameters.values():
            if word.kind in by_keyword:
                defaults.setdefault(word.name, word.default)
    return defaults


def _may_be_a_number(default: object) -> bool:
    return default is inspect.Parameter.empty or isinstance(default, int | float)


def _numbers(options: str) -> dict[str, int | float]:
    numbers: dict[str, int | float] = {}
    for option in filter(None, map(str.strip, options.split(","))):
        word, _, text = map(str.strip, option.partition("="))
        try:
            number = float(text)
        except ValueError as error:
            raise ConfigError(
                f"loss.options must be numbers by keyword, as 'alpha=2, beta=50', got {options!r}"
            ) from error
        numbers[word] = int(number) if math.isfinite(number) and number == int(number) and "." not in text else number
    return numbers
