"""Do a flow's parameters help by a more expressive family, or by better amortization?

Command:  python -m infsub.main --config=configs/paper/flow_parameters.py --workdir=runs/paper
Minutes:  15 to 30 on two cores at scale small, the default
Expect:   inference gap 14.2 ± 0.8 nats of a linear FFG encoder, 5.0 ± 0.2 with RNVP
"""

from __future__ import annotations

from infsub.config import Config
from infsub.experiments import experiment

FAMILIES = ("gaussian", "auxiliary", "rnvp", "planar", "sylvester")


def get_config() -> Config:
    """The decoder of an FFG model, frozen; on it a linear encoder with each family."""
    return experiment(
        "flow_parameters",
        "Do flows help by expressiveness or by better amortization?",
        cells={
            "decoder": {},
            **{
                f"linear_{q}": {
                    "init_from": "@decoder",
                    "init_parts": "decoder",
                    "train.freeze": "decoder",
                    "model.encoder.hidden": (),
                    "model.posterior.name": q,
                    "evaluate.local.families": (q,),
                }
                for q in FAMILIES
            },
        },
        shared={"data.name": "binarized_mnist"},
        smoke=("linear_gaussian", "linear_planar"),
    )
