"""Families of approximate posteriors q(z|x): each a `Posterior(init, sample)` of one datapoint.

A family's parameters are {"encoded": …, "shared": …}, "encoded" being an encoder's output in
amortised use. Every family has a factorised Gaussian q(z0) at its base, params["encoded"]["mean"]
and ["log_scale"] [D], and `init` starts it there: N(0, I) through a flow that is the identity, or
nearly so. A family with `context_dim` > 0 sees features h(x), params["encoded"]["context"] [C]; in
local use they are a free vector.

With sticking=True a `sample` returns the same numbers, but log_q carries the gradient through z
alone and none of the density's own parameters ("sticking the landing", Roeder et al. 2017, arXiv
1703.09194). The ELBO's gradient is the same in expectation, and has no noise left where q is the
posterior. With sign=−1 it turns its noise about: the mean over this antithetic pair has no noise of
odd order.

`FAMILIES`, at the end, is all that the rest of infsub knows of a family.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from infsub import densities, flows, linalg, placing
from infsub.samplers import as_sampler, promoted
from infsub.types import (
    Array,
    Gaussian,
    Key,
    Params,
    Posterior,
    Sampler,
    Target,
    as_partial,
    positive_int,
)

_LOG_SCALE_LIMIT = 15.0  # e^±15 is what float32 resolves beside a mean of order 1
_LOG_SCALE_LIMIT_V = 7.0  # v has no unit but its own


class Family(NamedTuple):
    """What there is to know of a family by its name; a row of `FAMILIES`.

    Attributes:
      constructor: (latent_dim, **options) -> Posterior, or (target, **options) if it needs one.
      label: in tables and figures.
      defaults: options of an amortised one in a config. A family that can see features h(x) gets
        them: without, its flow would never see x.
      needs_target: whether its `sample` computes with the datapoint's Target.
      auxiliary: whether it has an auxiliary variable v: then log_q is of z and v together, and
        log p(x) − L[q] bounds KL(q‖p) from above.
    """

    constructor: Callable[..., Posterior]
    label: str
    defaults: Mapping[str, Any]
    needs_target: bool = False
    auxiliary: bool = False


def family(name: str) -> Family:
    """The row of `FAMILIES`. Raises ValueError when there is none of that name."""
    if name not in FAMILIES:
        raise ValueError(f"unknown posterior {name!r}: it must be one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def make(name: str, latent_dim: int, *, target: Target | None = None, **options: Any) -> Posterior:
    """The family called `name` over z [D]; options are its constructor's arguments.

    target: of the same D, for a family that needs it; the others do not look at it.
    Raises ValueError when the name is unknown, the target is missing or a size is wrong, TypeError
    for an unknown option.
    """
    constructor, needs_target = family(name).constructor, family(name).needs_target
    if not needs_target:
        return constructor(latent_dim, **options)
    if target is None or target.latent_dim != latent_dim:
        found = "no target" if target is None else f"a target of latent_dim={target.latent_dim}"
        raise ValueError(
            f"posterior {name!r} needs a target of latent_dim={latent_dim}; got {found}"
        )
    return constructor(target, **options)


def sampler(posterior: Posterior, params: Params) -> Partial:
    """`posterior` at `params` as a function key -> (z [D], log_q []), its arrays all arguments."""
    return Partial(_sample, as_partial(posterior.sample), params)


def _sample(sample: Callable[..., Any], params: Params, key: Key) -> tuple[Array, Array]:
    return sample(key, params)


def gaussian_of(params: Params, full: bool = False) -> Gaussian:
    """The base Gaussian q(z0) of any family's params: mean [D], scale [D].

    full=True gives `full_gaussian`'s own, of scale [D, D].
    """
    encoded = params["encoded"]
    scale = jnp.exp(flows.soft_clip(encoded["log_scale"], _LOG_SCALE_LIMIT))
    if full:
        unit = jnp.eye(scale.size, dtype=scale.dtype) + _square(encoded["lower"], scale.size)
        scale = scale[:, None] * unit
    return Gaussian(encoded["mean"], scale)


def with_gaussian(params: Params, q: Gaussian) -> Params:
    """`params` with `q`, such as the encoder's, as the base Gaussian: a start for any family.

    `full_gaussian` takes q's Cholesky factor; of a dense q the others take its `factorised`.
    """
    params, q = promoted((params, q))
    encoded = params["encoded"]
    if "lower" in encoded:
        cholesky = q.scale if jnp.ndim(q.scale) == 2 else jnp.diag(q.scale)
        q = Gaussian(q.mean, jnp.diagonal(cholesky))
        below = _below(q.mean.size)
        encoded = encoded | {"lower": (cholesky / q.scale[:, None])[below]}
    q = factorised(q)
    log_scale = flows.soft_clip_inverse(jnp.log(q.scale), _LOG_SCALE_LIMIT)
    return params | {"encoded": encoded | {"mean": q.mean, "log_scale": log_scale}}


def start(key: Key, posterior: Posterior, q: Gaussian) -> Params:
    """Params of any family that is q as nearly as it can be: itself, or at its base Gaussian.

    Of the families here `full_gaussian`, `rnvp` and `auxiliary` can be any Gaussian, `sylvester`
    nearly, `gaussian` and the base of the others any factorised one.
    """
    params, q = promoted((posterior.init(key), q))
    if q.scale.ndim == 2:
        q = q._replace(scale=jnp.tril(q.scale))  # which `place` may multiply by
    if posterior.place is not None and q.scale.ndim == 2:
        return jax.jit(posterior.place)(params, q)  # its loops would each compile, in every call
    return with_gaussian(params, q)


def factorised(q: Gaussian) -> Gaussian:
    """The factorised Gaussian closest to q in KL(·‖q): its mean, and variances 1 / diag(precision)."""
    if jnp.ndim(q.scale) < 2:
        return q
    inverse = linalg.inverse(q.scale)
    return Gaussian(q.mean, 1 / jnp.sqrt(jnp.sum(inverse**2, axis=0)))


def moment_matched(
    key: Key,
    q: Sampler | Any,
    num_samples: int = 1000,
    full: bool = False,
) -> Gaussian:
    """The Gaussian of q(z)'s mean [D] and standard deviations [D]; AIS may start from it.

    q: whatever gives draws itself, a sampler such as `sampler(posterior, params)` or a distribution
    object.
    full=True gives q's covariance too, as its Cholesky factor [D, D].
    Raises ValueError when num_samples is not 2 or more, or is no more than D where full, TypeError for
    what is no sampler, such as a Posterior without its params.
    """
    if positive_int("num_samples", num_samples) < 2:
        raise ValueError(
            "num_samples must be at least 2: of one draw there is no standard deviation"
        )
    return _moment_matched(key, as_sampler(q), num_samples, full)


@functools.partial(jax.jit, static_argnames=("num_samples", "full"))
def _moment_matched(key: Key, q: Partial, num_samples: int, full: bool) -> Gaussian:
    z, _ = jax.vmap(q)(jax.random.split(key, num_samples))
    mean, scale = jnp.mean(z, axis=0), jnp.std(z, axis=0)
    if not full:
        return Gaussian(mean, scale)
    if num_samples <= mean.size:
        raise ValueError(
            f"num_samples must exceed D={mean.size} for a full covariance; got {num_samples}"
        )
    noise = (z - mean) / scale  # of correlations, all of one size, no digit is lost
    correlation = noise.T @ noise / num_samples
    return Gaussian(mean, scale[:, None] * linalg.factor(correlation))


def _cached(constructor: Callable[..., Any]) -> Callable[..., Any]:
    """Equal arguments give the same object, so that jit knows it again; lists count as tuples."""
    cached = functools.cache(constructor)

    def hashable(a: Any) -> Any:
        return tuple(a) if isinstance(a, list) else a

    @functools.wraps(constructor)
    def construct(*args: Any, **kwargs: Any) -> Any:
        return cached(*map(hashable, args), **{k: hashable(v) for k, v in kwargs.items()})

    return construct


def _check(hidden: Sequence[int] = (), activation: str = "elu", context_dim: int = 0, **sizes: int):
    for name, size in sizes.items() | {("hidden", width) for width in hidden}:
        positive_int(name, size)
    if context_dim:
        positive_int("context_dim", context_dim)
    if activation not in flows.ACTIVATIONS:
        known = ", ".join(flows.ACTIVATIONS)
        raise ValueError(f"unknown activation {activation!r}: it must be one of {known}")


def _init(latent_dim: int, context_dim: int = 0, **shared: Any) -> Params:
    encoded = {"mean": jnp.zeros(latent_dim), "log_scale": jnp.zeros(latent_dim)}
    if context_dim:
        encoded["context"] = jnp.zeros(context_dim)
    return {"encoded": encoded, "shared": shared}


def _context(params: Params) -> Array:
    encoded = params["encoded"]
    return encoded.get("context", encoded["mean"][:0])


def _below(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries of "lower" lie in a matrix [D, D]."""
    # int32 with and without x64: jax caches index arithmetic by the type it met first.
    rows, columns = np.tril_indices(size, -1)
    return rows.astype(np.int32), columns.astype(np.int32)


