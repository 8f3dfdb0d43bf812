"""How do the methods of the paper's tables compare on handwritten characters, all tuned with equal budgets?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, the paper's tables, on another data set:
eleven methods. Each is tuned with the same number of trials on a validation fold of the training classes, then
trained anew with fresh seeds on all of them and measured on the test classes, once; paper mode, in which the test
classes choose an epoch, stands beside that.

Run:   python studies/table_omniglot.py
Look:  python -m dashboards table omniglot
"""

from studies.machinery.cli import main
from studies.machinery.tables import table

STUDY = table("omniglot", __doc__)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
