"""Any q as a function key -> (z [D], log_q []): a Gaussian, a function, or another library's object."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from infsub import densities
from infsub.programs import Packed
from infsub.types import Array, Gaussian, Key, Posterior, Sampler, as_partial

T = TypeVar("T")

_WANTED = (
    "q must be infsub.Gaussian(mean [D], scale [D]), a function key -> (z [D], log_q []), or a "
    "distribution with sample_and_log_prob(seed=…) or sample(key) and log_prob(z); got "
)


def promoted(values: T, *others: Any) -> T:
    """`values`, such as a Gaussian or a z, as arrays of one type: theirs and the `others`', float32 at least.

    In bfloat16 a bound would be computed as roughly, integers have no gradient, and the carry of a scan
    may not become wider on its way.
    """
    values = jax.tree.map(jnp.asarray, values)
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves((values, others)))
    return jax.tree.map(lambda a: a.astype(dtype), values)


def as_sampler(q: Gaussian | Sampler | Any) -> Partial:
    """`q` as a function key -> (z [D], log_q []), its arrays all arguments; a Gaussian's float32 at least.

    q may be a distribution object: one with sample_and_log_prob(seed=…), such as distrax's, with
    TFP's experimental_sample_and_log_prob, or with NumPyro's and FlowJAX's sample(key) and log_prob(z).
    It is of the whole z: of D independent coordinates make one, as with NumPyro's `to_event(1)`. Make it
    inside the function of one datapoint, for most such objects do not go through vmap; one that is no
    pytree compiles anew in each call outside.

    Raises:
      TypeError: q is none of these.
      ValueError: a Gaussian whose shapes do not fit.
    """
    if isinstance(q, Gaussian):
        return Partial(densities.sample_gaussian, q=promoted(densities.check_gaussian(q)))
    if isinstance(q, Posterior):
        raise TypeError(
            f"{_WANTED}a Posterior, which samples by params: write posteriors.sampler(posterior, params)"
        )
    # FlowJAX's has the key in another place, and draws as NumPyro's objects do.
    if "seed" in _parameters(getattr(q, "sample_and_log_prob", None)):
        return _bound(_sample_object, q)
    if hasattr(q, "experimental_sample_and_log_prob"):
        return _bound(_sample_tfp, q)
    if hasattr(q, "sample") and hasattr(q, "log_prob"):
        return _bound(_sample_numpyro, q)
    if not callable(q):
        hint = ": write infsub.Gaussian(mean, scale)" if isinstance(q, tuple | list) else ""
        raise TypeError(f"{_WANTED}{type(q).__name__}{hint}")
    return as_partial(q)


def draw(q: Sampler, key: Key, latent_dim: int) -> tuple[Array, Array]:
    """One draw of q, (z [D], log_q []).

    Raises:
      ValueError: z is not of shape [latent_dim].
      TypeError: q returns no pair, or log_q is no scalar of float32's digits.
    """
    drawn = q(key)
    if not isinstance(drawn, tuple | list) or len(drawn) != 2:
        raise TypeError(f"q must return (z [D], log_q []) for a key; got {type(drawn).__name__}")
    z, log_q = drawn
    if jnp.shape(z) != (latent_dim,):
        raise ValueError(
            f"q must sample z of shape [{latent_dim}], the latent_dim; got {jnp.shape(z)}"
        )
    if jnp.shape(log_q) != ():
        raise TypeError(
            f"q must give log_q as a scalar, the log density of the whole z [D={latent_dim}]; got "
            f"shape {jnp.shape(log_q)}: sum over z's coordinates (NumPyro: .to_event(1); distrax and "
            "TFP: Independent or MultivariateNormalDiag)"
        )
    check_digits("q's log density", log_q)
    return z, log_q


def check_digits(name: str, value: Any) -> None:
    """A TypeError unless a log density has float32's digits: of hundreds of nats bfloat16 loses some."""
    dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 4:
        raise TypeError(
            f"{name} must return float32 or float64, in nats; it returned {dtype}: convert its terms "
            "before they are summed, as with .astype('float32'); a constant is 0.0"
        )


def _parameters(method: Any) -> Collection[str]:
    """The names of a method's parameters; none where there is no method."""
    return () if method is None else inspect.signature(method).parameters


def _bound(sample: Any, q: Any) -> Partial:
    """`sample` with q bound, its arrays as arguments; q itself where it is no pytree, and may change."""
    if any(leaf is q for leaf in jax.tree.leaves(q)):
        return Partial(partial(sample, q))
    return Partial(_sample_packed, Packed((sample, q)))


def _sample_packed(packed: Packed, key: Key) -> tuple[Array, Array]:
    sample, q = packed.tree
    return sample(q, key)


def _sample_object(q: Any, key: Key) -> tuple[Array, Array]:
    return q.sample_and_log_prob(seed=key)


def _sample_tfp(q: Any, key: Key) -> tuple[Array, Array]:
    return q.experimental_sample_and_log_prob(seed=key)


def _sample_numpyro(q: Any, key: Key) -> tuple[Array, Array]:
    z = q.sample(key)
    return z, q.log_prob(z)
