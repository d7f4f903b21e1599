"""How many gradient steps on one datapoint buy back what its encoder lost?

Command:  python -m infsub.main --config=configs/paper/local_steps.py --workdir=runs/paper
Minutes:  15 to 30 on two cores at scale small, the default
Expect:   L[q*] − L of FFG 3.03 ± 0.18 nats at the encoder's q, 0.100 ± 0.017 after 100 steps
"""

from __future__ import annotations

from infsub.config import Config
from infsub.experiments import experiment


def get_config() -> Config:
    """L after n local steps from the encoder's q, for q_FFG and q_AF."""
    return experiment(
        "local_steps",
        "How many gradient steps buy back the amortization gap?",
        cells={
            q: {"model.posterior.name": q, "evaluate.local.families": (q,)}
            for q in ("gaussian", "auxiliary")
        },
        shared={
            "data.name": "binarized_mnist",
            "evaluate.local.curve": (0, 1, 3, 10, 30, 100, 300, 1000, 3000),
        },
        smoke=("gaussian",),
        figure={"kind": "steps"},
    )
