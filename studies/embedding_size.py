"""How does retrieval depend on the size of the embedding, with and without hard synthetic negatives?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, take 512 throughout, their code 128, 256 and
512.

Run:   python studies/embedding_size.py
       python studies/embedding_size.py --dataset cub200
Look:  python -m dashboards figure embedding_size
"""

from studies.machinery.cli import main
from studies.machinery.tables import ROWS, curve

ARMS = {name: ROWS[name] for name in ("hdml_npair", "npair")}
STUDY = curve("embedding_size", __doc__, "network.embedding_size", (16, 32, 64, 128, 256, 512), ARMS)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
