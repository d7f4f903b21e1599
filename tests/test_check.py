"""A user's own model, and the mistakes in it that would give wrong numbers in silence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import linear_gaussian

import infsub
from infsub.types import Model

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_a_model_made_anew_compiles_nothing_anew():
    truth, traces = linear_gaussian(2, 6), []

    def log_likelihood(params, x, z):
        traces.append(1)
        return params.log_likelihood(x, z)

    def encode(params, x):
        return params.best_gaussian(x)

    @jax.jit
    def elbo(model, params, x):
        target, q = model.target(params, x), model.encode(params, x)
        return infsub.elbo(jax.random.key(0), target, q, 2000)

    x = jnp.ones(6)
    for scale in (1.0, 2.0):
        params = truth._replace(noise=scale * truth.noise)
        result = elbo(Model(2, encode, log_likelihood), params, x)
        expected = params.log_px(x) - params.kl(x, params.best_gaussian(x))
        assert abs(result.log_px - expected) < 4 * result.standard_error
        assert len(traces) == 1
    target = Model(2, encode, log_likelihood).target(truth, x)
    np.testing.assert_allclose(
        target.log_likelihood(jnp.ones(2)), truth.log_likelihood(x, 1.0 * jnp.ones(2)), rtol=1e-6
    )
