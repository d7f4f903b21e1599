"""Where a variational autoencoder's inference loses its nats: the public API.

The examples in docstrings begin with

    import infsub, jax, jax.numpy as jnp
    from jax.scipy.stats import norm

## Choosing an estimator

- `measure` is all of them at once, with gaps and a verdict; begin with it, and with `check`.
- `elbo` is what training sees: a bound as loose as q is wrong, KL(q‖p) nats.
- `iwae` is cheap and enough where q is good (Pareto k below 0.5). Its bias falls as Var(w)/2K, which at
  50 dimensions of z no K makes small for an encoder's q; from `laplace` it is a fair second witness.
- `ais` is the one to publish. `measure` and the command run it from `laplace` with 16 chains, 25
  temperatures and 5 leapfrog steps, `ais(key, target, laplace(target), 16, 25, 5)`; by itself it takes
  100 of 10 from the prior. Where its certificate is too wide double the temperatures, and only then the
  chains.
- `optimize_local` is for gaps: the family's own best, L[q*], where no encoder is to blame. `gaussian` and
  `full_gaussian` take natural steps and a tenth of a second; `rnvp`, `auxiliary` and `sylvester` start
  where the full Gaussian ends, `planar` and `hamiltonian` where FFG does. "authors" is the paper's rule,
  for comparisons with it.

## Reading the diagnostics

- A standard error is of one datapoint's random keys; `gaps.Mean` has that and the one over datapoints. A
  gap's is paired: what makes one x harder than another cancels.
- ESS well above 4 of K chains: the weights agree. It cannot see a mode that no chain has met: two starts
  that disagree do (`ais_start="prior"` beside "laplace"), an IWAE above AIS, or the certificate.
- Pareto k above 0.7: the mean of the weights is ruled by a few; a bound still, no estimate.
- Acceptance far from 0.8, which the pilot aims at: its temperatures were too few to settle.
- `converged` False of a local q*: max_steps came first, and the approximation gap holds what is missing.

## What a certificate says, and what it does not

`bdmc` bounds log p(x) from above too, because it draws z with x and so holds one exact sample of
p(z|x): the mean of upper − lower bound is what AIS misses at most, on x's that the MODEL draws. Real x's
may be harder: the certificate is evidence there, and no proof. It falls with more temperatures; a gap
that does not is a posterior of several modes, or a step size that fits nowhere.

## Writing a family of posteriors

`Posterior(init, sample)`: init, key -> {"encoded": …, "shared": …}; sample, (key, params, sticking=False,
sign=1) -> (z [D], log q []), normalised, differentiable. Without `sticking` or `sign` a rule of
sticking_the_landing=False, antithetic=False fits it. `natural` and `place` make it fast. Test it as
tests/test_posteriors.py does: E[p(z)/q(z)] = 1, and log q by its Jacobian.
"""

from infsub import signals

if signals.is_command():  # the library leaves signals alone; the command hears them from here on
    signals.watch()

from infsub import data, densities, gaps, grids, posteriors
from infsub.ais import AISInfo, ais, ais_with_info
from infsub.bdmc import BDMC, bdmc, reverse_ais
from infsub.bounds import elbo, iwae
from infsub.check import Check, check
from infsub.datapoints import map_datapoints
from infsub.laplace import LaplaceInfo, laplace, laplace_with_info
from infsub.latents import FlatLatent, flat_latent
from infsub.local import LocalResult, local_curve, optimize_local
from infsub.measure import AIS, Settings
from infsub.measurement import Comparison, Measurement, compare, load, measure
from infsub.types import Estimate, Gaussian, Model, Posterior, Target, UserError

# The functions `ais`, `bdmc`, `check`, `laplace` are named like the modules they live in, and `measure` like
# another one: they are bound here, after those modules are loaded, so `infsub.ais(…)` is always the function.
__all__ = [
    "AIS",
    "BDMC",
    "AISInfo",
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
    "UserError",
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
