"""Convolutions as matrix products beside XLA's own, in the CIFAR-10 decoder of the paper's width.

Inside a loop, as training steps and leapfrog steps are: gradients in the weights and in z.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import compiled, matmul_peak, record, seconds, show

from infsub import convolutions, networks

ROWS, LATENT, CHANNELS, IMAGE, STEPS = 64, 50, (256, 128, 64), (32, 32, 3), 4


def xla(x: Any, kernel: Any, size: tuple[int, int]) -> Any:
    """`convolutions.conv_transpose` by XLA's."""
    padding = [
        (3, 3 + wanted - (2 * given + 2)) for wanted, given in zip(size, x.shape, strict=False)
    ]
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_transpose(x[None], kernel, (2, 2), padding, dimension_numbers=layout)[0]


def steps(conv_transpose: Any, module: Any, in_weights: bool) -> Any:
    """STEPS steps downhill on ‖decoder(z)‖², in the weights or in z: jitted, (variables, zs)."""

    def loss(variables: Any, zs: Any) -> Any:
        return jnp.mean(jax.vmap(functools.partial(module.apply, variables))(zs) ** 2)

    def run(variables: Any, zs: Any) -> Any:
        def step(_: int, moving: Any) -> Any:
            value = (
                functools.partial(loss, zs=zs) if in_weights else functools.partial(loss, variables)
            )
            return jax.tree.map(lambda a, g: a - 1e-3 * g, moving, jax.grad(value)(moving))

        return lax.fori_loop(0, STEPS, step, variables if in_weights else zs)

    def traced(*arguments: Any) -> Any:
        with mock.patch.object(convolutions, "conv_transpose", conv_transpose):
            return run(*arguments)

    return jax.jit(traced)


def main() -> None:
    """Prints milliseconds a step of each, and our share of the matmul peak."""
    module = networks.ConvDecoder(CHANNELS, IMAGE)
    zs = jax.random.normal(jax.random.key(0), (ROWS, LATENT))
    variables = jax.jit(module.init)(jax.random.key(1), zs[0])
    sides = networks.conv_sizes(IMAGE[0], len(CHANNELS))[::-1]
    features = (*CHANNELS, IMAGE[2])
    products = [16 * s**2 * features[i] * features[i + 1] for i, s in enumerate(sides[:-1])]
    forward = 2 * ROWS * (sum(products) + LATENT * sides[0] ** 2 * CHANNELS[0])
    peak = matmul_peak()
    for name, in_weights, passes in (("weights", True, 3), ("z", False, 2)):
        runs = {
            "infsub": steps(convolutions.conv_transpose, module, in_weights),
            "XLA's convolutions": steps(xla, module, in_weights),
        }
        cost = compiled(runs["infsub"], variables, zs)
        bound = {label: functools.partial(run, variables, zs) for label, run in runs.items()}
        a, b = (np.asarray(jax.tree.leaves(run())[0]) for run in bound.values())
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
        times = seconds(bound, repeats=3)
        title = f"gradient in {name}, {ROWS} rows, {STEPS} steps on {jax.default_backend()}"
        show(title, times, "infsub")
        step = {label: median / STEPS for label, (median, _, _) in times.items()}
        peer = "XLA's convolutions"
        flop = passes * forward
        title = f"CIFAR decoder, gradient in {name}"
        record(title, step["infsub"], peer, step[peer], flop=flop, peak=peak, **cost)


if __name__ == "__main__":
    main()
