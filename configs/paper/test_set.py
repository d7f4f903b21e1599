"""What generalises to the test set, the model or its inference?

Command:  python -m infsub.main --config=configs/paper/test_set.py --workdir=runs/paper
Minutes:  15 to 30 on two cores at scale small, the default
Expect:   amortization gap of FFG 3.03 ± 0.18 nats on training points, 3.3 ± 0.2 on test points
"""

from __future__ import annotations

from infsub.config import Config
from infsub.experiments import experiment


def get_config() -> Config:
    """q_FFG and q_AF, the gaps at training and at test points."""
    return experiment(
        "test_set",
        "What generalises: model or inference?",
        cells={
            f"{q}_{split}": {
                "model.posterior.name": q,
                "evaluate.split": split,
                "evaluate.local.families": (q,),
            }
            for q in ("gaussian", "auxiliary")
            for split in ("train", "test")
        },
        shared={"data.name": "binarized_mnist"},
        smoke=("gaussian_train", "gaussian_test"),
    )
