"""The objects that travel between modules: shapes, aliases, nothing that computes.

Letters: N datapoints, B block, K samples or chains, D latent dimensions, X pixels, T temperatures.
Everything is in nats and for ONE datapoint; `vmap` adds the leading axes.

A function that travels (a likelihood, a sampler) is a `jax.tree_util.Partial`: its code is structure,
the arrays bound to it are arguments. So objects made anew for each datapoint pass through jit, vmap
and scan, and a new value of a parameter never compiles anew.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Float

from infsub.programs import Packed, has_arrays, of_owner, unbound

Array = jax.Array
# Checked when a test calls, with every D and K of one call the same; never in a user's process.
Scalar = Float[Array, ""]  # []
Number = Scalar | float
Vector = Float[Array, " D"]  # [D]
Matrix = Float[Array, "D D"]  # [D, D]
Samples = Float[Array, " K"]  # [K]
Pixels = Float[Array, "..."]  # of one x, in any shape
Key = jax.Array
Params = Any
LogDensity = Callable[[Vector], Scalar]
Sampler = Callable[[Key], tuple[Vector, Scalar]]  # key -> (z, log_q)


def as_partial(function: Callable[..., Any]) -> Partial:
    """`function` as a pytree: its bound arrays are leaves, its code is structure.

    A function may be a partial of arrays, or a module that is called or a method of one, whose arrays
    are leaves too. They are read now: of a module that is trained in place, make it anew.
    """
    leaf_types: tuple[type, ...] = (Array, np.ndarray)
    if isinstance(function, Partial):
        inner = of_owner(function.func)
        if inner is function.func and not has_arrays(inner):
            return function
        leaf_types += (np.generic, float, int, complex)  # what stands in a Partial is its leaves
    code, args, keywords = unbound(function)
    if all(isinstance(leaf, leaf_types) for leaf in jax.tree.leaves((args, keywords))):
        if has_arrays(code):
            args, code = (Packed(code), *args), _call_packed
        return Partial(code, *args, **keywords)
    return Partial(function)


def _call_packed(module: Packed, *args: Any, **keywords: Any) -> Any:
    return module.tree(*args, **keywords)


def positive_int(name: str, value: Any) -> int:
    """`value` as an int, or a ValueError that names the argument."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}")
    return int(value)


def increasing_steps(name: str, value: Any) -> tuple[int, ...]:
    """`value` as numbers of steps, 0 ≤ n_1 < n_2 < …, or a ValueError that names the argument."""
    try:
        steps = tuple(map(operator.index, value))
    except TypeError:
        steps = ()
    if not steps or steps[0] < 0 or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(
            f"{name} must be increasing integers of at least 0, such as (0, 1, 3, 10); got {value!r}"
        )
    return steps


def _check_density(name: str, density: Any, wanted: str) -> None:
    """A TypeError unless it is a function; a distribution object is none, though some are callable."""
    if hasattr(density, "log_prob"):
        kind = type(density).__name__
        raise TypeError(f"{name} must be {wanted}; got a distribution: write {kind}(…).log_prob")
    if not callable(density):
        raise TypeError(f"{name} must be {wanted}; got {density!r}")


