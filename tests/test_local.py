"""Local optimisation against closed forms, its promises, and the published model's digits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from jax.scipy.stats import norm
from jax.tree_util import Partial

from infsub import densities, grids, local, posteriors
from infsub.local import local_curve, optimize_local
from infsub.samplers import as_sampler
from infsub.types import Gaussian, Posterior, Target

SMALL = {
    "planar": {"num_steps": 1},
    "sylvester": {"num_steps": 1, "num_reflections": 2},
    "rnvp": {"num_steps": 1, "hidden": (10,)},
    "auxiliary": {"num_steps": 1, "hidden": (10,), "auxiliary_hidden": (10,)},
    "hamiltonian": {"num_steps": 1, "auxiliary_hidden": (10,)},
}
MODEL = models.linear_gaussian(4, 6)
each_rule = pytest.mark.parametrize("rule", ["fast", "authors"])


@functools.cache
def optimizer(name, **rule):
    """optimize_local of MODEL, vmapped: (keys [N], xs [N, X], starts: Gaussian) -> LocalResult."""

    def one(key, x, start):
        target = MODEL.target(x)
        posterior = posteriors.make(name, 4, target=target, **SMALL.get(name, {}))
        params = posteriors.with_gaussian(posterior.init(jax.random.key(0)), start)
        return optimize_local(key, target, posterior, params, **rule)

    return jax.jit(jax.vmap(one))


def keys_for(seed, xs):
    return jax.random.split(jax.random.key(seed), len(xs))


@pytest.fixture(scope="module")
def xs():
    return jax.vmap(lambda key: MODEL.simulate(key)[1])(jax.random.split(jax.random.key(1), 8))


@pytest.fixture(scope="module")
def zeros(xs):
    return Gaussian(jnp.zeros((len(xs), 4)), jnp.ones((len(xs), 4)))


@pytest.fixture(scope="module")
def best(xs):
    """The best factorised Gaussians: exact means, 1 / diag(precision) for variances."""
    return jax.vmap(MODEL.best_gaussian)(xs)


@pytest.fixture(scope="module")
def log_px(xs):
    return jax.vmap(MODEL.log_px)(xs)


@pytest.fixture(scope="module")
def gap(xs, best):
    """The approximation gap of FFG in closed form, [N]."""
    return jax.vmap(MODEL.kl)(xs, best)


def divergences(xs, params):
    """KL(q ‖ p(z|x)) of Gaussian parameters in closed form: no noise of an estimate in it."""
    return jax.vmap(lambda x, params: MODEL.kl(x, posteriors.gaussian_of(params)))(xs, params)


def assert_estimates(found, expected, slack):
    excess = np.abs(found.log_px - expected) - 4 * found.standard_error
    assert np.all(excess < slack), excess


@each_rule
def test_gaussian_reaches_its_closed_form(xs, zeros, log_px, gap, rule):
    found = optimizer("gaussian", rule=rule)(keys_for(2, xs), xs, zeros)
    assert np.all(found.converged)
    assert np.all(gap > 0.1)
    np.testing.assert_allclose(divergences(xs, found.params), gap, atol=0.02)
    assert_estimates(found.elbo, log_px - gap, slack=0.02)


def test_full_gaussian_reaches_log_px(xs, zeros, log_px):
    """The posterior is in the family: the approximation gap is 0, and IWAE has no variance."""
    found = optimizer("full_gaussian")(keys_for(3, xs), xs, zeros)
    assert_estimates(found.elbo, log_px, slack=0.01)
    assert_estimates(found.iwae, log_px, slack=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", tuple(posteriors.FAMILIES)[1:])
def test_richer_families_are_no_worse(xs, best, log_px, gap, name):
    """From FFG's optimum each richer family ends no lower, and not above log p(x)."""
    rule = {} if name == "full_gaussian" else {"max_steps": 600}
    found = optimizer(name, **rule)(keys_for(4, xs), xs, best)
    start = posteriors.make(name, 4, target=MODEL.target(xs[0]), **SMALL.get(name, {}))
    untouched = start.init(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(untouched):
        moved = dict(jax.tree_util.tree_leaves_with_path(found.params))[path] != leaf
        assert np.any(moved), f"{jax.tree_util.keystr(path)} of {name} is never trained"
    errors = 3 * found.elbo.standard_error
    assert np.all(found.elbo.log_px > log_px - gap - errors)
    assert np.all(found.elbo.log_px < log_px + errors + 1e-4)
    assert np.mean(found.elbo.log_px - (log_px - gap)) > 0.1


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("planar", posteriors.planar(4, num_steps=1)),
        ("auxiliary", posteriors.auxiliary(4, hidden=(10,), auxiliary_hidden=(10,))),
    ],
)
def test_a_start_is_fitted_first(xs, zeros, log_px, gap, name, family):
    """A flow goes on from the best Gaussian that it can be: FFG, or of full covariance, which is p(z|x)."""

    @jax.jit
    @jax.vmap
    def run(key, x, start):
        target = MODEL.target(x)
        return optimize_local(key, target, family, start=start, window=5, patience=1)

    found = run(keys_for(16, xs), xs, zeros)
    assert np.all(found.num_steps > (100 if name == "auxiliary" else 50))  # and the Gaussian's
    floor = log_px - (0 if name == "auxiliary" else gap)
    assert np.all(found.elbo.log_px > floor - 4 * found.elbo.standard_error - 0.02)
    assert np.all(found.elbo.log_px < log_px + 4 * found.elbo.standard_error + 0.01)


