"""How do the methods of the paper's table compare on birds they have never seen, all tuned with equal budgets?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, the table on CUB-200-2011: eleven methods.
Each is tuned with the same number of trials on a validation fold of the training classes, then trained anew with
fresh seeds on all of them and measured on the test classes, once; paper mode, in which the test classes choose an
epoch, stands beside that.

Run:   python studies/table_cub200.py
       python studies/table_cub200.py --set network.extractor=mobilenet_v2 --set network.weights=WEIGHTS ...
Look:  python -m dashboards table cub200
"""

from studies.machinery.cli import main
from studies.machinery.tables import table

STUDY = table("cub200", __doc__)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
