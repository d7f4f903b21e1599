"""Cholesky factors, triangular systems and eigenvectors in plain XLA, without LAPACK.

jaxlib's LAPACK kernels, under vmap on a CPU, hand their batch to the pool of threads they run on and
wait there: two of them at once on two cores wait for each other forever (jaxlib 0.10, seen with
Cholesky factors, triangular systems and eigenvalues). At D = 50 these here cost as little.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from infsub.types import Array, Matrix, Vector

_NUM_SWEEPS = 10


def factor(matrix: Matrix) -> Matrix:
    """The lower triangular L with L Lᵀ = matrix, both [D, D]; NaN where it is not positive definite."""
    rows = jnp.arange(len(matrix))

    def column(j: Array, lower: Array) -> Array:
        rest = matrix[:, j] - lower @ lower[j]
        entries = rest / jnp.sqrt(jnp.where(rest[j] > 0, rest[j], jnp.nan))
        return lower.at[:, j].set(jnp.where(rows >= j, entries, 0))

    return jax.lax.fori_loop(0, len(matrix), column, jnp.zeros_like(matrix))


def solve(lower: Matrix, b: Vector | Float[Array, "D N"]) -> Vector | Float[Array, "D N"]:
    """x with lower x = b, lower [D, D] and b [D] or [D, N]; nobody reads above lower's diagonal."""

    def row(i: Array, x: Array) -> Array:
        # The rows of x from i on are still 0, so what stands above the diagonal must not be NaN.
        entries = jnp.where(jnp.arange(len(b)) < i, lower[i], 0)
        return x.at[i].set((b[i] - entries @ x) / lower[i, i])

    return jax.lax.fori_loop(0, len(b), row, jnp.zeros_like(b))


def inverse(lower: Matrix) -> Matrix:
    """lower⁻¹, [D, D]; nobody reads above lower's diagonal."""
    return solve(lower, jnp.eye(len(lower), dtype=lower.dtype))


def inverse_factor(matrix: Matrix) -> Matrix:
    """The lower triangular L with L Lᵀ = matrix⁻¹, [D, D]; NaN where it is not positive definite."""
    # Reversed, a factor is upper triangular: matrix = R Rᵀ, so matrix⁻¹ = R⁻ᵀ R⁻¹.
    upper = factor(matrix[::-1, ::-1])[::-1, ::-1]
    return inverse(upper.T)


def eigen(matrix: Matrix) -> tuple[Vector, Matrix]:
    """Eigenvalues [D], ascending, and eigenvectors [D, D], in columns, of a symmetric matrix.

    Jacobi's method, D/2 rotations at a time that share no row (Brent & Luk 1985); a sweep meets
    each pair once, and the error falls quadratically: `_NUM_SWEEPS` end at rounding.
    """
    size = len(matrix)
    even = size + size % 2  # an odd one gets an axis of its own, which nothing turns
    a = jnp.zeros((even, even), matrix.dtype).at[:size, :size].set(matrix)

    def turn(columns: Array, p: Array, q: Array, cos: Array, sin: Array) -> Array:
        left, right = columns[:, p], columns[:, q]
        columns = columns.at[:, p].set(cos * left - sin * right)
        return columns.at[:, q].set(sin * left + cos * right)

    def meet(_: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        a, vectors, order = carry
        p, q = order[: even // 2], order[::-1][: even // 2]
        off = a[p, q]
        tau = (a[q, q] - a[p, p]) / jnp.where(off == 0, 1, 2 * off)
        tan = jnp.where(tau >= 0, 1, -1) / (jnp.abs(tau) + jnp.sqrt(1 + tau**2))
        tan = jnp.where(off == 0, 0, tan)
        cos = 1 / jnp.sqrt(1 + tan**2)
        a = turn(turn(a, p, q, cos, tan * cos).T, p, q, cos, tan * cos).T
        # A round robin: the first stays, the others move on by one.
        order = jnp.concatenate([order[:1], jnp.roll(order[1:], 1)])
        return a, turn(vectors, p, q, cos, tan * cos), order

    start = a, jnp.eye(even, dtype=a.dtype), jnp.arange(even)
    rounds = _NUM_SWEEPS * max(even - 1, 1)
    a, vectors, _ = jax.lax.fori_loop(0, rounds, meet, start)
    values = jnp.diagonal(a)[:size]
    ascending = jnp.argsort(values)
    return values[ascending], vectors[:size, :size][:, ascending]
