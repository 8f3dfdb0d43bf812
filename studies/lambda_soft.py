"""How much should the classifier's loss on synthetic features weigh in the generator's?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, Eq. (9): J_gen = J_recon + lambda J_soft.
Without J_soft (0) the generator may change the label of what it makes.

Run:   python studies/lambda_soft.py
       python studies/lambda_soft.py --dataset cub200
Look:  python -m dashboards figure lambda_soft
"""

from studies.machinery.cli import main
from studies.machinery.tables import curve

ARMS = {"hdml": {"synthesis": "hdml"}, "baseline": {"synthesis": "none"}}
STUDY = curve("lambda_soft", __doc__, "hdml.lambda_soft", (0.0, 0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4), ARMS)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
