"""When does inference overfit, and does it before the model does?

Command:  python -m infsub.main --config=configs/paper/over_training.py --workdir=runs/paper
Minutes:  15 to 30 on two cores at scale small, the default
Expect:   amortization gap on training points 7.2 ± 0.5 nats after 10 epochs, 3.6 ± 0.3 after 80
"""

from __future__ import annotations

from infsub.config import Config
from infsub.experiments import experiment

WHEN = ("1/8", "1/4", "1/2", "1")


def get_config() -> Config:
    """Checkpoints of one run, the gaps at training and at validation points."""
    return experiment(
        "over_training",
        "When does inference overfit?",
        cells={
            f"after_{when.replace('/', '_')}_{split}": {
                "evaluate.checkpoint": f"@{when}",
                "evaluate.split": split,
            }
            for when in WHEN
            for split in ("train", "validation")
        },
        shared={
            "data.name": "fashion_mnist",
            "model.latent_dim": 20,
            "train.keep_every": f"@{WHEN[0]}",
        },
        scales={"small": {"train.num_epochs": 80}, "smoke": {"train.num_epochs": 8}},
        figure={
            "kind": "curves",
            "x": "evaluate.checkpoint",
            "y": ("amortization_gap_{family}", "approximation_gap_{family}"),
            "lines": ("evaluate.split",),
        },
    )