def test_small_steps_are_for_a_flow_that_is_placed(monkeypatch):
    """At a Gaussian of full covariance little is left to gain; at a factorised one much is."""
    taken = []

    class Taken(Exception):
        pass

    def take(key, target, posterior, params, rule):
        taken.append(rule)
        raise Taken

    monkeypatch.setattr(local, "_checked_start", take)
    target = MODEL.target(jnp.zeros(MODEL.weight.shape[0]))
    for scale in (jnp.ones(4), jnp.eye(4)):
        start = Gaussian(jnp.zeros(4), scale)
        with pytest.raises(Taken):
            optimize_local(jax.random.key(0), target, "rnvp", start=start, fitted=True)
    assert taken == [local.RULES["fast"], local._PLACED]


def test_nobody_reads_above_the_diagonal_of_a_start(monkeypatch):
    """Neither where it is placed nor for the width of the attempt that begins anew."""
    taken = []

    class Taken(Exception):
        pass

    def take(key, target, posterior, params, wide, *rest):
        taken.append((params, wide))
        raise Taken

    monkeypatch.setattr(local, "_optimize", take)
    target, factor = MODEL.target(jnp.zeros(MODEL.weight.shape[0])), jnp.eye(4)
    for scale in (factor, factor + jnp.triu(jnp.full((4, 4), 9.0), 1)):
        start = Gaussian(jnp.zeros(4), scale)
        with pytest.raises(Taken):
            optimize_local(jax.random.key(0), target, "rnvp", start=start, fitted=True)
    jax.tree.map(np.testing.assert_array_equal, *taken)


def bent(y):
    """z2 is z1² + y, up to noise: a posterior that is bent about a Gaussian's mean."""
    return Target(None, lambda z: norm.logpdf(y, z[1] - z[0] ** 2, 0.3), latent_dim=2)


@pytest.mark.slow
@pytest.mark.computing
@pytest.mark.parametrize(
    ("family", "rule", "tolerance"),
    [
        (posteriors.rnvp(2, hidden=(20,)), "fast", 0.04),
        pytest.param(
            posteriors.rnvp(2, hidden=(20,)), "thorough", 0.04, marks=pytest.mark.thorough
        ),
        (posteriors.sylvester(2), "fast", 0.15),  # all that its two steps find by any rule
    ],
    ids=["rnvp", "rnvp, thorough", "sylvester"],
)
def test_a_placed_flow_bends(family, rule, tolerance):
    """By small steps alone it would end at the best Gaussian, a third of a nat and more below log p(x)."""
    ys, start = jnp.array([-1.0, 0.0, 0.5]), Gaussian(jnp.zeros(2), jnp.ones(2))

    @jax.jit
    @jax.vmap
    def run(key, y):
        target = bent(y)
        gaussian = optimize_local(key, target, "full_gaussian", start=start)
        flow = optimize_local(key, target, family, start=start, rule=rule)
        return gaussian.elbo, flow.elbo, flow.converged, grids.log_px(target).log_px

    gaussian, flow, converged, log_px = run(jax.random.split(jax.random.key(0), 3), ys)
    assert np.all(log_px - gaussian.log_px > 0.3)
    assert np.all(converged)
    missed = log_px - flow.log_px
    assert np.all(missed > -4 * flow.standard_error)
    assert np.all(missed < 4 * flow.standard_error + tolerance)


