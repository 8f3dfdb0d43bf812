"""Does HDML help losses that the paper did not try it on, and how do newer losses do beside it?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, build on triplet and N-pair alone; the
augmentor asks for an anchor, a positive and a negative, which other losses of tuples have too. Multi-similarity (Wang
et al., CVPR 2019) and proxy anchor (Kim et al., CVPR 2020) are those of pytorch-metric-learning, as are any others by
their names.

Run:   python studies/beyond.py --dataset cub200
       python studies/baseline.py --set loss.name=pml.CircleLoss --name circle
Look:  python -m dashboards table cub200 --study table_cub200 --study beyond-cub200
"""

from studies.machinery.cli import main
from studies.machinery.space import LogUniform
from studies.machinery.study import Study
from studies.machinery.tables import ROWS, TUNED

PLAIN = ("contrastive", "triplet_semihard", "lifted", "angular")
HARDENED = {f"hdml_{name}": {**ROWS[name], "synthesis": "hdml"} for name in PLAIN}
NEWER = {
    "multi_similarity": {"loss.name": "pml.MultiSimilarityLoss", "synthesis": "none"},
    "proxy_anchor": {"loss.name": "pml.ProxyAnchorLoss", "synthesis": "none"},
}
ARMS = {**{name: ROWS[name] for name in PLAIN}, **HARDENED, **NEWER}

STUDY = Study(
    name="beyond",
    question=__doc__,
    arms=ARMS,
    rivals={f"hdml_{name}": name for name in PLAIN},
    space={**TUNED, "optim.lr_loss": LogUniform(1e-4, 1e-1)},
    trials=12 * len(ARMS),
    test_seeds=8,
    paper_mode=True,
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
