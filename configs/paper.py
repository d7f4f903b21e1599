"""A model of the paper's on any data set, with any posterior, at any scale.

Command:  python -m infsub.main --workdir=runs/fashion_af \\
              --config=configs/paper.py:dataset=fashion_mnist,posterior=auxiliary,scale=small
Scales:   paper, the authors' settings (3280 epochs of Burda's schedule, 1000 datapoints, AIS of 100
          chains and 10,000 temperatures: days on a CPU); small, half an hour on two cores; smoke, a
          few minutes and no meaning.
Expect:   L[q] ≤ L[q*] ≤ log p̂ within errors, on every data set.
"""

from __future__ import annotations

from infsub.config import Config, default, posterior, variant
from infsub.types import UserError

EPOCHS = {"paper": 3280, "small": 30, "smoke": 3}


def get_config(arg: str | None = None) -> Config:
    """The settings of `dataset=…,posterior=…,scale=…`."""
    chosen = variant(arg, dataset="binarized_mnist", posterior="gaussian", scale="paper")
    if chosen["scale"] not in EPOCHS:
        raise UserError(f"scale is {chosen['scale']!r}; it must be one of {', '.join(EPOCHS)}.")
    colour = chosen["dataset"] == "cifar10"

    config = default()
    config.data.name = chosen["dataset"]
    config.model.posterior = posterior(chosen["posterior"])
    if colour:
        config.model.encoder.kind, config.model.encoder.hidden = "conv", (64, 128, 256)
        config.model.decoder.kind, config.model.decoder.hidden = "conv", (256, 128, 64)

    train, evaluate = config.train, config.evaluate
    train.num_epochs = EPOCHS[chosen["scale"]]
    train.annealing = "entropy"
    evaluate.local.families = ("gaussian", "auxiliary")
    if chosen["scale"] == "paper":
        train.schedule = "burda"
        train.annealing_epochs = 50 if colour else 400
        evaluate.per_class = 10 if colour else 100
        evaluate.ais.num_chains, evaluate.ais.num_temperatures = 100, 10_000
        evaluate.local.preset, evaluate.local.max_steps = "authors", 100_000
    else:
        train.schedule = "cosine"
        train.annealing_epochs = train.num_epochs // 3
    if chosen["scale"] == "smoke":
        evaluate.per_class = 1
        evaluate.elbo_samples, evaluate.iwae_samples = 100, 500
        evaluate.local.max_steps = 500
        evaluate.ais.num_temperatures = 20
    return config
