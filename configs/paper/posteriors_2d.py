"""Pictures of true posteriors over two latent variables, and where each q fails.

Command:  python -m infsub.main --config=configs/paper/posteriors_2d.py --workdir=runs/paper
Minutes:  15 to 30 on two cores at scale small, the default
Expect:   amortization gap 2.2 ± 0.7 nats (FFG); log p̂ −145.94 ± 0.03, by quadrature −145.58
"""

from __future__ import annotations

from infsub.config import Config
from infsub.experiments import experiment


def get_config() -> Config:
    """z of 2 dimensions, trained with q_FFG and with q_AF; densities on a grid."""
    return experiment(
        "posteriors_2d",
        "Where does each q fail?",
        cells={q: {"model.posterior.name": q} for q in ("gaussian", "auxiliary")},
        shared={
            "data.name": "binarized_mnist",
            "model.latent_dim": 2,
            "evaluate.local.families": ("gaussian", "full_gaussian", "auxiliary"),
            "evaluate.grid": 200,
        },
        smoke=("gaussian",),
        figure={"kind": "posteriors"},
    )
