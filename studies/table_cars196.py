"""How do the methods of the paper's table compare on cars they have never seen, all tuned with equal budgets?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, table 2: eleven methods. Each is tuned with
the same number of trials on a validation fold of the training classes, then trained anew with fresh seeds on all of
them and measured on the test classes, once; paper mode, in which the test classes choose an epoch, stands beside
that.

Run:   python studies/table_cars196.py
Look:  python -m dashboards table cars196
"""

from studies.machinery.cli import main
from studies.machinery.study import Study
from studies.machinery.tables import RIVALS, ROWS, TUNED

STUDY = Study(
    name="table_cars196",
    question=__doc__,
    base={"recipe": "paper", "data.name": "cars196"},
    arms=ROWS,
    rivals=RIVALS,
    space=TUNED,
    trials=12 * len(ROWS),
    test_seeds=8,
    paper_mode=True,
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
