"""How do the methods of the paper's tables compare on handwritten characters, all tuned with equal budgets?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, tables 2 to 4, on another data set: eleven
methods. Each is tuned with the same number of trials on a validation fold of the training classes, then trained anew
with fresh seeds on all of them and measured on the test classes, once; paper mode, in which the test classes choose
an epoch, stands beside that.

Run:   python studies/table_omniglot.py
Look:  python -m dashboards table omniglot
"""

from studies.machinery.cli import main
from studies.machinery.study import Study
from studies.machinery.tables import RIVALS, ROWS, TUNED

STUDY = Study(
    name="table_omniglot",
    question=__doc__,
    base={"recipe": "paper", "data.name": "omniglot"},
    arms=ROWS,
    rivals=RIVALS,
    space=TUNED,
    trials=12 * len(ROWS),
    test_seeds=8,
    paper_mode=True,
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
