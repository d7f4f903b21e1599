"""A small VAE on 4,000 real digits, and where its inference loses its nats.

Command:  python -m infsub.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from __future__ import annotations

from infsub.config import Config, default


def get_config() -> Config:
    """The quickstart's settings."""
    config = default()
    config.model.latent_dim = 20
    config.train.num_epochs = 40
    config.train.annealing = "entropy"
    config.train.annealing_epochs = 10
    return config
