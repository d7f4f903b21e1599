"""Does an encoder of more capacity have a smaller amortization gap?

Command:  python -m infsub.main --config=configs/paper/larger_encoder.py --workdir=runs/paper
Minutes:  15 to 45 on two cores at scale small, the default
Expect:   amortization gap 3.03 ± 0.18 nats of [200, 200], 2.36 ± 0.15 of [500, 500], on
          binarized_mnist
"""

from __future__ import annotations

from infsub.config import Config
from infsub.experiments import experiment


def get_config() -> Config:
    """Encoders of [200, 200] and [500, 500], of FFG and AF; on CIFAR-10 convolutional and wider ones."""
    return experiment(
        "larger_encoder",
        "Does encoder capacity shrink the amortization gap?",
        cells={
            **{
                f"{name}_{width}_{width}": {
                    "data.name": "binarized_mnist",
                    "model.encoder.hidden": (width, width),
                    "model.posterior.name": q,
                    "evaluate.local.families": (q,),
                }
                for name, q in (("encoder", "gaussian"), ("auxiliary", "auxiliary"))
                for width in (200, 500)
            },
            "conv": {"data.name": "cifar10"},
            "conv_wide": {"data.name": "cifar10", "model.encoder.hidden": "@2"},
        },
        smoke=("encoder_200_200", "conv_wide"),
    )
