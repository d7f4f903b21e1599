"""Cholesky factors, triangular systems and eigenvectors against numpy's, at the precisions that are used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infsub import linalg


def positive_definite(dim, dtype, size=3):
    root = np.random.default_rng(dim).normal(size=(size, dim, dim + 2))
    return (root @ root.mT / dim + 0.1 * np.eye(dim)).astype(dtype)


@jax.jit
@jax.vmap
def factors_and_solutions(matrix, b):
    lower = linalg.factor(matrix)
    dirty = lower + jnp.triu(jnp.full_like(lower, jnp.nan), 1)
    return (
        lower,
        linalg.inverse_factor(matrix),
        linalg.solve(dirty, b),
        linalg.solve(lower, b[:, 0]),
    )


@pytest.mark.parametrize("dim", [1, 5, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("float64", 1e-12)])
def test_factors_and_solutions_are_numpys(dim, dtype, tolerance):
    matrix = positive_definite(dim, dtype)
    b = np.random.default_rng(0).normal(size=(3, dim, 4)).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        found = factors_and_solutions(matrix, b)
    lower, inverse, x, column = jax.device_get(found)
    assert lower.dtype == inverse.dtype == x.dtype == dtype
    np.testing.assert_allclose(lower, np.linalg.cholesky(matrix), atol=tolerance)
    np.testing.assert_allclose(x, np.linalg.solve(lower, b), rtol=tolerance, atol=tolerance * 10)
    np.testing.assert_allclose(column, x[..., 0], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(inverse, np.tril(inverse))
    wanted = np.linalg.inv(matrix)
    np.testing.assert_allclose(inverse @ inverse.mT, wanted, atol=tolerance * np.abs(wanted).max())


def test_a_matrix_that_is_not_positive_definite_has_no_factor():
    matrix = positive_definite(5, np.float32)
    matrix[1] -= 3 * np.eye(5, dtype=np.float32)
    matrix[2, 3, 3] = np.nan
    for factor in factors_and_solutions(matrix, np.zeros((3, 5, 4), np.float32))[:2]:
        assert np.isnan(factor).any(axis=(1, 2)).tolist() == [False, True, True]


@pytest.mark.parametrize("dim", [1, 4, 21, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-13)])
def test_eigenvectors_are_orthogonal_and_make_the_matrix_again(dim, dtype, tolerance):
    matrix = positive_definite(dim, dtype)
    matrix[1] = np.eye(dim)  # all equal
    with jax.enable_x64(dtype == "float64"):
        values, vectors = jax.device_get(jax.jit(jax.vmap(linalg.eigen))(matrix))
    assert values.dtype == vectors.dtype == dtype
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix), atol=tolerance * 10)
    identity = np.broadcast_to(np.eye(dim), matrix.shape)
    np.testing.assert_allclose(vectors.mT @ vectors, identity, atol=tolerance)
    again = (vectors * values[:, None]) @ vectors.mT
    np.testing.assert_allclose(again, matrix, atol=tolerance * 10)
