"""One datapoint → its row: every estimator's bounds on log p(x), of any model, as a pure function.

The driver in evaluate.py maps these functions over a data set. Whatever they are compiled for is in
`Settings`; whatever they compute with is a key and a `Datapoint`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from infsub import grids, posteriors, rows
from infsub.ais import ais
from infsub.bdmc import bdmc
from infsub.bounds import elbo, iwae
from infsub.keys import named
from infsub.laplace import laplace
from infsub.local import LocalResult, local_curve, optimize_local
from infsub.types import Array, Estimate, Gaussian, Key, Params, Posterior, Sampler, Target

AIS_STARTS = ("posterior", "laplace", "local", "prior")
IWAE_STARTS = ("posterior", "laplace")

# Factor on the learning rate of an amortised flow's weights in its curve. After 3000 steps q* is 0.09
# nats ahead with 0.03, 0.24 with 0.1, 0.23 with 0.01 (AF on eight binarised MNIST digits).
_TRAINED = 0.03
_NUM_CELLS, _NUM_SAMPLES = 100, 400_000  # of a density's side; of a q's density
_BEYOND = 0.002  # of the true posterior, may lie beyond each side of its picture


class AIS(NamedTuple):
    """The arguments of `ais` that a run of it is compiled for."""

    num_chains: int = 16
    num_temperatures: int = 25
    num_leapfrog: int = 5
    schedule: str = "linear"
    adaptation: str = "pilot"


class Settings(NamedTuple):
    """What is measured, and how; the defaults are those of config.evaluate.

    Attributes:
      elbo_samples, iwae_samples: K of L[q] and of IWAE.
      iwae_start: what IWAE samples: "posterior", q(z|x), or "laplace".
      ais: of every run of it, the certificate's too.
      ais_start: what AIS anneals from: "posterior", q(z|x) or the Gaussian of its moments; "laplace",
        mode and curvature, found from there; "local", the q* of the first family; "prior".
      families: of local inference; of "own", the encoder's, `measure` makes its name.
      preset, max_steps: its rule.
      curve: numbers of local steps to take L[q] after; (): none.
      grid: cells a side of the quadrature of log p(x), where z is a plane; 0: none.
    """

    elbo_samples: int = 1000
    iwae_samples: int = 5000
    iwae_start: str = "posterior"
    ais: AIS = AIS()
    ais_start: str = "laplace"
    families: tuple[str, ...] = (posteriors.OWN, "gaussian")
    preset: str = "fast"
    max_steps: int = 20_000
    curve: tuple[int, ...] = ()
    grid: int = 0


class Datapoint(NamedTuple):
    """What a model says of one x.

    Attributes:
      target: p(z) p(x|z).
      q: q(z|x), the encoder's.
      base: the Gaussian that Laplace's search starts from, AIS where it starts at "posterior", and curves
        that do not at `amortised`: q, or one of its moments.
      own: the family of q, by its name in posteriors.py; "" where it is none of those.
      amortised: q as a member of that family, the encoder's output as its params, where its curve
        starts; None where that is not known.
    """

    target: Target
    q: Gaussian | Sampler
    base: Gaussian
    own: str
    amortised: tuple[Posterior, Params] | None = None


class _Fit(NamedTuple):
    """Local inference of one family at one datapoint, and the key that all its draws are named under."""

    family: str
    posterior: Posterior
    result: LocalResult
    key: Key


def bounds_of_datapoint(
    key: Key, point: Datapoint, settings: Settings, chunk_size: int = 500
) -> dict[str, Array]:
    """The row of one datapoint: every bound in nats with its error and diagnostics, all [].

    chunk_size: IWAE samples at a time; it changes no draw.

    Raises:
      ValueError: a start that there is not; or as the estimators.
    """
    _check(settings)
    bound = elbo(named(key, "elbo"), point.target, point.q, settings.elbo_samples)
    row = rows.build(rows.ELBO.name, bound)
    curvature = laplace(point.target, point.base)
    fits = _fits(named(key, "local"), settings.families, point, curvature, settings)
    for fit in fits:
        stopped = {"steps": fit.result.num_steps, "converged": fit.result.converged}
        row |= rows.build(rows.LOCAL.of(fit.family), fit.result.elbo, **stopped)
        row |= rows.build(rows.LOCAL_IWAE.of(fit.family), fit.result.iwae)
        if settings.curve:
            row |= _curves(point, fit, settings)
    sampled = curvature if settings.iwae_start == "laplace" else point.q
    weighted = iwae(
        named(key, "iwae"),
        point.target,
        sampled,
        settings.iwae_samples,
        chunk_size=chunk_size,
    )
    row |= rows.build(rows.IWAE.name, weighted)
    start = _ais_start(point, fits, curvature, settings)
    annealed = ais(named(key, "ais"), point.target, start, **settings.ais._asdict())
    row |= rows.build(rows.AIS.name, annealed)
    if settings.grid:
        truth = grids.log_px(point.target, settings.grid)
        row |= rows.build(rows.GRID.name, truth.log_px, error=truth.error)
    return row


def certify_datapoint(
    key: Key, simulate: Callable[[Key], tuple[Array, Datapoint]], settings: Settings
) -> dict[str, Array]:
    """The row of two-sided bounds of one datapoint that the model simulates, in nats, all [].

    AIS runs as in `bounds_of_datapoint`, from the same kind of start.

    Args:
      key: of this datapoint.
      simulate: key -> (z [D], a draw of the prior; what the model says of an x drawn from p(x|z)).
      settings: of the rows.

    Raises:
      ValueError: as `bounds_of_datapoint`.
    """
    _check(settings)
    if settings.ais.adaptation != "pilot":
        raise ValueError(
            "the certificate is of AIS whose step sizes are frozen: it needs adaptation='pilot'; got "
            f"{settings.ais.adaptation!r}"
        )

    def model(key: Key) -> tuple[Array, Target, Gaussian | None]:
        z, point = simulate(named(key, "model"))
        curvature, fits = laplace(point.target, point.base), []
        if settings.ais_start == "local":
            first = settings.families[:1]
            fits = _fits(named(key, "local"), first, point, curvature, settings)
        return z, point.target, _ais_start(point, fits, curvature, settings)

    options = settings.ais._asdict()
    del options["adaptation"]
    result = bdmc(key, model, **options)
    return {
        **rows.build(rows.TWO_SIDED.name, result.gap, se=result.standard_error),
        **rows.build(rows.LOWER.name, result.lower),
        **rows.build(rows.UPPER.name, result.upper),
    }


def densities_of_datapoint(key: Key, point: Datapoint, settings: Settings) -> dict[str, Array]:
    """p(z|x) of one x, q(z|x) and each family's q*, the F of its row, on one grid; z is a plane.

    Returns:
      log_px [], low [2] and width [] of the window, truth [G, G], bounds [F], densities [F, G, G].
    """
    target = point.target
    bounds, samplers = [elbo(named(key, "elbo"), target, point.q, settings.elbo_samples)], [point.q]
    curvature = laplace(point.target, point.base)
    for fit in _fits(named(key, "local"), settings.families, point, curvature, settings):
        bounds.append(fit.result.elbo)
        samplers.append(posteriors.sampler(fit.posterior, fit.result.params))
    keys = jax.random.split(named(key, "densities"), len(samplers))
    zs = [grids.draw(k, q, _NUM_SAMPLES) for k, q in zip(keys, samplers, strict=True)]
    window = grids.find_window(target, settings.grid)
    log_joint = grids.log_joint_of_cells(target, window, settings.grid)
    log_px = grids.integrate(window, log_joint).log_px
    # A q that misses the posterior is to be seen where it is.
    window = functools.reduce(grids.cover, zs, grids.zoom(window, log_joint, _BEYOND))
    return {
        "log_px": log_px,
        **window._asdict(),
        "truth": jnp.exp(grids.log_joint_of_cells(target, window, _NUM_CELLS) - log_px),
        "bounds": jnp.stack([bound.log_px for bound in bounds]),
        "densities": jnp.stack([grids.histogram(window, z, _NUM_CELLS) for z in zs]),
    }


def _check(settings: Settings) -> None:
    for name, known in (("ais_start", AIS_STARTS), ("iwae_start", IWAE_STARTS)):
        if getattr(settings, name) not in known:
            raise ValueError(
                f"{name} must be one of {', '.join(known)}; got {getattr(settings, name)!r}"
            )
    if settings.ais_start == "local" and not settings.families:
        raise ValueError("ais_start='local' starts from the first of families, and there is none")


def _fits(
    key: Key, families: Sequence[str], point: Datapoint, curvature: Gaussian, settings: Settings
) -> list[_Fit]:
    """Local inference of each family; those that start at the best Gaussian share its fit."""

    @functools.cache
    def fit(family: str) -> _Fit:
        posterior = posteriors.make(family, point.target.latent_dim, target=point.target)
        key_of_family = named(key, family)
        found = functools.partial(
            optimize_local,
            named(key_of_family, "steps"),
            point.target,
            posterior,
            rule=settings.preset,
            max_steps=settings.max_steps,
        )
        if settings.preset == "authors":  # who start at N(0, I)
            return _Fit(family, posterior, found(), key_of_family)
        if posterior.natural is not None:
            return _Fit(family, posterior, found(start=curvature), key_of_family)
        dense = posterior.place is not None
        best = fit("full_gaussian" if dense else "gaussian").result
        result = found(start=posteriors.gaussian_of(best.params, full=dense), fitted=True)
        result = result._replace(num_steps=best.num_steps + result.num_steps)
        return _Fit(family, posterior, result, key_of_family)

    return [fit(family) for family in families]


def _ais_start(
    point: Datapoint, fits: list[_Fit], curvature: Gaussian, settings: Settings
) -> Gaussian | None:
    match settings.ais_start:
        case "posterior":
            return point.base
        case "laplace":
            return curvature
        case "local":
            fit = fits[0]
            q = posteriors.sampler(fit.posterior, fit.result.params)
            return posteriors.moment_matched(named(fit.key, "moments"), q)
    return None  # the prior


def _curves(point: Datapoint, fit: _Fit, settings: Settings) -> dict[str, Array]:
    """Columns of the bounds on the way from the encoder's q to q*, one curve or two.

    Of the encoder's own family they begin at its very output, L[q]. A flow's trained weights then
    take small steps in one curve and are held in the other.
    """
    key = named(fit.key, "curve")
    posterior, rates = fit.posterior, {rows.AFTER: 1.0}
    params = posterior.init(named(key, "init"))
    if settings.preset != "authors":
        params = posteriors.with_gaussian(params, point.base)
    if fit.family == point.own and point.amortised is not None:
        posterior, params = point.amortised
        rates = {rows.AFTER: _TRAINED, rows.AFTER_HELD: 0.0} if params["shared"] else rates

    def curve(shared_rate: Array) -> Estimate:
        return local_curve(
            jax.random.clone(key),  # the same noise in all, on purpose
            point.target,
            posterior,
            params,
            settings.curve,
            settings.preset,
            num_final_samples=settings.elbo_samples,
            shared_rate=shared_rate,
        )

    # One after the other, by one compiled program.
    curves = jax.lax.map(curve, jnp.asarray(list(rates.values())))
    columns: dict[str, Any] = {}
    for i, quantity in enumerate(rates):
        for j, n in enumerate(settings.curve):
            error = curves.standard_error[i, j]
            columns |= rows.build(quantity.of(fit.family, n), curves.log_px[i, j], se=error)
    return columns
