"""The paper's tables and curves as studies: rows and what is tuned of them, and a setting drawn over its values.

A method is a loss and where its negatives come from; names are those of the published figures. Of TUNED each has what
it reads.
"""

from collections.abc import Mapping
from dataclasses import replace

from hdml_core.config import Settings
from studies.machinery.samplers import grid
from studies.machinery.space import Choice, LogUniform, Space, Uniform
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
BOTH_RECIPES: Mapping[str, Settings] = {
    "paper": {"recipe": "paper", "synthesis": "hdml"},
    "authors": {"recipe": "authors", "synthesis": "hdml"},
    "paper baseline": {"recipe": "paper", "synthesis": "none"},
    "authors baseline": {"recipe": "authors", "synthesis": "none"},
}
"""HDML as both have it, each with its own baseline; for one loss."""
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


def curve(
    name: str, question: str, setting: str, values: tuple[int | float, ...], arms: Mapping[str, Settings]
) -> Study:
    """Return the study of a setting's curve with N-pair: each arm that reads it, at all values, on every fold."""
    study = Study(
        name=name,
        question=question,
        base={"loss.name": "npair"},
        arms=arms,
        space={setting: Choice(values)},
        folds=5,
        seeds=2,
        sampler="grid",
        pruner="none",
    )
    return replace(study, trials=len(grid(study.search_space)))