@pytest.mark.slow
@pytest.mark.computing
def test_a_placed_flow_that_stays_far_begins_anew():
    """The best Gaussian lies along one arm of each of five bends; a flow of width 200 stays there."""

    def log_likelihood(z):  # a posterior of z_{i+5} = z_i² − 1 + noise, and log p(x) = 0
        a, b = z[:5], z[5:]
        return jnp.sum(norm.logpdf(b, a**2 - 1, 0.3) - norm.logpdf(b))

    start = Gaussian(jnp.zeros(10), jnp.ones(10))

    @jax.jit
    def run(key):
        target = Target(None, log_likelihood, latent_dim=10)
        return optimize_local(key, target, posteriors.rnvp(10, hidden=(200,)), start=start)

    found = run(jax.random.split(jax.random.key(0), 2)[0])
    assert found.converged
    assert abs(found.elbo.log_px) < 4 * found.elbo.standard_error + 0.2  # 2.6 without


def test_companions_do_not_change_a_point(xs, zeros):
    """A converged point waits for its block unchanged: the same result in another block."""
    far = Gaussian(zeros.mean + 30, zeros.scale)
    start = jax.tree.map(lambda a, b: jnp.concatenate([a[:4], b[4:]]), zeros, far)
    keys, run = keys_for(2, xs), optimizer("gaussian", rule="fast")
    found, other = run(keys, xs, zeros), run(keys, xs, start)
    assert jnp.max(other.num_steps) > jnp.max(found.num_steps)
    assert len(np.unique(found.num_steps)) > 1
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one[:4], two[:4])


@each_rule
def test_never_worse_than_the_start(xs, best, gap, rule):
    """From the optimum a step size that only does harm leaves the start as the best found."""
    rule = {"rule": rule, "learning_rate": 3.0, "window": 50, "patience": 5, "max_steps": 170}
    rule |= {"decay": 1.0}  # halved twice, it is a good step
    found = optimizer("gaussian", **rule)(keys_for(5, xs), xs, best)
    np.testing.assert_allclose(divergences(xs, found.params), gap, atol=1e-4)
    assert not np.any(found.converged)
    np.testing.assert_array_equal(found.num_steps, 200)  # whole windows


def test_final_elbo_is_from_fresh_samples(xs, zeros, log_px):
    """It estimates the returned parameters' ELBO without the bias of having chosen them, within its error."""
    # Many candidates that differ much: what suits 4 judging samples best suits no others so well.
    rule = {
        "num_judged": 4,
        "num_samples": 2,
        "learning_rate": 0.3,
        "decay": 1.0,
        "window": 4,
        "patience": 25,
    }
    xs, log_px = jnp.tile(xs, (200, 1)), jnp.tile(log_px, 200)
    zeros = jax.tree.map(lambda a: jnp.tile(a, (200, 1)), zeros)
    found = optimizer("gaussian", num_final_samples=5, **rule)(keys_for(6, xs), xs, zeros)
    errors = found.elbo.log_px - (log_px - divergences(xs, found.params))
    scores = np.mean(errors) / np.std(errors) * np.sqrt(len(xs))
    assert abs(scores) < 4
    said = found.elbo.standard_error**2
    excess = (errors**2 - said) / np.mean(said)
    assert abs(np.mean(excess)) < 4 * np.std(excess) / np.sqrt(len(xs))


