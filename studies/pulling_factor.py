"""Is there a best pulling factor alpha, and how flat is the curve around it?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, the figure on alpha, Eq. (7): best near 90
for N-pair. The paper averages the raw metric loss in J_avg, the authors' code an inflated one; alpha means something
else in each, so that both recipes are drawn, each beside its own baseline.

Run:   python studies/pulling_factor.py
       python studies/pulling_factor.py --dataset cub200
Look:  python -m dashboards figure pulling_factor
"""

from studies.machinery.cli import main
from studies.machinery.tables import BOTH_RECIPES, curve

STUDY = curve(
    "pulling_factor", __doc__, "hdml.alpha", (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 90.0, 300.0, 1000.0), BOTH_RECIPES
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