def _square(lower: Array, size: int) -> Array:
    """The strictly lower triangular matrix [D, D] of "lower"."""
    return jnp.zeros((size, size), lower.dtype).at[_below(size)].set(lower)


def _draw(key: Key, q: Gaussian, sign: Array | int) -> tuple[Array, Array]:
    """One draw of a factorised q and its log q, from noise of this sign."""
    noise = sign * jax.random.normal(key, q.mean.shape, q.mean.dtype)
    z = q.mean + q.scale * noise
    return z, densities.normal(z, *q)


# Gaussians


@_cached
def gaussian(latent_dim: int) -> Posterior:
    """Factorised Gaussian (FFG), q(z) = N(mean, diag(scale²)); encoded: mean, log_scale [D].

    Raises ValueError when latent_dim is not a positive integer.
    """
    _check(latent_dim=latent_dim)

    def sample(
        key: Key, params: Params, sticking: bool = False, sign: Array | int = 1
    ) -> tuple[Array, Array]:
        z, log_q = _draw(key, gaussian_of(params), sign)
        if sticking:
            log_q = densities.normal(z, *gaussian_of(jax.lax.stop_gradient(params)))
        return z, log_q

    def natural(params: Params, gradient: Params) -> Params:
        variance, slope = gaussian_of(params).scale ** 2, gradient["encoded"]
        direction = {"mean": variance * slope["mean"], "log_scale": slope["log_scale"] / 2}
        return gradient | {"encoded": direction}

    return Posterior(lambda key: _init(latent_dim), sample, natural)


