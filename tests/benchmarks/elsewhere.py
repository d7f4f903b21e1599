"""Measured elsewhere: log p(x) of a model that has it in closed form, as each library gives it.

z ~ N(0, I) [D], x|z ~ N(W z + b, noise² I) [X], an easy one and one whose posterior is 10 times narrower
than its prior, so that the prior is far to start from. Every row is what its library's own functions
give at the settings beside it. Where a library leaves the step size to its user, it is the best of
0.02, 0.05 and 0.1, judged by the known answer; infsub's is found by its pilot, which is counted. A
gradient is one evaluation of ∇ log p(x, z) for one chain; a value of it is none. NumPyro's guide is
trained for each x by its own SVI. Of a Gaussian posterior Laplace's fit is exact, so AIS from there
has nothing left to do: that row shows what it costs, tests/benchmarks/frontier.py what it is worth.
"""

from __future__ import annotations

import math
import sys
import time
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
from timing import record, seconds

import infsub
from infsub import densities
from infsub.ais import pilot_size

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of its own use of JAX's insides
    from tensorflow_probability.substrates.jax import mcmc

PROBLEMS = {"easy": (5, 20, 0.5), "narrow": (20, 100, 0.1)}  # D, X, noise
POINTS = 20
CHAINS, TEMPERATURES, LEAPFROG, STEPS = 16, (100, 1000), 10, (0.02, 0.05, 0.1)
SAMPLES, SVI_STEPS, SVI_PARTICLES = 5000, 1000, 10
SMC_MOVES, SMC_ESS = 2, 0.9


class Method(NamedTuple):
    """A row: its number of gradients a datapoint, and () -> log p̂ [N]."""

    gradients: float
    run: Callable[[], Any]


def annealed(key: Any, x: Any, model: LinearGaussian, start: str, **options: Any) -> Any:
    """infsub's AIS from the prior, or from the mode and curvature that `laplace` finds."""
    target = model.target(x)
    q = infsub.laplace(target) if start == "laplace" else None
    return infsub.ais(key, target, q, **options).log_px


def tfp_chain(
    key: Any, x: Any, model: LinearGaussian, step_size: float, num_temperatures: int
) -> Any:
    """tfp.mcmc.sample_annealed_importance_chain as its docstring calls it."""
    key_start, key_run = jax.random.split(key)
    _, log_weights, _ = mcmc.sample_annealed_importance_chain(
        num_steps=num_temperatures,
        proposal_log_prob_fn=jax.vmap(densities.standard_normal),
        target_log_prob_fn=jax.vmap(partial(_log_joint, model, x)),
        current_state=jax.random.normal(key_start, (CHAINS, _dim(model))),
        make_kernel_fn=lambda log_prob: mcmc.HamiltonianMonteCarlo(
            log_prob, step_size=step_size, num_leapfrog_steps=LEAPFROG
        ),
        seed=key_run,
    )
    return _log_mean_exp(log_weights)


def blackjax_ais(
    key: Any, x: Any, model: LinearGaussian, step_size: float, num_temperatures: int
) -> Any:
    """AIS by hand on BlackJAX's HMC, its state made anew for every β."""
    kernel = blackjax.mcmc.hmc.build_kernel()
    betas = jnp.arange(num_temperatures + 1) / num_temperatures

    def chain(key: Any) -> Any:
        key_start, key_run = jax.random.split(key)

        def transition(carry: Any, t: Any) -> Any:
            z, log_weight = carry
            log_weight += (betas[t + 1] - betas[t]) * model.log_likelihood(x, z)

            def density(z: Any) -> Any:
                return densities.standard_normal(z) + betas[t + 1] * model.log_likelihood(x, z)

            state = blackjax.mcmc.hmc.init(z, density)
            key = jax.random.fold_in(key_run, t)
            state, _ = kernel(key, state, density, step_size, jnp.ones(z.size), LEAPFROG)
            return (state.position, log_weight), None

        z = jax.random.normal(key_start, (_dim(model),))
        (_, log_weight), _ = jax.lax.scan(transition, (z, 0.0), jnp.arange(num_temperatures))
        return log_weight

    return _log_mean_exp(jax.vmap(chain)(jax.random.split(key, CHAINS)))


