"""One model of the paper's: any data set, any posterior, any scale.

Command:  python -m infsub.main --workdir=runs/fashion_af \\
              --config=configs/model.py:dataset=fashion_mnist,posterior=auxiliary,scale=small
          and, to evaluate another checkpoint or other points of it, the same command with
              --mode=evaluate --config.evaluate.split=test --config.evaluate.name=test
Scales:   paper, the authors' settings (3280 epochs of Burda's schedule, 1000 datapoints, AIS of 100
          chains and 10,000 temperatures); full, their training and our measuring, certified; small,
          a hundredth of it; smoke, no meaning.
Minutes:  half an hour on two cores at scale small, a few at smoke, hours at full, days at paper
Expect:   L[q] ≤ L[q*] ≤ log p̂ within errors, on every data set.
"""

from __future__ import annotations

from infsub.config import Config, default, posterior, variant
from infsub.experiments import at_scale


def get_config(arg: str | None = None) -> Config:
    """The settings of `dataset=…,posterior=…,scale=…`."""
    chosen = variant(arg, dataset="binarized_mnist", posterior="gaussian", scale="paper")
    config = default()
    config.data.name = chosen["dataset"]
    config.update_from_flattened_dict(at_scale(chosen["scale"], chosen["dataset"]))
    config.model.posterior = posterior(chosen["posterior"])
    config.evaluate.local.families = ("gaussian", "auxiliary", "own")
    return config