@_cached
def full_gaussian(latent_dim: int) -> Posterior:
    """Gaussian of full covariance: z = mean + scale ∘ (ε + A ε), A strictly lower triangular.

    Its Cholesky factor is diag(scale)(I + A), of log determinant Σ log scale. Encoded: mean,
    log_scale [D], "lower" [D(D−1)/2], the entries of A row by row.
    Raises ValueError when latent_dim is not a positive integer.
    """
    _check(latent_dim=latent_dim)
    below = _below(latent_dim)

    def init(key: Key) -> Params:
        params = _init(latent_dim)
        params["encoded"]["lower"] = jnp.zeros(below[0].size)
        return params

    def sample(
        key: Key, params: Params, sticking: bool = False, sign: Array | int = 1
    ) -> tuple[Array, Array]:
        q = gaussian_of(params, full=True)
        noise = sign * jax.random.normal(key, q.mean.shape, q.mean.dtype)
        z = q.mean + q.scale @ noise
        if sticking:
            return z, densities.gaussian(z, gaussian_of(jax.lax.stop_gradient(params), full=True))
        # From the noise: solving for it would lose every digit where A is large.
        return z, densities.standard_normal(noise) - densities.log_volume(q)

    def natural(params: Params, gradient: Params) -> Params:
        # L moves by L M, M lower triangular, of which KL is ‖mean's move‖² + 2 Σ M_ii² + Σ M_ij²,
        # halved: where L is scaled, so is the step. G is the gradient in L.
        cholesky = gaussian_of(params, full=True).scale
        scale = jnp.diagonal(cholesky)
        slope, lower = gradient["encoded"], _square(params["encoded"]["lower"], latent_dim)
        slope_lower = _square(slope["lower"], latent_dim)
        diagonal = slope["log_scale"] - jnp.sum(lower * slope_lower, axis=1)
        g = (slope_lower + jnp.diag(diagonal)) / scale[:, None]
        m = jnp.tril(cholesky.T @ g)
        log_scale = jnp.diagonal(m) / 2
        move = cholesky @ (m - jnp.diag(log_scale)) / scale[:, None]
        direction = {
            "mean": cholesky @ (cholesky.T @ slope["mean"]),
            "log_scale": log_scale,
            "lower": (move - lower * log_scale[:, None])[below],
        }
        return gradient | {"encoded": direction}

    return Posterior(init, sample, natural, with_gaussian)


