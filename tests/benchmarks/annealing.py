"""AIS beside the same AIS built on BlackJAX's HMC, and beside nothing but its matrix products."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path

import blackjax
import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import load_oracle, oracle_decode, oracle_log_likelihood
from timing import compiled, record, seconds, show

import infsub
from infsub.types import Target

IMAGES, CHAINS, TEMPERATURES, LEAPFROG, STEP = 10, 100, 100, 10, 0.05
WIDTHS = (50, 200, 200, 784)


def model():
    """The oracle where it is at hand, random weights of its shapes elsewhere: speed is the same."""
    shared = Path(__file__).resolve().parents[3] / "shared"
    if (shared / "oracles").is_dir():
        params, xs = load_oracle(shared)
        return params, xs[:IMAGES]
    params = {}
    for layer, (rows, columns) in enumerate(itertools.pairwise(WIDTHS)):
        key = jax.random.key(layer)
        params[f"decoder_w{layer}"] = jax.random.normal(key, (rows, columns)) / rows**0.5
        params[f"decoder_b{layer}"] = jnp.zeros(columns)
    return params, jnp.zeros((IMAGES, WIDTHS[-1])).at[:, ::5].set(1.0)


def log_likelihood(params, x, z):
    """As a user would write it."""
    logits = oracle_decode(params, z)
    return jnp.sum(x * logits - jax.nn.softplus(logits))


@partial(jax.jit, static_argnames="likelihood")
def ours(key, xs, params, likelihood=log_likelihood):
    def point(key, x):
        target = Target(None, partial(likelihood, params, x), WIDTHS[0])
        return infsub.ais(key, target, None, CHAINS, TEMPERATURES, LEAPFROG, step_size=STEP).log_px

    return jax.vmap(point)(jax.random.split(key, len(xs)), xs)


@jax.jit
def products(params, z):
    """The matrix products of as many gradients, and nothing else: what no AIS can be faster than."""
    weights = [params[f"decoder_w{layer}"] for layer in range(len(WIDTHS) - 1)]

    def gradient(_, z):
        for weight in weights:
            z = z @ weight
        for weight in reversed(weights):
            z = z @ weight.T
        return z / jnp.max(jnp.abs(z))

    return jax.lax.fori_loop(0, TEMPERATURES * LEAPFROG, gradient, z)


@jax.jit
def blackjax_ais(key, xs, params):
    """One chain under vmap; a new β needs a new state, for the state keeps the old density."""
    kernel = blackjax.mcmc.hmc.build_kernel()
    betas = jnp.arange(TEMPERATURES + 1) / TEMPERATURES

    def chain(key, x):
        key_start, key_run = jax.random.split(key)

        def transition(carry, t):
            z, log_weight = carry
            log_weight += (betas[t + 1] - betas[t]) * log_likelihood(params, x, z)

            def density(z):
                return -0.5 * jnp.sum(z**2) + betas[t + 1] * log_likelihood(params, x, z)

            state = blackjax.mcmc.hmc.init(z, density)
            key = jax.random.fold_in(key_run, t)
            state, _ = kernel(key, state, density, STEP, jnp.ones(WIDTHS[0]), LEAPFROG)
            return (state.position, log_weight), None

        z = jax.random.normal(key_start, (WIDTHS[0],))
        (_, log_weight), _ = jax.lax.scan(transition, (z, 0.0), jnp.arange(TEMPERATURES))
        return log_weight

    keys = jax.random.split(key, (len(xs), CHAINS))
    log_weights = jax.vmap(jax.vmap(chain, (0, None)))(keys, xs)
    return jax.nn.logsumexp(log_weights, axis=1) - jnp.log(CHAINS)


def bytes_needed(num_temperatures, params, x):
    def point(key, x):
        target = Target(None, partial(log_likelihood, params, x), WIDTHS[0])
        return infsub.ais(key, target, None, CHAINS, num_temperatures, LEAPFROG).log_px

    analysis = jax.jit(point).lower(jax.random.key(0), x).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def main() -> None:
    params, xs = model()
    key, rows = jax.random.key(0), IMAGES * CHAINS
    z, square = (jax.random.normal(key, shape) for shape in ((rows, WIDTHS[0]), (1500, 1500)))
    square_product = jax.jit(lambda a: jax.lax.fori_loop(0, 100, lambda _, b: a @ b / 40, a))
    other, fast = "AIS on BlackJAX's HMC", "infsub.ais, densities.bernoulli_logits"
    names = ("infsub.ais", "… its matrix products alone", "100 square products of 1500")
    likelihoods = {names[0]: log_likelihood, fast: oracle_log_likelihood}
    programs = {name: compiled(ours, key, xs, params, each) for name, each in likelihoods.items()}
    times = seconds(
        {
            names[0]: lambda: ours(key, xs, params),
            other: lambda: blackjax_ais(key, xs, params),
            fast: lambda: ours(key, xs, params, oracle_log_likelihood),
            names[1]: lambda: products(params, z),
            names[2]: lambda: square_product(square),
        },
        3,
    )
    title = f"AIS: {rows} rows, T={TEMPERATURES}, L={LEAPFROG}, prior start, frozen step size"
    show(title, times, names[0])
    macs = sum(a * b for a, b in itertools.pairwise(WIDTHS))
    flop = 2 * 2 * macs * rows * TEMPERATURES * LEAPFROG  # forward and backward in z
    ais, shaped = (flop / times[name][0] / 1e9 for name in names[:2])
    peak = 100 * 2 * 1500**3 / times[names[2]][0] / 1e9
    print(
        f"GFLOP/s: AIS {ais:.0f}, {ais / shaped:.0%} of its products' {shaped:.0f}, "
        f"{ais / peak:.0%} of the square products' {peak:.0f}"
    )
    rates = {"flop": flop, "peak": 1e9 * peak}
    for name, program in programs.items():
        record(name, times[name][0], other, times[other][0], **rates, **program)
        record(name, times[name][0], "its matrix products alone", times[names[1]][0], **rates)
    small, large = (bytes_needed(t, params, xs[0]) for t in (100, 10_000))
    print(f"temporary memory: {small / 1e6:.2f} MB at T=100, {large / 1e6:.2f} MB at T=10,000")


if __name__ == "__main__":
    main()
