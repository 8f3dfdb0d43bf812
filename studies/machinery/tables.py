"""The paper's tables as studies: their rows, and what is tuned of them.

A method is a loss and where its negatives come from; names are those of the published figures. Of TUNED each has what
it reads.
"""

from collections.abc import Mapping

from hdml_core.config import Settings
from studies.machinery.space import LogUniform, Space, Uniform
from studies.machinery.study import Study

ROWS: Mapping[str, Settings] = {
    "contrastive": {"loss.name": "contrastive", "synthesis": "none"},
    "ddml": {"loss.name": "ddml", "synthesis": "none"},
    "triplet": {"loss.name": "triplet", "synthesis": "none"},
    "triplet_semihard": {"loss.name": "semihard", "synthesis": "none"},
    "daml_triplet": {"loss.name": "triplet", "synthesis": "daml"},
    "hdml_triplet": {"loss.name": "triplet", "synthesis": "hdml"},
    "lifted": {"loss.name": "lifted", "synthesis": "none"},
    "angular": {"loss.name": "angular", "synthesis": "none"},
    "npair": {"loss.name": "npair", "synthesis": "none"},
    "daml_npair": {"loss.name": "npair", "synthesis": "daml"},
    "hdml_npair": {"loss.name": "npair", "synthesis": "hdml"},
}
RIVALS: Mapping[str, str] = {
    "daml_triplet": "triplet",
    "hdml_triplet": "triplet",
    "daml_npair": "npair",
    "hdml_npair": "npair",
}
TUNED: Space = {
    "optim.lr_extractor": LogUniform(1e-6, 1e-3),
    "optim.lr_embedder": LogUniform(1e-5, 1e-2),
    "loss.margin": LogUniform(0.1, 2.0),
    "loss.threshold": LogUniform(1.1, 30.0),
    "loss.angle": Uniform(30.0, 55.0),
    "hdml.alpha": LogUniform(0.1, 1e4),
    "hdml.beta": LogUniform(0.1, 1e5),
    "daml.lambda_adv": LogUniform(1.0, 1e3),
}


def table(dataset: str, question: str) -> Study:
    """Return the study of a data set's table: every row tuned with the same budget, then opened with fresh seeds."""
    return Study(
        name=f"table_{dataset}",
        question=question,
        base={"recipe": "paper", "data.name": dataset},
        arms=ROWS,
        rivals=RIVALS,
        space=TUNED,
        trials=12 * len(ROWS),
        test_seeds=8,
        paper_mode=True,
    )
