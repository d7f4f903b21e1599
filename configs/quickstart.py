"""A small VAE on 4,000 real digits, and where its inference loses its nats.

Command:  python -m infsub.main --config=configs/quickstart.py --workdir=runs/quickstart
Minutes:  under 1 on two cores, compiling included: 50 epochs, then 100 digits, ten of each class
Expect:   validation ELBO −102.6 ± 1.6 nats after 50 epochs, test ELBO −104.2 ± 1.7
"""

from __future__ import annotations

from infsub.config import Config, default


def get_config() -> Config:
    """784-200-200-2z and its mirror, z = 20, a factorised Gaussian posterior."""
    config = default()
    config.model.latent_dim = 20
    config.train.num_epochs = 50
    config.train.learning_rate = 2e-3
    config.train.schedule = "cosine"
    config.train.annealing = "entropy"
    config.train.annealing_epochs = 10
    return config
