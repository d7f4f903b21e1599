"""The paper's main table: does inference lose its nats by approximation or by amortization?

Command:  python -m infsub.main --config=configs/paper/main_table.py --workdir=runs/paper
Minutes:  15 to 45 on two cores at scale small, the default
Expect:   trained with FFG, approximation gap 3.35 ± 0.05 nats, amortization gap 3.03 ± 0.18, on
          binarized_mnist
"""

from __future__ import annotations

from infsub.config import Config
from infsub.experiments import experiment

DATA_SETS = ("binarized_mnist", "fashion_mnist", "cifar10")


def get_config() -> Config:
    """Each data set, trained with q_FFG and with q_AF; q* of both families and of full covariance."""
    return experiment(
        "main_table",
        "Approximation or amortization? Does the generator accommodate the q it was trained with?",
        cells={
            f"{data}_{q}": {"data.name": data, "model.posterior.name": q}
            for data in DATA_SETS
            for q in ("gaussian", "auxiliary")
        },
        shared={"evaluate.local.families": ("gaussian", "full_gaussian", "auxiliary")},
        smoke=("binarized_mnist_gaussian", "binarized_mnist_auxiliary"),
    )
