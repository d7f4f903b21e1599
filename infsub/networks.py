"""Encoders and decoders of ONE datapoint: fully connected, or convolutional with batch norm.

    variables = module.init(key, x, train=False)     # {"params": …, "batch_stats": … if any}
    y = module.apply(variables, x, train=False)      # running statistics, needs no batch

Batch norm normalises over the image and a vmap axis, so in training the calls are vmapped by name;
the updated statistics are the same for all of the batch and leave vmap once:

    apply = lambda x: module.apply(variables, x, train=True, mutable=["batch_stats"])
    y, updated = jax.vmap(apply, out_axes=(0, None), axis_name="batch")(xs)

The encoder's axis is "batch"; the decoder, vmapped over samples inside datapoints, takes statistics
over both "batch" and "sample". Inputs are scaled to [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from infsub import convolutions
from infsub.flows import ACTIVATIONS
from infsub.types import Array

INITS: dict[str, Callable[..., Array]] = {  # of weights; biases start at zero
    "xavier_uniform": nn.initializers.xavier_uniform(),
    "xavier_normal": nn.initializers.xavier_normal(),
    "gaussian": nn.initializers.normal(0.05),
}


def encoder(config: Any, num_outputs: int) -> nn.Module:
    """A network x [H, W, C] -> [num_outputs], called as module(x, train).

    Args:
      config: kind ("mlp" or "conv"), hidden (widths, or channels; () is linear), activation, init.
      num_outputs: what the posterior takes of each datapoint.

    Raises:
      ValueError: an unknown kind, activation or initialisation; a width that is not positive.
    """
    hidden, activation, init_name = _checked(config)
    if config.kind == "mlp":
        return MLP(hidden, (num_outputs,), activation, init_name)
    return ConvEncoder(hidden, num_outputs, activation, init_name)


def decoder(config: Any, image_shape: tuple[int, int, int], params_per_pixel: int) -> nn.Module:
    """A network z [D] -> [H, W, C·params_per_pixel], called as module(z, train).

    The last axis holds the first parameter of every channel, then the second of every channel.

    Args:
      config: as the encoder's; hidden runs from z to x: a mirrored conv decoder has (256, 128, 64).
      image_shape: (H, W, C).
      params_per_pixel: 1 (Bernoulli logits) or 2 (mean and log-scale).

    Raises:
      ValueError: as `encoder`; or an image too small for so many convolutions.
    """
    hidden, activation, init_name = _checked(config)
    height, width, channels = image_shape
    output_shape = (height, width, channels * params_per_pixel)
    if config.kind == "mlp":
        return MLP(hidden, output_shape, activation, init_name)
    conv_sizes(min(height, width), len(hidden))  # raises if too small
    return ConvDecoder(hidden, output_shape, activation, init_name)


class MLP(nn.Module):
    """Dense layers with an activation between them: any shape -> output_shape."""

    hidden: tuple[int, ...]
    output_shape: tuple[int, ...]
    activation: str = "elu"
    init_name: str = "xavier_uniform"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        h, act = jnp.ravel(x), ACTIVATIONS[self.activation]
        for width in self.hidden:
            h = act(nn.Dense(width, kernel_init=INITS[self.init_name])(h))
        y = nn.Dense(math.prod(self.output_shape), kernel_init=INITS[self.init_name])(h)
        return y.reshape(self.output_shape)


class Conv(nn.Module):
    """`convolutions.conv` and a bias: [H, W, C] -> [h, w, features]."""

    features: int
    kernel_init: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = _kernel_and_bias(self, x.shape[-1])
        return convolutions.conv(x, kernel) + bias


class ConvTranspose(nn.Module):
    """`convolutions.conv_transpose` and a bias: [h, w, C] -> [*size, features]."""

    features: int
    kernel_init: Callable[..., Array]
    size: tuple[int, int]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = _kernel_and_bias(self, x.shape[-1])
        return convolutions.conv_transpose(x, kernel, self.size) + bias


def _kernel_and_bias(module: Conv | ConvTranspose, channels: int) -> tuple[Array, Array]:
    """The parameters of a convolution, by Flax's own names and shapes."""
    shape = (convolutions.KERNEL, convolutions.KERNEL, channels, module.features)
    kernel = module.param("kernel", module.kernel_init, shape)
    return kernel, module.param("bias", nn.initializers.zeros_init(), (module.features,))


