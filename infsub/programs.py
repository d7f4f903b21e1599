"""A function and its arguments as what a program is compiled for, and what it computes with.

jax knows a function again by its identity alone, and takes arrays alone as arguments. Here equal
partials are the same program, and modules travel as their arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


class _Static:
    """A value that a program is compiled for; one without a hash is equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value
        try:
            self._hash, self._hashable = hash(value), True
        except TypeError:
            self._hash, self._hashable = id(value), False

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or (self._hashable and bool(self.value == other.value))


def _travels(path: Any, leaf: Any) -> bool:
    """Whether a leaf is an argument of the compiled program, which is compiled for all others.

    Numbers are, that are arguments themselves or have a fraction. Inside a module whole numbers and
    truth values decide what it computes (Equinox's `inference`, sizes).
    """
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind not in "OSU"
    itself = len(path) == 2 and isinstance(leaf, int)
    return itself or isinstance(leaf, jax.Array | np.generic | float | complex)


def _unbound(function: Callable[..., Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A function without what partials have bound to it, and that: equal partials are the same."""
    args, keywords = (), {}
    while isinstance(function, functools.partial):
        args, keywords = (*function.args, *args), function.keywords | keywords
        function = function.func
    return function, args, keywords


class Program:
    """function(key, x, *args) as its arrays, and all else, of which an equal one compiles once."""

    def __init__(self, function: Callable[..., Any], args: Any, static: Mapping[str, Any]) -> None:
        function, bound, keywords = _unbound(function)
        tree = ([function], bound, keywords, args)
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        travelling = [_travels(*leaf) for leaf in leaves]
        self.arrays = [leaf for (_, leaf), go in zip(leaves, travelling, strict=True) if go]
        rest = [None if go else _Static(x) for (_, x), go in zip(leaves, travelling, strict=True)]
        self.code = (tuple(rest), structure, tuple(static.items()))


def call(code: Any, arrays: list[Any], *first: Any) -> Any:
    """The program's function of (key, x), or whatever comes first."""
    rest, structure, static = code
    travelling = iter(arrays)
    leaves = [next(travelling) if value is None else value.value for value in rest]
    (function,), bound, keywords, args = jax.tree.unflatten(structure, leaves)
    return function(*bound, *first, *args, **keywords, **dict(static))
