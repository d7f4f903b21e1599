"""The decomposition against closed forms, and its errors against many synthetic data sets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import linear_gaussian

from infsub import gaps
from infsub.types import Estimate, Gaussian

NUM_DATA_SETS = 2000
N = 60


def synthetic(rng, shape):
    """Rows as real ones are: bounds that spread by 20 nats together, gaps that spread by 1."""
    log_px = rng.normal(-86.4, 20.0, shape)
    approximation = rng.gamma(4.0, 0.5, shape)  # mean 2, standard deviation 1
    amortization = rng.gamma(4.0, 0.55, shape)  # mean 2.2
    local = log_px - approximation
    return local - amortization, local, log_px


def estimate(log_px, standard_error=0.1, ess=3.0):
    nan = jnp.nan
    fields = dict.fromkeys(Estimate._fields, nan)
    fields |= {"log_px": log_px, "standard_error": standard_error, "ess": ess}
    return Estimate(**{k: jnp.asarray(v) for k, v in fields.items()})


def test_mean_and_both_errors_by_hand():
    got = gaps.mean_over_datapoints([1.0, 2.0, 6.0], [0.3, 0.0, 0.4])
    assert got.mean == pytest.approx(3.0)
    assert got.standard_error == pytest.approx(np.sqrt(7 / 3))  # variance (4 + 1 + 9) / 2
    assert got.monte_carlo_error == pytest.approx(0.5 / 3)
    assert got.num_datapoints == 3
    one = gaps.mean_over_datapoints([5.0])
    assert one.mean == 5
    assert np.isnan(one.standard_error)
    assert np.isnan(one.monte_carlo_error)


def test_paired_standard_error_is_the_spread_over_many_data_sets():
    rng = np.random.default_rng(0)
    elbo, local, log_px = synthetic(rng, (NUM_DATA_SETS, N))
    results = [gaps.decompose(*rows) for rows in zip(elbo, local, log_px, strict=True)]
    truths = {"approximation": 2.0, "amortization": 2.2, "inference": 4.2}
    for name, truth in truths.items():
        means = np.array([getattr(r, name).mean for r in results])
        errors = np.array([getattr(r, name).standard_error for r in results])
        assert means.mean() == pytest.approx(truth, abs=4 * means.std() / np.sqrt(NUM_DATA_SETS))
        # The standard deviation of NUM_DATA_SETS means is itself known to 1/sqrt(2 * 2000) = 1.6 %.
        assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.06)
        assert np.mean(np.abs(means - truth) < 2 * errors) == pytest.approx(0.945, abs=0.02)
    unpaired = np.hypot(elbo.std(1, ddof=1), log_px.std(1, ddof=1)).mean() / np.sqrt(N)
    assert unpaired > 15 * errors.mean()  # what a difference of means would have claimed


def test_monte_carlo_error_is_the_spread_over_keys_on_fixed_datapoints():
    rng = np.random.default_rng(1)
    elbo, local, log_px = synthetic(rng, N)
    sigma = rng.uniform(0.05, 0.5, (3, N))
    results = []
    for _ in range(NUM_DATA_SETS):
        noisy = np.stack([elbo, local, log_px]) + sigma * rng.normal(size=(3, N))
        results.append(gaps.decompose(*noisy, *sigma))
    for name in ("approximation", "amortization", "inference"):
        means = [getattr(r, name).mean for r in results]
        assert getattr(results[0], name).monte_carlo_error == pytest.approx(np.std(means), rel=0.06)


def test_bootstrap_interval_covers_and_follows_the_skew():
    rng = np.random.default_rng(2)
    covered, sides = [], []
    for values in rng.gamma(0.5, 2.0, (300, 40)):  # mean 1, strongly skewed
        low, high = gaps.bootstrap_interval(values, level=0.9, num_resamples=400)
        covered.append(low < 1.0 < high)
        sides.append((high - values.mean()) - (values.mean() - low))
    assert np.mean(covered) == pytest.approx(0.87, abs=0.06)  # percentile intervals are a bit short
    assert np.mean(sides) > 0.02
    values = rng.normal(size=200)
    low, high = gaps.bootstrap_interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(200), rel=0.1)
    assert gaps.bootstrap_interval(values) == (low, high)  # the seed makes it repeatable
    assert np.isnan(gaps.bootstrap_interval([1.0])).all()


def test_gaps_of_a_linear_gaussian_model_are_its_kl_divergences():
    model = linear_gaussian(latent_dim=4, data_dim=6)
    xs = jax.vmap(lambda k: model.simulate(k)[1])(jax.random.split(jax.random.key(0), 30))

    def bounds(x):
        best, log_px = model.best_gaussian(x), model.log_px(x)
        amortised = Gaussian(best.mean + 0.1 * jnp.sin(x[:4]), 1.3 * best.scale)
        return log_px - model.kl(x, amortised), log_px - model.kl(x, best), log_px

    elbo, local, log_px = jax.jit(jax.vmap(bounds))(xs)
    got = gaps.decompose(elbo, local, log_px)
    precision = np.asarray(model.precision(), np.float64)
    approximation = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    shift = 0.1 * np.sin(np.asarray(xs)[:, :4])
    amortization = 0.5 * np.einsum("ni,ij,nj->n", shift, precision, shift).mean() + 4 * (
        0.5 * (1.3**2 - 1) - np.log(1.3)
    )
    assert got.approximation.mean == pytest.approx(approximation, abs=1e-4)
    assert got.approximation.standard_error < 1e-4  # the same for every x
    assert got.amortization.mean == pytest.approx(amortization, abs=1e-4)
    assert got.inference.mean == pytest.approx(approximation + amortization, abs=1e-4)
    assert got.excluded.size == 0
    # The best full-covariance Gaussian is the posterior itself: the whole gap is correlation.
    covariance, shape = gaps.split_approximation(log_px, log_px, local)
    assert covariance.mean == pytest.approx(approximation, abs=1e-4)
    assert shape.mean == 0


def test_non_finite_datapoints_are_excluded_from_all_gaps_and_named():
    rng = np.random.default_rng(3)
    elbo, local, log_px = synthetic(rng, N)
    keep = np.setdiff1d(np.arange(N), [3, 17, 40])
    want = gaps.decompose(elbo[keep], local[keep], log_px[keep])
    elbo[3], local[17], log_px[40] = -np.inf, np.nan, np.inf
    got = gaps.decompose(elbo, local, log_px)
    assert got.excluded.tolist() == [3, 17, 40]
    np.testing.assert_allclose(got[:3], want[:3])
    assert got.inference.mean == pytest.approx(got.approximation.mean + got.amortization.mean)
    with pytest.raises(ValueError, match=r"positions \[17\]"):
        gaps.mean_over_datapoints(local)
    with pytest.raises(ValueError, match="none of the 60"):
        gaps.decompose(elbo, local, np.full(N, np.nan))


def test_tightest_takes_the_largest_finite_bound_of_each_datapoint():
    nan, inf = np.nan, np.inf
    iwae = jnp.array([-90.0, -80.0, nan, nan, inf])
    ais = jnp.array([-89.0, -81.0, -70.0, nan, -60.0])

    @jax.jit
    @jax.vmap
    def run(a, b):
        return gaps.tightest(estimate(a, 0.5, 5.0), estimate(b, 0.1, 9.0))

    got = run(iwae, ais)
    np.testing.assert_allclose(got.log_px, [-89, -80, -70, nan, -60])
    np.testing.assert_allclose(got.standard_error, [0.1, 0.5, 0.1, nan, 0.1])
    np.testing.assert_allclose(got.ess, [9, 5, 9, nan, 9])
    assert got.log_weights.shape == (5, 1)
    with pytest.raises(ValueError, match="at least one"):
        gaps.tightest()


def test_selection_bias_bounds_the_lift_of_the_maximum_and_is_reached_by_equal_bounds():
    rng = np.random.default_rng(4)
    error_a, error_b = rng.uniform(0.1, 0.6, (2, 50))
    bound = gaps.selection_bias(error_a, error_b)
    noise = rng.normal(size=(20000, 2, 50)) * np.stack([error_a, error_b])
    lift = np.maximum(noise[:, 0], noise[:, 1]).mean()
    assert lift == pytest.approx(bound, rel=0.02)
    difference = np.array([0.0, 0.3])[None, :, None]
    assert (np.maximum(*np.moveaxis(noise + difference, 1, 0)).mean() - 0.3) < 0.8 * bound


def test_max_of_means_is_never_above_the_mean_of_the_maxima():
    rng = np.random.default_rng(5)
    a, b = rng.normal(-86.0, 1.0, N), rng.normal(-86.5, 1.0, N)
    assert gaps.max_of_means([a, b]) == 0
    assert gaps.max_of_means([b, a]) == 1
    assert max(a.mean(), b.mean()) < np.maximum(a, b).mean()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: gaps.mean_over_datapoints([]), "values"),
        (lambda: gaps.mean_over_datapoints([[1.0]]), "values"),
        (lambda: gaps.gap([1.0, 2.0], [1.0]), "lower"),
        (lambda: gaps.gap([1.0], [1.0], [0.1, 0.1], [0.1]), "upper_error"),
        (lambda: gaps.decompose([1.0, 2.0], [1.0], [1.0, 2.0]), "local"),
        (lambda: gaps.selection_bias([0.1], [0.1, 0.2]), "error_b"),
        (lambda: gaps.bootstrap_interval([1.0], level=95), "level"),
        (lambda: gaps.bootstrap_interval([1.0], num_resamples=0), "num_resamples"),
        (lambda: gaps.max_of_means([]), "max_of_means"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
