"""A config file of a model so small that starting Python takes longer than training it."""

from __future__ import annotations

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
