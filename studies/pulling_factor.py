"""Is there a best pulling factor alpha, and how flat is the curve around it?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, the figure on alpha, Eq. (7): best near 90
for N-pair. The paper averages the raw metric loss in J_avg, the authors' code an inflated one; alpha means something
else in each, so that both recipes are drawn, each beside its own baseline.

Run:   python studies/pulling_factor.py
       python studies/pulling_factor.py --dataset cub200
Look:  python -m dashboards figure pulling_factor
"""

from studies.machinery.cli import main
from studies.machinery.space import Choice
from studies.machinery.study import Study

STUDY = Study(
    name="pulling_factor",
    question=__doc__,
    base={"loss.name": "npair"},
    arms={
        "paper": {"recipe": "paper", "synthesis": "hdml"},
        "authors": {"recipe": "authors", "synthesis": "hdml"},
        "paper baseline": {"recipe": "paper", "synthesis": "none"},
        "authors baseline": {"recipe": "authors", "synthesis": "none"},
    },
    space={"hdml.alpha": Choice((0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 90.0, 300.0, 1000.0))},
    trials=22,
    folds=5,
    seeds=2,
    sampler="grid",
    pruner="none",
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
