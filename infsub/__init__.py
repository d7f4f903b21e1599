"""Where a variational autoencoder's inference loses its nats: the public API.

The examples in docstrings begin with

    import infsub, jax, jax.numpy as jnp
    from jax.scipy.stats import norm
"""

from infsub import signals

if signals.is_command():  # the library leaves signals alone; the command hears them from here on
    signals.watch()

from infsub import data, densities, gaps, grids, posteriors
from infsub.ais import ais, ais_with_info
from infsub.bdmc import bdmc, reverse_ais
from infsub.bounds import elbo, iwae
from infsub.check import Check, check
from infsub.datapoints import map_datapoints
from infsub.laplace import LaplaceInfo, laplace, laplace_with_info
from infsub.latents import FlatLatent, flat_latent
from infsub.local import LocalResult, local_curve, optimize_local
from infsub.measure import AIS, Settings
from infsub.measurement import Comparison, Measurement, compare, load, measure
from infsub.types import Estimate, Gaussian, Model, Posterior, Target

# The functions `ais`, `bdmc`, `check`, `laplace`, `measure` are named like the modules they live in: they are
# bound here, after those modules are loaded, so `infsub.ais(…)` is always the function.
__all__ = [
    "AIS",
    "Check",
    "Comparison",
    "Estimate",
    "FlatLatent",
    "Gaussian",
    "LaplaceInfo",
    "LocalResult",
    "Measurement",
    "Model",
    "Posterior",
    "Settings",
    "Target",
    "ais",
    "ais_with_info",
    "bdmc",
    "check",
    "compare",
    "data",
    "densities",
    "elbo",
    "flat_latent",
    "gaps",
    "grids",
    "iwae",
    "laplace",
    "laplace_with_info",
    "load",
    "local_curve",
    "map_datapoints",
    "measure",
    "optimize_local",
    "posteriors",
    "reverse_ais",
]
