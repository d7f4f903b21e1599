"""A published model of paper/results, measured anew from its weights: nothing is trained.

Command:  python -m infsub.main --mode=evaluate --workdir=runs/again \\
              --config=configs/published.py:run=binarized_mnist-gaussian-697ad6c2/train-952f3e03 \\
              --config.data.dir=DIR
Minutes:  3 on two cores for its 1,000 points, 15 of a model with AF; fewer points by
          --config.evaluate.first=50
Expect:   the published L[q] and log p̂ of every datapoint to the last digit, and L[q*] within 2e-5 nats,
          of a flow within 0.02, for its steps multiply what another build rounds differently, and above it
          at the few points where a flow now begins anew
"""

from __future__ import annotations

from pathlib import Path

from infsub import published
from infsub.config import Config, variant


def get_config(arg: str | None = None) -> Config:
    """The config of run=RUN/EVALUATION, a folder of paper/results/runs."""
    folder = Path(__file__).parent / "paper" / "results"
    return published.config(variant(arg, run="")["run"], folder)
