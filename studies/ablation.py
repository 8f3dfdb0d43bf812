"""What does each part of HDML contribute?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, section 4.3, leave out J_soft, J_recon and
the pulling (lambda_0 = 1) in turn; here also: whether anchor and positive of a synthetic tuple are real, as in the
paper, or generated, as in the authors' code. On validation folds, with the same folds and seeds for each.

Run:   python studies/ablation.py
       python studies/ablation.py --dataset cub200 --set hdml.alpha=25 --set hdml.beta=3e4
Look:  python -m dashboards figure ablation
"""

from studies.machinery.cli import main
from studies.machinery.study import Study

HDML = {"synthesis": "hdml"}

STUDY = Study(
    name="ablation",
    question=__doc__,
    base={"recipe": "paper", "loss.name": "npair"},
    arms={
        "full": HDML,
        "without J_soft": {**HDML, "hdml.lambda_soft": 0.0},
        "without J_recon": {**HDML, "hdml.recon_weight": 0.0},
        "without pulling": {**HDML, "hdml.alpha": 0.0},
        "generated roles": {**HDML, "hdml.generated_roles": "all"},
        "baseline": {"synthesis": "none"},
    },
    space={},
    trials=6,
    folds=5,
    seeds=2,
    pruner="none",
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
