"""Measured elsewhere: log p(x) of a model that has it in closed form, as each library gives it.

z ~ N(0, I) of 20 dimensions, x|z ~ N(W z + b, 0.1² I) of 100: the posterior is 10 times narrower than
the prior, so a prior start has a long way to go. Every row is what its library's own functions give
at the settings beside it, without tuning beyond its documentation's example; a gradient is one
evaluation of ∇ log p(x, z) for one chain. NumPyro's guides are trained for each x by its own SVI.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import blackjax
import blackjax.smc.resampling
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.tree_util import Partial
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, psis_diagnostic
from numpyro.infer.autoguide import AutoDiagonalNormal

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import LinearGaussian, linear_gaussian
from timing import seconds

import infsub
from infsub import densities

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of its own use of JAX's insides
    from tensorflow_probability.substrates.jax import mcmc

D, X, NOISE, POINTS = 20, 100, 0.1, 20
CHAINS, TEMPERATURES, LEAPFROG, STEP = 16, 100, 10, 0.05
SAMPLES, SVI_STEPS, SVI_PARTICLES = 5000, 1000, 10
SMC_MOVES, SMC_ESS = 2, 0.9


class Method(NamedTuple):
    """A row: what is run, its number of gradients a datapoint, and x [N, X] -> log p̂ [N]."""

    gradients: str
    run: Callable[[], Any]


def annealed(key: Any, x: Any, model: LinearGaussian, start: str, **options: Any) -> Any:
    """infsub's AIS from the prior, or from the mode and curvature that `laplace` finds."""
    target = model.target(x)
    q = infsub.laplace(target) if start == "laplace" else None
    return infsub.ais(key, target, q, **options).log_px


def tfp_chain(key: Any, x: Any, model: LinearGaussian) -> Any:
    """tfp.mcmc.sample_annealed_importance_chain as its docstring calls it."""
    key_start, key_run = jax.random.split(key)
    _, log_weights, _ = mcmc.sample_annealed_importance_chain(
        num_steps=TEMPERATURES,
        proposal_log_prob_fn=jax.vmap(densities.standard_normal),
        target_log_prob_fn=jax.vmap(partial(_log_joint, model, x)),
        current_state=jax.random.normal(key_start, (CHAINS, D)),
        make_kernel_fn=lambda log_prob: mcmc.HamiltonianMonteCarlo(
            log_prob, step_size=STEP, num_leapfrog_steps=LEAPFROG
        ),
        seed=key_run,
    )
    return _log_mean_exp(log_weights)


def blackjax_ais(key: Any, x: Any, model: LinearGaussian) -> Any:
    """AIS by hand on BlackJAX's HMC, its state made anew for every β."""
    kernel = blackjax.mcmc.hmc.build_kernel()
    betas = jnp.arange(TEMPERATURES + 1) / TEMPERATURES

    def chain(key: Any) -> Any:
        key_start, key_run = jax.random.split(key)

        def transition(carry: Any, t: Any) -> Any:
            z, log_weight = carry
            log_weight += (betas[t + 1] - betas[t]) * model.log_likelihood(x, z)

            def density(z: Any) -> Any:
                return densities.standard_normal(z) + betas[t + 1] * model.log_likelihood(x, z)

            state = blackjax.mcmc.hmc.init(z, density)
            key = jax.random.fold_in(key_run, t)
            state, _ = kernel(key, state, density, STEP, jnp.ones(D), LEAPFROG)
            return (state.position, log_weight), None

        z = jax.random.normal(key_start, (D,))
        (_, log_weight), _ = jax.lax.scan(transition, (z, 0.0), jnp.arange(TEMPERATURES))
        return log_weight

    return _log_mean_exp(jax.vmap(chain)(jax.random.split(key, CHAINS)))


def blackjax_smc(key: Any, x: Any, model: LinearGaussian) -> tuple[Any, Any]:
    """BlackJAX's adaptive tempered SMC with HMC moves: log p̂ and the number of temperatures."""
    key_start, key = jax.random.split(key)
    sampler = blackjax.adaptive_tempered_smc(
        densities.standard_normal,
        partial(model.log_likelihood, x),
        blackjax.mcmc.hmc.build_kernel(),
        blackjax.mcmc.hmc.init,
        {
            "step_size": jnp.full(1, STEP),
            "inverse_mass_matrix": jnp.ones((1, D)),
            "num_integration_steps": jnp.full(1, LEAPFROG),
        },
        blackjax.smc.resampling.systematic,
        SMC_ESS,
        num_mcmc_steps=SMC_MOVES,
    )

    def step(carry: Any) -> Any:
        state, log_px, number = carry
        state, info = sampler.step(jax.random.fold_in(key, number), state)
        return state, log_px + info.log_likelihood_increment, number + 1

    state = sampler.init(jax.random.normal(key_start, (CHAINS, D)))
    _, log_px, number = jax.lax.while_loop(
        lambda carry: carry[0].tempering_param < 1, step, (state, 0.0, 0)
    )
    return log_px, number


