"""Laplace's approximation: a posterior's mode and curvature, as the Gaussian that AIS starts from.

MacKay 2003, ch. 27. No encoder is needed, and none can be too bad: a start that is a Gaussian of
full covariance at the mode lets ten temperatures do what a hundred do from an encoder's q.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from infsub import densities, linalg
from infsub.bounds import as_wide_as, log_joint, log_likelihood_of_outputs
from infsub.samplers import promoted
from infsub.types import Array, Gaussian, Target, positive_int

_MAX_FULL = (
    512  # D up to which the covariance is full: D = 512 holds 1 MB a matrix, solved in 10 ms
)
_CHUNK = 64  # columns of a Jacobian at a time, so that memory does not grow with D
_NUM_CG = 50
_TOLERANCE = 0.01  # nats of gain that a step must promise
_ADAM = optax.adam(0.1)  # in units of the prior N(0, I)
# One pass tries them all, for less than a curvature anew: the largest that suits is not known.
_STEP_LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01, 0.001)


class LaplaceInfo(NamedTuple):
    """What one may look at of a fit.

    Attributes:
      log_px: [], Laplace's evidence in nats, log p(x, mode) + D/2 log 2π + ½ log det covariance; no
        bound, but exact where the posterior is Gaussian.
      log_joint: [], log p(x, mode).
      num_steps: [], Newton steps of the start that was kept.
      converged: [], False where num_steps came first or no step was an improvement.
      num_gradients: [], what all starts cost in gradients of log p(x, z). A value and a column of
        the Jacobian count one half, a product with the Hessian one.
    """

    log_px: Array
    log_joint: Array
    num_steps: Array
    converged: Array
    num_gradients: Array


class _Point(NamedTuple):
    """All that is known at z.

    Attributes:
      z: [D].
      value: [], log p(x, z).
      scale: [D, D] or [D], of the Gaussian whose precision is the curvature here.
      direction: [D], Newton's.
      gain: [], half the gradient along it: what the quadratic model promises, in nats.
    """

    z: Array
    value: Array
    scale: Array
    direction: Array
    gain: Array


def laplace(
    target: Target,
    start: Array | Gaussian | None = None,
    *,
    num_adam: int | None = None,
    num_steps: int = 30,
    full: bool | None = None,
) -> Gaussian:
    """N(mode, P⁻¹) of the posterior p(z|x), P its precision at the mode (MacKay 2003, ch. 27).

    P = −∇² log p(z) + Jᵀ H J, J the Jacobian of the target's `outputs` and H the negative Hessian
    of its likelihood in them (Gauss-Newton); without `outputs`, P = −∇² log p(x, z) itself. The
    mode is found by Newton's method along P⁻¹ ∇ log p(x, z), the best of several step lengths; a
    step that is not finite or not an improvement is refused. Where P is not positive definite, a
    multiple of I is added, for the steps as for the result (`_positive`). No gradient goes through the
    search: take `jax.lax.stop_gradient` of what it gives.

    Args:
      target: p(z) p(x|z) for one x.
      start: where the search starts: z [D], a Gaussian's mean, or several z [S, D], of whose modes
        the one of the greatest evidence is kept. None is 0, with 200 steps of Adam.
      num_adam: steps of Adam before Newton's; None is 200 for start=None, otherwise none.
      num_steps: Newton steps at most.
      full: whether the scale is a Cholesky factor [D, D]. Otherwise it is [D], the inverse root of
        P's diagonal (the closest in KL(q‖p)), P is never formed and steps are those of conjugate
        gradients: memory grows with D, not D². None is full up to D = 512.

    Returns:
      Gaussian(mode [D], scale); where no value at the start is finite, N(start, I).

    Raises:
      ValueError: a start of another shape, or num_steps or num_adam that cannot be.
      TypeError: a density returns no scalar.

    Example:
      >>> target = infsub.Target(None, lambda z: norm.logpdf(1.0, z).sum(), latent_dim=1)  # x = 1
      >>> q = infsub.laplace(target)  # p(z|x) = N(1/2, 1/2)
      >>> print(f"{q.mean[0]:.2f} {q.scale[0, 0] ** 2:.2f}")
      0.50 0.50
    """
    return laplace_with_info(target, start, num_adam=num_adam, num_steps=num_steps, full=full)[0]


def laplace_with_info(
    target: Target,
    start: Array | Gaussian | None = None,
    *,
    num_adam: int | None = None,
    num_steps: int = 30,
    full: bool | None = None,
) -> tuple[Gaussian, LaplaceInfo]:
    """`laplace`, and what one may look at of its fit: its evidence, convergence and cost."""
    dim = target.latent_dim
    if num_adam is None:
        num_adam = 200 if start is None else 0
    elif num_adam != 0:
        positive_int("num_adam", num_adam)
    if start is None:
        start = jnp.zeros(dim)
    starts = promoted(jnp.asarray(start.mean if isinstance(start, Gaussian) else start))
    if starts.ndim not in (1, 2) or starts.shape[-1] != dim or not starts.size:
        raise ValueError(
            f"start must be z [D={dim}], a Gaussian, or several z [S, D={dim}]; got shape {starts.shape}"
        )
    full = dim <= _MAX_FULL if full is None else full
    starts = starts.reshape(-1, dim)
    starts = starts.astype(as_wide_as(target, starts[0]).dtype)
    return _laplace(target, starts, num_adam, positive_int("num_steps", num_steps), full)


@partial(jax.jit, static_argnames=("num_adam", "full"))
def _laplace(
    target: Target, starts: Array, num_adam: int, num_steps: Array, full: bool
) -> tuple[Gaussian, LaplaceInfo]:
    def fit(z: Array) -> tuple[Gaussian, LaplaceInfo]:
        return _fit(target, z, num_adam, num_steps, full)

    q, info = jax.vmap(fit)(starts)
    best = jnp.argmax(jnp.where(jnp.isnan(info.log_px), -jnp.inf, info.log_px))
    cost = jnp.sum(info.num_gradients)
    q, info = jax.tree.map(lambda a: a[best], (q, info))
    return q, info._replace(num_gradients=cost)


def _fit(
    target: Target, z: Array, num_adam: int, num_steps: Array, full: bool
) -> tuple[Gaussian, LaplaceInfo]:
    """The fit from one start z [D]."""
    value_at = partial(log_joint, target)
    lengths = jnp.asarray(_STEP_LENGTHS, z.dtype)

    def search(carry: tuple[_Point, Array, Array]) -> tuple[_Point, Array, Array]:
        point, steps, _ = carry
        z = point.z + lengths[:, None] * point.direction
        values = jax.vmap(value_at)(z)
        best = jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))
        new = _examine(target, z[best], full)
        better = (new.value > point.value) & jnp.isfinite(new.gain)
        point = jax.tree.map(lambda new, old: jnp.where(better, new, old), new, point)
        return point, steps + better, ~better

    def unfinished(carry: tuple[_Point, Array, Array]) -> Array:
        point, steps, stuck = carry
        return (point.gain > _TOLERANCE) & (steps < num_steps) & ~stuck

    z = _warm_up(value_at, z, num_adam)
    start = _examine(target, z, full), jnp.zeros((), int), jnp.zeros((), bool)
    point, steps, _ = jax.lax.while_loop(unfinished, search, start)
    usable = jnp.isfinite(point.gain)
    identity = jnp.eye(z.size, dtype=z.dtype) if full else jnp.ones_like(z)
    q = Gaussian(point.z, jnp.where(usable, point.scale, identity))
    evidence = point.value + 0.5 * z.size * densities.LOG_2PI + densities.log_volume(q)
    # Newton's step itself and the values along it, at each step; the start has but the first.
    cost = num_adam + (steps + 1) * _num_gradients(target, full) + steps * lengths.size / 2
    return q, LaplaceInfo(
        jnp.where(usable, evidence, jnp.nan), point.value, steps, point.gain <= _TOLERANCE, cost
    )


def _warm_up(value_at: Callable[[Array], Array], z: Array, num_adam: int) -> Array:
    """z [D] after steps of Adam uphill, or as it was where they led nowhere better."""

    def climb(carry: Any, _: None) -> tuple[Any, None]:
        z, moments = carry
        gradient = jax.grad(value_at)(z)
        update, moments = _ADAM.update(-gradient, moments)
        return (z + update, moments), None

    (end, _), _ = jax.lax.scan(climb, (z, _ADAM.init(z)), length=num_adam)
    return jnp.where(value_at(end) > value_at(z), end, z)


def _examine(target: Target, z: Array, full: bool) -> _Point:
    value, gradient = jax.value_and_grad(partial(log_joint, target))(z)
    prior, push, bend = _curvature(target, z)
    basis = jnp.eye(z.size, dtype=z.dtype)
    # The prior's own curvature is the unit of what is added where P is not positive definite.
    unit = jnp.maximum(jnp.mean(_map(lambda e: e @ prior(e), basis)), 1e-6)
    if full:
        columns = _map(push, basis)
        precision = _map(prior, basis) - columns @ _map(bend, columns).T
        scale = _positive(0.5 * (precision + precision.T), unit)
        direction = scale @ (scale.T @ gradient)
    else:

        def entry(e: Array) -> Array:
            column = push(e)
            return e @ prior(e) - column @ bend(column)

        def product(v: Array) -> Array:
            return prior(v) - pull(bend(push(v)))[0]

        pull = jax.linear_transpose(push, z)
        diagonal = _map(entry, basis)
        scale = 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, unit))
        direction = _conjugate_gradients(product, gradient)
    return _Point(z, value, scale, direction, 0.5 * gradient @ direction)


def _num_gradients(target: Target, full: bool) -> float:
    """The cost of `_examine`: the gradient, the curvature, and the products of its direction."""
    columns = target.latent_dim * (1.0 if target.outputs is None else 0.5)
    return 1 + columns + (0 if full else _NUM_CG)


Linear = Callable[[Array], Array]


def _curvature(target: Target, z: Array) -> tuple[Linear, Linear, Linear]:
    """P = prior − pushᵀ bend push at z, as functions of a vector.

    prior: −∇² log p(z), D -> D; push: J, D -> X; bend: ∇² log p(x|l), X -> X. Without outputs
    l = z, push is the identity and P is the negative Hessian of log p(x, z).
    """

    def outputs(z: Array) -> Array:
        return z if target.outputs is None else ravel_pytree(wide(z))[0]

    def wide(z: Array) -> Any:  # P takes float32's digits
        def widened(leaf: Array) -> Array:
            inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
            return leaf.astype(jnp.promote_types(leaf.dtype, z.dtype)) if inexact else leaf

        return jax.tree.map(widened, target.outputs(z))  # pyright: ignore[reportOptionalCall]

    def log_likelihood(flat: Array) -> Array:
        return log_likelihood_of_outputs(target, flat if target.outputs is None else unravel(flat))

    if target.outputs is not None:
        shapes = jax.eval_shape(wide, z)
        _, unravel = ravel_pytree(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes))
    flat, push = jax.linearize(outputs, z)
    _, bend = jax.linearize(jax.grad(log_likelihood), flat)
    if target.log_prior is None:
        return lambda v: v, push, bend
    _, hessian = jax.linearize(jax.grad(target.log_prior), z)
    return lambda v: -hessian(v), push, bend


def _map(function: Callable[[Array], Array], rows: Array) -> Array:
    """`function` of each row, a chunk at a time."""
    if len(rows) <= _CHUNK:
        return jax.vmap(function)(rows)
    return jax.lax.map(function, rows, batch_size=_CHUNK)


def _positive(precision: Array, unit: Array) -> Array:
    """The Cholesky factor of precision⁻¹, or of (precision + c I)⁻¹ where that is not positive.

    c is the first of unit · 4ᵏ, k = 0, 1, …, that makes it so, as in Levenberg's method.
    """

    def raised(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        shift, _ = carry
        identity = jnp.eye(len(precision), dtype=precision.dtype)
        return 4 * shift, linalg.inverse_factor(precision + shift * identity)

    def unfinished(carry: tuple[Array, Array]) -> Array:
        shift, scale = carry
        possible = jnp.all(jnp.isfinite(precision)) & jnp.isfinite(shift)
        return jnp.any(jnp.isnan(scale)) & possible

    start = unit, linalg.inverse_factor(precision)
    return jax.lax.while_loop(unfinished, raised, start)[1]


def _conjugate_gradients(product: Linear, gradient: Array) -> Array:
    """P⁻¹ gradient, [D]; up to where P is found not to be positive (Nocedal & Wright, alg. 7.1)."""

    def improve(carry: Any) -> Any:
        x, residual, direction, norm2, steps = carry
        image = product(direction)
        curvature = direction @ image
        positive = curvature > 0
        length = jnp.where(positive, norm2 / curvature, jnp.where(steps == 0, 1.0, 0.0))
        x, residual = x + length * direction, residual - length * image
        new_norm2 = residual @ residual
        direction = residual + new_norm2 / norm2 * direction
        return x, residual, direction, new_norm2, jnp.where(positive, steps + 1, _NUM_CG)

    def unfinished(carry: Any) -> Array:
        *_, norm2, steps = carry
        return (norm2 > 1e-6 * gradient @ gradient) & (steps < _NUM_CG)

    start = jnp.zeros_like(gradient), gradient, gradient, gradient @ gradient, 0
    return jax.lax.while_loop(unfinished, improve, start)[0]
