"""How far off can log p̂ be? AIS bounded from both sides, for every model of the main table.

Command:  python -m infsub.main --config=configs/paper/certificate.py --workdir=runs/paper
Minutes:  15 to 45 on two cores at scale small, the default
Expect:   BDMC gap 0.02 ± 0.02 nats (FFG) and −0.016 ± 0.014 (AF) with 25 temperatures, on
          binarized_mnist
"""

from __future__ import annotations

from infsub.config import Config
from infsub.experiments import experiment

DATA_SETS = ("binarized_mnist", "fashion_mnist", "cifar10")
TEMPERATURES = {"half": "1/2", "full": "1", "double": "2"}  # of the scale's


def get_config() -> Config:
    """Bidirectional Monte Carlo with more and more temperatures, on data the model simulates."""
    return experiment(
        "certificate",
        "How far off can log p̂ be?",
        cells={
            f"{data}_{q}_{name}": {
                "data.name": data,
                "model.posterior.name": q,
                "evaluate.ais.num_temperatures": f"@{share}",
            }
            for data in DATA_SETS
            for q in ("gaussian", "auxiliary")
            for name, share in TEMPERATURES.items()
        },
        shared={"evaluate.local.families": ()},
        smoke=("binarized_mnist_gaussian_half", "binarized_mnist_gaussian_full"),
        scales={
            "full": {"evaluate.bdmc.num_points": 1000},
            # Reverse AIS must take the same steps: none that adapt while it measures.
            "paper": {"evaluate.bdmc.num_points": 1000, "evaluate.ais.adaptation": "pilot"},
            "small": {"evaluate.bdmc.num_points": 200},
            "smoke": {"evaluate.bdmc.num_points": 4},
        },
        figure={
            "kind": "curves",
            "x": "evaluate.ais.num_temperatures",
            "y": ("certificate",),
            "lines": ("data.name", "model.posterior.name"),
        },
    )
