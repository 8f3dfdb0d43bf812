"""What does hardness-aware synthesis gain over the metric loss it is built on, when both are tuned with equal budgets?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, its tables of results: HDML above its own
baseline on every data set. Here both schedule factors and the learning rate are searched; `baseline` gives the plain
loss the same number of trials, and `confirm` puts the best of both side by side on the test classes.

Run:   python studies/gain.py
       python studies/baseline.py
       python -m studies confirm gain --against baseline
       The triplet loss: --set loss.name=triplet --name gain-triplet, and baseline-triplet likewise.
Look:  mlflow ui --backend-store-uri sqlite:///runs/mlflow.db
"""

from studies.machinery.cli import main
from studies.machinery.space import LogUniform
from studies.machinery.study import Study

STUDY = Study(
    name="gain",
    question=__doc__,
    base={"recipe": "paper", "loss.name": "npair"},
    space={
        "hdml.alpha": LogUniform(0.1, 1e4),
        "hdml.beta": LogUniform(0.1, 1e5),
        "optim.lr_embedder": LogUniform(1e-5, 1e-2),
    },
    trials=24,
    pruner="median",
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
