"""Is there a best balance factor beta between real and synthetic tuples?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, Eq. (11): the real tuples weigh exp(-beta /
J_gen). J_gen is a sum in the authors' recipe and a mean in the paper's, so that both are drawn, each beside its own
baseline.

Run:   python studies/beta.py
       python studies/beta.py --dataset cub200
Look:  python -m dashboards figure beta
"""

from studies.machinery.cli import main
from studies.machinery.tables import BOTH_RECIPES, curve

STUDY = curve("beta", __doc__, "hdml.beta", (0.0, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5), BOTH_RECIPES)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
