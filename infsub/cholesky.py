"""Cholesky factors and triangular systems in plain XLA, without LAPACK.

jaxlib's LAPACK kernels, under vmap on a CPU, hand their batch to the pool of threads they run on and
wait there: two of them at once on two cores wait for each other forever (jaxlib 0.10, seen with
Cholesky factors, triangular systems and eigenvalues). At D = 50 these here cost as little.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from infsub.types import Array


def factor(matrix: Array) -> Array:
    """The lower triangular L with L Lᵀ = matrix, both [D, D]; NaN where it is not positive definite."""
    rows = jnp.arange(len(matrix))

    def column(j: Array, lower: Array) -> Array:
        rest = matrix[:, j] - lower @ lower[j]
        entries = rest / jnp.sqrt(jnp.where(rest[j] > 0, rest[j], jnp.nan))
        return lower.at[:, j].set(jnp.where(rows >= j, entries, 0))

    return jax.lax.fori_loop(0, len(matrix), column, jnp.zeros_like(matrix))


def solve(lower: Array, b: Array) -> Array:
    """x with lower x = b, lower [D, D] and b [D] or [D, N]; nobody reads above lower's diagonal."""

    def row(i: Array, x: Array) -> Array:
        # The rows of x from i on are still 0, so what stands above the diagonal must not be NaN.
        entries = jnp.where(jnp.arange(len(b)) < i, lower[i], 0)
        return x.at[i].set((b[i] - entries @ x) / lower[i, i])

    return jax.lax.fori_loop(0, len(b), row, jnp.zeros_like(b))


def inverse_factor(matrix: Array) -> Array:
    """The lower triangular L with L Lᵀ = matrix⁻¹, [D, D]; NaN where it is not positive definite."""
    # Reversed, a factor is upper triangular: matrix = R Rᵀ, so matrix⁻¹ = R⁻ᵀ R⁻¹.
    upper = factor(matrix[::-1, ::-1])[::-1, ::-1]
    return solve(upper.T, jnp.eye(len(matrix), dtype=matrix.dtype))