# Flows


def _flow_posterior(
    init: Callable[[Key], Params],
    flow: flows.Flow,
    steps_in: str,
    split: Callable[[Array], Any] = lambda z: z,
    join: Callable[[Any], Array] = lambda y: y,
) -> Posterior:
    """q(z_T) of a Gaussian z_0 pushed through params[steps_in]["steps"], which act on split(z)."""

    def sample(
        key: Key, params: Params, sticking: bool = False, sign: Array | int = 1
    ) -> tuple[Array, Array]:
        z, log_q = _draw(key, gaussian_of(params), sign)
        steps = params[steps_in]["steps"]
        y, start, log_det = flows.push(flow, steps, split(z), _context(params), sticking)
        if sticking:
            frozen = jax.lax.stop_gradient(params)
            log_q = densities.normal(join(start), *gaussian_of(frozen))
        return join(y), log_q - log_det

    return Posterior(init, sample)


@_cached
def planar(latent_dim: int, num_steps: int = 2) -> Posterior:
    """Planar flow, z' = z + û tanh(w·z + b) (Rezende & Mohamed 2015, arXiv 1505.05770, eq. 10).

    û = u + (m(w·u) − w·u) w/‖w‖², m(a) = a for a ≥ 0 and above −1 for any a, so that w·û > −1 and
    it is invertible. Encoded: mean, log_scale [D], "steps", a list of {"u" [D], "w" [D], "b" []}.
    Raises ValueError when an argument is not a positive integer.
    """
    _check(latent_dim=latent_dim, num_steps=num_steps)

    def init(key: Key) -> Params:
        params = _init(latent_dim)
        keys = jax.random.split(key, num_steps)
        params["encoded"]["steps"] = [flows.init_planar(key, latent_dim) for key in keys]
        return params

    return _flow_posterior(init, flows.planar, "encoded")


@_cached
def sylvester(
    latent_dim: int, num_steps: int = 2, rank: int | None = None, num_reflections: int = 8
) -> Posterior:
    """Sylvester flow, z' = z + Q R1 tanh(R2 Qᵀ z + b) (van den Berg et al. 2018, arXiv 1803.05649).

    Q [D, M] has orthonormal columns, from a product of Householder reflections; R1, R2 [M, M] are
    upper triangular with diagonals in (−1, 1), which makes it invertible. rank: M, by default
    min(D, 16). Encoded: mean, log_scale [D], "steps", a list of `flows.init_sylvester`'s dicts.
    Placed at a Gaussian of full covariance its units are nearly straight, so that it starts a few hundredths
    of a nat below it.
    Raises ValueError when an argument is not a positive integer, or rank exceeds D.
    """
    num_hidden = min(latent_dim, 16) if rank is None else rank
    _check(
        latent_dim=latent_dim, num_steps=num_steps, rank=num_hidden, num_reflections=num_reflections
    )
    if num_hidden > latent_dim:
        raise ValueError(f"rank must be at most latent_dim={latent_dim}; got {rank}")

    def init(key: Key) -> Params:
        params = _init(latent_dim)
        params["encoded"]["steps"] = [
            flows.init_sylvester(key, latent_dim, num_hidden, num_reflections)
            for key in jax.random.split(key, num_steps)
        ]
        return params

    def place(params: Params, q: Gaussian) -> Params:
        steps, scale = placing.correlated_sylvester(params["encoded"]["steps"], q)
        params = with_gaussian(params, Gaussian(q.mean, scale))
        return params | {"encoded": params["encoded"] | {"steps": steps}}

    return _flow_posterior(init, flows.sylvester, "encoded")._replace(place=place)