def numpyro_rows(
    keys: Any, xs: Any, model: LinearGaussian
) -> tuple[Callable[[], Any], list[float]]:
    """RenyiELBO(alpha=0), which is IWAE, of a guide trained for each x; and their Pareto k."""

    def joint(x: Any) -> None:
        z = numpyro.sample("z", dist.Normal(jnp.zeros(D), 1).to_event(1))
        mean = model.weight @ z + model.bias
        numpyro.sample("x", dist.Normal(mean, model.noise).to_event(1), obs=x)

    guide = AutoDiagonalNormal(joint)
    svi = SVI(joint, guide, optax.adam(1e-2), Trace_ELBO(num_particles=SVI_PARTICLES))
    svi.init(keys[0], xs[0])  # a guide learns its model's shapes outside jit

    @jax.jit
    def fit(key: Any, x: Any) -> Any:
        state = svi.init(key, x)
        step = lambda _, state: svi.update(state, x)[0]  # noqa: E731
        return svi.get_params(jax.lax.fori_loop(0, SVI_STEPS, step, state))

    @jax.jit
    def bound(key: Any, x: Any) -> Any:
        iwae = RenyiELBO(alpha=0, num_particles=SAMPLES)
        return -iwae.loss(key, fit(key, x), joint, guide, x)

    pairs = list(zip(keys, xs, strict=True))
    ks = [
        psis_diagnostic(key, fit(key, x), joint, guide, x, num_particles=SAMPLES)
        for key, x in pairs
    ]
    return lambda: jnp.stack([bound(key, x) for key, x in pairs]), ks


def _log_joint(model: LinearGaussian, x: Any, z: Any) -> Any:
    return densities.standard_normal(z) + model.log_likelihood(x, z)


def _log_mean_exp(log_weights: Any) -> Any:
    return jax.nn.logsumexp(log_weights) - jnp.log(log_weights.size)


def main() -> None:
    """Prints a row a method: its error against the closed form, with what it cost."""
    model = linear_gaussian(D, X, NOISE)
    key_x, key = jax.random.split(jax.random.key(0))
    _, xs = jax.vmap(model.simulate)(jax.random.split(key_x, POINTS))
    keys = jax.random.split(key, POINTS)
    truth = jax.vmap(model.log_px)(xs)

    def over_points(function: Callable[..., Any], **options: Any) -> Callable[[], Any]:
        mapped = jax.jit(jax.vmap(Partial(function, model=model, **options)))
        return lambda: mapped(keys, xs)

    smc = over_points(blackjax_smc)
    num_temperatures = float(jnp.mean(smc()[1]))
    renyi, ks = numpyro_rows(keys, xs, model)
    cost = CHAINS * TEMPERATURES * LEAPFROG
    laplace = partial(over_points, annealed, start="laplace")
    methods = {
        f"infsub.ais, prior, T={TEMPERATURES}": Method(
            f"{cost}", over_points(annealed, start="prior")
        ),
        "infsub.laplace, then ais, T=10, L=5": Method(
            f"{CHAINS * 50}", laplace(num_temperatures=10, num_leapfrog=5)
        ),
        f"TFP, sample_annealed_importance_chain, T={TEMPERATURES}": Method(
            f"{cost}", over_points(tfp_chain)
        ),
        f"BlackJAX, AIS by hand, T={TEMPERATURES}": Method(f"{cost}", over_points(blackjax_ais)),
        f"BlackJAX, adaptive tempered SMC, T≈{num_temperatures:.0f}": Method(
            f"{CHAINS * SMC_MOVES * LEAPFROG * num_temperatures:.0f}", lambda: smc()[0]
        ),
        f"NumPyro, SVI, RenyiELBO of {SAMPLES}, k={np.mean(ks):.2f}": Method(
            f"{SVI_STEPS * SVI_PARTICLES}", renyi
        ),
    }
    times = seconds({name: method.run for name, method in methods.items()}, 3)
    print(__doc__)
    print(f"{POINTS} datapoints, {CHAINS} chains; error: log p̂ − log p(x), nats, ± over datapoints")
    print(f"{'':58}{'error':>10} {'±':>7}{'gradients':>11}{'ms a point':>12}")
    for name, method in methods.items():
        error = np.asarray(method.run(), np.float64) - np.asarray(truth, np.float64)
        spread = np.std(error, ddof=1) / np.sqrt(POINTS)
        milliseconds = 1e3 * times[name][0] / POINTS
        print(
            f"{name:58}{np.mean(error):10.3f} {spread:7.3f}{method.gradients:>11}{milliseconds:12.2f}"
        )


if __name__ == "__main__":
    main()