@each_rule
def test_non_finite_likelihoods(rule):
    """NaN where z > 3, as 3 % of the first steps see, spoils nothing; NaN everywhere is reported."""

    def optimize(key, threshold):
        def log_likelihood(z):
            ordinary = densities.normal(z, jnp.full(1, -2.0), jnp.ones(1))
            return ordinary + jnp.where(z[0] > threshold, jnp.nan, 0) * z[0]

        target = Target(None, log_likelihood, 1)
        return optimize_local(key, target, posteriors.gaussian(1), rule=rule, max_steps=2000)

    thresholds = jnp.asarray([3.0, -jnp.inf])
    found = jax.jit(jax.vmap(optimize))(jax.random.split(jax.random.key(7)), thresholds)
    q = posteriors.gaussian_of(found.params)
    np.testing.assert_allclose(q.mean[:, 0], [-1, 0], atol=0.1)
    np.testing.assert_allclose(q.scale[:, 0], [np.sqrt(0.5), 1], atol=0.1)
    assert np.isfinite(found.elbo.log_px[0])
    assert np.isnan(found.elbo.log_px[1])
    assert not found.converged[1]


def test_a_value_without_a_gradient_is_no_optimum():
    """Of a missing pixel behind a where the value is right and the gradient NaN: no step can be taken."""

    def log_likelihood(x, z):
        return jnp.sum(jnp.where(jnp.isfinite(x), -0.5 * (x - z) ** 2, 0.0))

    target = Target(None, Partial(log_likelihood, jnp.asarray([1.5, jnp.nan])), 2)
    found = optimize_local(jax.random.key(7), target, posteriors.gaussian(2), max_steps=200)
    assert np.isfinite(found.elbo.log_px)
    assert not found.converged


@pytest.mark.parametrize("name", ["gaussian", "hamiltonian"])
def test_new_data_compile_nothing(name):
    """Other values of x, of the decoder and of the start run the program that is there."""
    traces = []

    def log_likelihood(weight, x, z):
        traces.append(1)
        return densities.normal(x, weight * z, jnp.ones(3))

    def run(seed):
        weight, x = jnp.full((), float(seed)), jnp.arange(3.0) + seed
        target = Target(None, Partial(log_likelihood, weight, x), 3)
        posterior = posteriors.make(name, 3, target=target, **SMALL.get(name, {}))
        params = posterior.init(jax.random.key(seed))
        return optimize_local(jax.random.key(seed), target, posterior, params, max_steps=100)

    first = run(1).elbo.log_px
    num_traces = len(traces)
    assert num_traces > 0
    assert run(2).elbo.log_px != first
    assert len(traces) == num_traces


def test_in_float64(xs):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (MODEL, xs[0]))
        target, posterior = wide[0].target(wide[1]), posteriors.gaussian(4)
        found = optimize_local(jax.random.key(8), target, posterior)
        assert found.elbo.log_px.dtype == found.params["encoded"]["mean"].dtype == jnp.float64
        kl = wide[0].kl(wide[1], posteriors.gaussian_of(found.params))
        assert abs(kl - wide[0].kl(wide[1], wide[0].best_gaussian(wide[1]))) < 0.02
        # From the same place in float32, by the same steps.
        start = Gaussian(jnp.zeros(4, jnp.float32), jnp.ones(4, jnp.float32))
        again = optimize_local(
            jax.random.key(8), target, posterior, rule=local._NATURAL, start=start
        )
        np.testing.assert_array_equal(again.elbo.log_px, found.elbo.log_px)
        params = jax.tree.map(lambda a: a.astype(jnp.float32), posterior.init(jax.random.key(0)))
        again = optimize_local(jax.random.key(8), target, posterior, params)
        np.testing.assert_array_equal(again.elbo.log_px, found.elbo.log_px)


def test_a_learning_rate_may_be_traced(xs):
    def first_step(rate):
        target, posterior = MODEL.target(xs[0]), posteriors.gaussian(4)
        rule = {"rule": "authors", "learning_rate": rate, "max_steps": 1, "window": 1}
        return optimize_local(jax.random.key(8), target, posterior, **rule).params["encoded"]

    small, large = (jax.eval_shape(first_step, rate) for rate in (1e-3, 1e-2))
    assert small == large


