from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ml_collections import ConfigDict

from infsub import networks

KEY = jax.random.key(0)


def config(kind="mlp", hidden=(8,), activation="elu", init="xavier_uniform"):
    return ConfigDict({"kind": kind, "hidden": hidden, "activation": activation, "init": init})


def initialised(net, x):
    return jax.jit(lambda: net.init(KEY, x, train=False))()


def num_params(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("hidden", [(), (5,), (7, 5), [200, 200]])
def test_fully_connected_shapes_and_parameter_counts(hidden):
    x = jnp.ones((28, 28, 1))
    net = networks.encoder(config(hidden=hidden), 6)
    variables = jax.eval_shape(lambda: net.init(KEY, x, train=False))
    widths = (784, *hidden, 6)
    assert num_params(variables) == sum((a + 1) * b for a, b in pairwise(widths))
    assert jax.eval_shape(lambda v: net.apply(v, x, train=True), variables).shape == (6,)
    decode = networks.decoder(config(hidden=hidden), (28, 28, 3), 2)
    pixels, _ = jax.eval_shape(lambda z: decode.init_with_output(KEY, z, train=False), jnp.ones(4))
    assert pixels.shape == (28, 28, 6)


def test_no_hidden_layer_is_an_affine_map():
    net = networks.encoder(config(hidden=()), 3)
    x, y = np.random.default_rng(0).normal(size=(2, 28, 28, 1)).astype(np.float32)
    variables = initialised(net, x)
    f = jax.jit(jax.vmap(lambda x: net.apply(variables, x, train=False)))
    both, nothing, one, other = f(np.stack([x + y, np.zeros_like(x), x, y]))
    np.testing.assert_allclose(both + nothing, one + other, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("elu", lambda h: np.where(h > 0, h, np.expm1(h))),
        ("relu", lambda h: np.maximum(h, 0)),
        ("tanh", np.tanh),
        ("sigmoid", lambda h: 1 / (1 + np.exp(-h))),
    ],
)
def test_an_mlp_is_dense_activation_dense(activation, function):
    net = networks.encoder(config(hidden=(5,), activation=activation), 3)
    x = np.random.default_rng(0).normal(size=(2, 2, 1)).astype(np.float32)
    y, variables = jax.device_get(jax.jit(lambda x: net.init_with_output(KEY, x, train=False))(x))
    first, last = (variables["params"][f"Dense_{i}"] for i in range(2))
    h = function(np.ravel(x) @ first["kernel"] + first["bias"])
    np.testing.assert_allclose(y, h @ last["kernel"] + last["bias"], atol=1e-5)


@pytest.mark.parametrize(("side", "channels", "features"), [(28, 1, 256), (32, 3, 1024)])
def test_conv_shapes_are_the_authors_for_28_and_32_pixels(side, channels, features):
    x = jnp.ones((side, side, channels))
    net = networks.encoder(config("conv", (64, 128, 256)), 100)
    variables = jax.eval_shape(lambda: net.init(KEY, x, train=False))
    params = variables["params"]
    assert params["Conv_0"]["kernel"].shape == (4, 4, channels, 64)
    assert params["Conv_2"]["kernel"].shape == (4, 4, 128, 256)
    assert params["Dense_0"]["kernel"].shape == (features, 100)
    assert variables["batch_stats"]["BatchNorm_2"]["mean"].shape == (256,)
    decode = networks.decoder(config("conv", (256, 128, 64)), (side, side, channels), 2)
    variables = jax.eval_shape(lambda: decode.init(KEY, jnp.ones(50), train=False))
    params = variables["params"]
    assert params["Dense_0"]["kernel"].shape == (50, features)
    assert params["ConvTranspose_1"]["kernel"].shape == (4, 4, 128, 64)
    assert set(variables["batch_stats"]) == {"BatchNorm_0", "BatchNorm_1"}
    y = jax.eval_shape(lambda v: decode.apply(v, jnp.ones(50), train=False), variables)
    assert y.shape == (side, side, 2 * channels)


def test_the_wide_encoder_takes_any_channels():
    net = networks.encoder(config("conv", (128, 256, 512)), 100)
    params = jax.eval_shape(lambda: net.init(KEY, jnp.ones((32, 32, 3)), train=False))["params"]
    assert params["Dense_0"]["kernel"].shape == (2048, 100)


