"""Toys on a cluster of several nodes, all of them on this machine: `... OUT NODES TRIALS`.

Leaves `costs.json` in OUT: the driver's seconds, and its memory in MB.
"""

import json
import os
import sys
import time
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from studies.machinery.resources import RAY_HABITS
from tests.machinery.toy_study import run_toy

SLOTS = 2
"""Of a node."""


def main(out: Path, nodes: int, trials: int) -> None:
    """Run so many trials on all nodes, and write down what they cost the driver."""
    os.environ.update(RAY_HABITS)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": SLOTS, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=SLOTS)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    begin = time.monotonic()
    run_toy(out, trials, parallel=SLOTS * nodes, sampler="random")
    costs = {"seconds": time.monotonic() - begin, "memory": psutil.Process().memory_info().rss / 2**20}
    (out / "costs.json").write_text(json.dumps(costs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