def test_mistakes_are_named(xs):
    key, target, posterior = jax.random.key(9), MODEL.target(xs[0]), posteriors.gaussian(4)
    with pytest.raises(
        ValueError, match="rule must be one of fast, thorough, authors, or a Rule; got 'slow'"
    ):
        optimize_local(key, target, posterior, rule="slow")
    with pytest.raises(TypeError, match=r"a rule has the fields .*; got step_size"):
        optimize_local(key, target, posterior, step_size=1.0)
    with pytest.raises(ValueError, match="num_samples must be a positive integer; got 0"):
        optimize_local(key, target, posterior, num_samples=0)
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        optimize_local(key, target, posterior, learning_rate=0.0)
    with pytest.raises(ValueError, match="bold_rate at least 0"):
        optimize_local(key, target, posterior, bold_rate=-1.0)
    with pytest.raises(ValueError, match="wide_rate and bold_rate at least 0"):
        optimize_local(key, target, posterior, wide_rate=-1.0)
    with pytest.raises(ValueError, match="q must sample z of shape"):
        optimize_local(key, target, posteriors.gaussian(3))
    with pytest.raises(ValueError, match="params must have the posterior's shapes"):
        optimize_local(key, target, posterior, posteriors.planar(4).init(key))
    own = Posterior(posterior.init, lambda key, params: posterior.sample(key, params))
    with pytest.raises(ValueError, match="a rule of sticking_the_landing=False"):
        optimize_local(key, target, own)
    jax.eval_shape(lambda: optimize_local(key, target, own, sticking_the_landing=False))
    with pytest.raises(ValueError, match="a rule of natural=False"):
        optimize_local(key, target, posteriors.planar(4), natural=True)
    with pytest.raises(
        ValueError, match="unknown posterior 'planer': it must be one of gaussian, "
    ):
        optimize_local(key, target, "planer")
    with pytest.raises(TypeError, match=r"a Posterior\(init, sample\).*got function"):
        optimize_local(key, target, posteriors.gaussian)
    with pytest.raises(
        TypeError, match=r"q must be .*got tuple: write infsub.Gaussian\(mean, scale\)"
    ):
        optimize_local(key, target, posterior, start=(jnp.zeros(4), jnp.ones(4)))
    params = posterior.init(key)
    q = Gaussian(jnp.zeros(4), jnp.ones(4))
    with pytest.raises(ValueError, match="two places to start from"):
        optimize_local(key, target, posterior, params, start=q)
    with pytest.raises(ValueError, match=r"q must have a mean \[D\]"):
        optimize_local(key, target, posterior, start=Gaussian(jnp.zeros(4), jnp.ones(())))
    for odd in ({"num_samples": 3}, {"num_judged": 3}):
        with pytest.raises(ValueError, match="antithetic samples come in pairs"):
            optimize_local(key, target, posterior, **odd)
    for steps in ((), (1, 1), (3, 1), (-1, 2), (0, 1.5), 3):
        with pytest.raises(ValueError, match="steps must be increasing integers of at least 0"):
            local_curve(key, target, posterior, params, steps)  # pyright: ignore
    with pytest.raises(ValueError, match="a rule of sticking_the_landing=False"):
        local_curve(key, target, own, params, (0, 1))
    with pytest.raises(ValueError, match="params must have the posterior's shapes"):
        local_curve(key, target, posterior, posteriors.planar(4).init(key), (0, 1))


@pytest.mark.slow
def test_a_family_by_name_from_any_q(xs):
    """The same as the family itself from the Gaussian, and from the moments of a sampler."""
    q, target, key = MODEL.best_gaussian(xs[0]), MODEL.target(xs[0]), jax.random.key(0)
    by_name = optimize_local(key, target, "planar", start=q, max_steps=200)
    itself = optimize_local(key, target, posteriors.planar(4), start=q, max_steps=200)
    np.testing.assert_array_equal(by_name.elbo.log_px, itself.elbo.log_px)
    # Of a Gaussian there is one optimum, wherever it starts.
    from_moments = optimize_local(key, target, "gaussian", start=as_sampler(q)).elbo
    want = MODEL.log_px(xs[0]) - MODEL.kl(xs[0], q)
    assert abs(from_moments.log_px - want) < 4 * from_moments.standard_error + 0.01