def test_a_transposed_convolution_is_the_convolutions_transpose_with_the_dropped_row_at_the_end():
    # PyTorch's definition: ConvTranspose2d is the gradient of Conv2d.
    net = networks.ConvDecoder((2,), (15, 14, 3))  # 15 -> 6 drops a row, 14 -> 6 drops none
    z = np.random.default_rng(0).normal(size=4).astype(np.float32)

    @jax.jit
    def both(z):
        y, variables = net.init_with_output(KEY, z)
        params = variables["params"]
        h = jax.nn.elu(z @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
        # lax.conv_transpose does not flip its kernel, and the gradient of a convolution does
        kernel = jnp.flip(params["ConvTranspose_0"]["kernel"], (0, 1)).transpose(0, 1, 3, 2)

        def conv(x):
            return lax.conv_general_dilated(
                x[None], kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )[0]

        _, transpose = jax.vjp(conv, jnp.zeros((15, 14, 3)))
        return y, transpose(h.reshape(6, 6, 2))[0]

    y, expected = both(z)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def normalised(h, axes):
    mean, var = h.mean(axes), h.var(axes)
    return (h - mean) / np.sqrt(var + 1e-5), mean, var


def test_batch_statistics_are_those_of_the_batch_in_training_and_the_running_ones_in_evaluation():
    net = networks.ConvEncoder((3,), 2)
    xs = (2 + 3 * np.random.default_rng(0).normal(size=(7, 10, 10, 1))).astype(np.float32)
    variables = initialised(net, xs[0])
    params = jax.device_get(variables["params"])

    def head(h):
        y = np.where(h > 0, h, np.expm1(h)).reshape(len(h), -1) @ params["Dense_0"]["kernel"]
        return y + params["Dense_0"]["bias"]

    layout = ("NHWC", "HWIO", "NHWC")
    kernel = params["Conv_0"]["kernel"]
    convolved = np.asarray(
        lax.conv_general_dilated(xs, kernel, (2, 2), "VALID", dimension_numbers=layout)
    )

    def apply(x):
        return net.apply(variables, x, train=True, mutable=["batch_stats"])

    y, updated = jax.jit(jax.vmap(apply, out_axes=(0, None), axis_name="batch"))(xs)
    h, mean, var = normalised(convolved, (0, 1, 2))
    np.testing.assert_allclose(y, head(h), atol=1e-4)
    stats = updated["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-4)

    evaluate = jax.jit(jax.vmap(lambda x: net.apply(variables | updated, x, train=False)))
    evaluated = np.asarray(evaluate(xs))
    expected = head((convolved - stats["mean"]) / np.sqrt(stats["var"] + 1e-5))
    np.testing.assert_allclose(evaluated, expected, atol=1e-4)
    assert np.abs(evaluated - y).max() > 0.1
    others = np.concatenate([xs[:1], np.zeros_like(xs[1:])])
    np.testing.assert_allclose(evaluated[0], evaluate(others)[0], atol=1e-5)


def test_a_decoders_statistics_are_over_datapoints_and_samples():
    net = networks.ConvDecoder((3, 2), (10, 10, 1))
    zs = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    variables = initialised(net, zs[0, 0])

    def apply(z):
        return net.apply(variables, z, train=True, mutable=["batch_stats"])

    @jax.jit
    def run(zs):
        over_samples = jax.vmap(apply, out_axes=(0, None), axis_name="sample")
        return jax.vmap(over_samples, out_axes=(0, None), axis_name="batch")(zs)

    y, updated = run(zs)
    flat, same = run(zs.reshape(20, 1, 3))
    np.testing.assert_allclose(y.reshape(20, 10, 10, 1), flat[:, 0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), updated, same)


def test_a_decoder_in_evaluation_is_its_layers_with_the_running_statistics():
    net, rng = networks.ConvDecoder((3, 2), (10, 10, 1)), np.random.default_rng(0)
    z = rng.normal(size=4).astype(np.float32)
    shapes = jax.eval_shape(lambda: net.init(KEY, z))
    variables = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
    params, stats = variables["params"], variables["batch_stats"]["BatchNorm_0"]
    stats["var"] = 1 + stats["var"] ** 2

    @jax.jit
    def both(z):
        def deconvolved(h, layer):
            layer, layout = params[layer], ("NHWC", "HWIO", "NHWC")
            y = lax.conv_transpose(h, layer["kernel"], (2, 2), "VALID", dimension_numbers=layout)
            return y + layer["bias"]

        dense, scaling = params["Dense_0"], params["BatchNorm_0"]
        h = jax.nn.elu(z @ dense["kernel"] + dense["bias"]).reshape(1, 1, 1, 3)
        h = (deconvolved(h, "ConvTranspose_0") - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
        h = jax.nn.elu(h * scaling["scale"] + scaling["bias"])
        return net.apply(variables, z, train=False), deconvolved(h, "ConvTranspose_1")[0]

    y, expected = both(z)
    np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("init", "std"),
    [("xavier_uniform", None), ("xavier_normal", None), ("gaussian", 0.05)],
)
def test_initialisations(init, std):
    net = networks.encoder(config(hidden=(200,), init=init), 100)
    params = initialised(net, jnp.ones((20, 20, 1)))["params"]["Dense_0"]
    kernel = np.asarray(params["kernel"])
    std = std or np.sqrt(2 / (400 + 200))
    assert abs(kernel.std() / std - 1) < 0.02
    assert (params["bias"] == 0).all()
    if init == "xavier_uniform":
        assert np.abs(kernel).max() <= np.sqrt(3) * std
    else:
        assert np.abs(kernel).max() > 2 * std


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "cnn"}, "kind must be one of mlp, conv; got 'cnn'"),
        ({"activation": "gelu"}, "one of elu, relu, tanh, sigmoid; got 'gelu'"),
        ({"init": "he"}, "one of xavier_uniform, xavier_normal, gaussian; got 'he'"),
        ({"hidden": (200, 0)}, "positive integers"),
        ({"kind": "conv", "hidden": ()}, "at least one convolution"),
        ({"kind": "conv", "hidden": (4, 4, 4, 4)}, "4 convolutions, too many .* 28, 13, 5, 1"),
    ],
)
def test_a_wrong_field_lists_what_is_known(fields, words):
    with pytest.raises(ValueError, match=words):
        networks.decoder(config(**fields), (28, 28, 1), 1)


def test_modules_are_hashable_and_equal_when_their_fields_are():
    a, b = (networks.encoder(config("conv", (4, 8)), 3) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
