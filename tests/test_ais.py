"""AIS: exact in law on linear-Gaussian models, tight from bad starts, robust to bad likelihoods."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from models import linear_gaussian

import infsub
from infsub import hmc, schedules
from infsub.ais import _authors, checked_plan, pilot_size, prepare, start_chains
from infsub.types import Gaussian, Target


def wrong(q, shift=0.2, width=1.15):
    offset = q.scale if q.scale.ndim == 1 else jnp.sum(q.scale, axis=1)  # of noise [1, …, 1]
    return Gaussian(q.mean + shift * offset, width * q.scale)


def simulate(model, num_points, seed=7):
    return jax.vmap(model.simulate)(jax.random.split(jax.random.key(seed), num_points))


def mean_and_error(ratio):
    return ratio.mean(), ratio.std(ddof=1) / np.sqrt(ratio.size)


def exact_model(latent_dim, dtype):
    model = linear_gaussian(latent_dim, 2 * latent_dim)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), model)


def start_from(model, x, full):
    return wrong(model.exact_gaussian(x) if full else model.best_gaussian(x))


@pytest.mark.parametrize(
    ("latent_dim", "schedule", "full", "dtype"),
    [
        (1, "linear", False, "float32"),
        (10, "adaptive", False, "float32"),
        (50, "linear", False, "float32"),
        (10, "adaptive", True, "float64"),
        (50, "linear", True, "float32"),
    ],
)
def test_weights_average_to_px_and_reverse_ones_to_its_inverse(latent_dim, schedule, full, dtype):
    """E[w] = p(x) and E[1/w] = 1/p(x) in reverse, at few temperatures, with the pilot's step sizes."""

    def point(key, _, model):
        def simulated(key):
            z, x = model.simulate(key)
            return z, model.target(x), start_from(model, x, full)

        both = infsub.bdmc(key, simulated, 2, 16, 3, schedule)
        log_px = model.log_px(model.simulate(jax.random.split(key)[0])[1])  # of bdmc's x
        forward, reverse = both.lower.log_weights - log_px, log_px - both.upper.log_weights
        return jnp.exp(forward), jnp.exp(reverse), both.upper.log_px - log_px

    with jax.enable_x64(dtype == "float64"):
        model, indices = exact_model(latent_dim, dtype), np.arange(1500 if full else 4000)
        forward, reverse, excess = infsub.map_datapoints(
            point, jax.random.key(0), indices, model, block_size=500
        )
    for ratio in (forward, reverse):
        assert ratio.dtype == dtype
        mean, error = mean_and_error(ratio.mean(axis=1))
        assert error < 0.05
        assert abs(mean - 1) < 3 * error
    assert excess.mean() > 0  # an upper bound