def blackjax_smc(key: Any, x: Any, model: LinearGaussian, step_size: float) -> tuple[Any, Any]:
    """BlackJAX's adaptive tempered SMC with HMC moves: log p̂ and the number of temperatures."""
    key_start, key = jax.random.split(key)
    sampler = blackjax.adaptive_tempered_smc(
        densities.standard_normal,
        partial(model.log_likelihood, x),
        blackjax.mcmc.hmc.build_kernel(),
        blackjax.mcmc.hmc.init,
        {
            "step_size": jnp.full(1, step_size),
            "inverse_mass_matrix": jnp.ones((1, _dim(model))),
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

    state = sampler.init(jax.random.normal(key_start, (CHAINS, _dim(model))))
    _, log_px, number = jax.lax.while_loop(
        lambda carry: carry[0].tempering_param < 1, step, (state, 0.0, 0)
    )
    return log_px, number


def numpyro_rows(
    keys: Any, xs: Any, model: LinearGaussian
) -> tuple[Callable[[], Any], list[float]]:
    """RenyiELBO(alpha=0), which is IWAE, of a guide trained for each x; and their Pareto k."""

    def joint(x: Any) -> None:
        z = numpyro.sample("z", dist.Normal(jnp.zeros(_dim(model)), 1).to_event(1))
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


def _dim(model: LinearGaussian) -> int:
    return model.weight.shape[1]


def _log_joint(model: LinearGaussian, x: Any, z: Any) -> Any:
    return densities.standard_normal(z) + model.log_likelihood(x, z)


def _log_mean_exp(log_weights: Any) -> Any:
    return jax.nn.logsumexp(log_weights) - jnp.log(log_weights.size)


def table(name: str) -> None:
    """Prints a row a method: its error against the closed form, with what it cost."""
    dim, size, noise = PROBLEMS[name]
    model = linear_gaussian(dim, size, noise)
    key_x, key = jax.random.split(jax.random.key(0))
    _, xs = jax.vmap(model.simulate)(jax.random.split(key_x, POINTS))
    keys = jax.random.split(key, POINTS)
    truth = jax.vmap(model.log_px)(xs)

    def over_points(function: Callable[..., Any], **options: Any) -> Callable[[], Any]:
        mapped = jax.jit(jax.vmap(Partial(function, model=model, **options)))
        return lambda: mapped(keys, xs)

    def tuned(function: Callable[..., Any], **options: Any) -> tuple[Callable[[], Any], float, Any]:
        """The run of the step size whose answer is best, that step size, and its answer."""
        runs = {step: over_points(function, step_size=step, **options) for step in STEPS}
        found = {step: run() for step, run in runs.items()}

        def error(step: float) -> float:
            return float(abs(jnp.mean(jax.tree.leaves(found[step])[0] - truth)))

        best = min(STEPS, key=error)
        return runs[best], best, found[best]

    methods: dict[str, Method] = {}
    for number in TEMPERATURES:
        cost = CHAINS * number * LEAPFROG
        run = over_points(annealed, start="prior", num_temperatures=number)
        methods[f"infsub.ais from the prior, T={number}"] = Method(
            cost + math.prod(pilot_size(CHAINS, number)) * LEAPFROG, run
        )
        for title, function in (
            ("TFP, sample_annealed_importance_chain", tfp_chain),
            ("BlackJAX, AIS by hand", blackjax_ais),
        ):
            run, step, _ = tuned(function, num_temperatures=number)
            methods[f"{title}, T={number}, step {step}"] = Method(cost, run)
    smc, step, (_, numbers) = tuned(blackjax_smc)
    number = float(jnp.mean(numbers))
    methods[f"BlackJAX, adaptive tempered SMC, T≈{number:.0f}, step {step}"] = Method(
        CHAINS * SMC_MOVES * LEAPFROG * number, lambda: smc()[0]
    )
    renyi, ks = numpyro_rows(keys, xs, model)
    methods[f"NumPyro, SVI, RenyiELBO of {SAMPLES}, PSIS k={np.mean(ks):.2f}"] = Method(
        SVI_STEPS * SVI_PARTICLES, renyi
    )
    fits = jax.vmap(lambda x: infsub.laplace_with_info(model.target(x))[1].num_gradients)(xs)
    methods["infsub.laplace, then ais, T=10, L=5"] = Method(
        (CHAINS * 10 + math.prod(pilot_size(CHAINS, 10))) * 5 + float(jnp.mean(fits)),
        over_points(annealed, start="laplace", num_temperatures=10, num_leapfrog=5),
    )
    times = seconds({name: method.run for name, method in methods.items()}, 3, time.process_time)
    print(
        f"\n**{name}**: D = {dim}, X = {size}, noise {noise}; log p(x) = {jnp.mean(truth):.3f} on "
        f"average of {POINTS} x's\n"
    )
    print(f"| {CHAINS} chains | log p̂ | error | ± over x's | gradients | CPU ms |")
    print("|---|---:|---:|---:|---:|---:|")
    for title, method in methods.items():
        found = np.asarray(method.run(), np.float64)
        error = found - np.asarray(truth, np.float64)
        spread = np.std(error, ddof=1) / np.sqrt(POINTS)
        number = next((n for n in TEMPERATURES if f"T={n}," in title), TEMPERATURES[-1])
        ours = f"infsub.ais from the prior, T={number}"
        if not title.startswith("infsub"):
            spent = [times[each][0] / POINTS for each in (ours, title)]
            errors = f"CPU seconds; the peer's error {np.mean(error):.3f} nats"
            record(f"{name}, {ours}", spent[0], title, spent[1], note=errors)
        print(
            f"| {title} | {np.mean(found):.3f} | {np.mean(error):.3f} | {spread:.3f} | "
            f"{method.gradients:,.0f} | {1e3 * times[title][0] / POINTS:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    print(__doc__)
    for problem in PROBLEMS:
        table(problem)
