"""Does an encoder of more capacity have a smaller amortization gap?

Command:  python -m infsub.main --config=configs/paper/larger_encoder.py --workdir=runs/paper
Minutes:  15 to 45 on two cores at scale small, the default
Expect:   amortization gap 3.03 ± 0.18 nats of [200, 200], 2.36 ± 0.15 of [500, 500], on
          binarized_mnist
"""

from __future__ import annotations

from infsub.config import Config
from infsub.experiments import experiment

AUXILIARY = {
    "data.name": "binarized_mnist",
    "model.posterior.name": "auxiliary",
    "evaluate.local.families": ("auxiliary",),
}


def get_config() -> Config:
    """Encoders of [200, 200] and [500, 500], of FFG and AF; on CIFAR-10 convolutional and wider ones."""
    return experiment(
        "larger_encoder",
        "Does encoder capacity shrink the amortization gap?",
        cells={
            "encoder_200_200": {"data.name": "binarized_mnist"},
            "encoder_500_500": {
                "data.name": "binarized_mnist",
                "model.encoder.hidden": (500, 500),
            },
            **{
                f"auxiliary_{name}": AUXILIARY | {"model.encoder.hidden": hidden}
                for name, hidden in (("200_200", (200, 200)), ("500_500", (500, 500)))
            },
            "conv": {"data.name": "cifar10"},
            "conv_wide": {"data.name": "cifar10", "model.encoder.hidden": "@2"},
        },
        smoke=("encoder_200_200", "conv_wide"),
    )