@pytest.mark.parametrize("num_leapfrog", [1, 3])
def test_a_diagonal_factor_is_the_diagonal(num_leapfrog):
    """HMC with a full mass matrix against the factorised one: the same chains, either way."""
    model = linear_gaussian(4, 8)
    z, x = model.simulate(jax.random.key(1))
    target, q = model.target(x), wrong(model.best_gaussian(x))
    full, sizes = Gaussian(q.mean, jnp.diag(q.scale)), (8, 12, num_leapfrog)

    @jax.jit
    def both_ways(key):
        return [
            (
                infsub.ais_with_info(key, target, start, *sizes, step_size=0.5),
                infsub.reverse_ais(key, target, z, start, *sizes, step_size=0.5),
            )
            for start in (q, full)
        ]

    ((one, info), back), ((other, other_info), other_back) = both_ways(jax.random.key(0))
    np.testing.assert_allclose(other.log_weights, one.log_weights, rtol=1e-4)
    np.testing.assert_allclose(other_info.z, info.z, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(other_info.acceptance, info.acceptance, rtol=1e-3)
    np.testing.assert_allclose(other_back.log_weights, back.log_weights, rtol=1e-4)


def test_the_exact_posterior_has_nothing_to_anneal():
    """From p(z|x) itself, of full covariance, every weight is p(x), forward and reverse."""
    model = linear_gaussian(10, 20)
    z, x = model.simulate(jax.random.key(1))
    target, q, truth = model.target(x), model.exact_gaussian(x), model.log_px(x)
    forward = infsub.ais(jax.random.key(0), target, q, 8, 5, 2)
    reverse = infsub.reverse_ais(jax.random.key(0), target, z, q, 8, 5, 2)
    for estimate in (forward, reverse):
        np.testing.assert_allclose(estimate.log_weights, truth, atol=1e-3)


def test_prior_start():
    model = linear_gaussian(10, 20, noise=1.0)
    _, xs = simulate(model, 1000)

    def point(key, x, model):
        estimate = infsub.ais(key, model.target(x), None, 8, 10, 3, "power")
        return jnp.exp(estimate.log_weights - model.log_px(x))

    ratio = infsub.map_datapoints(point, jax.random.key(0), xs, model, block_size=500)
    mean, error = mean_and_error(ratio.mean(axis=1))
    assert error < 0.05
    assert abs(mean - 1) < 3 * error


def test_standard_error_is_honest():
    """z-scores of log p̂ against the truth have unit variance; a bootstrap gives the same error."""
    model = linear_gaussian(10, 20)
    _, xs = simulate(model, 300)

    def point(key, x, model):
        q = wrong(model.best_gaussian(x), 0.2, 1.1)
        return infsub.ais(key, model.target(x), q, 64, 20, 3), model.log_px(x)

    estimate, truth = infsub.map_datapoints(point, jax.random.key(0), xs, model, block_size=100)
    z_scores = (estimate.log_px - truth) / estimate.standard_error
    assert abs(z_scores.mean() + estimate.standard_error.mean() / 2) < 3 / np.sqrt(300)
    assert abs(z_scores.std() - 1) < 4 / np.sqrt(2 * 300)
    rng, log_weights = np.random.default_rng(0), estimate.log_weights[:20]
    resampled = log_weights[:, rng.integers(0, 64, (1000, 64))]
    bootstrap = np.log(np.exp(resampled - log_weights.max(1)[:, None, None]).mean(2)).std(1)
    np.testing.assert_allclose(bootstrap, estimate.standard_error[:20], rtol=0.15)
    assert np.all((estimate.ess >= 1) & (estimate.ess <= 64))


def test_tight_from_a_deliberately_bad_q_where_iwae_is_not():
    model = linear_gaussian(50, 100, noise=0.2)
    _, xs = simulate(model, 20)

    def point(key, x, model):
        best = model.best_gaussian(x)
        bad = Gaussian(best.mean + 0.5 * best.scale, 2 * best.scale)  # four times the variance
        target = model.target(x)
        annealed = infsub.ais(key, target, bad, 16, 200)
        return annealed, infsub.iwae(key, target, bad, 5000), model.log_px(x)

    annealed, iwae, truth = infsub.map_datapoints(point, jax.random.key(0), xs, model)
    assert abs((annealed.log_px - truth).mean()) < 0.3
    assert (truth - iwae.log_px).mean() > 5
    assert np.all(iwae.pareto_k > 0.7)


def test_memory_does_not_grow_with_temperatures():
    """No chain's past is kept, nor anything to differentiate it by: a listed mistake of others."""
    model = exact_model(50, "float32")
    _, x = model.simulate(jax.random.key(7))

    def bytes_of(num_temperatures):
        def one(key, x):
            return infsub.ais(key, model.target(x), model.best_gaussian(x), 16, num_temperatures)

        compiled = jax.jit(one).lower(jax.random.key(0), x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    state = 4 * 16 * 50  # bytes of the chains' z
    assert bytes_of(1000) - bytes_of(10) < 0.1 * 990 * state


def test_a_constant_likelihood_gives_exactly_its_value():
    """Nothing to anneal: every log weight is the constant, whatever the chains do."""
    target = Target(None, lambda z: -3.25 + 0 * jnp.sum(z), 6)
    for schedule in ("linear", "adaptive"):
        estimate = infsub.ais(jax.random.key(0), target, None, 4, 10, schedule=schedule)
        np.testing.assert_allclose(estimate.log_weights, -3.25, rtol=1e-5)


def test_own_prior():
    """z ~ N(1, 0.5²) and x|z ~ N(z, 1): log p(x) = log N(x; 1, 1.25)."""
    x, dim = jnp.array([0.3, 2.0]), 2
    prior = partial(infsub_normal, mean=jnp.ones(dim), scale=jnp.full(dim, 0.5))
    target = Target(prior, Partial(infsub_normal, x, scale=jnp.ones(dim)), dim)
    estimate = infsub.ais(
        jax.random.key(0), target, Gaussian(jnp.zeros(dim), jnp.ones(dim)), 512, 50
    )
    truth = infsub_normal(x, jnp.ones(dim), jnp.sqrt(jnp.full(dim, 1.25)))
    assert abs(estimate.log_px - truth) < 4 * estimate.standard_error
    with pytest.raises(ValueError, match="q=None starts at N"):
        infsub.ais(jax.random.key(0), target)


def infsub_normal(z, mean, scale):
    return jnp.sum(jax.scipy.stats.norm.logpdf(z, mean, scale))


def test_frozen_step_sizes_are_used_as_given():
    """Each at its own temperature: nearly none moves and all are accepted, or 3 widths and few are."""
    model = linear_gaussian(3, 6)
    _, xs = simulate(model, 1)
    target, q = model.target(xs[0]), model.best_gaussian(xs[0])
    step_size = np.where(np.arange(20) % 3 == 0, 3.0, 0.01)
    _, info = infsub.ais_with_info(jax.random.key(0), target, q, 400, 20, 2, step_size=step_size)
    np.testing.assert_allclose(info.step_sizes, step_size, rtol=1e-6)
    assert np.all(info.acceptance[step_size > 1] < 0.8)
    assert np.all(info.acceptance[step_size < 1] > 0.999)
    assert info.non_finite == 0
    assert info.z.shape == (400, 3)


@pytest.mark.parametrize("schedule", ["linear", "adaptive"])
def test_the_measuring_run_takes_what_the_pilot_has_frozen(schedule):
    model = linear_gaussian(3, 6)
    _, xs = simulate(model, 1)
    target, q, sizes = model.target(xs[0]), wrong(model.best_gaussian(xs[0]), 2.0), (8, 20, 2)
    key, settings = jax.random.key(0), checked_plan(q, *sizes, schedule, None)
    frozen = jax.jit(prepare)(jax.random.split(key)[0], target, q, settings)
    _, info = infsub.ais_with_info(key, target, q, *sizes, schedule)
    np.testing.assert_allclose(info.step_sizes, frozen.step_sizes, rtol=1e-5)
    np.testing.assert_allclose(info.betas, frozen.betas, atol=1e-6)
    assert np.ptp(frozen.step_sizes) > 0.1
    if schedule == "adaptive":  # and not where the pilot itself looked
        assert np.max(abs(info.betas - schedules.schedule_betas("power", 20))) > 0.05


def test_a_trajectory_of_a_whole_period_does_not_come_back():
    """On N(0, I) ten steps of 0.618 are one turn: of fixed length, every one would end at its start."""
    q = Gaussian(jnp.zeros(2), jnp.ones(2))
    flat = Target(None, lambda z: 0.0 * jnp.sum(z), 2)
    key, step_size = jax.random.key(0), 2 * np.sin(np.pi / 10)
    _, info = infsub.ais_with_info(key, flat, q, 500, 5, 10, step_size=step_size)
    key_start, _ = jax.random.split(jax.random.split(key)[1])
    z = start_chains(key_start, q, 500)
    correlation = np.corrcoef(z.ravel(), info.z.ravel())[0, 1]
    assert abs(correlation) < 0.3  # 0.98 of a fixed length


def test_the_pilot_is_a_small_share():
    assert pilot_size(16, 100) == (8, 25)  # the default: an eighth of 1600 transitions
    assert pilot_size(100, 10_000) == (8, 25)
    assert pilot_size(16, 10) == (4, 5)
    for num_chains, num_temperatures in itertools.product(
        (1, 2, 5, 16, 64), (1, 2, 7, 10, 50, 300)
    ):
        chains, temperatures = pilot_size(num_chains, num_temperatures)
        assert chains >= 2
        assert 1 <= temperatures <= max(num_temperatures // 2, 1) + num_temperatures % 2
        assert chains == 2 or chains * temperatures <= num_chains * num_temperatures / 8


@pytest.mark.parametrize(("num_temperatures", "settled"), [(50, 10), (10, 3)])
def test_the_pilot_steers_acceptance_at_every_temperature(num_temperatures, settled):
    model = linear_gaussian(20, 40, noise=0.1)
    _, xs = simulate(model, 20)

    def point(key, x, model):
        q = wrong(model.best_gaussian(x), 0.5, 2.0)
        return infsub.ais_with_info(key, model.target(x), q, 16, num_temperatures)[1]

    info = infsub.map_datapoints(point, jax.random.key(0), xs, model)
    by_temperature = info.acceptance.mean(axis=0)
    assert np.all(by_temperature > 0.6)
    assert np.all(by_temperature[settled:] < 0.97)


def test_the_authors_rule():
    """0.01 · 1.02 or 0.98 a transition, each chain by its own acceptance so far, kept in [1e-4, 0.5]."""
    # Of seed 1 no share is 0.65 itself, which rounding might put on either side.
    accepted = np.random.default_rng(1).uniform(size=(300, 4)) < [0.2, 0.6, 0.7, 1.0]
    state, step_size, update = _authors(4, jnp.float32)
    update, found = jax.jit(update), []
    for t, now in enumerate(accepted):
        found.append(step_size(state, t))
        state = update(state, hmc.HMCInfo(now + 0.0, now, 0.0 * now), t)
    want, chain = np.empty((300, 4)), np.full(4, 0.01)
    for t in range(300):
        want[t] = chain
        chain *= np.where(accepted[: t + 1].mean(axis=0) > 0.65, 1.02, 0.98)
        chain = np.clip(chain, 1e-4, 0.5)
    np.testing.assert_allclose(found, want, rtol=1e-4)
    assert (want.min(), want.max()) == (1e-4, 0.5)
    flat = Target(None, lambda z: -0.5 * jnp.sum(z**2), 3)
    _, info = infsub.ais_with_info(jax.random.key(0), flat, None, 5, 300, 2, adaptation="authors")
    np.testing.assert_allclose(info.step_sizes[:100], 0.01 * 1.02 ** np.arange(100), rtol=1e-3)


def test_the_authors_step_sizes_are_not_jittered():
    """The first is 0.01, and moves z by as much of the momentum; by two thirds of it with jitter."""
    q = Gaussian(jnp.zeros(2), jnp.ones(2))
    flat, key = Target(None, lambda z: 0.0 * jnp.sum(z), 2), jax.random.key(0)
    _, info = infsub.ais_with_info(key, flat, q, 500, 1, 1, adaptation="authors")
    key_start, _ = jax.random.split(jax.random.split(key)[1])
    moved = info.z - start_chains(key_start, q, 500)
    assert np.std(moved) == pytest.approx(0.01, rel=4 / np.sqrt(2 * moved.size))


def test_a_non_finite_region_is_rejected_and_counted():
    """A likelihood that is NaN for z₀ > 1: chains stay out of it and nothing else is poisoned."""

    def log_likelihood(z):
        return jnp.where(z[0] > 1, jnp.nan, 0.0) - 0.5 * jnp.sum(z**2)

    start = Gaussian(jnp.array([-1.0, 0.0]), jnp.array([0.2, 1.0]))
    target = Target(None, log_likelihood, 2)
    estimate, info = infsub.ais_with_info(jax.random.key(0), target, start, 64, 50)
    assert info.non_finite > 0
    assert np.all(np.isfinite(estimate.log_weights))
    assert info.z[:, 0].max() <= 1
    # ∫_{z₀<1} N(z; 0, I) e^{−‖z‖²/2} dz = Φ(√2) / 2
    truth = np.log(0.5 * 0.921350)
    assert abs(estimate.log_px - truth) < 4 * estimate.standard_error


@pytest.mark.parametrize("schedule", ["linear", "sigmoid", "power", "geometric"])
@pytest.mark.parametrize("num_temperatures", [1, 2, 100])
def test_schedules_increase_from_0_to_1(schedule, num_temperatures):
    betas = schedules.schedule_betas(schedule, num_temperatures)
    assert betas.shape == (num_temperatures + 1,)
    assert betas[0] == 0
    assert betas[-1] == 1
    assert np.all(np.diff(betas) > 0)


def test_the_adaptive_schedule_spends_temperatures_where_weights_vary():
    """sd_β(log_ratio) ∝ 1/β (as from a prior): equal distances are a geometric schedule."""
    pilot = np.linspace(0, 1, 200, dtype=np.float32) ** 3
    distances = jax.jit(schedules.equal_distances, static_argnums=2)
    betas = distances(pilot, 1 / (pilot[1:] + 0.01), 50)
    want = 0.01 * (101 ** (np.arange(51) / 50) - 1)
    np.testing.assert_allclose(betas, want, atol=0.01)
    flat = distances(pilot, np.ones(199, np.float32), 50)
    np.testing.assert_allclose(flat, np.arange(51) / 50, atol=1e-4)


def test_an_explicit_schedule_is_the_named_one():
    model = linear_gaussian(3, 6)
    _, xs = simulate(model, 1)
    target, q = model.target(xs[0]), model.best_gaussian(xs[0])
    named = infsub.ais(jax.random.key(0), target, q, 4, 10, 2, "sigmoid")
    explicit = infsub.ais(
        jax.random.key(0), target, q, 4, 99, 2, schedules.schedule_betas("sigmoid", 10)
    )
    np.testing.assert_array_equal(named.log_weights, explicit.log_weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_chains": 0}, "num_chains must be a positive integer; got 0"),
        ({"num_temperatures": 1.5}, "num_temperatures must be a positive integer; got 1.5"),
        ({"num_leapfrog": -2}, "num_leapfrog must be a positive integer; got -2"),
        ({"schedule": "cubic"}, "schedule must be one of linear, .*; got 'cubic'"),
        ({"schedule": [0.0, 0.7, 0.5, 1.0]}, "increases strictly from 0 to 1"),
        ({"schedule": [0.1, 1.0]}, "increases strictly from 0 to 1"),
        ({"adaptation": "nuts"}, "adaptation must be one of pilot, authors; got 'nuts'"),
        ({"step_size": [0.1, 0.2]}, r"step_size must be a number or an array \[T=100\]"),
        ({"schedule": "adaptive", "step_size": 0.1}, "chosen by the pilot run"),
        ({"adaptation": "authors", "step_size": 0.02}, "needs step_size=None"),
        ({"step_size": -0.1}, "step_size must be positive and finite; got -0.1"),
        (
            {"step_size": [0.1, 0.0], "num_temperatures": 2},
            r"positive and finite; got \[0.1 0. \]",
        ),
        ({"step_size": jnp.nan}, "step_size must be positive and finite; got nan"),
        ({"step_size": np.inf}, "step_size must be positive and finite; got inf"),
        ({"q": Gaussian(jnp.zeros(2), jnp.ones(2))}, r"q must have mean and scale of shape \[3\]"),
        ({"q": Gaussian(jnp.zeros(3), jnp.ones((3, 2)))}, r"a Cholesky factor is \[3, 3\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    target = Target(None, lambda z: jnp.sum(z), 3)
    with pytest.raises(ValueError, match=message):
        infsub.ais(jax.random.key(0), target, **arguments)


def test_a_step_size_may_be_traced():
    target = Target(None, lambda z: jnp.sum(z), 3)
    found = jax.eval_shape(lambda s: infsub.ais(jax.random.key(0), target, step_size=s), 0.1)
    assert found.log_weights.shape == (16,)


@pytest.mark.parametrize(("dtype", "narrow"), [("float32", "bfloat16"), ("float64", "float32")])
def test_a_q_of_fewer_digits_is_that_q(dtype, narrow):
    """It is computed with as the target is: the same bounds as of the same numbers in the wider type."""
    with jax.enable_x64(dtype == "float64"):
        model = exact_model(4, dtype)
        z, x = model.simulate(jax.random.key(1))
        target, rounded = (
            model.target(x),
            jax.tree.map(lambda a: a.astype(narrow), (z, wrong(model.best_gaussian(x)))),
        )

        @jax.jit
        def estimates(z, q):
            return (
                infsub.ais(jax.random.key(0), target, q, 4, 5, 2),
                infsub.reverse_ais(jax.random.key(0), target, z, q, 4, 5, 2, step_size=0.3),
            )

        found = estimates(*rounded)
        wanted = estimates(*jax.tree.map(lambda a: a.astype(dtype), rounded))
    for one, two in zip(found, wanted, strict=True):
        assert one.log_px.dtype == dtype
        np.testing.assert_allclose(one.log_weights, two.log_weights, rtol=1e-5)


def test_a_sampler_cannot_be_annealed_from():
    target = Target(None, lambda z: jnp.sum(z), 3)
    with pytest.raises(TypeError, match="q must be a Gaussian"):
        infsub.ais(jax.random.key(0), target, lambda key: (jnp.zeros(3), 0.0))  # pyright: ignore
    with pytest.raises(TypeError, match="log_likelihood must return a scalar"):
        infsub.ais(jax.random.key(0), Target(None, lambda z: z, 3))
