"""How good is the plain metric loss, without hardness-aware synthesis, once it is tuned as carefully?

The baseline of Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, is the metric loss alone,
Eq. (12) or (13). A method is better only than a baseline that was given the same budget: `confirm` puts the
best trials of two studies side by side.

Run:   python studies/baseline.py
       python -m studies confirm alpha_beta --against baseline
Look:  mlflow ui --backend-store-uri sqlite:///runs/mlflow.db
"""

from studies.machinery.cli import main
from studies.machinery.space import LogUniform
from studies.machinery.study import Study

STUDY = Study(
    name="baseline",
    question=__doc__,
    base={"recipe": "paper", "loss.name": "npair", "synthesis": "none"},
    space={"optim.lr_embedder": LogUniform(1e-5, 1e-2), "optim.weight_decay": LogUniform(1e-6, 1e-2)},
    trials=24,
    pruner="median",
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
