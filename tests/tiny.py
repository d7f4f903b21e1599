"""A config file of a model so small that starting Python takes longer than training it."""

from __future__ import annotations

from typing import Any

from infsub.config import Config, default


def get_config() -> Config:
    """Every kind of state there is: annealing, clipping, a schedule, validation, pictures."""
    config = default()
    config.model.latent_dim = 2
    config.model.encoder.hidden = (8,)
    config.model.decoder.hidden = (8,)
    train = config.train
    train.num_epochs, train.batch_size = 12, 250
    train.annealing, train.annealing_epochs = "entropy", 3
    train.schedule, train.gradient_clip = "cosine", 100.0
    train.picture_every, train.validation_samples = 5, 2
    train.checkpoint_seconds = 0.0
    return config


def measured(**fields: Any) -> Config:
    """The same after two epochs, with a cheap evaluation of every kind, and these fields of it.

    Files of tests that measure this model as it is here share its programs.
    """
    config = get_config()
    config.train.num_epochs = 2
    config.evaluate.update(
        {"per_class": 1, "block_size": 5, "elbo_samples": 20, "iwae_samples": 50, "grid": 40}
    )
    config.evaluate.ais.update({"num_chains": 4, "num_temperatures": 5, "num_leapfrog": 2})
    config.evaluate.local.max_steps = 100
    config.evaluate.bdmc.num_points = 10
    config.evaluate.update(fields)
    return config
