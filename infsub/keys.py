"""The named streams of one seed: no two draws of a run use the same key.

A run's root is `jax.random.key(seed)`, a stream of it fold_in(root, number). Inside a stream time and
datapoints are folded in as numbers, and siblings by their names: a new one leaves the others' draws
as they are. Weights and rows depend on numbers and names, so both stay for good.
"""

from __future__ import annotations

import enum
import zlib

import jax

from infsub.types import Key


@enum.unique
class Stream(enum.IntEnum):
    """What a run draws random numbers for."""

    SHUFFLE = 0  # the permutation of an epoch
    BATCH = 1  # pixels of an epoch's dynamically binarised images; a step's x ~ p(x) of the model
    NOISE = 2  # z of a step
    INIT = 3  # weights
    VALIDATION = 4  # z, and by the name "pixels" the images, of validation and test in training
    PICTURES = 5  # of reconstructions and draws, by name
    ROWS = 6  # of the bounds of a datapoint, by name
    CERTIFICATE = 7  # of a simulated datapoint and both its bounds
    IMAGES = 8  # pixels of evaluated images; x ~ p(x) that the model simulates for evaluation


def stream(root: Key, number: Stream) -> Key:
    """The key of a stream of the seed whose key `root` is."""
    return jax.random.fold_in(root, int(number))


def named(key: Key, name: str) -> Key:
    """The key of what is called `name` among the siblings under `key`: fold_in(key, crc32(name))."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
