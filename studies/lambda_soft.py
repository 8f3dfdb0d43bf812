"""How much should the classifier's loss on synthetic features weigh in the generator's?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, Eq. (9): J_gen = J_recon + lambda J_soft.
Without J_soft (0) the generator may change the label of what it makes.

Run:   python studies/lambda_soft.py
       python studies/lambda_soft.py --dataset cub200
Look:  python -m dashboards figure lambda_soft
"""

from studies.machinery.cli import main
from studies.machinery.space import Choice
from studies.machinery.study import Study

STUDY = Study(
    name="lambda_soft",
    question=__doc__,
    base={"loss.name": "npair"},
    arms={
        "hdml": {"synthesis": "hdml"},
        "baseline": {"synthesis": "none"},
    },
    space={"hdml.lambda_soft": Choice((0.0, 0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4))},
    trials=9,
    folds=5,
    seeds=2,
    sampler="grid",
    pruner="none",
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