@_cached
def rnvp(
    latent_dim: int,
    num_steps: int = 2,
    hidden: Sequence[int] = (200,),
    activation: str = "elu",
    context_dim: int = 0,
) -> Posterior:
    """Real-NVP (Dinh et al. 2017, arXiv 1605.08803): the halves of z update each other in turn.

    A step is b' = b ∘ σ(a, h) + μ(a, h), a' = a ∘ σ(b', h) + μ(b', h); a is the first ⌊D/2⌋ of z.
    Encoded: mean, log_scale [D], "context" h; shared: "steps", networks of `hidden` widths.
    Raises ValueError when a size is not a positive integer or the activation is unknown.
    """
    _check(hidden, activation, context_dim, latent_dim=latent_dim, num_steps=num_steps)
    half = latent_dim // 2

    def init(key: Key) -> Params:
        sizes = (half, latent_dim - half, context_dim, hidden)
        steps = [flows.init_coupling(key, *sizes) for key in jax.random.split(key, num_steps)]
        return _init(latent_dim, context_dim, steps=steps)

    def place(params: Params, q: Gaussian) -> Params:
        # y = (z − mean) / width has a precision of diagonal 1, and shears of a and b correlate it.
        narrow = factorised(q)
        inverse = linalg.inverse(q.scale / narrow.scale[:, None])
        maps, scale = placing.shears(inverse.T @ inverse, half)
        factor = jnp.diag(scale)  # of y so far
        first, second, steps = slice(0, half), slice(half, None), list(params["shared"]["steps"])

        def add(layers: list[Params], matrix: Array, seen: slice, moved: slice) -> list[Params]:
            spread = jnp.sqrt(jnp.sum(factor[seen] ** 2, axis=1))
            width, size = narrow.scale[seen] * spread, len(matrix)
            out = narrow.scale[moved, None] * matrix * spread
            return placing.linear_net(
                layers,
                activation,
                jnp.concatenate(
                    [jnp.diag(1 / width), jnp.zeros((width.size, context_dim))], axis=1
                ),
                -q.mean[seen] / width,
                jnp.concatenate([jnp.zeros_like(out), out]),
                jnp.zeros(2 * size),
            )

        for i, (m, n) in enumerate(maps):
            to_second = add(steps[i]["second"], m, first, second)
            factor = factor.at[second].add(m @ factor[first])
            to_first = add(steps[i]["first"], n, second, first)
            factor = factor.at[first].add(n @ factor[second])
            steps[i] = {"first": to_first, "second": to_second}
        params = with_gaussian(params, Gaussian(q.mean, narrow.scale * scale))
        return params | {"shared": params["shared"] | {"steps": steps}}

    posterior = _flow_posterior(
        init,
        flows.coupling(activation),
        "shared",
        split=lambda z: (z[:half], z[half:]),
        join=jnp.concatenate,
    )
    wide = (
        num_steps >= placing.NUM_SHEARS and half > 0 and latent_dim - half <= min(hidden, default=0)
    )
    return posterior._replace(place=place if wide else None)


# Families with an auxiliary variable v


def _auxiliary_family(
    latent_dim: int,
    num_v: int,
    hidden: Sequence[int],
    activation: str,
    context_dim: int,
    init_steps: Callable[[Key], list[Params]],
) -> tuple[Callable[[Key], Params], Callable[..., tuple[Array, Array]]]:
    """(init, sample) of q(z0) q(v0|z0, h) through a flow; sample(flow, flow's context, …)."""

    def init(key: Key) -> Params:
        key_q, key_r, key_steps = jax.random.split(key, 3)
        widths = (latent_dim + context_dim, hidden, 2 * num_v)
        return _init(
            latent_dim,
            context_dim,
            q=flows.init_net(key_q, *widths),
            r=flows.init_net(key_r, *widths),
            steps=init_steps(key_steps),
        )

    def given(z: Array, name: str, params: Params) -> Gaussian:
        mean, log_scale = flows.net(params["shared"][name], activation, z, _context(params))
        return Gaussian(mean, jnp.exp(flows.soft_clip(log_scale, _LOG_SCALE_LIMIT_V)))

    def sample(
        flow: flows.Flow, context: Any, key: Key, params: Params, sticking: bool, sign: Array | int
    ) -> tuple[Array, Array]:
        key_z, key_v = jax.random.split(key)
        z, _ = _draw(key_z, gaussian_of(params), sign)
        v, _ = _draw(key_v, given(z, "q", params), sign)
        steps = params["shared"]["steps"]
        (z, v), (z_0, v_0), log_det = flows.push(flow, steps, (z, v), context, sticking)
        # r is no part of q(z, v): its gradient is not 0 in expectation, and always stays.
        log_r = densities.normal(v, *given(z, "r", params))
        q_params = jax.lax.stop_gradient(params) if sticking else params
        log_q_z = densities.normal(z_0, *gaussian_of(q_params))
        log_q_v = densities.normal(v_0, *given(z_0, "q", q_params))
        return z, log_q_z + log_q_v - log_det - log_r

    return init, sample