@jax.tree_util.register_pytree_node_class
class Target:
    """The unnormalised posterior of one datapoint, p(z) p(x|z) for a fixed x.

    Attributes:
      log_prior: z [D] -> [], natural log, normalised; None is N(0, I).
      log_likelihood: z [D] -> [], log p(x|z), natural log, normalised over x.
      latent_dim: D.
      outputs: z [D] -> l, an array or a pytree of them: all that p(x|z) depends on z by, such as a
        decoder's logits; None where that is not said.
      log_likelihood_of_outputs: l -> [], log p(x|z) again. With both, `laplace` takes
        Gauss-Newton's curvature, which is cheaper than the Hessian's and safer far from a mode.

    Raises:
      TypeError: a density is not callable.
      ValueError: latent_dim is not a positive integer, or only one of the last two is given.
    """

    log_prior: LogDensity | None
    log_likelihood: LogDensity
    latent_dim: int
    outputs: Callable[[Array], Any] | None
    log_likelihood_of_outputs: Callable[[Any], Array] | None

    def __init__(
        self,
        log_prior: LogDensity | None,
        log_likelihood: LogDensity,
        latent_dim: int,
        *,
        outputs: Callable[[Array], Any] | None = None,
        log_likelihood_of_outputs: Callable[[Any], Array] | None = None,
    ) -> None:
        if log_prior is not None:
            _check_density("log_prior", log_prior, "a function of z [D], or None for N(0, I)")
        _check_density("log_likelihood", log_likelihood, "a function of z [D]")
        self.log_prior = None if log_prior is None else as_partial(log_prior)
        self.log_likelihood = as_partial(log_likelihood)
        self.latent_dim = positive_int("latent_dim", latent_dim)
        if (outputs is None) != (log_likelihood_of_outputs is None):
            raise ValueError("outputs and log_likelihood_of_outputs go together: give both or none")
        self.outputs = self.log_likelihood_of_outputs = None
        if outputs is not None and log_likelihood_of_outputs is not None:
            self.outputs = as_partial(outputs)
            self.log_likelihood_of_outputs = as_partial(log_likelihood_of_outputs)

    def tree_flatten(self) -> tuple[tuple[Any, ...], int]:
        functions = (self.log_prior, self.log_likelihood)
        return (*functions, self.outputs, self.log_likelihood_of_outputs), self.latent_dim

    @classmethod
    def tree_unflatten(cls, latent_dim: int, children: tuple[Any, ...]) -> Target:
        target = object.__new__(cls)  # no checks: jax unflattens with placeholders
        target.log_prior, target.log_likelihood, *rest = children
        target.outputs, target.log_likelihood_of_outputs = rest
        target.latent_dim = latent_dim
        return target


@jax.tree_util.register_pytree_node_class
class Model(NamedTuple):
    """A latent-variable model p(z) p(x|z) with an encoder, as functions of ONE datapoint.

    As an argument of jit, vmap or scan a Model is its functions: `latent_dim` is structure, and one
    made anew of the same functions does not compile anew. `params` are whatever the functions take;
    x is an array or any pytree of arrays, covariates included; z is flat, [D]: `flat_latent`
    ravels a latent of several parts into it.

    Attributes:
      latent_dim: D.
      encode: (params, x) -> q(z|x): Gaussian(mean [D], scale), or a sampler key -> (z [D], log_q []).
      log_likelihood: (params, x, z [D]) -> [], log p(x|z) in nats, summed over x, normalised over x.
      sample_x: (key, params, z [D], x) -> x, a draw of p(x|z), not its mean. The x it is given
        carries covariates over (what p conditions on) and is None where there is none.
      log_prior: (params, x, z [D]) -> [], log p(z), normalised; None is N(0, I).
      sample_prior: (key, params, x) -> z [D], a draw of log_prior; None where that is None.
      outputs: (params, x, z [D]) -> l, all that p(x|z) depends on z by, such as a decoder's logits: an
        array or a pytree of them; None where that is not said.
      log_likelihood_of_outputs: (params, x, l) -> [], log_likelihood again. With both, `laplace`
        takes Gauss-Newton's curvature, see Target: of a network D/2 gradients a step instead of D.

    Raises:
      TypeError, ValueError: from `target`, as Target.
    """

    latent_dim: int
    encode: Callable[..., Any]
    log_likelihood: Callable[..., Array]
    sample_x: Callable[..., Any] | None = None
    log_prior: Callable[..., Array] | None = None
    sample_prior: Callable[..., Array] | None = None
    outputs: Callable[..., Any] | None = None
    log_likelihood_of_outputs: Callable[..., Array] | None = None

    def target(self, params: Params, x: Any) -> Target:
        """The unnormalised posterior of x, its parameters bound as arguments."""
        packed = Packed(params)

        def of_x(function: Callable[..., Any] | None) -> Any:
            return function and Partial(_at, as_partial(function), packed, x)

        return Target(
            of_x(self.log_prior),
            of_x(self.log_likelihood),
            self.latent_dim,
            outputs=of_x(self.outputs),
            log_likelihood_of_outputs=of_x(self.log_likelihood_of_outputs),
        )

    def tree_flatten(self) -> tuple[tuple[Any, ...], int]:
        return tuple(f and as_partial(f) for f in self[1:]), self.latent_dim

    @classmethod
    def tree_unflatten(cls, latent_dim: int, children: tuple[Any, ...]) -> Model:
        return cls(latent_dim, *children)


