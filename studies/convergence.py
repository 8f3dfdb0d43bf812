"""Does HDML converge to better embeddings, or only sooner or later than the loss it is built on?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, section 4.3. Four methods are
validated after every epoch, with the same folds and seeds and the published settings unless others are given. On
glyphs they train three times as long as usual; on other data say how long, or it is 18 epochs there too.

Run:   python studies/convergence.py
       python studies/convergence.py --dataset cub200 --set optim.epochs=120
Look:  python -m dashboards figure convergence --over epoch
"""

from studies.machinery.cli import main
from studies.machinery.study import Study
from studies.machinery.tables import ROWS

STUDY = Study(
    name="convergence",
    question=__doc__,
    base={"recipe": "paper", "optim.epochs": 18},
    arms={name: ROWS[name] for name in ("triplet", "hdml_triplet", "npair", "hdml_npair")},
    space={},
    trials=4,
    folds=5,
    seeds=2,
    pruner="none",
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