@_cached
def auxiliary(
    latent_dim: int,
    num_steps: int = 2,
    hidden: Sequence[int] = (200,),
    auxiliary_hidden: Sequence[int] = (200, 200),
    activation: str = "elu",
    context_dim: int = 0,
    auxiliary_dim: int | None = None,
) -> Posterior:
    """Real-NVP with an auxiliary variable v: q_AF of Cremer et al. 2018, arXiv 1801.03558.

    z0 ~ q(z0), v0 ~ q(v0|z0, h). A step is v' = v ∘ σ1(z, h) + μ1(z, h), z' = z ∘ σ2(v', h) +
    μ2(v', h), its networks its own, σ twice a sigmoid (a plain sigmoid's family: z0 and v0 take the
    factor). log q = log q(z0) + log q(v0|z0, h) − Σ log σ − log r(v_T|z_T, h), r scored at v_T
    itself: E[p(x, z)/q] = p(x), and the ELBO is L[q(z)] − E KL(q(v|z) ‖ r(v|z, h)).

    Encoded: mean, log_scale [D], "context" h; shared: "steps" of `hidden` widths, "q" and "r" of
    `auxiliary_hidden` widths. auxiliary_dim: of v, by default D.
    Raises ValueError when a size is not a positive integer or the activation is unknown.
    """
    num_v = latent_dim if auxiliary_dim is None else auxiliary_dim
    sizes = {"latent_dim": latent_dim, "num_steps": num_steps, "auxiliary_dim": num_v}
    _check((*hidden, *auxiliary_hidden), activation, context_dim, **sizes)
    flow = flows.coupling(activation)

    def init_steps(key: Key) -> list[Params]:
        widths = (latent_dim, num_v, context_dim, hidden)
        return [flows.init_coupling(key, *widths) for key in jax.random.split(key, num_steps)]

    init, sample_through = _auxiliary_family(
        latent_dim, num_v, auxiliary_hidden, activation, context_dim, init_steps
    )

    def sample(
        key: Key, params: Params, sticking: bool = False, sign: Array | int = 1
    ) -> tuple[Array, Array]:
        return sample_through(flow, _context(params), key, params, sticking, sign)

    def place(params: Params, q: Gaussian) -> Params:
        # z = mean + √d ∘ e + M v with M = √d ∘ U √λ, where U (1 + λ) Uᵀ is the covariance of z / √d.
        # Then v given z is Gaussian with independent entries, of variances 1 / (1 + λ): r is exact.
        narrow = factorised(q)
        cholesky = q.scale / narrow.scale[:, None]
        eigenvalues, vectors = linalg.eigen(cholesky @ cholesky.T)
        # A little narrower than the narrowest direction needs: all λ > 0.
        ratio = 0.9 * eigenvalues[0]
        scale, root = jnp.sqrt(ratio) * narrow.scale, jnp.sqrt(eigenvalues / ratio - 1)
        rows, context = (vectors / scale[:, None]).T, jnp.zeros((latent_dim, context_dim))
        rows /= jnp.sqrt(1 + root**2)[:, None]  # of order 1
        zeros, identity = jnp.zeros((latent_dim, latent_dim)), jnp.eye(latent_dim)
        means = jnp.diag(root / jnp.sqrt(1 + root**2))
        shared = params["shared"]
        r = placing.linear_net(
            shared["r"],
            activation,
            jnp.concatenate([rows, context], axis=1),
            -rows @ q.mean,
            jnp.concatenate([means, zeros]),
            jnp.concatenate([jnp.zeros(latent_dim), -jnp.log1p(root**2) / 2]),
        )
        first = placing.linear_net(
            shared["steps"][0]["first"],
            activation,
            jnp.concatenate([identity, context], axis=1),
            jnp.zeros(latent_dim),
            jnp.concatenate([zeros, scale[:, None] * vectors * root]),
            jnp.zeros(2 * latent_dim),
        )
        steps = [shared["steps"][0] | {"first": first}, *shared["steps"][1:]]
        params = with_gaussian(params, Gaussian(q.mean, scale))
        placed = params | {"shared": shared | {"r": r, "steps": steps}}
        # Where q is a line, to rounding, an eigenvalue may come out negative.
        finite = jnp.all(jnp.isfinite(root))
        based = with_gaussian(params, narrow)
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), placed, based)

    narrowest = min(min(hidden, default=0), min(auxiliary_hidden, default=0))
    wide = num_v == latent_dim <= narrowest  # a net without hidden layers has no units to place
    return Posterior(init, sample, place=place if wide else None)