# The curve after n steps


@functools.cache
def curve(steps, rule="fast", **options):
    """local_curve of MODEL, vmapped: (keys [N], xs [N, X], starts: Gaussian) -> Estimate [N, S]."""

    def one(key, x, start):
        posterior = posteriors.gaussian(4)
        params = posteriors.with_gaussian(posterior.init(key), start)
        return local_curve(key, MODEL.target(x), posterior, params, steps, rule, **options)

    return jax.jit(jax.vmap(one))


def test_the_curve_goes_from_the_start_to_the_optimum(xs, zeros, log_px, gap):
    found = curve((0, 10, 100, 2000))(keys_for(11, xs), xs, zeros)
    assert found.log_px.shape == found.standard_error.shape == (8, 4)
    start = log_px - jax.vmap(MODEL.kl)(xs, zeros)
    errors = 4 * found.standard_error
    assert np.all(np.abs(found.log_px[:, 0] - start) < errors[:, 0])
    assert np.all(np.abs(found.log_px[:, -1] - (log_px - gap)) < errors[:, -1] + 0.05)
    assert np.all(np.diff(found.log_px, axis=1) > 0)


def test_the_curve_is_one_run(xs, zeros):
    """Looking on the way changes no step: Adam's moments and the numbers of the steps go on."""
    keys = keys_for(12, xs)
    often, once = (curve(steps)(keys, xs, zeros) for steps in ((0, 1, 3, 10), (10,)))
    np.testing.assert_allclose(once.log_weights[:, 0], often.log_weights[:, -1], rtol=1e-5)


def test_the_curve_is_paired_on_samples_that_did_not_fit(xs, best):
    """A step from the optimum gains nothing on fresh samples, and much on those it was taken on."""
    xs = jnp.tile(xs, (100, 1))
    best = jax.tree.map(lambda a: jnp.tile(a, (100, 1)), best)
    rule = local.RULES["authors"]._replace(num_samples=1, learning_rate=0.03)
    found = curve((0, 1), rule, num_final_samples=1)(keys_for(13, xs), xs, best)
    gains = found.log_px[:, 1] - found.log_px[:, 0]
    assert np.mean(gains) < 3 * np.std(gains) / np.sqrt(len(xs))
    assert np.std(gains) < 0.2 * np.std(found.log_px[:, 0])


def test_the_weights_of_a_flow_move_by_their_own_rate(xs):
    """Held, they leave the same as a posterior without them; and a rate of 1 is the plain curve."""
    flow, steps = posteriors.rnvp(4, hidden=(8,)), (0, 20)
    key, key_init = jax.random.split(jax.random.key(15))
    params, target = flow.init(key_init), MODEL.target(xs[0])
    fixed = params["shared"]

    def sample(key, held, sticking=False):
        return flow.sample(key, held | {"shared": fixed}, sticking)

    alone = Posterior(lambda key: {"encoded": flow.init(key)["encoded"]}, sample)
    plain, one, held = (
        local_curve(key, target, flow, params, steps, num_final_samples=50, **rate).log_px
        for rate in ({}, {"shared_rate": 1.0}, {"shared_rate": 0.0})
    )
    start = {"encoded": params["encoded"]}
    reference = local_curve(key, target, alone, start, steps, num_final_samples=50).log_px
    np.testing.assert_array_equal(plain, one)
    np.testing.assert_allclose(held, reference, rtol=1e-5)
    assert np.abs(plain[1] - held[1]) > 0.01


