"""What does entropy annealing do to both gaps?

Command:  python -m infsub.main --config=configs/paper/no_annealing.py --workdir=runs/paper
Minutes:  15 to 30 on two cores at scale small, the default
Expect:   approximation gap of FFG 3.35 ± 0.05 nats with annealing, 1.91 ± 0.04 without
"""

from __future__ import annotations

from infsub.config import Config
from infsub.experiments import experiment


def get_config() -> Config:
    """q_FFG and q_AF, trained with and without entropy annealing; the gaps at test points too."""
    return experiment(
        "no_annealing",
        "What does annealing do to both gaps?",
        cells={
            f"{q}_{annealing}{at}": {
                "data.name": "binarized_mnist",
                "model.posterior.name": q,
                "train.annealing": annealing,
                "evaluate.split": split,
                "evaluate.local.families": (q,),
            }
            for at, split in (("", "train"), ("_test", "test"))
            for q in ("gaussian", "auxiliary")
            for annealing in ("entropy", "none")
        },
        smoke=("gaussian_entropy", "gaussian_none"),
    )
