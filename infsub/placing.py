"""Flows made to be a Gaussian of full covariance, or nearly: where local optimisation starts them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from infsub import flows, linalg
from infsub.types import Array, Gaussian, Matrix, Params, Vector


def correlate(
    precision: Matrix,
    product: Callable[[Any], Matrix],
    maps: Any,
    learning_rate: float,
    num_steps: int,
) -> tuple[Any, Vector]:
    """`maps` whose linear flow T = product(maps) makes N(0, precision⁻¹) of independent noise.

    With the best scale of the noise, (TᵀPT)_ii^(−1/2), the flow is ½ Σ log (TᵀPT)_ii − ½ log det P
    nats away in KL, and there where TᵀPT is diagonal. Adam finds such a T from the `maps` given, in
    a hundredth of the time that gradients of a decoder take to find it.

    Args:
      precision: P [D, D].
      product: maps -> T [D, D], of determinant 1.
      maps: any pytree; none that is left as it is by all gradients.
      learning_rate: of Adam's first step; it falls as a cosine.
      num_steps: of Adam.

    Returns:
      (maps, scale [D]).
    """
    adam = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def diagonal(maps: Any) -> Vector:
        t = product(maps)
        return jnp.sum(t * (precision @ t), axis=0)

    def descend(_: Array, carry: Any) -> Any:
        maps, moments = carry
        gradient = jax.grad(lambda maps: jnp.sum(jnp.log(diagonal(maps))) / 2)(maps)
        updates, moments = adam.update(gradient, moments)
        return optax.apply_updates(maps, updates), moments

    maps, _ = jax.lax.fori_loop(0, num_steps, descend, (maps, adam.init(maps)))
    return maps, 1 / jnp.sqrt(diagonal(maps))


NUM_SHEARS = 2  # couplings that make any covariance; one alone leaves a's own as it is


def shears(precision: Matrix, num_first: int) -> tuple[list[tuple[Array, Array]], Vector]:
    """Linear couplings that `correlate`, of diagonal 1: b' = b + M a, then a' = a + N b'.

    Returns:
      ([(M [D − A, A], N [A, D − A]) of each of NUM_SHEARS couplings], scale [D]), A the size of a.
    """

    def product(maps: Any) -> Matrix:
        t = jnp.eye(len(precision), dtype=precision.dtype)
        for m, n in maps:
            t = t.at[num_first:].add(m @ t[:num_first])
            t = t.at[:num_first].add(n @ t[num_first:])
        return t

    # Not 0, where a coupling and the next would do the same.
    shape = NUM_SHEARS, 2, len(precision) - num_first, num_first
    noise = 0.1 * jax.random.normal(jax.random.key(0), shape, precision.dtype)
    return correlate(precision, product, [(m, n.T) for m, n in noise], 0.05, 200)


# Of a unit's input at one standard deviation, so that the unit is bent by a few per cent: of a straighter
# one, in whose place R1 is larger, no gradient finds the bend of a posterior again.
_NEARLY_STRAIGHT = 0.3


def correlated_sylvester(steps: list[Params], q: Gaussian) -> tuple[list[Params], Vector]:
    """Sylvester steps that `correlate` nearly to q's precision, and the scale [D] of their noise.

    Where R2 is small and R1 large a step is nearly straight: z' = z + Q N Qᵀ (z − mean), N upper
    triangular, is R1 R2 and the mean slope of tanh.
    """
    inverse = linalg.inverse(q.scale)
    maps = [{name: step[name] for name in ("reflectors", "triangles")} for step in steps]

    def shear(a: Params, t: Matrix) -> tuple[Array, Matrix]:
        basis = flows.orthonormal(a["reflectors"], len(a["triangles"]))
        return basis, t + basis @ (jnp.tril(a["triangles"], -1).T @ (basis.T @ t))

    def product(maps: Any) -> Matrix:
        t = jnp.eye(q.mean.size, dtype=q.scale.dtype)
        for a in maps:
            t = shear(a, t)[1]
        return t

    maps, scale = correlate(inverse.T @ inverse, product, maps, 0.1, 800)
    factor, new = jnp.diag(scale), []
    for a in maps:
        basis, sheared = shear(a, factor)
        spread = jnp.sqrt(jnp.sum((basis.T @ factor) ** 2, axis=1))
        # R2 = diag(small) scales what the units see to `_NEARLY_STRAIGHT`, R1 scales it back.
        small = jnp.minimum(_NEARLY_STRAIGHT / spread, 0.9)
        variance = (small * spread) ** 2  # of a unit's input
        slope = 1 - variance + 2 * variance**2  # E tanh' to second order
        r1 = jnp.tril(a["triangles"], -1).T / (small * slope)
        diagonals = jnp.stack(
            [jnp.zeros_like(small), jnp.arctanh(small / math.sqrt(flows.CONTRACTION))]
        )
        bias = -small * (basis.T @ q.mean)
        new.append(a | {"triangles": r1, "diagonals": diagonals, "bias": bias})
        factor = sheared
    return new, scale


# Where an activation is a straight line, and the width in which it is one: exact to float32 for elu
# and relu within 6 of the middle, to 0.1 % within 1 for the others.
_STRAIGHT = {"elu": (6.0, 1.0), "relu": (6.0, 1.0), "sigmoid": (0.0, 0.1), "tanh": (0.0, 0.05)}


def linear_net(
    layers: list[Params], activation: str, weight: Array, bias: Array, out: Array, shift: Array
) -> list[Params]:
    """`layers` made to compute out @ (weight @ x + bias) + shift, by one hidden unit a row of weight.

    The other hidden units stay as they are, with outputs of weight 0. The rows, of order 1, must not
    outnumber the units of a layer. weight [R, inputs], bias [R], out [outputs, R], shift [outputs].
    """
    num_rows = bias.size
    middle, width = _STRAIGHT[activation]
    value, slope = jax.value_and_grad(flows.ACTIVATIONS[activation])(middle)
    new = []
    # What a row's unit passes on is offset + size · (weight @ x + bias).
    offset, size = 0.0, 1.0
    for layer in layers[:-1]:
        if new:
            weight, bias = jnp.eye(num_rows, layer["w"].shape[0]), jnp.zeros(num_rows)
        gain = width / size
        w = layer["w"].at[:, :num_rows].set(gain * weight.T)
        b = layer["b"].at[:num_rows].set(middle + gain * (bias - offset))
        new.append({"w": w, "b": b})
        offset, size = value, slope * width
    last = layers[-1]["w"]
    w = jnp.zeros_like(last).at[:num_rows].set(out.T / size)
    return [*new, {"w": w, "b": shift - jnp.sum(out, axis=1) * offset / size}]