def _at(function: Partial, params: Packed, x: Any, z: Any) -> Any:
    return function(params.tree, x, z)


class Gaussian(NamedTuple):
    """A Gaussian over z, factorised or of full covariance: z = mean + scale · noise.

    Attributes:
      mean: [D].
      scale: [D], standard deviations, positive; or [D, D], the lower Cholesky factor of the
        covariance, its diagonal positive, whose entries above the diagonal nobody reads.
    """

    mean: Vector
    scale: Vector | Matrix


class Estimate(NamedTuple):
    """A number that bounds log p(x), and what one may know about it. Fields that do not apply are NaN.

    So JAX_DEBUG_NANS stops at every estimator.

    Attributes:
      log_px: [], the bound in nats.
      standard_error: [], Monte Carlo standard error of `log_px` in nats.
      ess: [], effective sample size of the importance weights, (Σw)² / Σw², between 1 and K.
      acceptance: [], mean acceptance probability of the HMC transitions.
      log_weights: [K], log importance weights; NaN [1] where they were streamed and not kept.
      pareto_k: [], shape of the weights' upper tail; above 0.7 neither `log_px` nor its standard
        error can be believed (Vehtari et al. 2024, arXiv 1507.02646).
    """

    log_px: Scalar
    standard_error: Scalar
    ess: Scalar
    acceptance: Scalar
    log_weights: Samples
    pareto_k: Scalar


class Sample(Protocol):
    """(key, params) -> (z [D], log_q []), with or without the gradient of log_q's own parameters.

    `sign` is a factor on the noise, 1 or −1.
    """

    def __call__(
        self, key: Key, params: Params, /, sticking: bool = False, sign: Array | int = 1
    ) -> tuple[Array, Array]: ...


class Posterior(NamedTuple):
    """A family of approximate posteriors; the same object serves amortised and local inference.

    Attributes:
      init: key -> params, {"encoded": …, "shared": …}. An encoder outputs the "encoded" part for
        each datapoint, the "shared" part is one set of weights for all of them; local optimisation
        fits both to a single datapoint.
      sample: (key, params) -> (z [D], log_q []). log_q is normalised, or, for a family with an
        auxiliary variable, log q(z, v) − log r(v|z), whose importance weights are still unbiased.
        sticking=True keeps the numbers and drops the gradient of log_q that does not
        come through z; a posterior without it is for rules of sticking_the_landing=False.
        sign=−1 turns the noise about: with the draw of the same key and sign=1 it is an antithetic
        pair; a posterior without it is for rules of antithetic=False.
      natural: (params, gradient) -> F⁻¹ gradient, F the Fisher information of q at params: the
        direction in which a gradient in the params is steepest in KL, whatever their units. None
        where the family does not know it.
      place: (params, q) -> params at which q(z) is q, a Gaussian of full covariance, as nearly as
        it can be. None where the family can be factorised ones only, by `posteriors.with_gaussian`.
    """

    init: Callable[[Key], Params]
    sample: Sample
    natural: Callable[[Params, Params], Params] | None = None
    place: Callable[[Params, Gaussian], Params] | None = None


class UserError(Exception):
    """A mistake of the user's, told in one sentence: what was given, what is wanted, what to do.

    The command line prints it without a traceback and exits with code 2.
    """
