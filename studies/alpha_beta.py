"""How does retrieval on unseen classes depend on alpha and beta, the two factors of HDML's hardness schedule?

Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019. alpha decides how far negatives are pulled
as the metric loss falls, exp(-alpha / J_avg), Eq. (7); beta how soon the synthetic tuples count as the generator
learns, exp(-beta / J_gen), Eq. (11). Published: alpha 90 for N-pair, beta 1e4. The published point is tried first, and
the plain N-pair loss, without synthesis, is the baseline.

Run:   python studies/alpha_beta.py
       python studies/alpha_beta.py --dataset cub200 --trials 40
       python studies/alpha_beta.py --set loss.name=triplet --name alpha_beta-triplet
Look:  mlflow ui --backend-store-uri sqlite:///runs/mlflow.db
       hardness/kept and hardness/w_real show the schedule that each alpha and beta made.
"""

from studies.machinery.cli import main
from studies.machinery.space import LogUniform
from studies.machinery.study import Study

STUDY = Study(
    name="alpha_beta",
    question=__doc__,
    base={"recipe": "paper", "loss.name": "npair"},
    space={"hdml.alpha": LogUniform(0.1, 300.0), "hdml.beta": LogUniform(0.1, 1e5)},
    baseline={"synthesis": "none"},
    trials=12,
    pruner="median",
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY))
