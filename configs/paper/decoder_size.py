"""Does a better decoder make posteriors easier to approximate?

Command:  python -m infsub.main --config=configs/paper/decoder_size.py --workdir=runs/paper
Minutes:  15 to 30 on two cores at scale small, the default
Expect:   approximation gap of FFG 7.58 ± 0.12 nats under a linear decoder, 2.73 ± 0.06 with four
          layers
"""

from __future__ import annotations

from infsub.config import Config
from infsub.experiments import experiment

DECODERS = {
    "decoder_linear": (),
    "decoder_2x200": (200,) * 2,
    "decoder_4x200": (200,) * 4,
    "decoder_2x500": (500,) * 2,
}


def get_config() -> Config:
    """Decoders of 0, 2 and 4 hidden layers of 200, and of [500, 500]."""
    return experiment(
        "decoder_size",
        "Does a better decoder make posteriors easier?",
        cells={
            name: {"data.name": "binarized_mnist", "model.decoder.hidden": hidden}
            for name, hidden in DECODERS.items()
        },
        shared={"evaluate.local.families": ("gaussian", "full_gaussian")},
        smoke=("decoder_linear", "decoder_4x200"),
    )
