"""Is there a best balance factor beta between real and synthetic tuples?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, Eq. (11): the real tuples weigh exp(-beta /
J_gen). J_gen is a sum in the authors' recipe and a mean in the paper's, so that both are drawn, each beside its own
baseline.

Run:   python studies/beta.py
       python studies/beta.py --dataset cub200
Look:  python -m dashboards figure beta
"""

from studies.machinery.cli import main
from studies.machinery.space import Choice
from studies.machinery.study import Study

STUDY = Study(
    name="beta",
    question=__doc__,
    base={"loss.name": "npair"},
    arms={
        "paper": {"recipe": "paper", "synthesis": "hdml"},
        "authors": {"recipe": "authors", "synthesis": "hdml"},
        "paper baseline": {"recipe": "paper", "synthesis": "none"},
        "authors baseline": {"recipe": "authors", "synthesis": "none"},
    },
    space={"hdml.beta": Choice((0.0, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5))},
    trials=18,
    folds=5,
    seeds=2,
    sampler="grid",
    pruner="none",
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