def test_a_rate_of_more_digits_widens_no_parameter(xs):
    with jax.enable_x64(True):
        flow, steps = posteriors.rnvp(4, hidden=(8,)), (0, 2)
        target = jax.tree.map(lambda leaf: leaf.astype("float32"), MODEL.target(xs[0]))
        params = jax.tree.map(lambda leaf: leaf.astype("float32"), flow.init(jax.random.key(15)))
        curve = local_curve(
            jax.random.key(0), target, flow, params, steps, num_final_samples=50,
            shared_rate=np.float64(0.03),
        )  # fmt: skip
    assert np.all(np.isfinite(curve.log_px))


def test_a_longer_curve_compiles_no_more(xs):
    traces = []

    def log_likelihood(x, z):
        traces.append(1)
        return densities.normal(x, z, jnp.ones(4))

    posterior, counts = posteriors.gaussian(4), []
    for steps in ((0, 1), (0, 300), (0, 1, 3, 10)):
        before = len(traces)
        target = Target(None, Partial(log_likelihood, xs[0][:4]), 4)
        params = posterior.init(jax.random.key(0))
        local_curve(jax.random.key(14), target, posterior, params, steps, num_final_samples=5)
        counts.append(len(traces) - before)
    assert counts[0] > 0
    assert counts[1] == 0  # more steps
    assert counts[2] <= counts[0]  # more bounds


def optimize_digits(shared_dir, name, digits, **rule):
    """optimize_local on digits of the published model, from its encoder, 20 digits at a time."""
    model, xs = models.load_oracle(shared_dir)

    def one(arguments):
        key, x = arguments
        target, posterior = models.oracle_target(model, x), posteriors.make(name, 50)
        start = models.oracle_encoder(model, x)
        params = posteriors.with_gaussian(posterior.init(key), start)
        return optimize_local(key, target, posterior, params, **rule)

    keys = jax.random.split(jax.random.key(10), len(xs))
    run = jax.jit(lambda *arguments: jax.lax.map(one, arguments, batch_size=20))
    return run(keys[digits], xs[digits])


@pytest.fixture(scope="module")
def gaussian_digits(shared_dir):
    return optimize_digits(shared_dir, "gaussian", slice(None), num_final_samples=1000)


@pytest.mark.slow
@pytest.mark.computing
def test_gaussian_on_the_published_model(gaussian_digits):
    """L[q*_FFG] of the 100 digits: −88.43 … −88.47 in the reproduction's own files."""
    found = gaussian_digits
    assert np.all(found.converged)
    assert -88.50 < np.mean(found.elbo.log_px) < -88.38
    assert np.all(found.elbo.log_px < found.iwae.log_px)


@pytest.mark.slow
@pytest.mark.computing
def test_auxiliary_flow_on_the_published_model(shared_dir, gaussian_digits):
    """q_AF closes most of FFG's approximation gap, and stays below the IWAE."""
    digits = slice(None, None, 50)
    found = optimize_digits(shared_dir, "auxiliary", digits, max_steps=600)
    assert np.all(found.elbo.log_px > gaussian_digits.elbo.log_px[digits] + 0.8)
    assert np.all(found.elbo.log_px < found.iwae.log_px)


def test_another_number_of_a_rule_is_no_other_program():
    target, posterior = MODEL.target(jnp.zeros(MODEL.weight.shape[0])), posteriors.gaussian(4)
    fields = {"rule": "fast", "num_samples": 2, "num_judged": 2, "num_final_samples": 2}
    curve, params = (
        functools.partial(local_curve, jax.random.key(0), target, posterior),
        posterior.init(None),
    )
    sizes = []
    for rate, steps in ((0.1, 50), (0.05, 100)):
        numbers = {"learning_rate": rate, "max_steps": steps, "decay": 1 - rate}
        found = optimize_local(jax.random.key(0), target, posterior, **fields, **numbers)
        assert int(found.num_steps) <= steps
        rule = local._NATURAL._replace(num_samples=2, learning_rate=rate)
        found = curve(params, (0, 1), rule, num_final_samples=2)
        sizes.append((local._optimize._cache_size(), local._curve._cache_size(), found.log_px[1]))
    assert sizes[0][:2] == sizes[1][:2]
    assert sizes[0][2] != sizes[1][2]
