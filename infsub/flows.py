"""Invertible steps of normalizing flows: planar, Sylvester, coupling, leapfrog; their log volumes.

A flow is z_T = f_T ∘ … ∘ f_1 (z_0), log q(z_T) = log q(z_0) − Σ log |det ∂f_t|. A step's parameters
are a dict that its `init_…` makes; each step starts at the identity, or close to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from infsub import bounds, linalg
from infsub.types import Array, Key, Params, Target

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "elu": jax.nn.elu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}
_GATE_LIMIT = 6.0
_FORCE_LIMIT = 100.0
CONTRACTION = 0.99  # no direction of a tanh flow shrinks below 1 − 0.99


class Flow(NamedTuple):
    """One invertible step; y is z [D], or a pair of arrays, and context what it is conditioned on.

    Attributes:
      forward: (params, y, context) -> (y', log |det ∂y'/∂y| []).
      inverse: (params, y', context, near) -> (y, log |det ∂y'/∂y| []), where `near` is y itself:
        the value is known, the gradient in y' is what is asked for.
    """

    forward: Callable[[Params, Any, Any], tuple[Any, Array]]
    inverse: Callable[[Params, Any, Any, Any], tuple[Any, Array]]


def push(
    flow: Flow, steps: Sequence[Params], y: Any, context: Any, sticking: bool = False
) -> tuple[Any, Any, Array | float]:
    """(y_T, y_0, Σ log |det|) of the flow's steps, from y = y_0.

    When sticking, y_0 and Σ are functions of y_T alone: the same numbers by way of the inverse,
    with no gradient in the flow's parameters.
    """
    states, log_det = [y], 0.0
    for step in steps:
        y, term = flow.forward(step, y, context)
        states.append(y)
        log_det += term
    if not sticking:
        return y, states[0], log_det
    steps, context, states = jax.lax.stop_gradient((steps, context, states))
    back, log_det = y, 0.0
    for step, near in zip(reversed(steps), reversed(states[:-1]), strict=True):
        back, term = flow.inverse(step, back, context, near)
        log_det += term
    return y, back, log_det


def soft_clip(a: Array, limit: float) -> Array:
    """`a` kept within ±limit, smooth and increasing; off by e^(|a| − limit) inside."""
    a = jnp.clip(a, -1e6, 1e6)  # beyond, the difference would be rounding
    return a - jax.nn.softplus(a - limit) + jax.nn.softplus(-a - limit)


def soft_clip_inverse(y: Array, limit: float) -> Array:
    """The a that `soft_clip` makes y of; of a y at the limit or beyond, one near it."""
    y = jnp.clip(y, -limit + 1e-3, limit - 1e-3)
    return y + jnp.log1p(-jnp.exp(-y - limit)) - jnp.log1p(-jnp.exp(y - limit))


# z' = z + A tanh(B z + b)


def _tanh_flow(matrices: Callable[[Params], tuple[Array, Array, Array, Array]]) -> Flow:
    """z' = z + A tanh(B z + b), where B A [M, M] is upper triangular and its diagonal above −1.

    Then det = Π_m (1 + tanh'_m (B A)_mm) > 0, by Sylvester's determinant identity.
    `matrices` gives A [D, M], B [M, D], b [M] and B A.
    """

    def forward(params: Params, z: Array, context: Any) -> tuple[Array, Array]:
        a, b, bias, product = matrices(params)
        hidden = jnp.tanh(b @ z + bias)
        log_det = jnp.sum(jnp.log1p((1 - hidden**2) * jnp.diag(product)))
        return z + a @ hidden, log_det

    def inverse(params: Params, z: Array, context: Any, near: Array) -> tuple[Array, Array]:
        a, b, bias, product = matrices(params)
        hidden = jnp.tanh(b @ near + bias)
        slope = 1 - hidden**2
        residual = z - (near + a @ hidden)
        # Woodbury: (I + A S B)⁻¹ = I − A (I + S B A)⁻¹ S B
        system = jnp.eye(slope.size, dtype=z.dtype) + slope[:, None] * product
        # Upper triangular; reversed, lower.
        inner = linalg.solve(system[::-1, ::-1], (slope * (b @ residual))[::-1])[::-1]
        z = near + residual - a @ inner
        return z, forward(params, z, context)[1]

    return Flow(forward, inverse)


def _planar_matrices(params: Params) -> tuple[Array, Array, Array, Array]:
    u, w, bias = params["u"], params["w"], params["b"]
    dot, norm2 = jnp.dot(w, u), jnp.dot(w, w)
    # m(a) = c·elu(a/c) > −c, and m(a) − a = O(a²): û tends to u as w tends to 0, and no 0/0 arises.
    bounded = CONTRACTION * jax.nn.elu(dot / CONTRACTION)
    u_hat = u + (bounded - dot) * w / jnp.where(norm2 > 0, norm2, 1)
    return u_hat[:, None], w[None, :], bias[None], bounded[None, None]


planar = _tanh_flow(_planar_matrices)


def init_planar(key: Key, latent_dim: int) -> Params:
    """{"u" [D], "w" [D], "b" []} of a planar step."""
    key_u, key_w = jax.random.split(key)
    return {
        # Not zero: u = w = 0 is a saddle that no gradient leaves.
        "u": 0.01 * jax.random.normal(key_u, (latent_dim,)),
        "w": jax.random.normal(key_w, (latent_dim,)) / math.sqrt(latent_dim),
        "b": jnp.zeros(()),
    }


def orthonormal(reflectors: Array, num_columns: int) -> Array:
    """The first columns of a product of Householder reflections, reflectors [R, D] -> [D, M]."""

    def reflect(columns: Array, v: Array) -> tuple[Array, None]:
        norm2 = jnp.dot(v, v)
        return columns - 2 * jnp.outer(v, v @ columns) / jnp.where(norm2 > 0, norm2, 1), None

    columns = jnp.eye(reflectors.shape[1], num_columns, dtype=reflectors.dtype)
    return jax.lax.scan(reflect, columns, reflectors, reverse=True)[0]


def _sylvester_matrices(params: Params) -> tuple[Array, Array, Array, Array]:
    q = orthonormal(params["reflectors"], params["bias"].size)
    diagonals = math.sqrt(CONTRACTION) * jnp.tanh(params["diagonals"])
    r1 = jnp.triu(params["triangles"], 1) + jnp.diag(diagonals[0])
    r2 = jnp.tril(params["triangles"], -1).T + jnp.diag(diagonals[1])
    return q @ r1, r2 @ q.T, params["bias"], r2 @ r1


sylvester = _tanh_flow(_sylvester_matrices)


def init_sylvester(key: Key, latent_dim: int, rank: int, num_reflections: int) -> Params:
    """{"reflectors" [R, D], "triangles" [M, M], "diagonals" [2, M], "bias" [M]} of a Sylvester step.

    The triangles hold R1 above the diagonal and R2ᵀ below; the diagonals are before their tanh.
    """
    key_q, key_r, key_diagonal = jax.random.split(key, 3)
    # R1 = 0 makes it the identity; R2 = 0 too would be a saddle.
    triangles = jnp.tril(jax.random.normal(key_r, (rank, rank)), -1) / math.sqrt(rank)
    diagonal = 0.5 * jax.random.normal(key_diagonal, (rank,))
    return {
        "reflectors": jax.random.normal(key_q, (num_reflections, latent_dim)),
        "triangles": triangles,
        "diagonals": jnp.stack([jnp.zeros(rank), diagonal]),
        "bias": jnp.zeros(rank),
    }


# Couplings of two variables

# (step params, the other variable, context) -> (log scale, shift)
Conditioner = Callable[[Params, Array, Any], tuple[Array, Array]]


@jax.custom_jvp
def _known_as(value: Array, known: Array) -> Array:
    """`value`, of which the number is known already: its gradient alone is computed."""
    return known


@_known_as.defjvp
def _known_as_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return primals[1], tangents[0]


def _coupling(update_first: Conditioner, update_second: Conditioner) -> Flow:
    """(a, b) -> (a', b'): b' = b ∘ s_2(a) + m_2(a), then a' = a ∘ s_1(b') + m_1(b')."""

    def forward(params: Params, y: Any, context: Any) -> tuple[Any, Array]:
        first, second = y
        log_scale_2, shift = update_second(params, first, context)
        second = second * jnp.exp(log_scale_2) + shift
        log_scale_1, shift = update_first(params, second, context)
        first = first * jnp.exp(log_scale_1) + shift
        return (first, second), jnp.sum(log_scale_1) + jnp.sum(log_scale_2)

    def inverse(params: Params, y: Any, context: Any, near: Any) -> tuple[Any, Array]:
        # From the known values the networks and forces are the forward pass's own: XLA computes them
        # once, where rounding would have them all anew.
        first, second = y
        log_scale_1, shift = update_first(params, second, context)
        first = _known_as((first - shift) * jnp.exp(-log_scale_1), near[0])
        log_scale_2, shift = update_second(params, first, context)
        second = _known_as((second - shift) * jnp.exp(-log_scale_2), near[1])
        return (first, second), jnp.sum(log_scale_1) + jnp.sum(log_scale_2)

    return Flow(forward, inverse)


def _log_gate(a: Array) -> Array:
    """log of 2 σ(a), the scale of a coupling: 1 at a = 0, between 2 σ(−6) and 2 σ(6).

    The factor 2 changes no family: it multiplies z_T, and goes into the scale of z_0.
    """
    return jax.nn.log_sigmoid(soft_clip(a, _GATE_LIMIT)) + math.log(2)


def init_net(key: Key, num_inputs: int, hidden: Sequence[int], num_outputs: int) -> list[Params]:
    """A fully connected network, Xavier-uniform but for a last layer of zeros: it starts as 0."""
    widths = [num_inputs, *hidden]
    layers = []
    for fan_in, fan_out in zip(widths[:-1], hidden, strict=True):
        key, key_w = jax.random.split(key)
        limit = math.sqrt(6 / (fan_in + fan_out))
        weight = jax.random.uniform(key_w, (fan_in, fan_out), minval=-limit, maxval=limit)
        layers.append({"w": weight, "b": jnp.zeros(fan_out)})
    last = {"w": jnp.zeros((widths[-1], num_outputs)), "b": jnp.zeros(num_outputs)}
    return [*layers, last]


def net(layers: list[Params], activation: str, *inputs: Array) -> tuple[Array, Array]:
    """The two halves of the network's output."""
    hidden = jnp.concatenate(inputs)
    for layer in layers[:-1]:
        hidden = ACTIVATIONS[activation](hidden @ layer["w"] + layer["b"])
    first, second = jnp.split(hidden @ layers[-1]["w"] + layers[-1]["b"], 2)
    return first, second


def coupling(activation: str) -> Flow:
    """(a, b) -> (a', b'): b' = b ∘ s(a, h) + m(a, h), then a' = a ∘ s(b', h) + m(b', h); h the context.

    s = 2 σ(·) and m are the outputs of networks, s about 1 where they are about 0.
    """

    def conditioner(name: str) -> Conditioner:
        def condition(params: Params, other: Array, context: Array) -> tuple[Array, Array]:
            gate, shift = net(params[name], activation, other, context)
            return _log_gate(gate), shift

        return condition

    return _coupling(conditioner("first"), conditioner("second"))


def init_coupling(
    key: Key, num_first: int, num_second: int, context_dim: int, hidden: Sequence[int]
) -> Params:
    """{"first", "second"}, the networks that update a and b."""
    key_1, key_2 = jax.random.split(key)
    return {
        "first": init_net(key_1, num_second + context_dim, hidden, 2 * num_first),
        "second": init_net(key_2, num_first + context_dim, hidden, 2 * num_second),
    }


def leapfrog(target: Target) -> Flow:
    """(z, v) -> (z', v'): v' = v ∘ s + ε ∘ w ∘ ∇_z log p(x, z), then z' = z + ε ∘ w ∘ v'.

    A kick and a drift, with friction s = 2 σ(·) [D] and step sizes ε [D] in units of the context
    w [D], the width of z; w ∘ ∇_z log p, of order 1 near the posterior, is kept within ±100. The
    volume changes by Π s, exactly.
    """
    force = jax.grad(partial(bounds.log_joint, target))

    def step_size(params: Params) -> Array:
        return jnp.exp(soft_clip(params["log_step_size"], _GATE_LIMIT))

    def kick(params: Params, z: Array, width: Array) -> tuple[Array, Array]:
        shift = step_size(params) * soft_clip(width * force(z), _FORCE_LIMIT)
        return _log_gate(params["friction"]), shift

    def drift(params: Params, v: Array, width: Array) -> tuple[Array, Array]:
        return jnp.zeros_like(v), step_size(params) * width * v

    return _coupling(drift, kick)


def init_leapfrog(latent_dim: int) -> Params:
    """{"log_step_size" [D], "friction" [D]} of a leapfrog step."""
    # A tenth of the width of z costs 0.005 nats a dimension at the start; a hundredth is so close
    # to the saddle at 0 that optimisation stops before the step has grown.
    return {
        "log_step_size": jnp.full(latent_dim, math.log(0.1)),
        "friction": jnp.zeros(latent_dim),
    }
