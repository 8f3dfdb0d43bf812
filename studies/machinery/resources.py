"""What a study's trials take of the cluster that they run on: a Ray of this machine, or the one at RAY_ADDRESS."""

import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune

from hdml_core.config import ConfigError
from studies.machinery.study import Study

RAY_HABITS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}
"""Files of its own for every trial, other working folders, chatter: what a study does without."""

LAUNCHED = Path("~/ray_bootstrap_config.yaml")
"""What `ray up` leaves on the head of a cluster: the kinds of nodes that it starts, and may grow by."""
PATIENCE = 300.0
"""Seconds for which nodes are waited for that are being started."""
LOOK_EVERY = 1.0
"""Seconds for which a look at the nodes holds."""

Amounts = Mapping[str, float]
"""Of a node or a bundle, by Ray's names: CPU, GPU."""


@dataclass(frozen=True)
class Resources:
    """What each trial gets: so many CPUs for each of its processes, and GPUs, or a share of one, for all of them."""

    cpus: int
    gpus: float
    processes: int = 1

    @classmethod
    def of(cls, study: Study, has_gpus: bool) -> "Resources":
        """What the study asks for; of several GPUs each has a process of its own.

        Raises ConfigError where two processes would have to share a GPU.
        """
        gpus = study.gpus_per_trial if has_gpus else 0.0
        if gpus and study.processes_per_trial > max(1.0, gpus):
            raise ConfigError(
                f"study.processes_per_trial must be at most gpus_per_trial where there are GPUs, for ranks don't share "
                f"one, got {study.processes_per_trial} and {gpus:g}: leave it out, or give --gpus-per-trial more"
            )
        return cls(study.cpus_per_trial, gpus, max(study.processes_per_trial, math.ceil(gpus)))

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What each of the trial's processes takes of a node."""
        gpu = {"GPU": self.gpus / self.processes} if self.gpus else {}
        return [{"CPU": float(self.cpus), **gpu}] * self.processes

    @property
    def placement(self) -> tune.PlacementGroupFactory:
        """The same for Tune: processes of a trial near one another, trials where there is most room."""
        return tune.PlacementGroupFactory(self.bundles, strategy="PACK" if self.processes > 1 else "SPREAD")

    def fitting(self, nodes: Sequence[Amounts]) -> int:
        """How many trials fit on these nodes."""
        return sum(self._on(node) for node in nodes) // self.processes

    def node_share(self, nodes: Sequence[Amounts]) -> float:
        """Which share of nodes a trial takes, of the dearest of those that it fits on; without any, whole ones."""
        shares = [self.processes / n for node in nodes if (n := self._on(node))]
        return max(shares, default=float(self.processes))

    def _on(self, node: Amounts) -> int:
        """How many processes fit on a node."""
        return int(min((node.get(name, 0.0) + 1e-9) // amount for name, amount in self.bundles[0].items()))


class Room:
    """How many trials may be in hand at once: as many as fit on the nodes of the moment, at most what the study says.

    Where the cluster grows by what waits for it, as many as the study says.
    """

    def __init__(self, study: Study, resources: Resources) -> None:
        self._study, self._resources = study, resources
        self._looked = -math.inf

    def __call__(self) -> int:
        """The number as it is now."""
        if time.monotonic() - self._looked > LOOK_EVERY:
            self._looked = time.monotonic()
            fitting = self._study.parallel if may_come() else max(1, self._resources.fitting(nodes()))
            self._most = min(self._study.parallel, fitting)
        return self._most


def start_ray(study: Study) -> Resources:
    """Join the cluster at RAY_ADDRESS, else start a Ray on this machine; see what a trial gets of it.

    Raises ConfigError where no node that is there, or may come, is large enough for a trial.
    """
    os.environ.update(RAY_HABITS)
    if not ray.is_initialized():
        # Left to itself, Ray would join whatever was last started on this machine, and lose it when that ends.
        alone = {} if "RAY_ADDRESS" in os.environ else {"address": "local", "include_dashboard": False}
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **alone)
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _await_nodes()
    if may_come():
        # Left to itself, Tune asks for room for one trial at a time, and a cluster grows node after node.
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(study.parallel)
    kinds = [*nodes(), *may_come()]
    resources = Resources.of(study, has_gpus=any(kind["GPU"] for kind in kinds))
    if not resources.fitting(kinds):
        raise ConfigError(
            f"the nodes must have room for a trial, got {' + '.join(map(str, resources.bundles))} on nodes of "
            f"{', '.join(map(str, kinds))}: ask for less by study.cpus_per_trial or --gpus-per-trial, or start others"
        )
    return resources


def price_per_hour(study: Study, resources: Resources) -> float:
    """What an hour of a trial costs."""
    return study.node_price * resources.node_share([*nodes(), *may_come()])


def nodes() -> list[Amounts]:
    """What the nodes have that are there now."""
    return [_amounts(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def may_come() -> list[Amounts]:
    """What each node has that the cluster may grow by; empty where it stays as it is."""
    kinds = [_amounts(kind.get("resources", {})) for kind in _launched() for _ in range(kind.get("max_workers", 0))]
    return [kind for kind in kinds if any(kind.values())]


def _await_nodes() -> None:
    """Wait for the nodes that `ray up` starts at once: it returns when it has the head."""
    deadline = time.monotonic() + PATIENCE
    wanted = sum(kind.get("min_workers", 0) for kind in _launched())
    while wanted and len(nodes()) < 1 + wanted and time.monotonic() < deadline:
        print(f"waiting for nodes: {len(nodes())} of {1 + wanted} are there", file=sys.stderr)
        time.sleep(5)


def _launched() -> list[Mapping[str, Any]]:
    """The kinds of nodes of the cluster that `ray up` has started from here, if it has."""
    path = LAUNCHED.expanduser()
    if "RAY_ADDRESS" not in os.environ or not path.exists():
        return []
    return [*yaml.safe_load(path.read_text()).get("available_node_types", {}).values()]


def _amounts(resources: Amounts) -> Amounts:
    return {name: float(resources.get(name, 0.0)) for name in ("CPU", "GPU")}
