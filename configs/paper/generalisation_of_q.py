"""How much of the amortization gap is the encoder's capacity, how much its generalisation?

Command:  python -m infsub.main --config=configs/paper/generalisation_of_q.py --workdir=runs/paper
Minutes:  15 to 30 on two cores at scale small, the default
Expect:   amortization gap on simulated points 6.1 ± 0.4 nats trained on data, 3.58 ± 0.17 on such
          points
"""

from __future__ import annotations

from infsub.config import Config
from infsub.experiments import experiment

FRESH = {
    "init_from": "@source",
    "init_parts": "decoder",
    "train.freeze": "decoder",
    "evaluate.checkpoint": "last",  # the best one is chosen on data, which q_model never sees
}


def get_config() -> Config:
    """Fresh encoders on one frozen decoder: trained on its training data, and on its own samples.

    Samples never end, so the second has nothing to overfit: its gap on samples is capacity, and what is
    left to learn.
    """
    return experiment(
        "generalisation_of_q",
        "Amortization gap = capacity + generalisation: how much is which?",
        cells={
            "source": {},
            **{
                f"q_{on}_at_{split}": FRESH | {"train.on": on, "evaluate.split": split}
                for on in ("data", "model")
                for split in ("train", "test", "model")
            },
        },
        shared={"data.name": "binarized_mnist"},
    )