class ConvEncoder(nn.Module):
    """Convolutions (kernel 4, stride 2, no padding, batch norm, activation), then a dense layer."""

    channels: tuple[int, ...]
    num_outputs: int
    activation: str = "elu"
    init_name: str = "xavier_uniform"
    axis_name: str | tuple[str, ...] = "batch"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        h, act, init = x, ACTIVATIONS[self.activation], INITS[self.init_name]
        conv_sizes(min(x.shape[:2]), len(self.channels))  # raises if too small
        for features in self.channels:
            h = Conv(features, init)(h)
            h = act(_batch_norm(self.axis_name, train)(h))
        return nn.Dense(self.num_outputs, kernel_init=init)(jnp.ravel(h))


class ConvDecoder(nn.Module):
    """The mirror of ConvEncoder: a dense layer, then transposed convolutions back to the image.

    Where a convolution of stride 2 dropped a row, the transposed one adds it (PyTorch's
    output_padding), so that the sizes retrace the encoder's. First and last have no batch norm.
    """

    channels: tuple[int, ...]
    output_shape: tuple[int, int, int]
    activation: str = "elu"
    init_name: str = "xavier_uniform"
    axis_name: str | tuple[str, ...] = ("batch", "sample")

    @nn.compact
    def __call__(self, z: Array, train: bool = False) -> Array:
        act, init = ACTIVATIONS[self.activation], INITS[self.init_name]
        num_layers = len(self.channels)
        heights, widths = (conv_sizes(s, num_layers)[::-1] for s in self.output_shape[:2])
        start = (heights[0], widths[0], self.channels[0])
        h = act(nn.Dense(math.prod(start), kernel_init=init)(z)).reshape(start)
        features = (*self.channels[1:], self.output_shape[2])
        for i in range(num_layers):
            h = ConvTranspose(features[i], init, (heights[i + 1], widths[i + 1]))(h)
            if i < num_layers - 1:
                h = act(_batch_norm(self.axis_name, train)(h))
        return h


def conv_sizes(size: int, num_layers: int) -> list[int]:
    """An image side through convolutions of kernel 4 and stride 2: 32 -> 15 -> 6 -> 2.

    Raises:
      ValueError: the image is too small for so many.
    """
    sizes = [size]
    for _ in range(num_layers):
        if sizes[-1] < convolutions.KERNEL:
            raise ValueError(
                f"hidden has {num_layers} convolutions, too many for an image side of {size}: the "
                f"sides are {', '.join(map(str, sizes))} and a kernel is {convolutions.KERNEL} wide"
            )
        sizes.append(convolutions.conv_size(sizes[-1]))
    return sizes


def _batch_norm(axis_name: Any, train: bool) -> nn.BatchNorm:
    # Momentum and epsilon of PyTorch's defaults; two passes, for E[x²] − E[x]² cancels in float32.
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        axis_name=axis_name,
        use_fast_variance=False,
    )


def _checked(config: Any) -> tuple[tuple[int, ...], str, str]:
    for field, known in (
        ("kind", ("mlp", "conv")),
        ("activation", tuple(ACTIVATIONS)),
        ("init", tuple(INITS)),
    ):
        if config[field] not in known:
            raise ValueError(f"{field} must be one of {', '.join(known)}; got {config[field]!r}")
    hidden = tuple(config.hidden)
    if not all(isinstance(width, int) and width > 0 for width in hidden):
        raise ValueError(f"hidden must be positive integers; got {hidden!r}")
    if config.kind == "conv" and not hidden:
        raise ValueError("hidden must name the channels of at least one convolution; got ()")
    return hidden, config.activation, config.init
