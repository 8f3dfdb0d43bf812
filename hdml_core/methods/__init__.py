"""The methods: where synthetic negatives come from, each in a file of its own, and the table that the loop reads.

An objective takes networks, batch, metric loss and config to the record of its J's and, where a schedule decides how
hard its negatives are, to how hard they were.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hdml_core.config import Config, SynthesisName
from hdml_core.methods.daml import daml_losses
from hdml_core.methods.hdml import hdml_losses
from hdml_core.methods.plain import plain_losses
from hdml_core.notation import DamlLosses, Hardness, HdmlLosses, Losses, PlainLosses

__all__ = ["METHODS", "Method", "Objective", "method_of"]

Objective = Callable[..., tuple[Any, Hardness | None]]


class Method(NamedTuple):
    """A row of the table."""

    objective: Objective
    losses: type[Losses]
    moves: Mapping[str, str]
    """Which of the optimisers (metric, generator, head) each of its J's drives; the others rest."""
    has_hardness: bool = False


METHODS: Mapping[SynthesisName, Method] = {
    "none": Method(plain_losses, PlainLosses, {"metric": "j_metric"}),
    "hdml": Method(
        hdml_losses, HdmlLosses, {"metric": "j_metric", "generator": "j_gen", "head": "j_class"}, has_hardness=True
    ),
    "daml": Method(daml_losses, DamlLosses, {"metric": "j_metric", "generator": "j_gen"}),
}


def method_of(config: Config, epoch: int) -> Method:
    """Return the method of an epoch, counted from 0: before `daml.pretrain_share` of them is over, DAML's is plain."""
    pretrains = config.synthesis == "daml" and epoch < int(config.daml.pretrain_share * config.optim.epochs)
    return METHODS["none" if pretrains else config.synthesis]