def hamiltonian(
    target: Target,
    num_steps: int = 2,
    auxiliary_hidden: Sequence[int] = (200, 200),
    activation: str = "elu",
    context_dim: int = 0,
) -> Posterior:
    """Hamiltonian flow: an auxiliary one led by ∇_z log p(x, z) (Salimans et al. 2015, 1410.6460).

    z0 ~ q(z0), v0 ~ q(v0|z0, h). A step is a kick and a drift of the leapfrog, the kick with
    friction: v' = v ∘ σ + ε ∘ ∇_z log p(x, z), z' = z + ε ∘ v'; σ [D] and ε [D], in widths of
    q(z0), are learned. log q as in `auxiliary`. Encoded: mean, log_scale [D], "context" h; shared:
    "steps", a list of {"log_step_size" [D], "friction" [D]}, "q" and "r".

    The target's arrays are arguments of `sample`: a new datapoint compiles nothing anew.
    Raises ValueError when a size is not a positive integer or the activation is unknown.
    """
    _check(auxiliary_hidden, activation, context_dim, num_steps=num_steps)
    widths = tuple(auxiliary_hidden)
    init, sample = _hamiltonian(target.latent_dim, num_steps, widths, activation, context_dim)
    return Posterior(init, Partial(sample, target))


@_cached
def _hamiltonian(
    latent_dim: int, num_steps: int, hidden: tuple[int, ...], activation: str, context_dim: int
) -> tuple[Callable[[Key], Params], Callable[..., tuple[Array, Array]]]:
    init, sample_through = _auxiliary_family(
        latent_dim,
        latent_dim,
        hidden,
        activation,
        context_dim,
        lambda key: [flows.init_leapfrog(latent_dim) for _ in range(num_steps)],
    )

    def sample(
        target: Target,
        key: Key,
        params: Params,
        sticking: bool = False,
        sign: Array | int = 1,
    ) -> tuple[Array, Array]:
        flow, width = flows.leapfrog(target), gaussian_of(params).scale
        return sample_through(flow, width, key, params, sticking, sign)

    return init, sample


FAMILIES = {
    "gaussian": Family(gaussian, "FFG", {}),
    "full_gaussian": Family(full_gaussian, "full", {}),
    "planar": Family(planar, "planar", {"num_steps": 2}),
    "rnvp": Family(rnvp, "RNVP", {"num_steps": 2, "hidden": (200,), "context_dim": 50}),
    "auxiliary": Family(
        auxiliary,
        "AF",
        {"num_steps": 2, "hidden": (200,), "auxiliary_hidden": (200, 200), "context_dim": 50},
        auxiliary=True,
    ),
    "sylvester": Family(sylvester, "Sylvester", {"num_steps": 2, "num_reflections": 8}),
    "hamiltonian": Family(
        hamiltonian,
        "HF",
        {"num_steps": 2, "auxiliary_hidden": (200, 200), "context_dim": 50},
        needs_target=True,
        auxiliary=True,
    ),
}
OWN = "own"  # among the families of local inference, the encoder's


def chosen_families(names: Sequence[str], own: str) -> tuple[str, ...]:
    """`names` with the encoder's family for OWN, FFG where it is none of FAMILIES; each once."""
    found = own if own in FAMILIES else "gaussian"
    return tuple(dict.fromkeys(found if name == OWN else name for name in names))
