"""Cholesky factors, triangular systems and eigenvectors against numpy's, at the precisions that are used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infsub import linalg


def positive_definite(dim, dtype, size=3):
    root = jax.random.normal(jax.random.key(dim), (size, dim, dim + 2), dtype)
    return root @ root.mT / dim + 0.1 * jnp.eye(dim, dtype=dtype)


@pytest.mark.parametrize("dim", [1, 5, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("float64", 1e-12)])
def test_factors_and_solutions_are_numpys(dim, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        matrix = positive_definite(dim, dtype)
        lower = jax.jit(jax.vmap(linalg.factor))(matrix)
        inverse = jax.jit(jax.vmap(linalg.inverse_factor))(matrix)
        b = jax.random.normal(jax.random.key(0), (3, dim, 4), dtype)
        dirty = lower + jnp.triu(jnp.full((dim, dim), jnp.nan, dtype), 1)
        x = jax.jit(jax.vmap(linalg.solve))(dirty, b)
        (column,) = jax.vmap(linalg.solve)(lower[:1], b[:1, :, 0])
    matrix, lower, inverse, b, x, column = map(np.asarray, (matrix, lower, inverse, b, x, column))
    assert lower.dtype == inverse.dtype == x.dtype == dtype
    np.testing.assert_allclose(lower, np.linalg.cholesky(matrix), atol=tolerance)
    np.testing.assert_allclose(x, np.linalg.solve(lower, b), rtol=tolerance, atol=tolerance * 10)
    np.testing.assert_allclose(column, x[0, :, 0], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(inverse, np.tril(inverse))
    wanted = np.linalg.inv(matrix)
    np.testing.assert_allclose(inverse @ inverse.mT, wanted, atol=tolerance * np.abs(wanted).max())


def test_a_matrix_that_is_not_positive_definite_has_no_factor():
    matrix = positive_definite(5, jnp.float32).at[1].add(-3 * jnp.eye(5)).at[2, 3, 3].set(jnp.nan)
    for function in (linalg.factor, linalg.inverse_factor):
        missing = jnp.isnan(jax.vmap(function)(matrix)).any(axis=(1, 2))
        assert missing.tolist() == [False, True, True]


@pytest.mark.parametrize("dim", [1, 4, 21, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-13)])
def test_eigenvectors_are_orthogonal_and_make_the_matrix_again(dim, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        matrix = positive_definite(dim, dtype).at[1].set(jnp.eye(dim, dtype=dtype))  # all equal
        values, vectors = jax.jit(jax.vmap(linalg.eigen))(matrix)
    matrix, values, vectors = map(np.asarray, (matrix, values, vectors))
    assert values.dtype == vectors.dtype == dtype
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix), atol=tolerance * 10)
    identity = np.broadcast_to(np.eye(dim), matrix.shape)
    np.testing.assert_allclose(vectors.mT @ vectors, identity, atol=tolerance)
    again = (vectors * values[:, None]) @ vectors.mT
    np.testing.assert_allclose(again, matrix, atol=tolerance * 10)
